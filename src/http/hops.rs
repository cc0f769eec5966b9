//! Headers that do not pass from one connection to the next as they came.

use http::header::{self, HeaderName, HeaderValue};
use http::{StatusCode, Version};
use pingora_core::{Error, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};

use super::route::Changes;

/// HTTP/2 may cut a Cookie header in pieces; HTTP/1.1 has one (RFC 9113, 8.2.3).
///
/// # Errors
/// What came by HTTP/2 is no value of HTTP/1.1.
pub fn join_cookies(request: &mut RequestHeader) -> Result<()> {
    let mut pieces = request.headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes);
    let (Some(first), Some(second)) = (pieces.next(), pieces.next()) else { return Ok(()) };
    let mut whole = [first, second].join(&b"; "[..]);
    for piece in pieces {
        whole.extend_from_slice(b"; ");
        whole.extend_from_slice(piece);
    }
    let whole = HeaderValue::from_bytes(&whole);
    request.insert_header(header::COOKIE, whole.map_err(|_| Error::new_down(ErrorType::InvalidHTTPHeader))?)
}

/// Changes a request as its route says: what is added takes the place of what the client sent.
///
/// # Errors
/// None in practice: the values were read as such.
pub fn change(changes: &Changes, request: &mut RequestHeader) -> Result<()> {
    for name in &changes.remove {
        request.remove_header(name);
    }
    for (name, value) in &changes.add {
        request.insert_header(name, value)?;
    }
    Ok(())
}

/// Takes out of an answer what concerns the backend's connection alone.
pub fn take_out_hops(response: &mut ResponseHeader) {
    let named: Vec<HeaderName> = response
        .headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .filter(|name| !matches!(*name, header::TRANSFER_ENCODING | header::CONTENT_LENGTH))
        .collect();
    for name in named {
        response.remove_header(&name);
    }
    for name in ["keep-alive", "proxy-connection", "te", "upgrade"] {
        response.remove_header(name);
    }
    response.remove_header(&header::CONNECTION);
}

/// Says an answer's version and framing in our own terms (RFC 9112, 2.3 and 6.1): what has no body has no length either, and a body
/// whose end its backend shows by closing comes in chunks, so that one that was cut does not look whole.
///
/// # Errors
/// It has a transfer coding that nobody asked for.
pub fn frame_anew(response: &mut ResponseHeader) -> Result<()> {
    response.set_version(Version::HTTP_11);
    if response.status == StatusCode::NO_CONTENT {
        response.remove_header(&header::CONTENT_LENGTH);
        response.remove_header(&header::TRANSFER_ENCODING);
    }
    let mut said = response.headers.get_all(header::TRANSFER_ENCODING).iter();
    let Some(first) = said.next() else { return Ok(()) };
    if said.next().is_none() && first == "chunked" {
        return Ok(());
    }
    let values = response.headers.get_all(header::TRANSFER_ENCODING);
    let codings = values.iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    let is = |coding: &[u8], name: &str| coding.eq_ignore_ascii_case(name.as_bytes());
    let (mut chunked, mut other) = (false, false);
    for coding in codings.filter(|coding| !coding.is_empty()) {
        chunked |= is(coding, "chunked");
        other |= !is(coding, "chunked") && !is(coding, "identity");
    }
    if other {
        let why = "an answer has a transfer coding that was not asked for";
        return Err(Error::explain(ErrorType::InvalidHTTPHeader, why).into_up());
    }
    response.remove_header(&header::TRANSFER_ENCODING);
    // A length is kept where it says how the body came.
    if chunked || !response.headers.contains_key(header::CONTENT_LENGTH) {
        response.remove_header(&header::CONTENT_LENGTH);
        response.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    }
    Ok(())
}

/// Headers of which an answer may well have several; what a route adds comes beside those of the backend.
const LISTS: [HeaderName; 3] = [header::SET_COOKIE, header::VARY, header::LINK];

/// Changes an answer as its route says: what is added takes the place of what was there, but in [`LISTS`].
///
/// # Errors
/// None in practice: the values were read as such.
pub fn change_answer(changes: &Changes, response: &mut ResponseHeader) -> Result<()> {
    for name in &changes.remove {
        response.remove_header(name);
    }
    for (name, value) in &changes.add {
        if LISTS.contains(name) {
            response.append_header(name, value)?;
        } else {
            response.insert_header(name, value)?;
        }
    }
    Ok(())
}

/// A length that was said several times is said once (RFC 9110, 8.6); the engine has made sure that they are equal.
///
/// # Errors
/// None in practice: it was a value before.
pub fn say_length_once(response: &mut ResponseHeader) -> Result<()> {
    let mut said = response.headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(first) = said.next().filter(|first| said.next().is_some() || first.as_bytes().contains(&b',')) else {
        return Ok(());
    };
    let one = first.as_bytes().split(|byte| *byte == b',').next().unwrap_or_default().trim_ascii();
    let one = HeaderValue::from_bytes(one).map_err(|_| Error::new_up(ErrorType::InvalidHTTPHeader))?;
    response.insert_header(header::CONTENT_LENGTH, one)
}

/// Takes out what differs from `name` by underscores for hyphens alone: CGI and its like take both for one.
pub fn remove_alike(request: &mut RequestHeader, name: &HeaderName) {
    let alike = |other: &HeaderName| {
        other.as_str().len() == name.as_str().len()
            && other.as_str().contains('_')
            && other.as_str().bytes().zip(name.as_str().bytes()).all(|(a, b)| a == b || a == b'_' && b == b'-')
    };
    let found: Vec<HeaderName> = request.headers.keys().filter(|other| alike(other)).cloned().collect();
    for other in found {
        request.remove_header(&other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_route_adds_to_an_answer_takes_the_place_of_what_was_there_but_in_lists() {
        let of = |text: &'static str| HeaderValue::from_static(text);
        let mut answer = ResponseHeader::build(200, None).expect("a head");
        for (name, value) in [("set-cookie", "a=1"), ("vary", "accept"), ("server", "x"), ("x-old", "y")] {
            answer.append_header(name, value).expect("a header");
        }
        let add = [(header::SET_COOKIE, of("b=2")), (header::VARY, of("origin")), (header::SERVER, of("us"))];
        let changes = Changes { add: add.to_vec(), remove: vec![HeaderName::from_static("x-old")] };
        change_answer(&changes, &mut answer).expect("good values");
        let all = |name: &str| answer.headers.get_all(name).iter().cloned().collect::<Vec<_>>();
        assert_eq!(all("set-cookie"), [of("a=1"), of("b=2")]);
        assert_eq!(all("vary"), [of("accept"), of("origin")]);
        assert_eq!(all("server"), [of("us")]);
        assert_eq!(all("x-old"), [] as [HeaderValue; 0]);
    }
}
