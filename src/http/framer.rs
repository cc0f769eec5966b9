//! Where a client's HTTP/1 messages begin and end, judged strictly on the bytes as they came.
//!
//! What two parsers could read differently goes no further than this: two lengths, odd chunking, two hosts, bare line
//! feeds, folded lines, control characters. The parser behind repairs some of these, and a repaired message no longer shows
//! what a backend might have made of it. The framer also finds the border between messages, so that bytes of a next
//! request are never taken for part of this one. Pure: no I/O, no clock. The rules are those of RFC 9112, without its allowances.

/// Most bytes of a request's head, and of its trailers.
pub const MAX_HEAD: usize = 64 * 1024;
/// Most header lines of a request.
pub const MAX_FIELDS: usize = 128;
/// Most bytes of a chunk's size line, its extensions included.
const MAX_CHUNK_LINE: u32 = 256;
/// Most bytes of trailers.
const MAX_TRAILERS: u32 = 16 * 1024;

/// Why a request is refused: the status it gets, and a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// 400, 405, 431, 501 or 505.
    pub status: u16,
    /// What is wrong, for the client and the log.
    pub reason: &'static str,
}

const fn bad(reason: &'static str) -> Refusal {
    Refusal { status: 400, reason }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    Length(u64),
    Chunked(Chunk),
    Done,
    Raw,
}

/// A place in a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    /// In the size; digits so far, value, and bytes of the line.
    Size {
        digits: u32,
        value: u64,
        line: u32,
    },
    /// In an extension of the size line.
    Extension {
        value: u64,
        line: u32,
    },
    /// After the CR of the size line.
    SizeEnd(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// At the beginning of a trailer line; bytes of trailers so far.
    Trailer(u32),
    TrailerName {
        bytes: u32,
        any: bool,
    },
    TrailerValue(u32),
    TrailerLf(u32),
    LastLf,
}

/// Follows the messages of one connection.
#[derive(Debug)]
pub struct Framer {
    state: State,
    /// Where the last line of an unfinished head begins: what lies before has been looked at.
    looked: usize,
}

impl Default for Framer {
    fn default() -> Self {
        Framer { state: State::Head, looked: 0 }
    }
}

impl Framer {
    /// A follower of something that is not HTTP/1: nothing is judged.
    pub fn raw() -> Framer {
        Framer { state: State::Raw, looked: 0 }
    }

    /// Whether the head of a request is awaited.
    pub fn in_head(&self) -> bool {
        self.state == State::Head
    }

    /// Whether the present request has come whole.
    pub fn done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether nothing is judged.
    pub fn is_raw(&self) -> bool {
        self.state == State::Raw
    }

    /// The next request may begin, if the present one has come whole.
    pub fn next(&mut self) {
        if self.state == State::Done {
            self.state = State::Head;
        }
    }

    /// The connection changes its protocol.
    pub fn upgrade(&mut self) {
        self.state = State::Raw;
    }

    /// Judges the head that `bytes` begin with. Its length, once it is whole.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn head(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refusal> {
        let Some(end) = end_of_head(bytes, &mut self.looked)? else {
            if bytes.len() >= MAX_HEAD {
                return Err(Refusal { status: 431, reason: "the header is longer than 64 KiB" });
            }
            return Ok(None);
        };
        if end > MAX_HEAD {
            return Err(Refusal { status: 431, reason: "the header is longer than 64 KiB" });
        }
        self.looked = 0;
        self.state = match judge(&bytes[..end])? {
            Body::None => State::Done,
            Body::Length(0) => State::Done,
            Body::Length(length) => State::Length(length),
            Body::Chunked => State::Chunked(Chunk::Size { digits: 0, value: 0, line: 0 }),
        };
        Ok(Some(end))
    }

    /// How many of `bytes` belong to the body of the present request.
    ///
    /// # Errors
    /// [`Refusal`], for chunks that are not quite chunks.
    pub fn body(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        match &mut self.state {
            State::Head | State::Done => Ok(0),
            State::Raw => Ok(bytes.len()),
            State::Length(left) => {
                let taken = (bytes.len() as u64).min(*left);
                *left -= taken;
                if *left == 0 {
                    self.state = State::Done;
                }
                Ok(taken as usize)
            }
            State::Chunked(chunk) => {
                let mut at = 0;
                while at < bytes.len() {
                    match advance(*chunk, &bytes[at..])? {
                        (taken, Some(next)) => {
                            *chunk = next;
                            at += taken;
                        }
                        (taken, None) => {
                            self.state = State::Done;
                            return Ok(at + taken);
                        }
                    }
                }
                Ok(at)
            }
        }
    }
}

/// One step through a chunked body: bytes taken, and the next place; `None` after the last byte.
fn advance(chunk: Chunk, bytes: &[u8]) -> Result<(usize, Option<Chunk>), Refusal> {
    let byte = bytes[0];
    let next = match chunk {
        Chunk::Size { digits, value, line } => {
            if line >= MAX_CHUNK_LINE {
                return Err(bad("the line of a chunk's size is too long"));
            }
            match (byte as char).to_digit(16) {
                Some(_) if digits >= 15 => return Err(bad("a chunk's size has too many digits")),
                Some(digit) => Chunk::Size { digits: digits + 1, value: value << 4 | u64::from(digit), line: line + 1 },
                None if digits == 0 => return Err(bad("a chunk's size is not a hexadecimal number")),
                None if byte == b'\r' => Chunk::SizeEnd(value),
                None if byte == b';' => Chunk::Extension { value, line: line + 1 },
                None => return Err(bad("a chunk's size is not a hexadecimal number")),
            }
        }
        Chunk::Extension { value, line } => match byte {
            b'\r' => Chunk::SizeEnd(value),
            _ if line >= MAX_CHUNK_LINE => return Err(bad("the line of a chunk's size is too long")),
            b'\t' | b' '..=b'~' => Chunk::Extension { value, line: line + 1 },
            _ => return Err(bad("a chunk's extension holds a control character")),
        },
        Chunk::SizeEnd(_) if byte != b'\n' => return Err(bad("a chunk's size does not end in CR LF")),
        Chunk::SizeEnd(0) => Chunk::Trailer(0),
        Chunk::SizeEnd(value) => Chunk::Data(value),
        Chunk::Data(left) => {
            let taken = (bytes.len() as u64).min(left);
            let next = if taken == left { Chunk::DataCr } else { Chunk::Data(left - taken) };
            return Ok((taken as usize, Some(next)));
        }
        Chunk::DataCr if byte == b'\r' => Chunk::DataLf,
        Chunk::DataLf if byte == b'\n' => Chunk::Size { digits: 0, value: 0, line: 0 },
        Chunk::DataCr | Chunk::DataLf => return Err(bad("a chunk does not end where its size says")),
        Chunk::Trailer(_) if byte == b'\r' => Chunk::LastLf,
        Chunk::Trailer(bytes) if is_token(byte) => Chunk::TrailerName { bytes: bytes + 1, any: true },
        Chunk::Trailer(_) => return Err(bad("a trailer's name is not a token")),
        Chunk::TrailerName { bytes, .. } | Chunk::TrailerValue(bytes) if bytes >= MAX_TRAILERS => {
            return Err(Refusal { status: 431, reason: "the trailers are longer than 16 KiB" });
        }
        Chunk::TrailerName { bytes, any: true } if byte == b':' => Chunk::TrailerValue(bytes + 1),
        Chunk::TrailerName { bytes, any } if is_token(byte) => Chunk::TrailerName { bytes: bytes + 1, any },
        Chunk::TrailerName { .. } => return Err(bad("a trailer's name is not a token")),
        Chunk::TrailerValue(bytes) if byte == b'\r' => Chunk::TrailerLf(bytes + 1),
        Chunk::TrailerValue(bytes) if is_text(byte) => Chunk::TrailerValue(bytes + 1),
        Chunk::TrailerValue(_) => return Err(bad("a trailer holds a control character")),
        Chunk::TrailerLf(bytes) if byte == b'\n' => Chunk::Trailer(bytes + 1),
        Chunk::LastLf if byte == b'\n' => return Ok((1, None)),
        Chunk::TrailerLf(_) | Chunk::LastLf => return Err(bad("a trailer does not end in CR LF")),
    };
    Ok((1, Some(next)))
}

/// Length of a whole head, the empty line after it included. One empty line may come before (RFC 9112, 2.2). `looked` is
/// where the look begins, and where the next has to.
fn end_of_head(bytes: &[u8], looked: &mut usize) -> Result<Option<usize>, Refusal> {
    while let Some(feed) = bytes[*looked..].iter().position(|byte| *byte == b'\n') {
        let line = &bytes[*looked..*looked + feed];
        if line.last() != Some(&b'\r') {
            // A line feed without its carriage return would make two parsers see two ends.
            return Err(bad("a line does not end in CR LF"));
        }
        let first = *looked == 0;
        *looked += feed + 1;
        if line.len() == 1 && !first {
            return Ok(Some(*looked));
        }
    }
    Ok(None)
}

/// How long the body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    None,
    Length(u64),
    Chunked,
}

/// Judges a whole head.
fn judge(head: &[u8]) -> Result<Body, Refusal> {
    let head = head.strip_prefix(b"\r\n").unwrap_or(head);
    // The last two lines are the empty line, and what `split` finds behind it.
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r"));
    let line = lines.next().flatten().ok_or(bad("the request line does not end in CR LF"))?;
    let request = request_line(line)?;
    let (mut host, mut length, mut chunked, mut fields) = (None, None, false, 0);
    for line in lines {
        // Behind the last line feed there is nothing, and nothing has no carriage return.
        let Some(line) = line.filter(|line| !line.is_empty()) else { continue };
        fields += 1;
        if fields > MAX_FIELDS {
            return Err(Refusal { status: 431, reason: "the header has more than 128 lines" });
        }
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case(b"host") {
            if host.replace(value).is_some() {
                return Err(bad("there is more than one Host"));
            }
        } else if name.eq_ignore_ascii_case(b"content-length") {
            let number = number(value).ok_or(bad("the Content-Length is not a number"))?;
            if length.replace(number).is_some() {
                return Err(bad("there is more than one Content-Length"));
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            // Whatever else it is, its end is not certain (RFC 9112, 6.3).
            if !value.eq_ignore_ascii_case(b"chunked") || chunked {
                return Err(bad("the Transfer-Encoding is not chunked, once"));
            }
            chunked = true;
        }
    }
    match host {
        None if request.version_1_1 => return Err(bad("there is no Host")),
        None => {}
        Some(host) if !is_authority(host) => return Err(bad("the Host is no host name")),
        Some(host) if request.authority.is_some_and(|authority| authority != host) => {
            return Err(bad("the request line and the Host name two hosts"));
        }
        Some(_) => {}
    }
    match (length, chunked) {
        (Some(_), true) => Err(bad("there are a Content-Length and a Transfer-Encoding")),
        (None, true) if !request.version_1_1 => Err(bad("HTTP/1.0 has no Transfer-Encoding")),
        (None, true) => Ok(Body::Chunked),
        (Some(length), false) => Ok(Body::Length(length)),
        (None, false) => Ok(Body::None),
    }
}

struct RequestLine<'a> {
    version_1_1: bool,
    /// Of an absolute target.
    authority: Option<&'a [u8]>,
}

/// Whether a request's target holds nothing but what a URI may have, and what browsers put there all the same: `|`, and in a
/// query braces, `^`, the backquote and the backslash (WHATWG URL, the query percent-encode set).
pub fn is_target(target: &[u8]) -> bool {
    let query = target.iter().position(|byte| *byte == b'?').unwrap_or(target.len());
    let visible = |byte: &u8| matches!(byte, b'!'..=b'~') && !b"\"<>#".contains(byte);
    target.iter().all(visible) && !target[..query].iter().any(|byte| b"\\^`{}".contains(byte))
}

fn request_line(line: &[u8]) -> Result<RequestLine<'_>, Refusal> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(bad("the request line is not METHOD TARGET VERSION with one space between each"));
    };
    if method.is_empty() || !method.iter().all(|byte| is_token(*byte)) || method.len() > 32 {
        return Err(bad("the method is not a token"));
    }
    if matches!(method, b"CONNECT" | b"TRACE") {
        return Err(Refusal { status: 405, reason: "the methods CONNECT and TRACE are not served" });
    }
    let version_1_1 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        version if version.starts_with(b"HTTP/") => {
            return Err(Refusal { status: 505, reason: "the version is not HTTP/1.0 or HTTP/1.1" });
        }
        _ => return Err(bad("the request line does not end in a version")),
    };
    if !is_target(target) {
        return Err(bad("the request target holds a character that a URI does not have"));
    }
    if target.starts_with(b"/") || target == b"*" && method == b"OPTIONS" {
        return Ok(RequestLine { version_1_1, authority: None });
    }
    let rest = [&b"http://"[..], b"https://"]
        .into_iter()
        .find(|scheme| target.len() > scheme.len() && target[..scheme.len()].eq_ignore_ascii_case(scheme))
        .map(|scheme| &target[scheme.len()..])
        .ok_or(bad("the request target is neither a path nor an http URI"))?;
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
    let authority = &rest[..end];
    if authority.is_empty() || !is_authority(authority) {
        return Err(bad("the request target names no host"));
    }
    Ok(RequestLine { version_1_1, authority: Some(authority) })
}

fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    if matches!(line[0], b' ' | b'\t') {
        return Err(bad("a header line is folded"));
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or(bad("a header line has no colon"))?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
        return Err(bad("a header's name is not a token"));
    }
    if !value.iter().all(|byte| is_text(*byte)) {
        return Err(bad("a header's value holds a control character"));
    }
    Ok((name, value.trim_ascii()))
}

/// Digits and nothing else, at most eighteen.
fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 18 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(text.iter().fold(0, |value, digit| value * 10 + u64::from(digit - b'0')))
}

/// Whether the name of a header may hold this (RFC 9110, 5.6.2).
pub fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What may stand in a header's value: anything but control characters.
fn is_text(byte: u8) -> bool {
    byte == b'\t' || byte >= b' ' && byte != 0x7f
}

/// A host name, an address, or an address in brackets, and perhaps a port. An empty one is legal where nothing is named.
pub fn is_authority(text: &[u8]) -> bool {
    let (host, port) = match text.iter().rposition(|byte| *byte == b':') {
        Some(colon) if !text.ends_with(b"]") => (&text[..colon], Some(&text[colon + 1..])),
        _ => (text, None),
    };
    let port = port.is_none_or(|port| port.len() <= 5 && port.iter().all(u8::is_ascii_digit));
    let host = match host.strip_prefix(b"[") {
        Some(inner) => inner
            .strip_suffix(b"]")
            .is_some_and(|inner| inner.iter().all(|byte| byte.is_ascii_hexdigit() || b":.".contains(byte))),
        None => host.len() <= 253 && host.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%".contains(byte)),
    };
    port && host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(head: &str) -> &'static str {
        match Framer::default().head(head.as_bytes()) {
            Err(refusal) => refusal.reason,
            Ok(end) => panic!("{head:?} was taken: {end:?}"),
        }
    }

    #[test]
    fn whole_heads_are_taken_whichever_way_they_are_cut() {
        let head = b"POST /a?b HTTP/1.1\r\nHost: shop.example:8080\r\nContent-Length: 5\r\n\r\nhello";
        for cut in 0..head.len() - 5 {
            let mut framer = Framer::default();
            assert_eq!(framer.head(&head[..cut]), Ok(None), "{cut}");
        }
        let mut framer = Framer::default();
        let end = head.len() - 5;
        assert_eq!(framer.head(head), Ok(Some(end)));
        assert_eq!(framer.body(b"he"), Ok(2));
        assert!(!framer.done());
        assert_eq!(framer.body(b"lloGET /"), Ok(3));
        assert!(framer.done());
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        let host = "Host: a\r\n";
        for (head, word) in [
            (format!("GET / HTTP/1.1\r\n{host}{host}\r\n"), "more than one Host"),
            ("GET / HTTP/1.1\r\n\r\n".into(), "no Host"),
            (format!("GET http://b/ HTTP/1.1\r\n{host}\r\n"), "two hosts"),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n".into(), "no host name"),
            ("GET / HTTP/1.1\r\nHost: u@a\r\n\r\n".into(), "no host name"),
            (
                format!("GET / HTTP/1.1\r\n{host}Content-Length: 1\r\nContent-Length: 1\r\n\r\n"),
                "more than one Content",
            ),
            (format!("GET / HTTP/1.1\r\n{host}Content-Length: +1\r\n\r\n"), "not a number"),
            (format!("GET / HTTP/1.1\r\n{host}Content-Length: 1, 1\r\n\r\n"), "not a number"),
            (
                format!("GET / HTTP/1.1\r\n{host}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
                "a Content-Length and a Transfer",
            ),
            (format!("GET / HTTP/1.1\r\n{host}Transfer-Encoding: gzip, chunked\r\n\r\n"), "chunked, once"),
            (format!("GET / HTTP/1.1\r\n{host}Transfer-Encoding: chunked, chunked\r\n\r\n"), "chunked, once"),
            (format!("GET / HTTP/1.0\r\n{host}Transfer-Encoding: chunked\r\n\r\n"), "HTTP/1.0 has no"),
            (format!("GET / HTTP/1.1\r\n{host}X: a\r\n b\r\n\r\n"), "folded"),
            (format!("GET / HTTP/1.1\r\n{host}X : a\r\n\r\n"), "name is not a token"),
            (format!("GET / HTTP/1.1\r\n{host}X: a\0b\r\n\r\n"), "control character"),
            (format!("GET / HTTP/1.1\r\n{host}X: a\rb\r\n\r\n"), "control character"),
            (format!("GET / HTTP/1.1\n{host}\r\n"), "CR LF"),
            (format!("GET / HTTP/1.1\r\n{host}X: a\n\r\n"), "CR LF"),
            (format!("GET  / HTTP/1.1\r\n{host}\r\n"), "one space"),
            (format!("GET /\t HTTP/1.1\r\n{host}\r\n"), "character that a URI"),
            (format!("GET /a\\b HTTP/1.1\r\n{host}\r\n"), "character that a URI"),
            (format!("GET /# HTTP/1.1\r\n{host}\r\n"), "character that a URI"),
            (format!("GET a HTTP/1.1\r\n{host}\r\n"), "neither a path"),
            (format!("GET / HTTP/2.0\r\n{host}\r\n"), "version"),
            (format!("CONNECT a:443 HTTP/1.1\r\n{host}\r\n"), "not served"),
        ] {
            let reason = refused(&head);
            assert!(reason.contains(word), "{head:?} was refused because {reason:?}, not for {word:?}");
        }
    }

    #[test]
    fn chunks_are_followed_byte_by_byte_to_their_end() {
        let head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let body = b"5;name=value\r\nhello\r\n0A\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n";
        for step in [1, 2, 3, 7, 100] {
            let mut framer = Framer::default();
            framer.head(head).expect("a good head");
            let mut taken = 0;
            for part in body.chunks(step) {
                taken += framer.body(part).expect("good chunks");
            }
            assert_eq!((taken, framer.done()), (body.len(), true), "{step}");
            assert_eq!(framer.body(b"GET"), Ok(0));
        }
    }

    #[test]
    fn odd_chunks_are_refused() {
        for body in [
            &b"g\r\n"[..],
            b"\r\n",
            b"5\nhello\r\n",
            b"5 \r\nhello\r\n",
            b"0x5\r\nhello\r\n",
            b"5\r\nhelloX",
            b"5\r\nhello\n",
            b"-1\r\n",
            b"1111111111111111\r\n",
            b"0\r\n\n",
            b"0\r\n: a\r\n\r\n",
            b"0\r\nX Y: a\r\n\r\n",
            b"0\r\nX: a\n\r\n",
        ] {
            let mut framer = Framer::default();
            framer.head(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").expect("a good head");
            assert!(framer.body(body).is_err(), "{body:?} was taken");
        }
    }

    #[test]
    fn a_head_has_bounds() {
        let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(MAX_HEAD));
        assert_eq!(Framer::default().head(long.as_bytes()).expect_err("too long").status, 431);
        assert_eq!(Framer::default().head(&long.as_bytes()[..MAX_HEAD]).expect_err("too long").status, 431);
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: a\r\n".repeat(MAX_FIELDS));
        assert_eq!(Framer::default().head(many.as_bytes()).expect_err("too many").status, 431);
    }
}
