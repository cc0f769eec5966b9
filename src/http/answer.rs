//! Answers of our own: small, plain, and without an internal address.

use bytes::Bytes;
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use pingora_core::Result;
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use super::route::Changes;
use super::{hops, route};
use crate::config::http::Page;

/// What a status says when nothing else is configured.
pub fn sentence(status: u16) -> &'static str {
    match status {
        400 => "The request is malformed.",
        404 => "Nothing is served under this address.",
        405 => "This method is not served.",
        408 => "The request did not come in time.",
        417 => "The expectation cannot be met.",
        421 => "This host is not served here.",
        429 => "Too many requests came from this address.",
        431 => "The header of the request is too large.",
        501 => "This is not supported.",
        502 => "The service ended the exchange without an answer.",
        503 => "The service is not available at the moment.",
        504 => "The service did not answer in time.",
        _ => "The request could not be served.",
    }
}

/// The configured body of a status and its media type, or a plain one that says `reason`.
fn body(status: u16, reason: &str, pages: &[(u16, Page)]) -> (String, String) {
    match pages.iter().find(|(known, _)| *known == status) {
        Some((_, page)) => (page.body.clone(), page.content_type.clone()),
        None => (format!("{status} {reason}\n"), "text/plain; charset=utf-8".to_owned()),
    }
}

/// A whole answer as bytes, for requests that the engine never sees.
pub fn raw(status: u16, reason: &str, pages: &[(u16, Page)]) -> Vec<u8> {
    let phrase = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Error");
    let (body, content_type) = body(status, reason, pages);
    let length = body.len();
    format!(
        "HTTP/1.1 {status} {phrase}\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\
         cache-control: no-store\r\nconnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Sends an answer that says why a request failed: the configured page of its status, or `reason`.
///
/// # Errors
/// When the client cannot be written to.
pub async fn error(
    session: &mut Session,
    status: u16,
    reason: &str,
    retry_after: Option<u64>,
    pages: &[(u16, Page)],
) -> Result<()> {
    let (body, content_type) = body(status, reason, pages);
    let mut head = ResponseHeader::build(status, Some(5))?;
    head.insert_header(CONTENT_TYPE, content_type)?;
    head.insert_header(CACHE_CONTROL, "no-store")?;
    if let Some(seconds) = retry_after {
        head.insert_header(RETRY_AFTER, seconds)?;
    }
    send(session, head, Bytes::from(body)).await
}

/// Sends the answer of a route.
///
/// # Errors
/// When the client cannot be written to.
pub async fn page(session: &mut Session, status: u16, page: &Page, changes: &Changes) -> Result<()> {
    let mut head = ResponseHeader::build(status, Some(3))?;
    if !page.body.is_empty() {
        head.insert_header(CONTENT_TYPE, page.content_type.as_str())?;
    }
    hops::change_answer(changes, &mut head)?;
    send(session, head, Bytes::from(page.body.clone())).await
}

/// What a client asked for.
#[derive(Debug)]
pub struct Asked<'a> {
    /// Whether it came by TLS, here or before.
    pub tls: bool,
    /// The host as it was written, with its port.
    pub host: &'a str,
    /// Path and query.
    pub target: &'a str,
}

/// Where a redirect leads: what it names takes the place of what was asked for.
pub fn location(asked: &Asked<'_>, scheme: Option<&str>, host: Option<&str>, path: Option<&str>) -> String {
    let own_scheme = if asked.tls { "https" } else { "http" };
    // A port belongs to its scheme.
    let moves = scheme.is_some_and(|scheme| scheme != own_scheme);
    let own_host = if moves { route::without_port(asked.host) } else { asked.host };
    // Another path takes the query along, unless it has one.
    let query = asked.target.find('?').filter(|_| path.is_some_and(|path| !path.contains('?')));
    format!(
        "{}://{}{}{}",
        scheme.unwrap_or(own_scheme),
        host.unwrap_or(own_host),
        path.unwrap_or(asked.target),
        query.map_or("", |at| &asked.target[at..]),
    )
}

/// Sends a client elsewhere.
///
/// # Errors
/// When the client cannot be written to, or the address is none.
pub async fn redirect(session: &mut Session, status: u16, location: &str, changes: &Changes) -> Result<()> {
    let mut head = ResponseHeader::build(status, Some(3))?;
    head.insert_header(LOCATION, location)?;
    hops::change_answer(changes, &mut head)?;
    send(session, head, Bytes::new()).await
}

async fn send(session: &mut Session, mut head: ResponseHeader, body: Bytes) -> Result<()> {
    // 204 and 304 have no body and say no length.
    let bodiless = matches!(head.status.as_u16(), 204 | 304);
    if !bodiless {
        head.insert_header(CONTENT_LENGTH, body.len())?;
    }
    let silent = bodiless || body.is_empty() || session.req_header().method == http::Method::HEAD;
    session.write_response_header(Box::new(head), silent).await?;
    if !silent {
        session.write_response_body(Some(body), true).await?;
    }
    Ok(())
}
