//! HTTP: one request from its head to its log line, on the engine that pingora is to us.
//!
//! 1. `serve` has accepted the connection, ended TLS, and given it to the engine as a [`stream::Edge`], which judges what
//!    comes. The engine reads a request's head and calls this file, phase by phase, in the order of the functions below.
//! 2. `request_filter` finds the route, and answers by itself or finds the pool.
//! 3. `upstream_peer` chooses a member. The engine takes an idle connection to it, or dials by `upstream`.
//! 4. The request goes out; `wait` looks after it until the head of the answer comes.
//! 5. The answer is evidence. One that says "not now" (502, 503, 504) is not the client's yet: a request that may be sent
//!    twice goes to the next backend, as it does when a backend is silent or resets.
//! 6. `logging` counts it and writes its line.

pub mod answer;
#[cfg(test)]
mod contract;
pub mod forward;
pub mod framer;
pub mod route;
pub mod serve;
pub mod stream;
pub mod upstream;
pub mod wait;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Version};
use pingora_core::modules::http::HttpModules;
use pingora_core::protocols::{Digest, TcpKeepalive};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use self::forward::Client;
use self::route::{Action, Found, Route};
use self::serve::Connection;
use self::upstream::{Dialler, InUse, Won};
use self::wait::{Request, Verdict, Wait};
use crate::backend::Backend;
use crate::clock::{self, Time};
use crate::config::{Affinity, HttpVersion};
use crate::dial::{DialError, Failure, Story};
use crate::health::{Depth, Evidence, Seen, Source};
use crate::host::Host;
use crate::limits::Permit;
use crate::log::{AccessRecord, HttpRecord, Served};
use crate::pool::{self, CellShared, Policy, Pool, Want};
use crate::sniff;
use crate::table::{self, End, Listener};
use crate::{tcp, tls, witness};

/// An idle connection to a backend is kept this long.
const KEEP: Duration = Duration::from_secs(60);
/// The same for requests that may not be sent twice: what is young is hardly dead already.
const KEEP_ONCE: Duration = Duration::from_secs(1);
/// Streams at once on one HTTP/2 connection to a backend, and how often it is asked whether it is there.
const STREAMS: usize = 100;
const PING: Duration = Duration::from_secs(10);
/// Passes through the engine for one request, those that only hand over a race's winner included.
pub const PASSES: usize = 32;
/// A backend's TLS has this long, when there is another backend to ask.
const TLS_TIME: Duration = Duration::from_secs(1);
/// A request's body is drained for this long when the answer did not need it.
const DRAIN: Duration = Duration::from_secs(5);

/// Marks an answer that is not passed on because the request goes elsewhere.
const NOT_NOW: ErrorType = ErrorType::new("NotNow");

/// What the engine asks, on one worker.
pub struct Gateway {
    host: Arc<Host>,
}

/// One request, and what became of it.
#[derive(Default)]
pub struct Exchange {
    connection: Option<Arc<Connection>>,
    listener: Option<Arc<Listener>>,
    route: Option<Arc<Route>>,
    pool: Option<Arc<Pool>>,
    pool_name: Option<Arc<str>>,
    /// Of the pool, and for all but the first stream of a connection of the process.
    permits: [Option<Permit>; 2],
    began: Time,
    prefix: u32,
    pin: Option<u64>,
    home: Option<usize>,
    /// What goes to the backend, when it is not what came.
    target: Option<String>,
    request_id: Option<HeaderValue>,
    /// May be sent twice.
    repeatable: bool,
    /// A kind of request, for the record.
    kind: u64,

    // One attempt.
    member: usize,
    backend: Option<Arc<Backend>>,
    policy: Option<Arc<Policy>>,
    cell: Option<Arc<CellShared>>,
    dialler: Option<Arc<Dialler>>,
    line: Option<InUse>,
    wait: Option<Wait>,
    attempt_began: Time,
    sent: Option<Time>,
    shared: bool,
    reused: bool,

    // All attempts.
    tried: Vec<usize>,
    aside: Option<Won>,
    story: Story,
    retries: u32,
    served: Option<Served>,
    status: u16,
    took: Option<Duration>,
    body: [u64; 2],
    end: Option<End>,
    refused: Option<&'static str>,
}

impl Exchange {
    fn link(&self) -> Option<&stream::Link> {
        self.connection.as_ref().map(|connection| &*connection.link)
    }

    /// Forgets the attempt, and gives back what it held.
    fn leave_attempt(&mut self) {
        self.wait = None;
        self.line = None;
        self.sent = None;
        if let Some(dialler) = self.dialler.take() {
            let (_, story) = dialler.take();
            self.story_goes_on(story);
        }
    }

    /// The story is at the dialler's while it dials.
    fn story_goes_on(&mut self, story: Story) {
        if story.attempts >= self.story.attempts {
            self.story = story;
        }
    }

    fn fail(&mut self, cause: &str) {
        let backend = self.backend.as_ref().map_or_else(|| "".into(), |backend| backend.name.clone());
        self.story.failures.push(Failure { backend, cause: cause.into() });
    }

    /// Whether the request may go to one more backend now; takes a token for it.
    fn another(&mut self, session: &Session) -> bool {
        let (Some(pool), Some(policy)) = (&self.pool, &self.policy) else { return false };
        let unheard = session.response_written().is_none_or(|head| head.status.is_informational());
        let more = self.story.attempts < policy.attempts && pool.members.len() > self.tried.len();
        unheard && !session.as_ref().retry_buffer_truncated() && more && pool.shared.budget.extra(clock::now())
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = Box<Exchange>;

    fn new_ctx(&self) -> Box<Exchange> {
        Box::new(Exchange { began: clock::now(), ..Exchange::default() })
    }

    /// Bodies pass as they are.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, exchange: &mut Box<Exchange>) -> Result<()> {
        let about = session
            .digest()
            .and_then(|digest| digest.proxy_digest.as_ref())
            .and_then(|digest| digest.user_data.as_ref()?.downcast_ref::<Arc<Connection>>().cloned());
        let Some(connection) = about else { return Err(Error::new_in(ErrorType::InternalError)) };
        connection.link.active.fetch_add(1, Relaxed);
        exchange.prefix = witness::prefix(connection.client.ip());
        exchange.listener = Some(connection.listener(&self.host));
        exchange.connection = Some(connection);
        // The stream looks after all times by itself.
        session.set_read_timeout(None);
        session.set_total_drain_timeout(Some(DRAIN));
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, exchange: &mut Box<Exchange>) -> Result<bool> {
        match self.direct(session, exchange) {
            Ok(Direction::Pool) => Ok(false),
            Ok(Direction::Own) => {
                let Some(route) = exchange.route.clone() else { return Err(Error::new_in(ErrorType::InternalError)) };
                exchange.end = Some(End::Responded);
                match &route.action {
                    Action::Respond { status, page } => {
                        exchange.status = *status;
                        answer::page(session, *status, page).await?;
                    }
                    Action::Redirect { scheme, host, path, status } => {
                        let connection = exchange.connection.as_deref();
                        let tls = connection.is_some_and(|connection| connection.tls.is_some());
                        let head = session.req_header();
                        let own = head.uri.path_and_query().map_or("/", |path| path.as_str());
                        let own_scheme = if tls { "https" } else { "http" };
                        let location = format!(
                            "{}://{}{}",
                            scheme.as_deref().unwrap_or(own_scheme),
                            host.as_deref().unwrap_or(authority(head)),
                            path.as_deref().unwrap_or(own),
                        );
                        exchange.status = *status;
                        answer::redirect(session, *status, &location).await?;
                    }
                    Action::Pool(_) => return Err(Error::new_in(ErrorType::InternalError)),
                }
                Ok(true)
            }
            Err(refused) => {
                exchange.end = Some(refused.end);
                exchange.refused = Some(refused.reason);
                Err(Error::new_down(ErrorType::HTTPStatus(refused.status)))
            }
        }
    }

    async fn upstream_peer(&self, session: &mut Session, exchange: &mut Box<Exchange>) -> Result<Box<HttpPeer>> {
        let Some(pool) = exchange.pool.clone() else { return Err(Error::new_in(ErrorType::InternalError)) };
        let now = clock::now();
        let header = match (&exchange.connection, pool.policy.send_proxy) {
            (Some(connection), Some(version)) => sniff::proxy_header(version, connection.addresses(), &connection.tlvs),
            _ => Vec::new(),
        };
        let dialler = match exchange.aside.take() {
            Some(won) => {
                exchange.member = won.member;
                let story = std::mem::take(&mut exchange.story);
                Dialler::ready(self.host.clone(), pool.clone(), won, exchange.tried.clone(), header, story)
            }
            None => {
                let mut rng = tcp::fork_rng();
                let want = Want { pin: exchange.pin, tried: &exchange.tried, racing: None, home: exchange.home };
                let first = crate::dial::choose_first(&self.host, &pool, &want, now, &mut rng).map_err(|error| {
                    exchange.end = Some(ended(&pool, error));
                    Error::new_in(ErrorType::HTTPStatus(503))
                })?;
                exchange.member = first.member;
                let story = std::mem::take(&mut exchange.story);
                let tried = exchange.tried.clone();
                Dialler::new(self.host.clone(), pool.clone(), exchange.pin, first, tried, header, story)
            }
        };
        let member = &pool.members[exchange.member];
        let cell = &pool.cells[member.cell];
        exchange.backend = Some(member.backend.clone());
        exchange.policy = Some(pool.policy.clone());
        exchange.cell = Some(cell.shared.clone());
        exchange.attempt_began = now;
        let dialler = Arc::new(dialler);
        exchange.dialler = Some(dialler.clone());
        Ok(peer(&pool, &member.backend, dialler, session, exchange))
    }

    /// No connection: nothing was sent, so the next backend is asked, whatever the request.
    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        exchange: &mut Box<Exchange>,
        mut error: Box<Error>,
    ) -> Box<Error> {
        let outcome = exchange.dialler.take().map(|dialler| {
            let (outcome, story) = dialler.take();
            exchange.story_goes_on(story);
            outcome
        });
        let outcome = outcome.unwrap_or_default();
        error.set_retry(false);
        if let Some(won) = outcome.elsewhere {
            // Another member won the race: the next pass gets its connection.
            exchange.aside = Some(won);
            error.set_retry(true);
            return error;
        }
        if let (Some(failed), Some(pool)) = (outcome.failed, &exchange.pool) {
            exchange.end = Some(ended(pool, failed));
            return error;
        }
        // It connected, and then TLS or the beginning of HTTP/2 failed.
        let (Some(backend), Some(policy)) = (&exchange.backend, &exchange.policy) else { return error };
        let cause = handshake_cause(&error);
        let seen = Seen::Tls(cause);
        let evidence =
            Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen, began: exchange.attempt_began };
        backend.observe(&policy.health, &evidence, clock::now());
        let (attempts, most) = (exchange.story.attempts, policy.attempts);
        exchange.fail(cause);
        exchange.tried.push(exchange.member);
        let left = exchange.pool.as_ref().is_some_and(|pool| pool.members.len() > exchange.tried.len());
        if left && attempts < most {
            error.set_retry(true);
        } else {
            exchange.end = Some(End::Unreachable);
        }
        error
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        reused: bool,
        _peer: &HttpPeer,
        descriptor: std::os::fd::RawFd,
        _digest: Option<&Digest>,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        exchange.line = Some(InUse::begin(descriptor));
        exchange.reused = reused;
        let mut handshake = Duration::ZERO;
        if let Some(dialler) = &exchange.dialler {
            let (outcome, story) = dialler.take();
            exchange.story_goes_on(story);
            if let Some((took, _)) = outcome.connected {
                handshake = took;
            }
        }
        if reused {
            exchange.story.attempts += 1;
        }
        if let (Some(pool), Some(backend)) = (&exchange.pool, &exchange.backend) {
            let cell = pool.cells[pool.members[exchange.member].cell].name.clone();
            exchange.served = Some(Served { cell, backend: backend.name.clone(), handshake });
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        let (Some(connection), Some(listener)) = (exchange.connection.clone(), exchange.listener.clone()) else {
            return Err(Error::new_in(ErrorType::InternalError));
        };
        let table::Face::Http(face) = &listener.face else { return Err(Error::new_in(ErrorType::InternalError)) };
        exchange.shared = request.version == Version::HTTP_2;
        if let Some(target) = &exchange.target {
            request.set_raw_path(target.as_bytes())?;
        }
        let head = session.req_header();
        let trusted = forward::trusted(&face.forwarded, connection.client.ip());
        let client = Client { address: connection.client, tls: connection.tls.is_some(), host: authority(head) };
        forward::apply(&face.forwarded, trusted, client, request)?;
        if let Some(id) = &exchange.request_id {
            request.insert_header(forward::REQUEST_ID, id)?;
        }
        if let Some((name, subject)) = connection.subject() {
            request.remove_header(&name);
            if let Some(subject) = subject {
                request.insert_header(name, subject)?;
            }
        }
        // The engine takes it out with all that concerns one connection, and gRPC does not work without it.
        if says(&head.headers, &header::TE, "trailers") {
            request.insert_header(header::TE, "trailers")?;
            if request.version != Version::HTTP_2 {
                request.insert_header(header::CONNECTION, "te")?;
            }
        }
        if head.version == Version::HTTP_2 && request.version != Version::HTTP_2 {
            join_cookies(request)?;
        }
        if let Some(route) = &exchange.route {
            change(&route.request, request)?;
        }
        if session.as_mut().is_body_done() {
            self.sent(exchange);
        }
        Ok(())
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        exchange.body[0] += body.as_ref().map_or(0, Bytes::len) as u64;
        if end && exchange.sent.is_none() {
            self.sent(exchange);
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        let (Some(backend), Some(policy)) = (exchange.backend.clone(), exchange.policy.clone()) else {
            return Err(Error::new_in(ErrorType::InternalError));
        };
        let status = response.status.as_u16();
        if response.status.is_informational() && status != 101 {
            // A sign of life, and no answer yet.
            backend.silence.heard();
            return Ok(());
        }
        let now = clock::now();
        // An answer that comes before the whole request has come says nothing about time.
        let took = exchange.sent.map_or(Duration::ZERO, |sent| now.since(sent));
        exchange.wait = None;
        let error = is_error(status) || grpc_status(&response.headers) == Some(14);
        backend.replied(&policy.health, exchange.prefix, took, error, exchange.attempt_began, now);
        if let (Some(cell), true) = (&exchange.cell, exchange.sent.is_some()) {
            cell.first_byte.record(took);
        }
        if !error {
            wait::learn(exchange.kind, took);
        }
        exchange.status = status;
        exchange.took = Some(took);
        if matches!(status, 502..=504) && exchange.repeatable {
            exchange.tried.push(exchange.member);
            if exchange.another(session) {
                exchange.fail(match status {
                    502 => "answered 502",
                    503 => "answered 503",
                    _ => "answered 504",
                });
                let mut error = Error::new_up(NOT_NOW);
                error.set_retry(true);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        let status = response.status.as_u16();
        if response.status.is_informational() && status != 101 {
            return Ok(());
        }
        if status == 101 {
            if let Some(link) = exchange.link() {
                link.upgrade();
            }
        } else {
            take_out_hops(response);
        }
        if let Some(route) = exchange.route.take() {
            for name in &route.response.remove {
                response.remove_header(name);
            }
            for (name, value) in &route.response.add {
                response.insert_header(name, value)?;
            }
        }
        self.keep_in_place(response, exchange)?;
        if exchange.link().is_some_and(stream::Link::closing) {
            session.set_keepalive(None);
        }
        // From here on no other backend is asked: a long answer must not hold a whole table.
        exchange.pool = None;
        exchange.listener = None;
        Ok(())
    }

    fn upstream_response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        exchange: &mut Box<Exchange>,
    ) -> Result<Option<Duration>> {
        exchange.body[1] += body.as_ref().map_or(0, Bytes::len) as u64;
        Ok(None)
    }

    fn upstream_response_trailer_filter(
        &self,
        _session: &mut Session,
        trailers: &mut HeaderMap,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        // A gRPC call says how it ended behind its body: 14 is what 503 is elsewhere.
        if let (Some(14), Some(backend), Some(policy)) = (grpc_status(trailers), &exchange.backend, &exchange.policy) {
            let now = clock::now();
            let took = exchange.took.unwrap_or_default();
            backend.replied(&policy.health, exchange.prefix, took, true, exchange.attempt_began, now);
        }
        Ok(())
    }

    /// Something failed after a connection was there. Says whether the request goes elsewhere.
    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        exchange: &mut Box<Exchange>,
        reused: bool,
    ) -> Box<Error> {
        let verdict = exchange.wait.as_ref().map_or(Verdict::Waits, Wait::verdict);
        // What the engine itself knows for unprocessed: a refused stream, a connection that says it is going.
        let unprocessed = is_unprocessed(&error);
        let not_now = error.etype() == &NOT_NOW;
        let answered = exchange.took.is_some() && !not_now;
        let sent = exchange.sent.take();
        exchange.wait = None;
        exchange.line = None;
        error.set_retry(false);
        if let Some(dialler) = exchange.dialler.take() {
            let (_, story) = dialler.take();
            exchange.story_goes_on(story);
        }
        if *error.esource() == ErrorSource::Downstream {
            exchange.end.get_or_insert(End::ClientGone);
            return error;
        }
        if answered {
            // The answer has begun, so nobody else can finish it.
            exchange.end = Some(End::BackendReset);
            return error;
        }
        if not_now {
            exchange.took = None;
            exchange.status = 0;
            exchange.retries += 1;
            error.set_retry(true);
            return error;
        }
        let (Some(backend), Some(policy)) = (exchange.backend.clone(), exchange.policy.clone()) else { return error };
        let now = clock::now();
        match verdict {
            Verdict::TimedOut => {
                exchange.fail("no answer in time");
                exchange.end = Some(End::Timeout);
                error.etype = ErrorType::HTTPStatus(504);
                return error;
            }
            Verdict::Move => exchange.fail("silent"),
            Verdict::Waits => {
                exchange.fail(if unprocessed { "unprocessed" } else { "ended before its first byte" });
                // An idle connection may die of its age; a new one that ends unanswered says something.
                if !reused && !unprocessed {
                    backend.unanswered(&policy.health, exchange.prefix, sent.is_some(), exchange.attempt_began, now);
                }
            }
        }
        exchange.end = Some(End::BackendReset);
        exchange.tried.push(exchange.member);
        if (exchange.repeatable || unprocessed) && exchange.another(session) {
            exchange.retries += 1;
            exchange.end = None;
            error.set_retry(true);
        }
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, exchange: &mut Box<Exchange>) -> FailToProxy {
        let status = match (exchange.end, error.etype()) {
            (_, ErrorType::HTTPStatus(status)) => *status,
            (Some(End::Unreachable | End::Full), _) => 503,
            (Some(End::Timeout), _) => 504,
            _ => match error.esource() {
                ErrorSource::Upstream => 502,
                ErrorSource::Downstream => self.downstream_status(error, exchange),
                ErrorSource::Internal | ErrorSource::Unset => 500,
            },
        };
        let begun = session.response_written().is_some_and(|head| !head.status.is_informational());
        if status == 0 || begun {
            return FailToProxy { error_code: status, can_reuse_downstream: false };
        }
        exchange.status = status;
        let retry_after = match exchange.end {
            Some(End::Full) => Some(1),
            Some(End::Unreachable) => exchange.pool.as_ref().and_then(|pool| soonest_return(pool)),
            _ => None,
        };
        let listener = exchange.listener.clone();
        let pages = match listener.as_deref().map(|listener| &listener.face) {
            Some(table::Face::Http(face)) => face.pages.as_slice(),
            _ => &[],
        };
        let reason = exchange.refused.unwrap_or_else(|| answer::sentence(status));
        // The engine keeps a client's connection only where a request failed before a backend was looked for; then its
        // answer must not say otherwise.
        let whole = session.as_mut().is_body_done();
        let kept = exchange.pool.is_none() && exchange.backend.is_none() && whole && status != 400;
        if !kept {
            session.set_keepalive(None);
        }
        let sent = answer::error(session, status, reason, retry_after, pages).await;
        FailToProxy { error_code: status, can_reuse_downstream: sent.is_ok() && kept }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, exchange: &mut Box<Exchange>) {
        exchange.leave_attempt();
        let Some(connection) = exchange.connection.take() else { return };
        let end = match (exchange.end, error) {
            (Some(end), _) => end,
            (None, None) => End::Answered,
            (None, Some(error)) if *error.esource() == ErrorSource::Downstream => End::ClientGone,
            (None, Some(_)) => End::BackendReset,
        };
        let shared = &connection.shared;
        shared.requests[usize::from(exchange.status / 100).min(5)].add(1);
        shared.retries.add(u64::from(exchange.retries));
        let now = clock::now();
        let mut record = AccessRecord::new(connection.name.clone(), connection.client);
        record.pool = exchange.pool_name.take();
        record.served = exchange.served.take();
        record.attempts = exchange.story.attempts;
        record.raced = exchange.story.raced;
        record.failures = std::mem::take(&mut exchange.story.failures);
        record.first_byte = exchange.took;
        record.bytes_in = exchange.body[0];
        record.bytes_out = exchange.body[1];
        if self.host.access.wants(&record, end) {
            let head = session.req_header();
            record.http = Some(Box::new(HttpRecord {
                method: head.method.to_string(),
                host: authority(head).to_owned(),
                path: String::from_utf8_lossy(head.raw_path()).into_owned(),
                status: exchange.status,
                retries: exchange.retries,
                id: exchange.request_id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned(),
            }));
            self.host.access.write(record, end, now.since(exchange.began));
        }
        connection.link.active.fetch_sub(1, Relaxed);
        connection.link.next();
    }

    fn suppress_error_log(&self, _session: &Session, _exchange: &Box<Exchange>, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _exchange: &Box<Exchange>,
        _error: &Error,
        _context: ProxyWarnLogContext,
    ) -> bool {
        true
    }
}

/// Why a request is not served.
struct Refused {
    status: u16,
    reason: &'static str,
    end: End,
}

/// Where a request goes.
enum Direction {
    Pool,
    Own,
}

impl Gateway {
    /// A gateway to the live table.
    pub fn new(host: Arc<Host>) -> Gateway {
        Gateway { host }
    }

    /// Finds the route of a request, and its place in a pool.
    fn direct(&self, session: &Session, exchange: &mut Exchange) -> std::result::Result<Direction, Refused> {
        let malformed = |status, reason| Refused { status, reason, end: End::Malformed };
        let listener = exchange.listener.clone();
        let face = match listener.as_deref().map(|listener| &listener.face) {
            Some(table::Face::Http(face)) => face,
            // The listener got another face by a reload, and this connection is still here.
            _ => return Err(Refused { status: 421, reason: answer::sentence(421), end: End::NoRoute }),
        };
        let head = session.req_header();
        if matches!(head.method, Method::CONNECT | Method::TRACE) {
            return Err(malformed(405, answer::sentence(405)));
        }
        let upgrade = head.headers.get(header::UPGRADE).filter(|_| says(&head.headers, &header::CONNECTION, "upgrade"));
        if upgrade.is_some_and(|to| {
            !["websocket", "h2c"].iter().any(|known| to.as_bytes().eq_ignore_ascii_case(known.as_bytes()))
        }) {
            return Err(malformed(501, "the only upgrade that is served is websocket"));
        }
        if head.headers.get(header::EXPECT).is_some_and(|what| !what.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
            return Err(malformed(417, answer::sentence(417)));
        }
        let path_and_query = head.uri.path_and_query().map_or("/", |target| target.as_str());
        let (path, query) = match path_and_query.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (path_and_query, None),
        };
        let path = if path.is_empty() { "/" } else { path };
        let asterisk = head.raw_path() == b"*";
        let normal = if asterisk { Some("/".into()) } else { route::normalise(path) };
        let Some(normal) = normal else {
            return Err(malformed(400, "the path climbs above its root, or holds what is no escape"));
        };
        let host = route::host(authority(head));
        let route = match face.routes.find(&host, &normal, head.method.as_str(), &head.headers) {
            Found::Route(route) => route.clone(),
            Found::NoHost => {
                return Err(Refused { status: 421, reason: answer::sentence(421), end: End::NoRoute });
            }
            Found::NoRoute => {
                return Err(Refused { status: 404, reason: answer::sentence(404), end: End::NoRoute });
            }
        };
        let Action::Pool(pool) = &route.action else {
            exchange.route = Some(route);
            return Ok(Direction::Own);
        };
        exchange.pool_name = Some(pool.name.clone());
        let pool = pool.clone();

        let full = |reason| Refused { status: 503, reason, end: End::Full };
        let most = (u64::from(pool.policy.max_connections) * u64::from(route.share) / 100).max(1) as u32;
        let Some(place) = pool.shared.connections.take(most) else {
            pool.shared.refused_full.add(1);
            return Err(full(answer::sentence(503)));
        };
        let connection = exchange.connection.as_deref();
        let crowded = connection.is_some_and(|connection| connection.link.active.load(Relaxed) > 1);
        let process = match crowded.then(|| self.host.connections.take(self.host.max_connections.load(Relaxed))) {
            None => None,
            Some(Some(permit)) => Some(permit),
            // Each stream of one connection needs a backend's connection, and descriptors are counted for all.
            Some(None) => return Err(full(answer::sentence(503))),
        };
        exchange.permits = [Some(place), process];
        pool.shared.budget.client(exchange.began);

        let sent = route.path_to_send(&normal);
        if !asterisk && (sent != path || head.uri.authority().is_some() && head.version != Version::HTTP_2) {
            exchange.target = Some(match query {
                Some(query) => format!("{sent}?{query}"),
                None => sent.clone().into_owned(),
            });
        }
        let key = route.idempotency_key.as_ref();
        let keyed = key.is_some_and(|name| head.headers.get(name).is_some_and(|value| !value.is_empty()));
        let tunnel = upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"));
        exchange.repeatable = (head.method.is_idempotent() || keyed) && !tunnel;
        exchange.kind = {
            let mut kind = Xxh3::new();
            for part in [&*route.name, head.method.as_str(), &normal] {
                kind.update(part.as_bytes());
                kind.update(b"\0");
            }
            kind.digest()
        };
        let client = exchange.connection.as_ref().map(|connection| connection.client.ip());
        match &pool.policy.affinity {
            Affinity::None => {}
            Affinity::ClientIp => exchange.pin = client.map(pool::pin),
            Affinity::Sni => exchange.pin = Some(pool::pin_name(&host)),
            Affinity::Header(name) => {
                exchange.pin = head.headers.get(name.as_str()).map(|value| xxh3_64(value.as_bytes()));
            }
            Affinity::Cookie(cookie) => {
                exchange.home = forward::cookie(&head.headers, &cookie.name).and_then(|value| home(&pool, value));
            }
        }
        let trusted = client.is_some_and(|client| forward::trusted(&face.forwarded, client));
        let known = head.headers.get(forward::REQUEST_ID).filter(|id| trusted && forward::is_request_id(id)).cloned();
        exchange.request_id = Some(known.unwrap_or_else(|| forward::request_id(&mut tcp::fork_rng())));
        exchange.route = Some(route);
        exchange.pool = Some(pool);
        Ok(Direction::Pool)
    }

    /// The whole request has been given to a backend: the wait begins.
    fn sent(&self, exchange: &mut Exchange) {
        let (Some(backend), Some(policy), Some(line)) = (&exchange.backend, &exchange.policy, &exchange.line) else {
            return;
        };
        let now = clock::now();
        let timeout = exchange.route.as_ref().and_then(|route| route.timeout).unwrap_or(policy.request_timeout);
        let request = Request {
            backend: backend.clone(),
            policy: policy.clone(),
            descriptor: line.descriptor(),
            shared: exchange.shared,
            prefix: exchange.prefix,
            timeout,
            movable: exchange.repeatable,
            kind: exchange.kind,
        };
        exchange.sent = Some(now);
        exchange.wait = Some(Wait::begin(request, now));
    }

    /// Sets the cookie that names the cell and the backend, when the client has not got the right one.
    fn keep_in_place(&self, response: &mut ResponseHeader, exchange: &Exchange) -> Result<()> {
        let Some(pool) = &exchange.pool else { return Ok(()) };
        let Affinity::Cookie(cookie) = &pool.policy.affinity else { return Ok(()) };
        if exchange.home == Some(exchange.member) {
            return Ok(());
        }
        let tls = exchange.connection.as_ref().is_some_and(|connection| connection.tls.is_some());
        let mut text = format!("{}={}; Path={}", cookie.name, place(pool, exchange.member), cookie.path);
        if let Some(domain) = &cookie.domain {
            text.push_str("; Domain=");
            text.push_str(domain);
        }
        if let Some(age) = cookie.max_age {
            text.push_str(&format!("; Max-Age={}", age.as_secs()));
        }
        if cookie.secure.unwrap_or(tls) {
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

    /// What a client gets whose own side failed; 0: nothing, it is gone.
    fn downstream_status(&self, error: &Error, exchange: &mut Exchange) -> u16 {
        let Some(link) = exchange.link() else { return 0 };
        if let Some((refusal, _)) = link.refused() {
            exchange.end = Some(End::Malformed);
            exchange.refused = Some(refusal.reason);
            return refusal.status;
        }
        if link.timed_out() {
            exchange.end = Some(End::Idle);
            return 408;
        }
        match error.etype() {
            ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed | ErrorType::H2Error => 0,
            _ => {
                exchange.end = Some(End::Malformed);
                400
            }
        }
    }
}

/// What the engine is told about a member.
fn peer(
    pool: &Pool,
    backend: &Backend,
    dialler: Arc<Dialler>,
    session: &Session,
    exchange: &Exchange,
) -> Box<HttpPeer> {
    let policy = &pool.policy;
    // An empty name would make the engine judge nothing: a pool with TLS always has one.
    let name = policy.tls.as_ref().map(|tls| tls.name.clone());
    let mut peer = Box::new(HttpPeer::new(backend.address, name.is_some(), name.unwrap_or_default()));
    // An idle connection is used again only by those who may share it: for this backend as long as it is not retired, for
    // requests of the same kind, and where it began with a PROXY header, for the same client.
    let mut key = Xxh3::new();
    key.update(&backend.id.to_le_bytes());
    key.update(&backend.retired.load(Relaxed).to_le_bytes());
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
    // A backend that vanishes under a long answer or a WebSocket is found out by the kernel.
    options.tcp_keepalive = Some(TcpKeepalive {
        idle: policy.unacked.max(Duration::from_secs(1)) * 4,
        interval: policy.unacked.max(Duration::from_secs(1)),
        count: 3,
        user_timeout: Duration::ZERO,
    });
    options.h2_ping_interval = Some(PING);
    // A connection that changes its protocol is HTTP/1.1's.
    let upgrade = session.is_upgrade_req();
    match policy.http {
        HttpVersion::Two if !upgrade => options.set_http_version(2, 2),
        HttpVersion::Auto if !upgrade && policy.tls.is_some() => options.set_http_version(2, 1),
        _ => options.set_http_version(1, 1),
    }
    peer
}

/// The host that a request asks for, as it came.
pub fn authority(head: &RequestHeader) -> &str {
    let of_target = head.uri.authority().map(|authority| authority.as_str());
    of_target.or_else(|| head.headers.get(header::HOST)?.to_str().ok()).unwrap_or("")
}

/// Whether a header of lists has this word.
fn says(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let lists = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    lists.map(<[u8]>::trim_ascii).any(|found| found.eq_ignore_ascii_case(word.as_bytes()))
}

fn is_error(status: u16) -> bool {
    status >= 500 && !matches!(status, 501 | 505)
}

fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// HTTP/2 may cut a Cookie header in pieces; HTTP/1.1 has one (RFC 9113, 8.2.3).
fn join_cookies(request: &mut RequestHeader) -> Result<()> {
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

fn change(changes: &route::Changes, request: &mut RequestHeader) -> Result<()> {
    for name in &changes.remove {
        request.remove_header(name);
    }
    for (name, value) in &changes.add {
        request.insert_header(name, value)?;
    }
    Ok(())
}

/// Takes out of an answer what concerns the backend's connection alone.
fn take_out_hops(response: &mut ResponseHeader) {
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
    for name in ["keep-alive", "proxy-connection"] {
        response.remove_header(name);
    }
    response.remove_header(&header::CONNECTION);
}

/// The end of a request that dialling failed for; counted.
fn ended(pool: &Pool, error: DialError) -> End {
    match error {
        DialError::Full => {
            pool.shared.refused_full.add(1);
            End::Full
        }
        DialError::Unreachable => {
            pool.shared.refused_unreachable.add(1);
            End::Unreachable
        }
        DialError::ClientGone => End::ClientGone,
    }
}

/// In how many seconds the first backend may be back, where a hold says so.
fn soonest_return(pool: &Pool) -> Option<u64> {
    let now = clock::now();
    let holds = pool.members.iter().map(|member| member.backend.health().hold().1.since(now));
    holds.filter(|left| !left.is_zero()).min().map(|left| left.as_secs() + 1)
}

/// Whether a backend says of a request that it has not been looked at: a refused stream, or a connection that is going.
fn is_unprocessed(error: &Error) -> bool {
    let Some(cause) = error.root_cause().downcast_ref::<h2::Error>() else { return false };
    cause.is_remote()
        && (cause.is_go_away() && cause.reason() == Some(h2::Reason::NO_ERROR)
            || cause.is_reset() && cause.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// How a handshake failed, in words.
fn handshake_cause(error: &Error) -> &'static str {
    match error.etype() {
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => "handshake silent",
        _ => tls::cause_of_text(&error.to_string()),
    }
}

/// What a cookie says of a place in a pool: the cell's name, and a hash of the backend's.
fn place(pool: &Pool, member: usize) -> String {
    let member = &pool.members[member];
    format!("{}.{:08x}", pool.cells[member.cell].name, xxh3_64(member.backend.name.as_bytes()) as u32)
}

/// The member that a cookie names; where that is gone, the first of its cell.
fn home(pool: &Pool, cookie: &str) -> Option<usize> {
    let (cell, backend) = cookie.rsplit_once('.')?;
    let cell = pool.cells.iter().find(|known| *known.name == *cell)?;
    let backend = u32::from_str_radix(backend, 16).ok()?;
    let of_cell = cell.members.clone();
    let same = of_cell.clone().find(|&member| xxh3_64(pool.members[member].backend.name.as_bytes()) as u32 == backend);
    same.or(of_cell.into_iter().next())
}
