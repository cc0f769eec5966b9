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
mod direct;
mod exchange;
pub mod forward;
pub mod framer;
mod hops;
mod classify;
mod peer;
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
use http::header;
use http::{HeaderMap, Version};
use pingora_core::modules::http::HttpModules;
use pingora_core::protocols::Digest;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};

use self::direct::{Direction, says};
use self::exchange::{Exchange, Judged};
use self::forward::Client;
use self::route::Action;
use self::serve::Connection;
use self::upstream::{Dialler, InUse};
use self::wait::{Request, Verdict, Wait};
use crate::clock;
use crate::dial::{DialError, First};
use crate::health::{Depth, Evidence, Seen, Source};
use crate::host::Host;
use crate::log::{AccessRecord, HttpRecord, Served};
use crate::pool::{Trial, Want};
use crate::sniff;
use crate::table::{self, End};
use crate::{blame, tcp, tls};

/// Passes through the engine for one request, those that only hand over a race's winner included.
pub const PASSES: usize = 32;
/// A request's body is drained for this long when the answer did not need it.
const DRAIN: Duration = Duration::from_secs(5);

/// A piece of an answer, of 64 KiB at most, may take a client of HTTP/2 this long beyond the idle time: one that takes a kilobyte a
/// second is slow, and lives.
const SLOW_PIECE: Duration = Duration::from_secs(64);

/// Marks an answer that is not passed on because the request goes elsewhere.
const NOT_NOW: ErrorType = ErrorType::new("NotNow");

/// Ends a pass, so that the next begins with another backend.
fn not_now() -> Box<Error> {
    let mut error = Error::new_up(NOT_NOW);
    error.set_retry(true);
    error
}

/// What the engine asks, on one worker.
pub struct Gateway {
    host: Arc<Host>,
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
        connection.link.begins();
        exchange.h2_client = session.req_header().version == Version::HTTP_2;
        exchange.old_client = session.req_header().version == Version::HTTP_10;
        exchange.prefix = blame::prefix(connection.client.ip());
        exchange.listener = connection.listener(&self.host);
        exchange.connection = Some(connection);
        // The stream looks after all times by itself.
        session.set_read_timeout(None);
        session.set_total_drain_timeout(Some(DRAIN));
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, exchange: &mut Box<Exchange>) -> Result<bool> {
        let direction = direct::direct(&self.host, session, exchange);
        if !exchange.tunnel {
            // Nobody asked for what the engine would make of this.
            session.req_header_mut().remove_header(&header::UPGRADE);
        }
        if session.req_header().version == Version::HTTP_10 {
            session.set_ignore_info_resp(true);
        }
        if let (true, Some(listener), Some(pool)) = (exchange.h2_client, &exchange.listener, &exchange.pool) {
            // Any byte keeps its connection, so each of its answers has a bound of its own; by pieces, which a client takes slowly.
            session.set_write_timeout(Some(listener.idle(pool) + SLOW_PIECE));
        }
        match direction {
            Ok(Direction::Pool) => match direct::place(exchange).await {
                Ok(place) => {
                    exchange.permits[0] = place;
                    Ok(false)
                }
                Err(refused) => Err(exchange.refuse(&refused)),
            },
            Ok(Direction::Own) => {
                self.answer_by_itself(session, exchange).await?;
                Ok(true)
            }
            Err(refused) => Err(exchange.refuse(&refused)),
        }
    }

    async fn upstream_peer(&self, _session: &mut Session, exchange: &mut Box<Exchange>) -> Result<Box<HttpPeer>> {
        let Some(pool) = exchange.pool.clone() else { return Err(Error::new_in(ErrorType::InternalError)) };
        if let Some(lost) = exchange.suspected_of.take()
            && tcp::has_killed(exchange.kind, &lost).await
        {
            exchange.end = Some(End::Poison);
            return Err(Error::new_in(ErrorType::HTTPStatus(502)));
        }
        let mut now = clock::now();
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
                let tries = direct::avoid_failing(exchange, &pool, now);
                let tries = tries.and_then(|member| Some((member, pool.take_place(member, now)?)));
                // What may not be sent twice tries nothing as long as others do.
                let want = Want {
                    pin: exchange.pin,
                    tried: &exchange.tried,
                    racing: None,
                    home: exchange.home,
                    avoid: &exchange.avoided,
                    trial: if exchange.repeatable { Trial::Yes } else { Trial::Late },
                };
                let lane = exchange.route.as_ref().map_or(1, |route| route.lane);
                let mut first = match tries {
                    Some((member, permit)) => Ok(First { member, doubtful: false, permit }),
                    // Whoever comes later does not overtake those who wait.
                    None if !exchange.is_choosy() && pool.shared.queue.waits_before(lane) => Err(DialError::Full),
                    None => crate::dial::choose_first(&self.host, &pool, &want, now, &mut rng),
                };
                if matches!(first, Err(DialError::Full)) {
                    let ask = || crate::dial::choose_first(&self.host, &pool, &want, clock::now(), &mut rng).ok();
                    first = direct::in_turn(exchange, &pool, lane, ask).await.ok_or(DialError::Full);
                }
                let first = first.map_err(|error| {
                    exchange.end = Some(tcp::ended(&pool, error));
                    Error::new_in(ErrorType::HTTPStatus(503))
                })?;
                now = clock::now();
                exchange.member = first.member;
                let story = std::mem::take(&mut exchange.story);
                let tried = if exchange.avoided.is_empty() { &exchange.tried } else { &exchange.avoided }.clone();
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
        Ok(peer::peer(&pool, &member.backend, dialler, exchange))
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
            exchange.end = Some(tcp::ended(pool, failed));
            return error;
        }
        // It connected, and then TLS or the beginning of HTTP/2 failed.
        let (Some(backend), Some(policy)) = (&exchange.backend, &exchange.policy) else { return error };
        let cause = classify::handshake_cause(&error);
        let for_client = policy.send_proxy.is_some() && tls::may_be_the_clients(cause);
        if outcome.connected.is_some() && policy.tls.is_some() && for_client {
            backend.unanswered(&policy.health, exchange.prefix, true, exchange.attempt_began, clock::now());
        } else if outcome.connected.is_some() && policy.tls.is_some() {
            let seen = Seen::Tls(cause);
            let evidence =
                Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen, began: exchange.attempt_began };
            backend.observe(&policy.health, &evidence, clock::now());
        }
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
        session: &mut Session,
        reused: bool,
        _peer: &HttpPeer,
        descriptor: std::os::fd::RawFd,
        _digest: Option<&Digest>,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        exchange.line = Some(InUse::begin(descriptor));
        let mut handshake = Duration::ZERO;
        if let Some(dialler) = &exchange.dialler {
            let (outcome, story) = dialler.take();
            exchange.story_goes_on(story);
            if let Some((took, _)) = outcome.connected {
                handshake = took;
            }
        }
        exchange.permit = exchange.dialler.take().and_then(|dialler| dialler.settle());
        if reused {
            exchange.story.attempts += 1;
        }
        if let (Some(pool), Some(backend)) = (&exchange.pool, &exchange.backend) {
            let cell = pool.cells[pool.members[exchange.member].cell].name.clone();
            exchange.served = Some(Served { cell, backend: backend.name.clone(), handshake });
        }
        // It has said so since it was chosen, and nothing was sent yet.
        if exchange.backend.as_ref().is_some_and(|backend| backend.version.is_old()) {
            if exchange.leaves(session, false, true, "its data are too old") {
                return Err(not_now());
            }
            exchange.end = Some(End::Unreachable);
            return Err(Error::new_in(ErrorType::HTTPStatus(503)));
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
        let head_is_one = session.req_header().version != Version::HTTP_2;
        if let Some(target) = &exchange.target {
            request.set_raw_path(target.as_bytes())?;
        }
        let head = session.req_header();
        // HTTP/1.0 may name no host; its backend is told the address that the client meant.
        if !request.headers.contains_key(header::HOST) && request.uri.authority().is_none() {
            let destination = connection.destination.map(|address| address.to_string()).unwrap_or_default();
            request
                .insert_header(header::HOST, if exchange.host.is_empty() { &destination } else { &exchange.host })?;
        }
        let trusted = forward::trusted(&face.forwarded, connection.client.ip());
        let client = Client { address: connection.client, tls: connection.tls.is_some(), host: &exchange.host };
        forward::apply(&face.forwarded, trusted, client, request)?;
        if let Some(id) = &exchange.request_id {
            request.insert_header(forward::REQUEST_ID, id)?;
        }
        if let Some((name, subject)) = connection.subject() {
            request.remove_header(&name);
            hops::remove_alike(request, &name);
            if let Some(subject) = subject {
                request.insert_header(name, subject)?;
            }
        }
        // The engine takes it out with all that concerns one connection, and gRPC does not work without it.
        if says(&head.headers, &header::TE, "trailers") {
            request.insert_header(header::TE, "trailers")?;
            if request.version != Version::HTTP_2 && !exchange.tunnel {
                request.insert_header(header::CONNECTION, "te")?;
            }
        }
        if head.version == Version::HTTP_2 && request.version != Version::HTTP_2 {
            hops::join_cookies(request)?;
        }
        if let Some(route) = &exchange.route {
            hops::change(&route.request, request)?;
        }
        let complete = session.as_mut().is_body_done();
        let expects = head_is_one && !complete && !exchange.old_client && request.headers.contains_key(header::EXPECT);
        // Said anew for each request and each attempt.
        connection.link.expects.store(expects && !exchange.shared, Relaxed);
        if exchange.shared {
            // What a backend says before its answer does not come through HTTP/2.
            request.remove_header(&header::EXPECT);
            if expects {
                session.as_mut().set_close_on_response_before_downstream_finish(false);
                session.as_mut().write_continue_response().await?;
            }
            // Its streams have windows of their own, so that the kernel holds little for any of them.
            exchange.line.iter_mut().for_each(InUse::opens_up);
        }
        // A client of HTTP/2 sends its bodies side by side, and none of them alone can be waited for.
        let body = (head_is_one && !complete).then(|| connection.clone());
        self.begin_wait(exchange, body, complete);
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
        // The engine would end the body twice, and the second end would begin the next request on that connection.
        if end && body.as_ref().is_some_and(Bytes::is_empty) {
            *body = None;
        }
        // A request of HTTP/2 that ends with trailers ends with no body.
        let end = end || body.is_none();
        if body.is_some()
            && let Some(link) = exchange.link()
        {
            link.expects.store(false, Relaxed);
        }
        let now = clock::now();
        match &exchange.wait {
            Some(wait) if end && exchange.sent.is_none() => {
                wait.complete(now);
                exchange.sent = Some(now);
            }
            Some(wait) if exchange.sent.is_none() => wait.goes_on(now),
            _ => {}
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
        if status == 101 && !exchange.tunnel {
            return Err(
                Error::explain(ErrorType::InvalidHTTPHeader, "another protocol, which nobody asked for").into_up()
            );
        }
        if response.status.is_informational() && status != 101 {
            if let Some(link) = exchange.link() {
                link.expects.store(false, Relaxed);
            }
            // A sign of life, and no answer yet: the engine would end the client's connection with it.
            backend.heard(None, clock::now());
            session.as_mut().set_close_on_response_before_downstream_finish(false);
            return Ok(());
        }
        let now = clock::now();
        // An answer that comes before the whole request has come says nothing about time.
        let took = exchange.sent.map(|sent| now.since(sent));
        backend.heard(took.filter(|_| !classify::is_error(status)), now);
        // Only now: whoever leaves before the answer is known counts as unanswered.
        exchange.wait = None;
        if let Some(line) = &mut exchange.line {
            line.talks();
        }
        exchange.judge_head(session, response, &backend, &policy, now);
        if let (Some(cell), Some(took)) = (&exchange.cell, took) {
            cell.first_byte.record(took);
        }
        // What is not served, or not changed, is answered faster than what is.
        if let (200..=303 | 307 | 308, Some(took)) = (status, took) {
            wait::learn(exchange.kind, took);
        }
        backend.denied(exchange.prefix, matches!(status, 401 | 403 | 429), now);
        if let Some(pool) = &exchange.pool {
            pool.shared.poison.acquit(exchange.kind);
        }
        exchange.status = status;
        exchange.took = Some(took.unwrap_or_default());
        let version = policy.data_version.as_ref().and_then(|wanted| wanted.read(&response.headers));
        if version.is_some() {
            backend.says_version(version, exchange.attempt_began, now);
        }
        // Whoever may ask again gets newer data elsewhere.
        let old = version.is_some_and(|version| backend.version.is_too_old(version));
        if old && exchange.repeatable && exchange.leaves(session, false, false, "answered with old data") {
            return Err(not_now());
        }
        let cause = match status {
            // A client that tries a doubted backend for us does not pay for it.
            500 if backend.is_doubted() => Some("answered 500"),
            502 => Some("answered 502"),
            503 => Some("answered 503"),
            504 => Some("answered 504"),
            _ => None,
        };
        if cause.is_some_and(|cause| exchange.repeatable && exchange.leaves(session, true, false, cause)) {
            return Err(not_now());
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
            hops::take_out_hops(response);
            hops::say_length_once(response)?;
            hops::frame_anew(response)?;
            // Whether its request has come whole matters from here on.
            session.as_mut().set_close_on_response_before_downstream_finish(true);
        }
        if let Some(route) = exchange.route.take() {
            hops::change_answer(&route.response, response)?;
        }
        peer::keep_in_place(response, exchange, &session.req_header().headers)?;
        if let Some(link) = exchange.link().filter(|_| !exchange.h2_client && classify::is_bodiless(session, status)) {
            link.is_answered();
        }
        let endless = status == 101 || !response.headers.contains_key(header::CONTENT_LENGTH);
        if let Some(connection) = exchange.connection.as_ref().filter(|_| endless && !exchange.h2_client) {
            connection.forget_listener();
        }
        let old = exchange.old_client;
        if old
            && exchange.shared
            && !response.headers.contains_key(header::CONTENT_LENGTH)
            && !classify::is_bodiless(session, status)
        {
            // The engine would send it in chunks, which HTTP/1.0 does not know.
            return Err(Error::new_in(ErrorType::HTTPStatus(505)));
        }
        if old && !response.headers.contains_key(header::CONTENT_LENGTH) {
            // Its body ends with its connection.
            response.remove_header(&header::TRANSFER_ENCODING);
            session.set_keepalive(None);
            if let Some(link) = exchange.link() {
                link.until_close.store(true, Relaxed);
            }
        }
        if self.host.stopping.load(Relaxed) || exchange.link().is_some_and(stream::Link::closing) {
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
        end: bool,
        exchange: &mut Box<Exchange>,
    ) -> Result<Option<Duration>> {
        let bytes = body.as_ref().map_or(0, Bytes::len) as u64;
        exchange.body[1] += bytes;
        if let (Some(backend), 1..) = (&exchange.backend, bytes) {
            let now = clock::now();
            backend.silence.bodies.heard(now);
            exchange.answer.iter().for_each(|answer| answer.goes_on(now));
        }
        if end && let Some(link) = exchange.link().filter(|_| !exchange.h2_client) {
            link.is_answered();
        }
        if exchange.judged == Judged::Whole && (end || exchange.body[1] >= wait::SHOWN) {
            exchange.settle(false);
        }
        exchange.line.iter_mut().for_each(|line| line.carries(bytes));
        Ok(None)
    }

    fn upstream_response_trailer_filter(
        &self,
        _session: &mut Session,
        trailers: &mut HeaderMap,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        exchange.settle(classify::is_grpc_error(trailers));
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
        let left = exchange.line.as_ref().is_some_and(InUse::is_left);
        let verdict = match exchange.wait.as_ref().map_or(Verdict::Waits, Wait::verdict) {
            // Its backend took no more of it for too long, and it was ended from outside.
            Verdict::Waits if left => Verdict::TimedOut,
            verdict => verdict,
        };
        let hung = exchange.wait.as_ref().is_some_and(Wait::has_hung);
        // What the engine itself knows for unprocessed: a refused stream, a connection that says it is going.
        let unprocessed = classify::is_unprocessed(&error);
        let not_now = error.etype() == &NOT_NOW;
        let answered = exchange.took.is_some() && !not_now;
        let sent = exchange.sent.take();
        let cut = exchange.line.as_ref().is_some_and(InUse::is_cut);
        exchange.wait = None;
        exchange.line = None;
        exchange.permit = None;
        error.set_retry(false);
        if exchange.link().is_some_and(stream::Link::has_ended) {
            exchange.end = Some(End::Stopped);
            exchange.forgive();
            return error;
        }
        if *error.esource() == ErrorSource::Downstream {
            exchange.end.get_or_insert(End::ClientGone);
            exchange.judge_left();
            return error;
        }
        if left && !answered && exchange.link().is_some_and(stream::Link::is_left) {
            exchange.end = Some(End::ClientGone);
            exchange.forgive();
            return error;
        }
        if answered {
            // What we have cut, or could not pass on, is not the backend's doing.
            if *error.esource() == ErrorSource::Upstream && !cut {
                exchange.judge_cut();
            }
            exchange.forgive();
            // The answer has begun, so nobody else can finish it.
            exchange.end = Some(End::BackendReset);
            return error;
        }
        if not_now {
            exchange.forgive();
            exchange.took = None;
            exchange.status = 0;
            exchange.retries += 1;
            error.set_retry(true);
            return error;
        }
        if matches!(error.etype(), ErrorType::HTTPStatus(_)) {
            return error;
        }
        let (Some(backend), Some(policy)) = (exchange.backend.clone(), exchange.policy.clone()) else { return error };
        if *error.esource() != ErrorSource::Upstream {
            // What we could not send, or not understand ourselves, is nobody's failure but ours.
            exchange.end = Some(End::Malformed);
            if matches!(error.etype(), ErrorType::InvalidHTTPHeader) {
                error.etype = ErrorType::HTTPStatus(400);
            }
            return error;
        }
        let now = clock::now();
        // An idle connection may die of its age; so may one that says that it is going.
        let stale = verdict == Verdict::Waits && (reused || unprocessed);
        match verdict {
            Verdict::TimedOut | Verdict::GivenUp => {
                exchange.fail("no answer in time");
                // The silence of a backend is known where that was the reason.
                if !hung && verdict == Verdict::TimedOut {
                    backend.replied(&policy.health, exchange.prefix, exchange.class, true, exchange.attempt_began, now);
                }
                exchange.end = Some(End::Timeout);
                error.etype = ErrorType::HTTPStatus(504);
                return error;
            }
            Verdict::Stalled => {
                exchange.end = Some(End::Idle);
                error.etype = ErrorType::HTTPStatus(408);
                return error;
            }
            Verdict::Move => exchange.fail("silent"),
            Verdict::Waits => {
                exchange.fail(if unprocessed { "unprocessed" } else { "ended before its first byte" });
                if !stale && !hung {
                    backend.unanswered(&policy.health, exchange.prefix, true, exchange.attempt_began, now);
                }
            }
        }
        exchange.end = Some(End::BackendReset);
        if stale {
            // Others like it are hardly better: the next request to this backend gets a new one.
            upstream::renew(backend.id);
        } else {
            exchange.tried.push(exchange.member);
        }
        let died = verdict == Verdict::Waits && !unprocessed;
        if died && !exchange.may_survive_another(&backend, sent, now) {
            return error;
        }
        if (exchange.repeatable || unprocessed) && exchange.another(session, false, verdict == Verdict::Move) {
            exchange.retries += 1;
            exchange.end = None;
            error.set_retry(true);
        } else {
            exchange.watch_for_death(now);
        }
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, exchange: &mut Box<Exchange>) -> FailToProxy {
        let status = match (exchange.end, error.etype()) {
            (_, ErrorType::HTTPStatus(status)) => *status,
            (Some(End::ClientGone), _) => 0,
            (Some(End::Unreachable | End::Full | End::Stopped), _) => 503,
            (Some(End::Timeout), _) => 504,
            _ => match error.esource() {
                ErrorSource::Upstream => 502,
                ErrorSource::Downstream => self.downstream_status(error, exchange),
                ErrorSource::Internal | ErrorSource::Unset => 500,
            },
        };
        let begun = session.response_written().is_some_and(|head| !head.status.is_informational());
        if begun && let Some(link) = exchange.link() {
            // Whoever takes the end of the connection for the end of the body must not take this for it.
            link.cut.store(true, Relaxed);
        }
        if status == 0 || begun {
            return FailToProxy { error_code: status, can_reuse_downstream: false };
        }
        exchange.status = status;
        let retry_after = match exchange.end {
            Some(End::Full | End::Limited) => Some(1),
            Some(End::Poison) => Some(10),
            Some(End::Unreachable) => exchange.pool.as_ref().and_then(|pool| direct::soonest_return(pool)),
            _ => None,
        };
        let listener = exchange.listener.clone();
        let pages = match listener.as_deref().map(|listener| &listener.face) {
            Some(table::Face::Http(face)) => &*face.pages,
            _ => &[],
        };
        let reason = exchange.refused.unwrap_or_else(|| answer::sentence(status));
        // Which listener has no route for it, where it has a name and not just an address.
        let named = listener.as_ref().filter(|_| exchange.end == Some(End::NoRoute));
        let reason = match named.filter(|listener| listener.name.parse::<std::net::SocketAddr>().is_err()) {
            Some(listener) => &format!("{reason} (listener {})", listener.name),
            None => reason,
        };
        // The engine keeps a client's connection only where a request failed before a backend was looked for; then its
        // answer must not say otherwise.
        let whole = session.as_mut().is_body_done();
        let kept = exchange.pool.is_none() && exchange.backend.is_none() && whole && status != 400;
        if !kept {
            session.set_keepalive(None);
        }
        let sent = answer::error(session, status, reason, retry_after, pages).await;
        if !kept && !whole && sent.is_ok() && !exchange.h2_client {
            // What the client still sends must not turn the close into a reset that overtakes the answer.
            session.shutdown().await;
        }
        FailToProxy { error_code: status, can_reuse_downstream: sent.is_ok() && kept }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, exchange: &mut Box<Exchange>) {
        if error.is_none() {
            exchange.settle(false);
        }
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
        shared.request_ends[end as usize].add(1);
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
        if self.host.access.wants(&record, end, exchange.status) {
            let head = session.req_header();
            record.http = Some(Box::new(HttpRecord {
                method: head.method.to_string(),
                host: std::mem::take(&mut exchange.host),
                path: String::from_utf8_lossy(head.raw_path()).into_owned(),
                status: exchange.status,
                retries: exchange.retries,
                id: exchange.request_id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned(),
            }));
            self.host.access.write(record, end, now.since(exchange.began));
        }
        connection.link.ends_one(now);
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

impl Gateway {
    /// A gateway to the live table.
    pub fn new(host: Arc<Host>) -> Gateway {
        Gateway { host }
    }

    /// Answers a request whose route ends here.
    async fn answer_by_itself(&self, session: &mut Session, exchange: &mut Exchange) -> Result<()> {
        let Some(route) = exchange.route.clone() else { return Err(Error::new_in(ErrorType::InternalError)) };
        exchange.end = Some(End::Responded);
        match &route.action {
            Action::Respond { status, page } => {
                exchange.status = *status;
                answer::page(session, *status, page, &route.response).await
            }
            Action::Redirect { scheme, host, path, status } => {
                exchange.status = *status;
                let head = session.req_header();
                let target = head.uri.path_and_query().map_or("/", |path| path.as_str());
                let own = answer::Asked { tls: exchange.is_secure(&head.headers), host: &exchange.host, target };
                let location = answer::location(&own, scheme.as_deref(), host.as_deref(), path.as_deref());
                answer::redirect(session, *status, &location, &route.response).await
            }
            Action::Pool(_) => Err(Error::new_in(ErrorType::InternalError)),
        }
    }

    /// A request is being given to a backend: the wait begins, and its clock when the request is whole.
    fn begin_wait(&self, exchange: &mut Exchange, body: Option<Arc<Connection>>, complete: bool) {
        let (Some(backend), Some(policy), Some(line), Some(pool)) =
            (&exchange.backend, &exchange.policy, &exchange.line, &exchange.pool)
        else {
            return;
        };
        let now = clock::now();
        let timeout = exchange.route.as_ref().and_then(|route| route.timeout).unwrap_or(policy.request_timeout);
        let request = Request {
            backend: backend.clone(),
            policy: policy.clone(),
            place: line.place(),
            pool: pool.clone(),
            tried: exchange.tried.clone(),
            body,
            shared: exchange.shared,
            prefix: exchange.prefix,
            timeout,
            idle: exchange.listener.as_ref().map_or(policy.idle, |listener| listener.idle(pool)),
            movable: exchange.repeatable && exchange.story.attempts < policy.attempts,
            once: !exchange.repeatable,
            kind: exchange.kind,
            class: exchange.class,
        };
        if let Some(link) = exchange.link().filter(|_| !exchange.h2_client) {
            link.feeds(Some(line.place()).filter(|_| !exchange.shared && (!complete || exchange.tunnel)));
        }
        exchange.sent = complete.then_some(now);
        exchange.wait = Some(Wait::begin(request, complete, now));
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
