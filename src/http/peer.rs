//! What the engine is told about the backend that was chosen, and how a client finds back to it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::header::{self, HeaderMap};
use pingora_core::Result;
use pingora_core::protocols::TcpKeepalive;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::ResponseHeader;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::Exchange;
use super::upstream::{self, Dialler};
use crate::backend::Backend;
use crate::config::{Affinity, HttpVersion};
use crate::pool::Pool;
use crate::sniff;

/// An idle connection to a backend is kept this long.
const KEEP: Duration = Duration::from_secs(60);
/// The same for requests that may not be sent twice: what is young is hardly dead already.
const KEEP_ONCE: Duration = Duration::from_secs(1);
/// Streams at once on one HTTP/2 connection to a backend, and how often it is asked whether it is there.
const STREAMS: usize = 100;
/// Bytes of one answer over HTTP/2 that may wait for a slow client.
const WINDOW: u32 = 512 << 10;
const PING: Duration = Duration::from_secs(10);
/// A backend's TLS has this long, when there is another backend to ask.
const TLS_TIME: Duration = Duration::from_secs(1);

/// What the engine is told about a member.
pub fn peer(pool: &Pool, backend: &Backend, dialler: Arc<Dialler>, exchange: &Exchange) -> Box<HttpPeer> {
    let policy = &pool.policy;
    // An empty name would make the engine judge nothing: a pool with TLS always has one.
    let name = policy.tls.as_ref().map(|tls| tls.name.clone());
    let mut peer = Box::new(HttpPeer::new(backend.address, name.is_some(), name.unwrap_or_default()));
    // An idle connection is used again only by those who may share it: for this backend as long as it is not retired, for
    // requests of the same kind, and where it began with a PROXY header, for the same client.
    let mut key = Xxh3::new();
    key.update(&backend.id.to_le_bytes());
    key.update(&backend.retired.load(Relaxed).to_le_bytes());
    key.update(&upstream::renewed(backend.id).to_le_bytes());
    key.update(&[u8::from(exchange.repeatable), policy.http as u8]);
    if let (Some(version), Some(connection)) = (policy.send_proxy, &exchange.connection) {
        key.update(&sniff::proxy_header(version, connection.addresses(), &connection.tlvs));
    }
    if let Some(tls) = &policy.tls {
        key.update(&tls.digest.to_le_bytes());
    }
    peer.group_key = key.digest();
    let certificates = policy.tls.as_ref().map(|tls| upstream::certificates(tls));
    peer.client_cert_key = certificates.as_ref().and_then(|certificates| certificates.identity.clone());
    let last = exchange.tried.len() + 1 >= pool.members.len();
    let options = &mut peer.options;
    if let (Some(tls), Some(certificates)) = (&policy.tls, certificates) {
        options.verify_cert = tls.verify;
        options.verify_hostname = tls.verify;
        options.ca = Some(certificates.authorities.clone());
    }
    options.custom_l4 = Some(dialler);
    // The engine cannot race past TLS. While there is another backend to ask, a silent handshake is not waited out.
    options.total_connection_timeout = Some(match policy.tls {
        Some(_) if !last => policy.connect_timeout.min(TLS_TIME),
        _ => policy.connect_timeout + Duration::from_millis(500),
    });
    options.idle_timeout = Some(if exchange.repeatable && policy.send_proxy.is_none() { KEEP } else { KEEP_ONCE });
    options.max_h2_streams = STREAMS;
    // All streams together may fill their windows before the connection is full: clients that do not read stop nobody else.
    options.h2_stream_window_size = Some(WINDOW);
    options.h2_connection_window_size = Some(WINDOW * STREAMS as u32);
    // A backend that vanishes under a long answer or a WebSocket is found out by the kernel.
    options.tcp_keepalive = Some(TcpKeepalive {
        idle: policy.unacked.max(Duration::from_secs(1)) * 4,
        interval: policy.unacked.max(Duration::from_secs(1)),
        count: 3,
        user_timeout: Duration::ZERO,
    });
    options.h2_ping_interval = Some(PING);
    // A connection that changes its protocol is HTTP/1.1's, and a client of HTTP/1.0 understands more of its answers.
    match policy.http {
        HttpVersion::Two if !exchange.tunnel => options.set_http_version(2, 2),
        HttpVersion::Auto if !exchange.tunnel && !exchange.old_client && policy.tls.is_some() => {
            options.set_http_version(2, 1)
        }
        _ => options.set_http_version(1, 1),
    }
    peer
}

/// Sets the cookie that names the cell and the backend, when the client has not got the right one.
pub fn keep_in_place(response: &mut ResponseHeader, exchange: &Exchange, request: &HeaderMap) -> Result<()> {
    let Some(pool) = &exchange.pool else { return Ok(()) };
    let Affinity::Cookie(cookie) = &pool.policy.affinity else { return Ok(()) };
    // Where its class alone fails, its client has not lost its place.
    if exchange.home.is_some_and(|home| home == exchange.member || exchange.avoided.contains(&home)) {
        return Ok(());
    }
    let mut text = format!("{}={}; Path={}", cookie.name, place(pool, exchange.member), cookie.path);
    if let Some(domain) = &cookie.domain {
        text.push_str("; Domain=");
        text.push_str(domain);
    }
    if let Some(age) = cookie.max_age {
        text.push_str(&format!("; Max-Age={}", age.as_secs()));
    }
    if cookie.secure.unwrap_or_else(|| exchange.is_secure(request)) {
        text.push_str("; Secure");
    }
    if cookie.http_only {
        text.push_str("; HttpOnly");
    }
    if let Some(same_site) = &cookie.same_site {
        text.push_str("; SameSite=");
        text.push_str(same_site);
    }
    response.append_header(header::SET_COOKIE, text)?;
    Ok(())
}

/// What a cookie says of a place in a pool: the cell's name, and of the backend's so little that nobody finds its address
/// by it.
fn place(pool: &Pool, member: usize) -> String {
    let member = &pool.members[member];
    format!("{}.{:04x}", pool.cells[member.cell].name, trace(&member.backend.name))
}

fn trace(name: &str) -> u16 {
    xxh3_64(name.as_bytes()) as u16
}

/// The member that a cookie names; where that is gone, the first of its cell.
pub fn home(pool: &Pool, cookie: &str) -> Option<usize> {
    let (cell, backend) = cookie.rsplit_once('.')?;
    let cell = pool.cells.iter().find(|known| *known.name == *cell)?;
    let backend = u16::from_str_radix(backend, 16).ok()?;
    let of_cell = cell.members.clone();
    let same = of_cell.clone().find(|&member| trace(&pool.members[member].backend.name) == backend);
    same.or(of_cell.into_iter().next())
}
