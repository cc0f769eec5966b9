//! One request on its way through the phases of the engine: what they tell each other of it.

use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderMap, HeaderValue};
use pingora_core::{Error, ErrorType};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use super::direct::Refused;
use super::route::Route;
use super::serve::Connection;
use super::upstream::{Dialler, InUse, Won};
use super::wait::{Answer, Body, Left, Wait};
use super::{classify, forward, stream};
use crate::backend::Backend;
use crate::clock::{self, Time};
use crate::dial::{Failure, Story};
use crate::limits::Permit;
use crate::log::Served;
use crate::poison::KILLS_WITHIN;
use crate::pool::{CellShared, Policy, Pool};
use crate::table::{End, Face, Listener};
use crate::tcp;

/// An answer that has gone on for this long may be cut without an error.
const LONG: Duration = Duration::from_secs(10);

/// What was said of an answer to the health of its backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Judged {
    /// Nothing.
    #[default]
    No,
    /// Nothing yet: it has to come whole.
    Whole,
    /// Nothing yet: it says behind its body how it ended.
    Word,
    /// That it was well when its head came, which says not how long it is.
    Well,
    /// All that there is to say.
    Done,
}

/// One request, and what became of it.
#[derive(Default)]
pub struct Exchange {
    pub(super) connection: Option<Arc<Connection>>,
    pub(super) listener: Option<Arc<Listener>>,
    pub(super) route: Option<Arc<Route>>,
    pub(super) pool: Option<Arc<Pool>>,
    pub(super) pool_name: Option<Arc<str>>,
    /// Of the pool, and for all but the first stream of a connection of the process.
    pub(super) permits: [Option<Permit>; 2],
    pub(super) began: Time,
    pub(super) prefix: u32,
    pub(super) h2_client: bool,
    /// It speaks HTTP/1.0.
    pub(super) old_client: bool,
    /// It asks for a WebSocket.
    pub(super) tunnel: bool,
    /// The host that it asks for, as it came.
    pub(super) host: String,
    pub(super) pin: Option<u64>,
    pub(super) home: Option<usize>,
    /// What goes to the backend, when it is not what came.
    pub(super) target: Option<String>,
    pub(super) request_id: Option<HeaderValue>,
    /// May be sent twice.
    pub(super) repeatable: bool,
    /// A kind of request, for the record; and its class, for its health.
    pub(super) kind: u64,
    pub(super) class: u64,

    // One attempt.
    pub(super) member: usize,
    pub(super) backend: Option<Arc<Backend>>,
    pub(super) policy: Option<Arc<Policy>>,
    pub(super) cell: Option<Arc<CellShared>>,
    pub(super) dialler: Option<Arc<Dialler>>,
    /// One of the backend's connections.
    pub(super) permit: Option<Permit>,
    pub(super) line: Option<InUse>,
    pub(super) wait: Option<Wait>,
    pub(super) attempt_began: Time,
    pub(super) sent: Option<Time>,
    pub(super) shared: bool,
    /// What was said of the answer to its backend's health.
    pub(super) judged: Judged,
    pub(super) answer: Option<Answer>,
    /// The backend that died when it had just been given this request.
    pub(super) suspected_of: Option<Arc<Backend>>,

    // All attempts.
    pub(super) tried: Vec<usize>,
    /// The same with those where its class fails; empty when it fails nowhere.
    pub(super) avoided: Vec<usize>,
    pub(super) aside: Option<Won>,
    pub(super) story: Story,
    pub(super) retries: u32,
    pub(super) served: Option<Served>,
    pub(super) status: u16,
    pub(super) took: Option<Duration>,
    pub(super) body: [u64; 2],
    pub(super) end: Option<End>,
    pub(super) refused: Option<&'static str>,
}

impl Exchange {
    /// Whether its client came by TLS, here or to a trusted peer before us.
    pub(super) fn is_secure(&self, request: &HeaderMap) -> bool {
        let Some(connection) = &self.connection else { return false };
        let tls = connection.tls.is_some();
        match self.listener.as_ref().map(|listener| &listener.face) {
            Some(Face::Http(face)) => forward::is_secure(&face.forwarded, connection.client.ip(), tls, request),
            _ => tls,
        }
    }

    pub(super) fn link(&self) -> Option<&stream::Link> {
        self.connection.as_ref().map(|connection| &*connection.link)
    }

    /// Whether it cannot go to every member.
    pub(super) fn is_choosy(&self) -> bool {
        !self.tried.is_empty() || !self.avoided.is_empty()
    }

    /// Forgets the attempt, and gives back what it held.
    pub(super) fn leave_attempt(&mut self) {
        self.wait = None;
        self.line = None;
        self.sent = None;
        self.permit = None;
        if let Some(dialler) = self.dialler.take() {
            let (_, story) = dialler.take();
            self.story_goes_on(story);
        }
    }

    /// It is not served: what its client and the log are told.
    pub(super) fn refuse(&mut self, refused: &Refused) -> Box<Error> {
        self.end = Some(refused.end);
        self.refused = Some(refused.reason);
        Error::new_down(ErrorType::HTTPStatus(refused.status))
    }

    /// Leaves a member for another one that may take it, if there is one (see `another`); `cause` is for the log.
    pub(super) fn leaves(&mut self, session: &Session, better: bool, paid: bool, cause: &str) -> bool {
        self.tried.push(self.member);
        let leaves = self.another(session, better, paid);
        if leaves {
            self.fail(cause);
        }
        leaves
    }

    /// The head of an answer has come: what it says of its backend, now or when the rest has come.
    pub(super) fn judge_head(
        &mut self,
        session: &Session,
        response: &ResponseHeader,
        backend: &Arc<Backend>,
        policy: &Arc<Policy>,
        now: Time,
    ) {
        // A gRPC call says how it ended behind its body, and what says how long it is has to come whole.
        let status = response.status.as_u16();
        let grpc = classify::is_grpc(&response.headers);
        let error = classify::is_error(status) || classify::is_grpc_error(&response.headers);
        let length = classify::has_length(&response.headers) && !classify::is_bodiless(session, status) && !error;
        let word = grpc && status == 200 && classify::grpc_status(&response.headers).is_none();
        self.judged = match (error, word, length) {
            (true, ..) => Judged::Done,
            (_, true, _) => Judged::Word,
            (.., true) => Judged::Whole,
            _ => Judged::Well,
        };
        // While its client still sends the backend may wait for that.
        let watched = self.judged == Judged::Whole && self.sent.is_some();
        if let (true, Some(client)) = (watched, self.connection.clone()) {
            let (prefix, class, began, h2) = (self.prefix, self.class, self.attempt_began, self.h2_client);
            let (backend, policy) = (backend.clone(), policy.clone());
            self.answer = Some(Answer::begin(Body { backend, policy, client, prefix, class, began, h2 }, now));
        }
        if matches!(self.judged, Judged::Done | Judged::Well) {
            backend.replied(&policy.health, self.prefix, self.class, error, self.attempt_began, now);
        }
    }

    /// Its backend died with it, as far as is known: it may have been the reason. `sent` says when it was sent whole. False: it goes
    /// nowhere else.
    pub(super) fn may_survive_another(&mut self, backend: &Arc<Backend>, sent: Option<Time>, now: Time) -> bool {
        let Some(pool) = &self.pool else { return true };
        let innocent = pool.shared.poison.is_acquitted(self.kind);
        if !pool.shared.poison.may_go_on(self.kind, backend.id, innocent, now) {
            return false;
        }
        let at_once = sent.is_some_and(|sent| now.since(sent) < KILLS_WITHIN);
        self.suspected_of = (!innocent && at_once).then(|| backend.clone());
        true
    }

    /// It goes nowhere else; but its client may send it once more, and by then it should be known whether it kills.
    pub(super) fn watch_for_death(&mut self, now: Time) {
        if let (Some(lost), Some(pool)) = (self.suspected_of.take(), &self.pool)
            && pool.shared.poison.alone(self.kind, lost.id, now)
        {
            let kind = self.kind;
            tokio::spawn(async move { tcp::has_killed(kind, &lost).await });
        }
    }

    /// The story is at the dialler's while it dials.
    pub(super) fn story_goes_on(&mut self, story: Story) {
        if story.attempts >= self.story.attempts {
            self.story = story;
        }
    }

    pub(super) fn fail(&mut self, cause: &str) {
        let backend = self.backend.as_ref().map_or_else(|| "".into(), |backend| backend.name.clone());
        self.story.failures.push(Failure { backend, cause: cause.into() });
    }

    /// Whether the request may be sent once more now; takes a token for it, unless one was taken. `better` asks for a
    /// backend that is not in doubt: the present answer is at hand.
    pub(super) fn another(&mut self, session: &Session, better: bool, paid: bool) -> bool {
        let (Some(pool), Some(policy)) = (&self.pool, &self.policy) else { return false };
        let unheard = session.response_written().is_none_or(|head| head.status.is_informational());
        let more = self.story.attempts < policy.attempts && pool.has_untried(&self.tried, !better, |_| true);
        unheard
            && !session.as_ref().retry_buffer_truncated()
            && more
            && (paid || pool.shared.budget.extra(clock::now()))
    }

    /// No verdict is given on the answer any more.
    pub(super) fn forgive(&mut self) {
        (self.judged, self.answer) = (Judged::No, None);
    }

    /// The backend has ended its answer before its time. A long one may end with the backend's life, which says nothing of others,
    /// and a backend may lose its patience with a client that takes nothing.
    pub(super) fn judge_cut(&mut self) {
        let long = clock::now().since(self.attempt_began) > LONG;
        // What the windows of HTTP/2 hold back is not known here; before the end of a short answer it is nothing.
        let clients = match self.h2_client {
            true => self.judged == Judged::Well,
            false => self.link().is_some_and(stream::Link::is_blocked),
        };
        if self.tunnel || long || clients {
            return self.forgive();
        }
        if self.judged == Judged::Well {
            self.judged = Judged::Whole;
        }
        self.settle(true);
    }

    /// Its client has left before the end of the answer.
    pub(super) fn judge_left(&mut self) {
        match self.answer.as_ref().map(|answer| answer.left(clock::now())) {
            Some(Left::Waiting) => self.settle(true),
            Some(Left::Served) => self.settle(false),
            Some(Left::Nothing) | None => self.forgive(),
        }
    }

    /// Gives the verdict on an answer, where it is due.
    pub(super) fn settle(&mut self, error: bool) {
        let stalled = self.answer.take().is_some_and(|answer| answer.has_stalled());
        if !matches!(self.judged, Judged::Whole | Judged::Word) {
            return;
        }
        self.judged = Judged::Done;
        if let (false, Some(backend), Some(policy)) = (stalled, &self.backend, &self.policy) {
            backend.replied(&policy.health, self.prefix, self.class, error, self.attempt_began, clock::now());
        }
    }
}
