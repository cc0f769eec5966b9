//! What an answer, or the failure to get one, says about the backend.

use http::{HeaderMap, header};
use pingora_core::{Error, ErrorType};
use pingora_proxy::Session;

use crate::tls;

/// How the media types of gRPC begin, and the statuses that are to gRPC what 5xx are to HTTP: deadline exceeded, internal,
/// unavailable. A backend is compared with its own past in all of them.
const GRPC: &[u8] = b"application/grpc";
const GRPC_ERRORS: [u16; 3] = [4, 13, 14];

/// Whether an answer has no body by its nature (RFC 9110, 6.4.1).
pub fn is_bodiless(session: &Session, status: u16) -> bool {
    session.req_header().method == http::Method::HEAD || matches!(status, 204 | 304)
}

/// Whether an answer says how many bytes it has, and has any.
pub fn has_length(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_LENGTH).is_some_and(|length| length.as_bytes() != b"0")
}

/// Whether a status is an error of the backend's: not one that says what it is not made for.
pub fn is_error(status: u16) -> bool {
    status >= 500 && !matches!(status, 501 | 505)
}

/// Whether an answer is a gRPC call's, which says behind its body how it ended.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(GRPC))
}

/// Whether headers or trailers say that a gRPC call ended in an error of the backend's.
pub fn is_grpc_error(headers: &HeaderMap) -> bool {
    grpc_status(headers).is_some_and(|status| GRPC_ERRORS.contains(&status))
}

/// How a gRPC call ended, where these headers or trailers say it.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// Whether a backend says of a request that it has not been looked at: a refused stream, or a connection that is going.
pub fn is_unprocessed(error: &Error) -> bool {
    let Some(cause) = error.root_cause().downcast_ref::<h2::Error>() else { return false };
    // A GOAWAY is told only to streams after the last that it names, whatever its reason (RFC 9113, 6.8).
    cause.is_remote() && (cause.is_go_away() || cause.is_reset() && cause.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// How a handshake failed, in words.
pub fn handshake_cause(error: &Error) -> &'static str {
    match error.etype() {
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => "handshake silent",
        _ => tls::cause_of_text(&error.to_string()),
    }
}
