//! Parsers of what a client sends first: the server name of a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3), and the
//! PROXY protocol's header, versions 1 and 2 (haproxy.org, "The PROXY protocol", 2020). Pure: bytes in, verdict out;
//! each byte is looked at once, however the network cut it. And the writer of that header.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Most bytes of a ClientHello, its records' headers included.
pub const HELLO_MOST: usize = 64 << 10;
/// Longest header of version 1, its line end included.
const V1_MOST: usize = 107;
/// Most bytes behind the fixed part of a header of version 2.
const V2_MOST: usize = 4 << 10;
/// First bytes of a header of version 2.
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// A value behind the addresses of version 2 that covers the bytes of the header itself (`PP2_TYPE_CRC32C`).
const TLV_CRC32C: u8 = 3;

/// What the bytes so far say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<T> {
    /// Nothing yet.
    More,
    /// This.
    Done(T),
    /// They are not what they should be: why.
    Wrong(&'static str),
}

// ---- ClientHello ----

/// Reads a ClientHello piece by piece.
#[derive(Debug, Default)]
pub struct HelloReader {
    /// Bytes of the stream that were looked at.
    taken: usize,
    /// Bytes of the present record that are still to come.
    record: usize,
    /// The handshake message, without the headers of its records.
    message: Vec<u8>,
}

impl HelloReader {
    /// Judges the stream so far; `stream` begins with the same bytes each time. The name is in lower case; `None`: the
    /// client names no server.
    pub fn read(&mut self, stream: &[u8]) -> Verdict<Option<String>> {
        loop {
            if self.record == 0 {
                let Some(header) = stream.get(self.taken..self.taken + 5) else {
                    return self.wait(stream);
                };
                let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
                if header[0] != 22 || header[1] != 3 || header[2] > 4 || length == 0 || length > 1 << 14 {
                    return Verdict::Wrong("no TLS handshake");
                }
                self.record = length;
                self.taken += 5;
            }
            let there = &stream[self.taken.min(stream.len())..];
            let part = &there[..there.len().min(self.record)];
            if part.is_empty() {
                return self.wait(stream);
            }
            self.message.extend_from_slice(part);
            self.taken += part.len();
            self.record -= part.len();
            if self.message[0] != 1 {
                return Verdict::Wrong("no ClientHello");
            }
            if let [_, a, b, c, ..] = self.message[..] {
                let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                if length > HELLO_MOST {
                    return Verdict::Wrong("a ClientHello of more than 64 KiB");
                }
                if let Some(hello) = self.message.get(4..4 + length) {
                    return match server_name(hello) {
                        Some(name) => Verdict::Done(name),
                        None => Verdict::Wrong("a malformed ClientHello"),
                    };
                }
            }
        }
    }

    /// Bytes that it holds.
    pub fn memory(&self) -> usize {
        self.message.capacity()
    }

    fn wait(&self, stream: &[u8]) -> Verdict<Option<String>> {
        // What will never be a handshake is told at its first byte.
        match stream.get(self.taken) {
            Some(first) if self.record == 0 && *first != 22 => Verdict::Wrong("no TLS handshake"),
            _ if stream.len() >= HELLO_MOST => Verdict::Wrong("a ClientHello of more than 64 KiB"),
            _ => Verdict::More,
        }
    }
}

/// Takes bytes from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        Some(self.take(bytes)?.iter().fold(0, |n, byte| n << 8 | usize::from(*byte)))
    }

    /// A list behind its length, which has this many bytes.
    fn list(&mut self, bytes: usize) -> Option<Bytes<'a>> {
        let length = self.number(bytes)?;
        self.take(length).map(Bytes)
    }
}

/// The server's name in the body of a ClientHello; `None` when it is malformed.
fn server_name(hello: &[u8]) -> Option<Option<String>> {
    let mut hello = Bytes(hello);
    // Version and random.
    hello.take(2 + 32)?;
    let session = hello.list(1)?;
    let ciphers = hello.list(2)?;
    let compressions = hello.list(1)?;
    if session.0.len() > 32 || ciphers.0.len() < 2 || ciphers.0.len() % 2 != 0 || compressions.0.is_empty() {
        return None;
    }
    // Before TLS 1.3 there may be no extensions at all.
    if hello.0.is_empty() {
        return Some(None);
    }
    let mut extensions = hello.list(2)?;
    if !hello.0.is_empty() {
        return None;
    }
    let mut found = None;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let mut body = extensions.list(2)?;
        if kind != 0 {
            continue;
        }
        // A second one could name another server to a reader that takes the last.
        if found.is_some() {
            return None;
        }
        let mut names = body.list(2)?;
        if !body.0.is_empty() || names.0.is_empty() {
            return None;
        }
        while !names.0.is_empty() {
            let kind = names.number(1)?;
            let name = names.list(2)?;
            if kind != 0 || found.is_some() {
                return None;
            }
            found = Some(host_name(name.0)?);
        }
    }
    Some(found)
}

/// Whether `bytes` are the beginning of a TLS handshake and nothing else: records of handshake and change of cipher (RFC 8446,
/// 5.1). Such a beginning asks for nothing yet, so it may be said to another server as well; early data may not.
pub fn is_only_handshake(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let [kind, 3, minor, high, low, ..] = rest {
        if !matches!(kind, 20 | 22) || *minor > 4 {
            return false;
        }
        let length = 5 + usize::from(u16::from_be_bytes([*high, *low]));
        rest = rest.get(length..).unwrap_or_default();
    }
    // What has not come of the next record's header must not be the beginning of anything else.
    !bytes.is_empty() && matches!(rest, [] | [20 | 22] | [20 | 22, 3, ..])
}

/// Whether this is a DNS name as a client may ask for it, in lower case.
pub fn is_host_name(name: &str) -> bool {
    host_name(name.as_bytes()).is_some_and(|read| read == name)
}

/// A DNS name in lower case, without the dot that may end it.
fn host_name(bytes: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(bytes).ok()?;
    let name = name.strip_suffix('.').unwrap_or(name);
    let fine = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let whole = !name.is_empty() && name.len() <= 253 && name.bytes().all(fine);
    let labels = name.split('.').all(|label| (1..=63).contains(&label.len()));
    (whole && labels).then(|| name.to_ascii_lowercase())
}

// ---- PROXY protocol ----

/// What a PROXY header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxied {
    /// Length of the header in the stream.
    pub length: usize,
    /// The client and the address that it connected to; `None`: the sender speaks for itself (`LOCAL`), or does not know.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    /// What else version 2 carried, as it stood, without a checksum.
    pub tlvs: Vec<u8>,
}

/// Judges the stream so far, which must begin with a header.
pub fn proxied(stream: &[u8]) -> Verdict<Proxied> {
    let common = stream.len().min(V2_SIGNATURE.len());
    if stream[..common] == V2_SIGNATURE[..common] {
        return version_2(stream);
    }
    let line = &stream[..stream.len().min(V1_MOST)];
    let Some(end) = line.windows(2).position(|pair| pair == b"\r\n") else {
        let start = &b"PROXY "[..line.len().min(6)];
        return match line.strip_prefix(start) {
            Some(rest) if line.len() < V1_MOST && !rest.contains(&b'\n') => Verdict::More,
            _ => Verdict::Wrong("no PROXY header"),
        };
    };
    // A line feed before the line's end would end the line for another reader.
    match version_1(&line[..end]).filter(|_| !line[..end].contains(&b'\n')) {
        Some(addresses) => Verdict::Done(Proxied { length: end + 2, addresses, tlvs: Vec::new() }),
        None => Verdict::Wrong("a malformed PROXY header"),
    }
}

/// How many bytes more surely belong to the header that `stream` begins with; at least 1, which suits who must not take
/// a byte of what follows it.
pub fn header_lacks(stream: &[u8]) -> usize {
    let least = if stream.len() < 16 {
        // The shortest header of either version.
        15 - stream.len().min(14)
    } else if stream.starts_with(V2_SIGNATURE) {
        16 + usize::from(u16::from_be_bytes([stream[14], stream[15]])) - stream.len().min(16 + 65_535)
    } else {
        1
    };
    least.max(1)
}

fn version_1(line: &[u8]) -> Option<Option<(SocketAddr, SocketAddr)>> {
    let line = std::str::from_utf8(line).ok()?;
    let rest = line.strip_prefix("PROXY ")?;
    // What follows UNKNOWN is to be ignored.
    if rest == "UNKNOWN" || rest.starts_with("UNKNOWN ") {
        return Some(None);
    }
    let words: Vec<&str> = rest.split(' ').collect();
    let [family, source, destination, source_port, destination_port] = words[..] else { return None };
    let address = |text: &str| -> Option<IpAddr> {
        match family {
            "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            "TCP6" => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            _ => None,
        }
    };
    let port = |text: &str| -> Option<u16> {
        let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        canonical.then(|| text.parse().ok()).flatten()
    };
    let source = SocketAddr::new(address(source)?, port(source_port)?);
    let destination = SocketAddr::new(address(destination)?, port(destination_port)?);
    Some(Some((source, destination)))
}

fn version_2(stream: &[u8]) -> Verdict<Proxied> {
    let Some(fixed) = stream.get(..16) else { return Verdict::More };
    let (command, family) = (fixed[12], fixed[13]);
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if command != 0x20 && command != 0x21 {
        return Verdict::Wrong("a PROXY header of an unknown version or command");
    }
    if length > V2_MOST {
        return Verdict::Wrong("a PROXY header of more than 4 KiB");
    }
    let Some(body) = stream.get(16..16 + length) else { return Verdict::More };
    let whole = 16 + length;
    if command == 0x20 {
        // The sender's own connection, a health check for instance; what it carries says nothing of a client.
        return Verdict::Done(Proxied { length: whole, ..Proxied::default() });
    }
    let mut body = Bytes(body);
    let Some(addresses) = version_2_addresses(family, &mut body) else {
        return Verdict::Wrong("a PROXY header with addresses that are none");
    };
    if family != 0 && !has_its_checksum(&stream[..whole], whole - body.0.len()) {
        return Verdict::Wrong("a PROXY header that does not have its checksum");
    }
    match tlvs(body) {
        // What follows an unspecified family is for nobody to read.
        None if family == 0 => Verdict::Done(Proxied { length: whole, addresses, tlvs: Vec::new() }),
        Some(tlvs) => Verdict::Done(Proxied { length: whole, addresses, tlvs }),
        None => Verdict::Wrong("a PROXY header with malformed values"),
    }
}

fn version_2_addresses(family: u8, body: &mut Bytes<'_>) -> Option<Option<(SocketAddr, SocketAddr)>> {
    fn fixed<const N: usize>(body: &mut Bytes<'_>) -> Option<[u8; N]> {
        body.take(N)?.try_into().ok()
    }
    let (source, destination): (IpAddr, IpAddr) = match family {
        0x00 => return Some(None),
        0x11 => (Ipv4Addr::from(fixed::<4>(body)?).into(), Ipv4Addr::from(fixed::<4>(body)?).into()),
        0x21 => (Ipv6Addr::from(fixed::<16>(body)?).into(), Ipv6Addr::from(fixed::<16>(body)?).into()),
        // Datagrams and unix sockets do not come this way.
        _ => return None,
    };
    let source = SocketAddr::new(source, body.number(2)? as u16);
    let destination = SocketAddr::new(destination, body.number(2)? as u16);
    Some(Some((source, destination)))
}

/// Whether a header that carries a CRC-32C has that, computed with zeros in its place; `values` is where the values begin.
fn has_its_checksum(header: &[u8], values: usize) -> bool {
    let mut at = values;
    while let Some(&[kind, high, low]) = header.get(at..at + 3) {
        let length = usize::from(u16::from_be_bytes([high, low]));
        if kind == TLV_CRC32C {
            let Some(&[a, b, c, d]) = header.get(at + 3..at + 3 + length) else { return false };
            let mut zeroed = header.to_vec();
            zeroed[at + 3..at + 7].fill(0);
            return u32::from_be_bytes([a, b, c, d]) == crc32c(&zeroed);
        }
        at += 3 + length;
    }
    true
}

/// CRC-32C (Castagnoli), bit by bit: headers are short, and few carry one.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _: u8| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// The values behind the addresses, without the checksum of a header that will not be the same.
fn tlvs(mut body: Bytes<'_>) -> Option<Vec<u8>> {
    let mut kept = Vec::new();
    while !body.0.is_empty() {
        let whole = body.0;
        let kind = body.number(1)?;
        let value = body.list(2)?;
        if kind != usize::from(TLV_CRC32C) {
            kept.extend_from_slice(&whole[..3 + value.0.len()]);
        }
    }
    Some(kept)
}

/// Versions of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyVersion {
    /// A line of text.
    V1,
    /// Bytes.
    V2,
}

/// The header for a backend. Without addresses it says that the connection is our own.
pub fn proxy_header(version: ProxyVersion, addresses: Option<(SocketAddr, SocketAddr)>, tlvs: &[u8]) -> Vec<u8> {
    // One family for both: an IPv4 client of an IPv6 socket is an IPv4 client.
    let addresses =
        addresses.map(|(source, destination)| match (source.ip().to_canonical(), destination.ip().to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                (SocketAddr::new(a.into(), source.port()), SocketAddr::new(b.into(), destination.port()))
            }
            (a, b) => {
                let wide = |ip: IpAddr| match ip {
                    IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
                    IpAddr::V6(_) => ip,
                };
                (SocketAddr::new(wide(a), source.port()), SocketAddr::new(wide(b), destination.port()))
            }
        });
    match version {
        ProxyVersion::V1 => match addresses {
            None => b"PROXY UNKNOWN\r\n".to_vec(),
            Some((source, destination)) => format!(
                "PROXY {} {} {} {} {}\r\n",
                if source.is_ipv4() { "TCP4" } else { "TCP6" },
                source.ip(),
                destination.ip(),
                source.port(),
                destination.port()
            )
            .into_bytes(),
        },
        ProxyVersion::V2 => {
            let mut body = Vec::with_capacity(36 + tlvs.len());
            let (command, family) = match addresses {
                None => (0x20, 0x00),
                Some((source, destination)) => {
                    for address in [source, destination] {
                        match address.ip() {
                            IpAddr::V4(v4) => body.extend_from_slice(&v4.octets()),
                            IpAddr::V6(v6) => body.extend_from_slice(&v6.octets()),
                        }
                    }
                    body.extend_from_slice(&source.port().to_be_bytes());
                    body.extend_from_slice(&destination.port().to_be_bytes());
                    body.extend_from_slice(tlvs);
                    (0x21, if source.is_ipv4() { 0x11 } else { 0x21 })
                }
            };
            let mut header = V2_SIGNATURE.to_vec();
            header.extend_from_slice(&[command, family]);
            header.extend_from_slice(&(body.len() as u16).to_be_bytes());
            header.extend_from_slice(&body);
            header
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test a failed expectation is a failed test.
mod tests {
    use super::*;

    /// A ClientHello for `name`, of about `padding` bytes more, in records of at most `record` bytes.
    fn hello(name: Option<&str>, padding: usize, record: usize) -> Vec<u8> {
        let mut extensions = Vec::new();
        let mut extension = |kind: u16, body: &[u8]| {
            extensions.extend_from_slice(&kind.to_be_bytes());
            extensions.extend_from_slice(&(body.len() as u16).to_be_bytes());
            extensions.extend_from_slice(body);
        };
        extension(43, &[2, 3, 4]);
        extension(21, &vec![0; padding]);
        if let Some(name) = name {
            let n = name.len() as u16;
            let body = [&(n + 3).to_be_bytes()[..], &[0], &n.to_be_bytes(), name.as_bytes()].concat();
            extension(0, &body);
        }
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.extend_from_slice(&[0, 0, 2, 0x13, 1, 1, 0]);
        body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
        body.extend_from_slice(&extensions);
        let mut message = vec![1, 0];
        message.extend_from_slice(&(body.len() as u16).to_be_bytes());
        message.extend_from_slice(&body);
        let mut stream = Vec::new();
        for part in message.chunks(record) {
            stream.extend_from_slice(&[22, 3, 1]);
            stream.extend_from_slice(&(part.len() as u16).to_be_bytes());
            stream.extend_from_slice(part);
        }
        stream
    }

    fn at_once(stream: &[u8]) -> Verdict<Option<String>> {
        HelloReader::default().read(stream)
    }

    #[test]
    fn a_hello_is_read_however_it_is_cut() {
        for (padding, record) in [(0, 16_000), (1_200, 16_000), (1_200, 700), (3, 1)] {
            let stream = hello(Some("Shop.Example"), padding, record);
            for cut in 1..stream.len() {
                let mut reader = HelloReader::default();
                assert_eq!(reader.read(&stream[..cut]), Verdict::More, "{padding} {record} {cut}");
                assert_eq!(
                    reader.read(&stream),
                    Verdict::Done(Some("shop.example".into())),
                    "{padding} {record} {cut}"
                );
            }
            let mut reader = HelloReader::default();
            let verdicts: Vec<_> = (1..=stream.len()).map(|n| reader.read(&stream[..n])).collect();
            assert_eq!(verdicts.last(), Some(&Verdict::Done(Some("shop.example".into()))));
        }
        assert_eq!(at_once(&hello(None, 0, 100)), Verdict::Done(None));
        assert_eq!(at_once(&hello(Some("a.b."), 0, 100)), Verdict::Done(Some("a.b".into())));
    }

    #[test]
    fn what_is_no_hello_is_told_early_and_what_is_malformed_at_all() {
        assert_eq!(at_once(b"G"), Verdict::Wrong("no TLS handshake"));
        assert_eq!(at_once(&[22, 3, 1, 0, 0]), Verdict::Wrong("no TLS handshake"));
        assert_eq!(at_once(&[22, 3, 1, 0, 1, 2]), Verdict::Wrong("no ClientHello"));
        assert_eq!(at_once(&[22, 3, 1, 0, 4, 1, 1, 0, 1]), Verdict::Wrong("a ClientHello of more than 64 KiB"));
        for bad in ["", "a..b", "sp ace", "a\0b", &"x".repeat(64), &"ab.".repeat(100)] {
            assert_eq!(at_once(&hello(Some(bad), 0, 16_000)), Verdict::Wrong("a malformed ClientHello"), "{bad:?}");
        }
        // Two names, in one extension or in two.
        let one = hello(Some("a.example"), 0, 16_000);
        let mut two = one.clone();
        let extension = one[one.len() - 18..].to_vec();
        two.extend_from_slice(&extension);
        for (at, more) in [(3, 18u16), (7, 18), (9 + 41, 18)] {
            let old = u16::from_be_bytes([two[at], two[at + 1]]);
            two[at..at + 2].copy_from_slice(&(old + more).to_be_bytes());
        }
        assert_eq!(at_once(&two), Verdict::Wrong("a malformed ClientHello"));
    }

    #[test]
    fn only_a_handshake_may_be_said_twice() {
        let hello = hello(Some("shop.example"), 300, 100);
        assert!((1..=hello.len()).all(|cut| is_only_handshake(&hello[..cut])));
        let early = [&hello[..], &[23, 3, 3, 0, 1, 0]].concat();
        assert!(!is_only_handshake(&early), "early data asks for something");
        assert!(!is_only_handshake(&early[..hello.len() + 1]), "and is known by its first byte");
        assert!(!is_only_handshake(b"") && !is_only_handshake(b"GET / HTTP/1.1\r\n") && !is_only_handshake(&[22, 2]));
    }

    #[test]
    fn endless_records_end_at_the_bound() {
        let mut stream = vec![22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff];
        stream.resize(5 + (1 << 14), 0);
        let mut all = stream.clone();
        while all.len() < 80_000 {
            all.extend_from_slice(&[22, 3, 1, 0x40, 0]);
            all.extend_from_slice(&vec![0; 1 << 14]);
        }
        assert!(matches!(at_once(&all), Verdict::Wrong(_)));
        assert!(matches!(at_once(&all[..HELLO_MOST]), Verdict::Wrong(_)));
    }

    fn addresses(a: &str, b: &str) -> Option<(SocketAddr, SocketAddr)> {
        Some((a.parse().unwrap(), b.parse().unwrap()))
    }

    #[test]
    fn headers_of_both_versions_are_read_however_they_are_cut_and_written_again() {
        let pairs = [
            addresses("192.0.2.1:5000", "198.51.100.2:443"),
            addresses("[2001:db8::1]:5000", "[2001:db8::2]:443"),
            None,
        ];
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            for pair in pairs {
                let tlvs: &[u8] =
                    if version == ProxyVersion::V2 && pair.is_some() { &[2, 0, 3, b'a', b'b', b'c'] } else { &[] };
                let header = proxy_header(version, pair, tlvs);
                let stream = [&header[..], b"GET / HTTP/1.1\r\n"].concat();
                for n in 0..header.len() {
                    assert_eq!(proxied(&stream[..n]), Verdict::More, "{version:?} {pair:?} {n}");
                }
                for n in header.len()..stream.len() {
                    let wanted = Proxied { length: header.len(), addresses: pair, tlvs: tlvs.to_vec() };
                    assert_eq!(proxied(&stream[..n]), Verdict::Done(wanted), "{version:?} {pair:?} {n}");
                }
            }
        }
        let mapped = addresses("[::ffff:192.0.2.1]:5000", "[::ffff:198.51.100.2]:443");
        assert_eq!(proxy_header(ProxyVersion::V1, mapped, &[]), b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n");
    }

    #[test]
    fn headers_are_taken_strictly() {
        for bad in [
            "PROXY TCP4 192.0.2.1 198.51.100.2 5000\r\n",
            "PROXY TCP4  192.0.2.1 198.51.100.2 5000 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.2 05000 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.2 +5000 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.2 65536 443\r\n",
            "PROXY TCP4 192.0.2.01 198.51.100.2 5000 443\r\n",
            "PROXY TCP4 2001:db8::1 2001:db8::2 5000 443\r\n",
            "PROXY TCP6 192.0.2.1 198.51.100.2 5000 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.2 5000 443 \r\n",
            "PROXY UNKNOWNX\r\n",
            "PROXY UNKNOWN a\nb\r\n",
            "PROXY UDP4 192.0.2.1 198.51.100.2 5000 443\r\n",
            "proxy TCP4 192.0.2.1 198.51.100.2 5000 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\n",
            "GET / HTTP/1.1\r\n",
            "\r\nX",
        ] {
            assert!(matches!(proxied(bad.as_bytes()), Verdict::Wrong(_)), "{bad:?}: {:?}", proxied(bad.as_bytes()));
        }
        assert_eq!(
            proxied(b"PROXY UNKNOWN what ever\r\nx"),
            Verdict::Done(Proxied { length: 25, ..Proxied::default() })
        );
        assert!(matches!(proxied(&[b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat()), Verdict::Wrong(_)));
        let good = proxy_header(ProxyVersion::V2, addresses("192.0.2.1:1", "192.0.2.2:2"), &[]);
        let with = |at: usize, byte: u8| {
            let mut header = good.clone();
            header[at] = byte;
            proxied(&header)
        };
        assert!(matches!(with(12, 0x11), Verdict::Wrong(_)), "version 1 in the bytes of version 2");
        assert!(matches!(with(12, 0x22), Verdict::Wrong(_)), "an unknown command");
        assert!(matches!(with(13, 0x12), Verdict::Wrong(_)), "datagrams");
        assert!(matches!(with(13, 0x31), Verdict::Wrong(_)), "unix sockets");
        assert!(matches!(with(13, 0x21), Verdict::Wrong(_)), "too short for IPv6");
        assert!(matches!(with(14, 0xff), Verdict::Wrong(_)), "too long");
        // A value that is longer than what is left.
        let cut = proxy_header(ProxyVersion::V2, addresses("192.0.2.1:1", "192.0.2.2:2"), &[2, 0, 9, 1]);
        assert!(matches!(proxied(&cut), Verdict::Wrong(_)));
    }

    #[test]
    fn random_bytes_harm_no_parser() {
        let mut rng = fastrand::Rng::with_seed(4);
        let seeds = [
            hello(Some("a.example"), 30, 50),
            proxy_header(ProxyVersion::V2, addresses("192.0.2.1:1", "192.0.2.2:2"), &[5, 0, 1, 9]),
        ];
        for _ in 0..200_000 {
            let mut bytes = seeds[rng.usize(..2)].clone();
            for _ in 0..rng.usize(1..6) {
                let at = rng.usize(..bytes.len());
                bytes[at] = rng.u8(..);
            }
            bytes.truncate(rng.usize(..=bytes.len()));
            let _ = at_once(&bytes);
            let _ = proxied(&bytes);
        }
    }

    #[test]
    fn what_follows_an_unspecified_family_is_skipped() {
        let mut header = V2_SIGNATURE.to_vec();
        header.extend([0x21, 0x00, 0, 3, 0xff, 0xff, 0xff]);
        match version_2(&header) {
            Verdict::Done(Proxied { length, addresses, tlvs }) => {
                assert_eq!((length, addresses, tlvs), (header.len(), None, Vec::new()));
            }
            _ => panic!("it is a header"),
        }
    }

    #[test]
    fn a_checksum_is_checked_where_there_is_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the value that RFC 3720 and its like agree on");
        let addresses = ("192.0.2.1:1000".parse().unwrap(), "192.0.2.2:443".parse().unwrap());
        let values = [&[TLV_CRC32C, 0, 4, 0, 0, 0, 0][..], &[2, 0, 3], b"abc"].concat();
        let mut header = proxy_header(ProxyVersion::V2, Some(addresses), &values);
        let sum = crc32c(&header);
        assert!(matches!(proxied(&header), Verdict::Wrong(_)), "zeros are not it");
        let at = header.len() - values.len() + 3;
        header[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        let Verdict::Done(found) = proxied(&header) else { panic!("it has its checksum") };
        assert_eq!((found.addresses, &found.tlvs[..]), (Some(addresses), &[2, 0, 3, b'a', b'b', b'c'][..]));
        header[at - 4] ^= 1;
        assert!(matches!(proxied(&header), Verdict::Wrong(_)));
    }
}
