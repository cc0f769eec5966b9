//! What a backend is told about the client: `X-Forwarded-For`, `-Proto`, `-Host`, and `Forwarded` (RFC 7239).
//!
//! The rule of trust: from a peer in `forwarded.trust` its own headers are kept and added to; from anybody else they are
//! replaced, all of them, those that are not sent included. A `Forwarded` that is not well-formed is replaced from anybody.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue};
use pingora_core::Result;
use pingora_http::RequestHeader;

use super::framer::is_token;
use super::hops::remove_alike;
use crate::config::http::{Forwarded, Send};

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED: HeaderName = http::header::FORWARDED;
/// Names the request in logs on both sides.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Most bytes of a header that is added to; a longer one is replaced.
const LONGEST: usize = 4 * 1024;

/// The client as a backend is told of it.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Its address.
    pub address: SocketAddr,
    /// Whether it came by TLS.
    pub tls: bool,
    /// The host that it asked for, as it wrote it.
    pub host: &'a str,
}

/// Whether this peer's own headers are believed.
pub fn trusted(rule: &Forwarded, peer: IpAddr) -> bool {
    rule.trust.iter().any(|network| network.contains(peer.to_canonical()))
}

/// Whether the client came by TLS: to us, or to a trusted peer that says so.
pub fn is_secure(rule: &Forwarded, peer: IpAddr, tls: bool, headers: &HeaderMap) -> bool {
    let said = headers.get(PROTO).filter(|_| trusted(rule, peer)).and_then(|said| said.to_str().ok());
    // Of a list the first is the client's own.
    match said.and_then(|said| said.split(',').next()).map(str::trim) {
        Some(said) if said.eq_ignore_ascii_case("https") => true,
        Some(said) if said.eq_ignore_ascii_case("http") => false,
        _ => tls,
    }
}

/// Sets, replaces or adds to the headers of a request that goes to a backend.
///
/// # Errors
/// None in practice: everything that is set is text without control characters.
pub fn apply(rule: &Forwarded, trusted: bool, client: Client<'_>, request: &mut RequestHeader) -> Result<()> {
    let ip = client.address.ip().to_canonical();
    let proto = if client.tls { "https" } else { "http" };
    let sent = |which: Send| rule.send == Send::Both || rule.send == which;
    let before =
        |request: &RequestHeader, name: &HeaderName| if trusted { joined(&request.headers, name) } else { None };

    if !trusted && request.headers.keys().any(|name| name.as_str().contains('_')) {
        for name in [&FOR, &PROTO, &HOST, &REQUEST_ID] {
            remove_alike(request, name);
        }
    }
    if sent(Send::XForwarded) {
        let list = match before(request, &FOR) {
            Some(list) => format!("{list}, {ip}"),
            None => ip.to_string(),
        };
        request.insert_header(FOR, list)?;
        if !(trusted && request.headers.contains_key(PROTO)) {
            request.insert_header(PROTO, proto)?;
        }
        if !(trusted && request.headers.contains_key(HOST)) {
            request.insert_header(HOST, client.host)?;
        }
    } else if !trusted {
        for name in [&FOR, &PROTO, &HOST] {
            request.remove_header(name);
        }
    }
    if sent(Send::Forwarded) {
        let mut list = match before(request, &FORWARDED).filter(|list| well_formed(list.as_bytes())) {
            Some(list) => list + ", ",
            None => String::with_capacity(64),
        };
        // Writing to a string cannot fail.
        let _ = match ip {
            IpAddr::V4(ip) => write!(list, "for={ip};proto={proto}"),
            IpAddr::V6(ip) => write!(list, "for=\"[{ip}]\";proto={proto}"),
        };
        if !client.host.is_empty()
            && client.host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte))
        {
            let _ = write!(list, ";host={}", client.host);
        } else if !client.host.is_empty() {
            let _ = write!(list, ";host=\"{}\"", client.host);
        }
        request.insert_header(FORWARDED, list)?;
    } else if !trusted {
        request.remove_header(&FORWARDED);
    }
    Ok(())
}

/// All values of a header in one list; `None` when there is none, it is too long, or it is no text.
fn joined(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let mut list = String::new();
    for value in headers.get_all(name) {
        let text = value.to_str().ok()?;
        if !list.is_empty() {
            list.push_str(", ");
        }
        list.push_str(text);
        if list.len() > LONGEST {
            return None;
        }
    }
    (!list.is_empty()).then_some(list)
}

/// Whether a value is a list of elements of `name=value` pairs, as RFC 7239 has them.
pub fn well_formed(value: &[u8]) -> bool {
    let mut rest = value.trim_ascii();
    loop {
        let Some(equals) = rest.iter().position(|byte| *byte == b'=') else { return false };
        let (name, value) = (&rest[..equals], &rest[equals + 1..]);
        if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
            return false;
        }
        let end = match value.strip_prefix(b"\"") {
            Some(quoted) => match end_of_quoted(quoted) {
                Some(end) => end + 2,
                None => return false,
            },
            None => {
                let end = value.iter().position(|byte| !is_token(*byte)).unwrap_or(value.len());
                if end == 0 {
                    return false;
                }
                end
            }
        };
        rest = value[end..].trim_ascii_start();
        match rest.first() {
            None => return true,
            Some(b';' | b',') => rest = rest[1..].trim_ascii_start(),
            Some(_) => return false,
        }
    }
}

/// Where a quoted string ends whose first quote is taken off.
fn end_of_quoted(text: &[u8]) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at),
            0..=8 | 10..=31 | 127 => return None,
            _ => {}
        }
    }
    None
}

/// The value of a cookie, as a client sends it back. Of two of the same name the first counts.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let pairs =
        headers.get_all(http::header::COOKIE).into_iter().flat_map(|value| value.as_bytes().split(|b| *b == b';'));
    // Other cookies beside it may hold any bytes.
    pairs.map(<[u8]>::trim_ascii).find_map(|pair| {
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        std::str::from_utf8(value).ok()
    })
}

/// An identifier for a request that has none: 128 random bits.
pub fn request_id(rng: &mut fastrand::Rng) -> HeaderValue {
    let text = format!("{:032x}", rng.u128(..));
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("0"))
}

/// Whether what a client calls its request may be passed on and logged: short, and nothing but visible characters.
pub fn is_request_id(value: &HeaderValue) -> bool {
    let bytes = value.as_bytes();
    (1..=128).contains(&bytes.len()) && bytes.iter().all(|byte| matches!(byte, b'!'..=b'~') && *byte != b'"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_found_beside_any_other() {
        let cookies = |text: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.append(http::header::COOKIE, HeaderValue::from_bytes(text).expect("a value"));
            cookie(&headers, "place").map(str::to_owned)
        };
        assert_eq!(cookies(b"place=c0.1a"), Some("c0.1a".into()));
        assert_eq!(cookies(b"name=\xc3\xa9; place=c0.1a;x=\xff"), Some("c0.1a".into()));
        assert_eq!(cookies(b"a=1;\tplace=first; place=second"), Some("first".into()));
        assert_eq!(cookies(b"places=1; place"), None);
    }

    fn request(headers: &[(&'static str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build("GET", b"/", None).expect("a request");
        for (name, value) in headers {
            request.append_header(*name, *value).expect("a header");
        }
        request
    }

    fn told(rule: &Forwarded, trusted: bool, request: &mut RequestHeader) -> [String; 4] {
        let client = Client { address: "[::ffff:192.0.2.7]:1".parse().expect("an address"), tls: true, host: "a.b:8" };
        apply(rule, trusted, client, request).expect("applies");
        [FOR, PROTO, HOST, FORWARDED].map(|name| {
            let all = request.headers.get_all(name).iter().map(|value| value.to_str().expect("text").to_owned());
            all.collect::<Vec<_>>().join("|")
        })
    }

    const LIES: [(&str, &str); 5] = [
        ("x-forwarded-for", "1.1.1.1"),
        ("x-forwarded-for", "2.2.2.2"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "liar"),
        ("forwarded", "for=1.1.1.1"),
    ];

    #[test]
    fn a_stranger_is_not_believed() {
        let told = told(&Forwarded::default(), false, &mut request(&LIES));
        assert_eq!(told, ["192.0.2.7", "https", "a.b:8", "for=192.0.2.7;proto=https;host=\"a.b:8\""]);
    }

    #[test]
    fn a_trusted_peer_is_added_to() {
        let told = told(&Forwarded::default(), true, &mut request(&LIES));
        assert_eq!(told[0], "1.1.1.1, 2.2.2.2, 192.0.2.7");
        assert_eq!(told[1..3], ["http", "liar"]);
        assert_eq!(told[3], "for=1.1.1.1, for=192.0.2.7;proto=https;host=\"a.b:8\"");
    }

    #[test]
    fn what_is_not_sent_is_taken_out_all_the_same() {
        let rule = Forwarded { send: Send::Off, trust: Vec::new() };
        assert_eq!(told(&rule, false, &mut request(&LIES)), ["", "", "", ""]);
        let rule = Forwarded { send: Send::Forwarded, trust: Vec::new() };
        assert_eq!(told(&rule, false, &mut request(&LIES))[0], "");
    }

    #[test]
    fn an_ill_formed_list_is_replaced() {
        for (value, good) in [
            ("for=1.1.1.1", true),
            ("for=1.1.1.1;proto=http, for=\"[2001:db8::1]:80\"", true),
            ("for=\"a\\\"b\"", true),
            ("for", false),
            ("for=", false),
            ("for=\"a", false),
            ("for=a b", false),
            ("=a", false),
            ("for=a,", false),
            ("", false),
        ] {
            assert_eq!(well_formed(value.as_bytes()), good, "{value}");
        }
    }

    #[test]
    fn a_cookie_is_found_among_others() {
        let mut headers = HeaderMap::new();
        headers.append("cookie", HeaderValue::from_static("a=1; cell=aliyun;b=2"));
        headers.append("cookie", HeaderValue::from_static("cell=tencent; xcell=no"));
        assert_eq!(cookie(&headers, "cell"), Some("aliyun"));
        assert_eq!(cookie(&headers, "b"), Some("2"));
        assert_eq!(cookie(&headers, "c"), None);
    }
}
