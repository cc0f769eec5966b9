//! Where a request goes: its route, its place in a pool, and what of it is refused.

use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Version};
use pingora_http::RequestHeader;
use pingora_proxy::Session;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::peer::home;
use super::route::{Action, Found};
use super::{Exchange, answer, forward, framer, route};
use crate::class::Avoids;
use crate::clock::{self, Time};
use crate::config::Affinity;
use crate::host::Host;
use crate::limits::{self, Permit};
use crate::pool::{self, Pool};
use crate::table::{self, End, Listener};
use crate::tcp;

/// Why a request is not served.
pub struct Refused {
    /// What the client gets.
    pub status: u16,
    /// The same in words.
    pub reason: &'static str,
    /// How its exchange ends.
    pub end: End,
}

/// Where a request goes.
pub enum Direction {
    /// To the pool of its route.
    Pool,
    /// To an answer of our own, which its route has.
    Own,
}

/// One of the pool's connections for a request, at once or in the pool's queue by its route's priority.
///
/// # Errors
/// There is no place, or not in time.
pub async fn place(exchange: &Exchange) -> std::result::Result<Option<Permit>, Refused> {
    let (Some(pool), Some(route)) = (&exchange.pool, &exchange.route) else { return Ok(None) };
    let most = (u64::from(pool.policy.max_connections) * u64::from(route.share) / 100).max(1) as u32;
    let ask = || pool.shared.connections.take(most);
    let queue = pool.policy.queue;
    let gone = || has_left(exchange);
    match pool.shared.queue.take_within_bound(route.lane, queue.length, queue.timeout, gone, ask).await {
        Some(place) => Ok(Some(place)),
        None => {
            pool.shared.refused_full.add(1);
            Err(Refused { status: 503, reason: answer::sentence(503), end: End::Full })
        }
    }
}

/// Whether nobody waits for the answer any more.
fn has_left(exchange: &Exchange) -> bool {
    let link = exchange.link();
    link.is_some_and(|link| link.is_left() || link.has_ended())
}

/// What `ask` gives when it is the request's turn in the pool's queue.
pub async fn in_turn<T>(exchange: &Exchange, pool: &Pool, lane: usize, ask: impl FnMut() -> Option<T>) -> Option<T> {
    let queue = pool.policy.queue;
    let gone = || has_left(exchange);
    if exchange.is_choosy() {
        return pool.shared.queue.take_some(queue.length, queue.timeout, gone, ask).await;
    }
    pool.shared.queue.take(lane, queue.length, queue.timeout, gone, ask).await
}

/// Collects the members to avoid because the request's class fails there, if others remain; or returns one member that this request
/// is to try.
pub fn avoid_failing(exchange: &mut Exchange, pool: &Pool, now: Time) -> Option<usize> {
    exchange.avoided.clear();
    if pool.shared.classes_failing.load(Relaxed) == 0 {
        return None;
    }
    let mut tries = None;
    let mut avoided = exchange.tried.clone();
    for (member, known) in pool.members.iter().enumerate() {
        let may_try = tries.is_none() && exchange.tried.is_empty() && known.backend.fit();
        match known.backend.avoids_class(exchange.class, exchange.repeatable, may_try, now) {
            Avoids::No => {}
            Avoids::Yes => avoided.push(member),
            Avoids::Tries => tries = Some(member),
        }
    }
    if avoided.len() > exchange.tried.len() && pool.has_untried(&avoided, false, |_| true) {
        exchange.avoided = avoided;
    }
    tries
}

/// Finds the route of a request, and its place in a pool.
pub fn direct(process: &Host, session: &Session, exchange: &mut Exchange) -> std::result::Result<Direction, Refused> {
    let listener = exchange.listener.clone();
    let face = match listener.as_deref().map(|listener| &listener.face) {
        Some(table::Face::Http(face)) => face,
        // The listener got another face by a reload, and this connection is still here.
        _ => return Err(no_route(421)),
    };
    if listener.as_ref().is_some_and(|listener| exceeds_rate(listener, exchange)) {
        return Err(Refused { status: 429, reason: answer::sentence(429), end: End::Limited });
    }
    let head = session.req_header();
    let (authority, path_and_query) = target(head);
    exchange.host = authority.to_owned();
    let upgrade = head.headers.get(header::UPGRADE).filter(|_| says(&head.headers, &header::CONNECTION, "upgrade"));
    serves(head, upgrade)?;
    if head.version == Version::HTTP_2 {
        hold_to_http1(head, authority)?;
    }
    let (path, query) = match path_and_query.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (path_and_query, None),
    };
    let path = if path.is_empty() { "/" } else { path };
    let asterisk = head.raw_path() == b"*";
    let normal = if asterisk { Some("/".into()) } else { route::normalise(path) };
    let normal = normal.ok_or(malformed(400, "the path climbs above its root, or holds what is no escape"))?;
    let host = route::host(authority);
    let route = match face.routes.find(&host, &normal, head.method.as_str(), &head.headers) {
        Found::Route(route) => route.clone(),
        Found::NoHost => return Err(no_route(421)),
        Found::NoRoute => return Err(no_route(404)),
    };
    let Action::Pool(pool) = &route.action else {
        exchange.route = Some(route);
        return Ok(Direction::Own);
    };
    exchange.pool_name = Some(pool.name.clone());
    let pool = pool.clone();
    exchange.class = xxh3_64(route.name.as_bytes()) << 1 | u64::from(!head.method.is_safe());
    exchange.kind = kind([&*route.name, head.method.as_str(), &normal]);
    if pool.shared.poison.kills(exchange.kind, exchange.began) {
        let reason = "Requests like this have ended the service; it is not served for some seconds.";
        return Err(Refused { status: 503, reason, end: End::Poison });
    }
    exchange.permits[1] = permit_beside_others(process, exchange)?;
    if let Some(connection) = exchange.connection.as_deref() {
        connection.link.bound_unacked(pool.policy.unacked);
        if !exchange.h2_client {
            connection.link.bound_idle(pool.policy.idle);
        }
    }
    pool.shared.budget.client(exchange.began);

    let sent = route.path_to_send(&normal);
    if !asterisk && (sent != path || absolute(head).is_some()) {
        exchange.target = Some(match query {
            Some(query) => format!("{sent}?{query}"),
            None => sent.clone().into_owned(),
        });
    }
    let key = route.idempotency_key.as_ref();
    let keyed = key.is_some_and(|name| head.headers.get(name).is_some_and(|value| !value.is_empty()));
    exchange.tunnel = upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"));
    exchange.repeatable = (head.method.is_idempotent() || keyed) && !exchange.tunnel;
    pin(exchange, &pool, head, &host);
    let client = exchange.connection.as_ref().map(|connection| connection.client.ip());
    let trusted = client.is_some_and(|client| forward::trusted(&face.forwarded, client));
    let known = head.headers.get(forward::REQUEST_ID).filter(|id| trusted && forward::is_request_id(id)).cloned();
    exchange.request_id = Some(known.unwrap_or_else(|| forward::request_id(&mut tcp::fork_rng())));
    exchange.route = Some(route);
    exchange.pool = Some(pool);
    Ok(Direction::Pool)
}

fn malformed(status: u16, reason: &'static str) -> Refused {
    Refused { status, reason, end: End::Malformed }
}

fn no_route(status: u16) -> Refused {
    Refused { status, reason: answer::sentence(status), end: End::NoRoute }
}

fn exceeds_rate(listener: &Listener, exchange: &Exchange) -> bool {
    let (Some(rate), Some(connection)) = (listener.per_client.rate, &exchange.connection) else { return false };
    let network = limits::network(connection.client.ip(), listener.per_client.prefix);
    !listener.shared.clients.allows(network, rate, exchange.began)
}

/// Refuses what no route can serve.
fn serves(head: &RequestHeader, upgrade: Option<&HeaderValue>) -> std::result::Result<(), Refused> {
    if matches!(head.method, Method::CONNECT | Method::TRACE) {
        return Err(malformed(405, answer::sentence(405)));
    }
    let is = |value: &HeaderValue, known: &str| value.as_bytes().eq_ignore_ascii_case(known.as_bytes());
    if upgrade.is_some_and(|to| !is(to, "websocket") && !is(to, "h2c")) {
        return Err(malformed(501, "the only upgrade that is served is websocket"));
    }
    if head.headers.get(header::EXPECT).is_some_and(|what| !is(what, "100-continue")) {
        return Err(malformed(417, answer::sentence(417)));
    }
    Ok(())
}

/// HTTP/1 was judged before it came here; HTTP/2 is held to the same.
fn hold_to_http1(head: &RequestHeader, authority: &str) -> std::result::Result<(), Refused> {
    let asterisk = head.raw_path() == b"*" && head.method != Method::OPTIONS;
    if !framer::is_authority(authority.as_bytes()) || !framer::is_target(head.raw_path()) || asterisk {
        return Err(malformed(400, "the host or the path holds a character that it cannot have"));
    }
    if head.headers.len() > framer::MAX_FIELDS {
        return Err(malformed(431, "the header has more than 128 lines"));
    }
    if head.headers.get_all(header::CONTENT_LENGTH).iter().nth(1).is_some() {
        return Err(malformed(400, "there is more than one Content-Length"));
    }
    // HTTP/2 has names that HTTP/1.1 has not.
    if !head.headers.keys().all(|name| name.as_str().bytes().all(framer::is_token)) {
        return Err(malformed(400, "the name of a header is not a token"));
    }
    Ok(())
}

/// What is served at the same address in the same way has one kind.
fn kind(parts: [&str; 3]) -> u64 {
    let mut kind = Xxh3::new();
    for part in parts {
        kind.update(part.as_bytes());
        kind.update(b"\0");
    }
    kind.digest()
}

/// Each stream of one connection needs a backend's connection, and descriptors are counted for all: a permit for one that is not the
/// only one.
fn permit_beside_others(process: &Host, exchange: &Exchange) -> std::result::Result<Option<Permit>, Refused> {
    let connection = exchange.connection.as_deref();
    if connection.is_none_or(|connection| connection.link.active.load(Relaxed) <= 1) {
        return Ok(None);
    }
    let permit = process.connections.take(process.max_connections.load(Relaxed));
    permit.map(Some).ok_or(Refused { status: 503, reason: answer::sentence(503), end: End::Full })
}

/// Notes what pins the request, by the pool's affinity.
fn pin(exchange: &mut Exchange, pool: &Arc<Pool>, head: &RequestHeader, host: &str) {
    match &pool.policy.affinity {
        Affinity::None => {}
        Affinity::ClientIp => {
            exchange.pin = exchange.connection.as_ref().map(|connection| pool::pin(connection.client.ip()));
        }
        Affinity::Sni => exchange.pin = Some(pool::pin_name(host)),
        Affinity::Header(name) => {
            exchange.pin = head.headers.get(name.as_str()).map(|value| xxh3_64(value.as_bytes()));
        }
        Affinity::Cookie(cookie) => {
            exchange.home = forward::cookie(&head.headers, &cookie.name).and_then(|value| home(pool, value));
        }
    }
}

/// Host, path and query of a target that is a whole URI, as a client of HTTP/1 may send it.
fn absolute(head: &RequestHeader) -> Option<(&str, &str)> {
    let target = std::str::from_utf8(head.raw_path()).ok().filter(|_| head.version != Version::HTTP_2)?;
    let scheme = ["http://", "https://"]
        .into_iter()
        .find(|scheme| target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)))?;
    let rest = &target[scheme.len()..];
    Some(rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len())))
}

/// The host that a request asks for, as it came, and its path with the query.
fn target(head: &RequestHeader) -> (&str, &str) {
    if let Some(parts) = absolute(head) {
        return parts;
    }
    let of_target = head.uri.authority().map(|authority| authority.as_str());
    let host = of_target.or_else(|| head.headers.get(header::HOST)?.to_str().ok()).unwrap_or("");
    (host, head.uri.path_and_query().map_or("/", |target| target.as_str()))
}

/// Whether a header of lists has this word.
pub fn says(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let lists = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    lists.map(<[u8]>::trim_ascii).any(|found| found.eq_ignore_ascii_case(word.as_bytes()))
}

/// In how many seconds the first backend may be back, where a hold says so.
pub fn soonest_return(pool: &Pool) -> Option<u64> {
    let now = clock::now();
    let holds = pool.members.iter().map(|member| member.backend.health().hold().1.since(now));
    holds.filter(|left| !left.is_zero()).min().map(|left| left.as_secs() + 1)
}
