//! One upstream: its health, what was learned about it, and its counters. Shared by workers and control, and
//! kept over reloads for as long as pool, name and address stay the same.
//!
//! Every mutable fact about a failure lives here. A success in state `up` takes no lock; all other evidence
//! takes the backend's own short mutex and runs `health::step` on the thread that saw it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::Time;
use crate::estimate::Estimate;
use crate::health::{self, Depth, Evidence, Health, Policy, Seen, Source, State, Transition};
use crate::limits::{Budget, Gauge, Window};
use crate::metrics::{Counter, DETECT_BOUNDS, Histogram};
use crate::ratio::Ratio;
use crate::silence::Silence;
use crate::witness::{Answered, Failing};

/// Transitions of one backend that are logged in ten seconds; the counters tell of the others.
const TOLD: u64 = 20;

/// Bursts of denials are told of this many seconds apart.
const DENIALS_APART: u64 = 60;
/// A prefix that gets errors for at least this share of its requests elsewhere brings them along.
const EVERYWHERE: f64 = 0.5;

/// How an attempt at a backend ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Outcome {
    /// Connected.
    Ok,
    /// Refused, reset during the handshake, or unreachable.
    Refused,
    /// No answer in time.
    Silent,
    /// Another attempt won.
    Lost,
    /// An error of our own: not evidence.
    Local,
}

impl Outcome {
    /// All outcomes, in the order of the counters.
    pub const ALL: [Outcome; 5] = [Outcome::Ok, Outcome::Refused, Outcome::Silent, Outcome::Lost, Outcome::Local];

    /// The word for logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Refused => "refused",
            Outcome::Silent => "silent",
            Outcome::Lost => "lost",
            Outcome::Local => "local_error",
        }
    }
}

/// Counters of one backend; they belong to pool and name.
#[derive(Debug, Default)]
pub struct Counters {
    /// Attempts by [`Outcome`].
    pub attempts: [Counter; Outcome::ALL.len()],
    /// Transitions by the state entered.
    pub transitions: [Counter; State::ALL.len()],
    /// Probes that succeeded, and those that failed.
    pub probes: [Counter; 2],
    /// Sessions that ended by a reset or a close of the backend before its first byte.
    pub unanswered: Counter,
    /// Bursts of answers that denied clients something.
    pub denial_bursts: Counter,
}

/// What the backends of one pool share, kept over reloads by the pool's name.
#[derive(Debug)]
pub struct PoolShared {
    /// The pool's name.
    pub name: Arc<str>,
    /// Connections of the pool, those being dialled included.
    pub connections: Arc<Gauge>,
    /// Tokens for races.
    pub budget: Budget,
    /// Rises with every transition: whoever chooses next computes the shares anew.
    pub epoch: AtomicU64,
    /// Clients whose connections end unanswered.
    pub failing: Failing,
    /// Races begun, and races won by the later attempt.
    pub races: [Counter; 2],
    /// Clients refused because the pool was at its cap, or all backends were full.
    pub refused_full: Counter,
    /// Clients refused because no backend connected in time.
    pub refused_unreachable: Counter,
    /// From the first failed evidence to leaving `up`, in seconds.
    pub detect: Histogram,
}

impl PoolShared {
    /// The state of a pool that is new.
    pub fn new(name: &str) -> PoolShared {
        PoolShared {
            name: name.into(),
            connections: Arc::default(),
            budget: Budget::default(),
            epoch: AtomicU64::new(1),
            failing: Failing::default(),
            races: Default::default(),
            refused_full: Counter::default(),
            refused_unreachable: Counter::default(),
            detect: Histogram::new(&DETECT_BOUNDS),
        }
    }
}

/// A backend's state as the data plane reads it: one relaxed load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    /// The state.
    pub state: State,
    /// When it began, in whole milliseconds.
    pub since: Time,
    open_run: Option<Depth>,
}

impl View {
    fn pack(self) -> u64 {
        let run = self.open_run.map_or(0, |depth| depth as u64 + 1);
        (self.since.0 / 1_000) << 8 | run << 4 | self.state as u64
    }

    fn unpack(bits: u64) -> View {
        let state = State::ALL[(bits & 0xf) as usize % State::ALL.len()];
        let open_run = match bits >> 4 & 0xf {
            0 => None,
            1 => Some(Depth::Connect),
            2 => Some(Depth::FirstByte),
            _ => Some(Depth::Answer),
        };
        View { state, since: Time((bits >> 8) * 1_000), open_run }
    }
}

#[derive(Debug)]
struct Locked {
    health: Health,
    /// Successful attempts that the learned loss already knows of.
    hits_known: u64,
}

/// One upstream address of one pool.
#[derive(Debug)]
pub struct Backend {
    /// Unique in the process.
    pub id: u64,
    /// Unique in its pool.
    pub name: Arc<str>,
    /// Where it listens.
    pub address: SocketAddr,
    /// What its pool's backends share.
    pub shared: Arc<PoolShared>,
    /// Its counters.
    pub counters: Arc<Counters>,
    /// Connections being dialled or running.
    pub in_flight: Arc<Gauge>,
    /// Learned handshake times.
    pub handshake: Estimate,
    /// Learned times from the client's bytes to the first byte of an answer.
    pub first_byte: Estimate,
    /// Clients that it answered.
    pub answered: Answered,
    /// Requests that wait for their first byte.
    pub silence: Silence,
    /// Rises when its connections are no longer to be trusted: then nobody takes an idle one again.
    pub retired: AtomicU32,
    /// Answers without an error that `ratio` does not know of yet, and whether it must know at once.
    good: AtomicU64,
    watched: AtomicBool,
    ratio: Mutex<Ratio>,
    /// The same for answers that deny a client something (401, 403, 429).
    undenied: AtomicU64,
    denials: Mutex<Ratio>,
    /// When a burst of them was told of last, in whole seconds since the process began.
    denials_told: AtomicU64,
    /// Wakes its prober, when it has one.
    pub prober: Mutex<Option<Arc<Notify>>>,
    /// When it is probed next, in milliseconds since the process began; 0: never.
    pub next_probe_ms: AtomicU64,
    /// When its certificate ends, in seconds since 1970, as a probe saw it last; 0: none was seen.
    pub certificate_expiry: AtomicI64,
    /// Whether an operator took it out.
    pub drained: AtomicBool,
    /// Transitions of the last ten seconds.
    told: Window,
    view: AtomicU64,
    /// Next trial in milliseconds since the process began; `u64::MAX`: none is due.
    trial_ms: AtomicU64,
    locked: Mutex<Locked>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Backend {
    /// A backend nothing is known about.
    pub fn new(
        shared: Arc<PoolShared>,
        name: &str,
        address: SocketAddr,
        counters: Arc<Counters>,
        policy: &Policy,
        now: Time,
    ) -> Backend {
        let health = Health::new(policy, now);
        let view = View { state: health.state(), since: health.since(), open_run: None };
        Backend {
            id: NEXT_ID.fetch_add(1, Relaxed),
            name: name.into(),
            address,
            shared,
            counters,
            in_flight: Arc::default(),
            handshake: Estimate::default(),
            first_byte: Estimate::default(),
            answered: Answered::default(),
            silence: Silence::default(),
            retired: AtomicU32::new(0),
            good: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            ratio: Mutex::default(),
            undenied: AtomicU64::new(0),
            denials: Mutex::default(),
            denials_told: AtomicU64::new(0),
            prober: Mutex::default(),
            next_probe_ms: AtomicU64::new(0),
            certificate_expiry: AtomicI64::new(0),
            drained: AtomicBool::new(false),
            told: Window::default(),
            view: AtomicU64::new(view.pack()),
            trial_ms: AtomicU64::new(u64::MAX),
            locked: Mutex::new(Locked { health, hits_known: 0 }),
        }
    }

    /// The present state.
    pub fn view(&self) -> View {
        View::unpack(self.view.load(Relaxed))
    }

    /// Whether new clients are meant for it: `up`, or `returning`, and not drained.
    pub fn fit(&self) -> bool {
        matches!(self.view().state, State::Up | State::Returning) && !self.drained.load(Relaxed)
    }

    /// Share of its full weight that it gets now, 0 to 1, drains apart.
    pub fn ramp_share(&self, policy: &Policy, now: Time) -> f64 {
        self.view().ramp_share(policy, now)
    }
}

impl View {
    /// Share of its full weight that a backend in this state gets, 0 to 1.
    pub fn ramp_share(self, policy: &Policy, now: Time) -> f64 {
        let view = self;
        match view.state {
            State::Up => 1.0,
            State::Returning => health::ramp_share(view.since, policy.ramp, now),
            _ => 0.0,
        }
    }
}

impl Backend {
    /// A copy of its health, for reports.
    pub fn health(&self) -> Health {
        self.lock().health.clone()
    }

    /// A handshake of a client's attempt that ended well.
    pub fn connected(&self, policy: &Policy, handshake: Duration, began: Time, now: Time) {
        self.handshake.record(handshake);
        self.counters.attempts[Outcome::Ok as usize].add(1);
        let view = self.view();
        if view.state != State::Up || view.open_run.is_some() {
            self.success(policy, Source::Traffic, Depth::Connect, began, now);
        }
    }

    /// The first byte of an answer to a client of `prefix`.
    pub fn answered(&self, policy: &Policy, prefix: u32, took: Duration, began: Time, now: Time) {
        self.first_byte.record(took);
        self.answered.note(prefix, now);
        self.shared.failing.answered(prefix, self.id);
        let view = self.view();
        if view.state != State::Up || view.open_run == Some(Depth::FirstByte) {
            self.success(policy, Source::Traffic, Depth::FirstByte, began, now);
        }
    }

    /// The first byte of an answer to a request; `took` is `None` where it came before the whole request had.
    pub fn heard(&self, took: Option<Duration>, now: Time) {
        self.silence.heard(now);
        if let Some(took) = took {
            self.first_byte.record(took);
        }
    }

    /// What the answer to a request says of this backend: whether it is an error.
    pub fn replied(&self, policy: &Policy, prefix: u32, error: bool, began: Time, now: Time) {
        if !error {
            self.answered.note(prefix, now);
            self.shared.failing.answered(prefix, self.id);
            if self.watched.load(Relaxed) {
                let mut ratio = self.ratio.lock().unwrap_or_else(PoisonError::into_inner);
                ratio.good(self.good.swap(0, Relaxed) + 1);
                self.watched.store(ratio.open(), Relaxed);
            } else {
                self.good.fetch_add(1, Relaxed);
            }
            let view = self.view();
            if view.state != State::Up || view.open_run.is_some() {
                self.success(policy, Source::Traffic, Depth::Answer, began, now);
            }
            return;
        }
        let known = self.shared.failing.failed(prefix, self.id, &self.answered, now);
        // Nobody but this prefix may ever have asked it: then there is no past, and no others.
        let blame = known.unwrap_or(health::Blame { prefix, others: true, elsewhere: 0.0 });
        let doubted = matches!(self.view().state, State::Suspect | State::Down);
        if doubted && blame.elsewhere >= EVERYWHERE {
            // What this client meets on other backends too says nothing about a doubted one.
            return;
        }
        let mut ratio = self.ratio.lock().unwrap_or_else(PoisonError::into_inner);
        ratio.good(self.good.swap(0, Relaxed));
        let alarm = if doubted {
            ratio.known();
            true
        } else {
            ratio.bad(blame)
        };
        self.watched.store(ratio.open(), Relaxed);
        drop(ratio);
        if alarm {
            let evidence = Evidence { source: Source::Traffic, depth: Depth::Answer, seen: Seen::Errors, began };
            self.observe(policy, &evidence, now);
        }
    }

    /// An answer that denies its client something, or one that does not. They are the client's matter; but where nearly none
    /// used to be, a burst of them may be a lost key or a broken limit of the cell's, and is told of.
    pub fn denied(&self, prefix: u32, denied: bool, now: Time) {
        if !denied {
            self.undenied.fetch_add(1, Relaxed);
            return;
        }
        let mut ratio = self.denials.lock().unwrap_or_else(PoisonError::into_inner);
        ratio.good(self.undenied.swap(0, Relaxed));
        let others = self.answered.others(prefix, now);
        let burst = ratio.bad(health::Blame { prefix, others, elsewhere: 0.0 });
        if burst {
            // What goes on is the past of tomorrow.
            ratio.known();
        }
        drop(ratio);
        if !burst {
            return;
        }
        self.counters.denial_bursts.add(1);
        let told = self.denials_told.load(Relaxed);
        if told > 0 && now.seconds() < told + DENIALS_APART {
            return;
        }
        self.denials_told.store(now.seconds().max(1), Relaxed);
        tracing::info!(
            pool = &*self.shared.name,
            backend = &*self.name,
            "a burst of 401, 403 or 429, which were rare before; nothing is done about it"
        );
    }

    /// Whether it was given up because nothing came from it any more, and nothing has come since.
    pub fn vanished(&self) -> bool {
        let view = self.view();
        view.state == State::Down
            && self.silence.unheard(view.since)
            && self.health().cause().is_some_and(|cause| matches!(cause.kind, "silent" | "refused"))
    }

    /// Whether clients of other prefixes than this were answered lately.
    pub fn others_than(&self, prefix: u32, now: Time) -> bool {
        self.answered.others(prefix, now)
    }

    /// A session that the backend ended before its first byte; `spoke` says whether client bytes came before.
    pub fn unanswered(&self, policy: &Policy, prefix: u32, spoke: bool, began: Time, now: Time) {
        self.counters.unanswered.add(1);
        let blame = if spoke {
            self.shared.failing.failed(prefix, self.id, &self.answered, now)
        } else {
            Some(health::Blame { prefix, others: false, elsewhere: 0.0 })
        };
        if let Some(blame) = blame {
            let seen = Seen::Reset(blame);
            self.observe(policy, &Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen, began }, now);
        }
    }

    /// A probe that succeeded, as deep as it looks.
    pub fn probed(&self, policy: &Policy, depth: Depth, began: Time, now: Time) {
        self.counters.probes[0].add(1);
        let view = self.view();
        if view.state != State::Up || view.open_run.is_some() {
            self.success(policy, Source::Probe, depth, began, now);
        }
    }

    /// A success seen by `source`.
    pub fn success(&self, policy: &Policy, source: Source, depth: Depth, began: Time, now: Time) {
        self.observe(policy, &Evidence { source, depth, seen: Seen::Success { hits: 0 }, began }, now);
    }

    /// Takes one fact; logs and publishes the transition it makes.
    pub fn observe(&self, policy: &Policy, evidence: &Evidence, now: Time) -> Option<Transition> {
        let mut locked = self.lock();
        let mut evidence = *evidence;
        if let Seen::Success { hits } = &mut evidence.seen {
            let known = self.counters.attempts[Outcome::Ok as usize].get();
            *hits = known.saturating_sub(locked.hits_known).min(u64::from(u32::MAX)) as u32;
            *hits += u32::from(evidence.source == Source::Probe);
            locked.hits_known = known;
        }
        let transition = locked.health.step(policy, &evidence, now);
        self.publish(&locked.health, policy);
        drop(locked);
        if let Some(transition) = &transition {
            self.report(transition);
        }
        transition
    }

    /// Claims the next trial: a client's connection for a backend that no probe can clear. At most one caller
    /// gets it, and the next only after a pause.
    pub fn claim_trial(&self, policy: &Policy, now: Time) -> bool {
        let due = self.trial_ms.load(Relaxed);
        if due > now.0 / 1_000 || self.drained.load(Relaxed) {
            return false;
        }
        let soon = now.0 / 1_000 + 1_000;
        if !self.shared.budget.trial(now) || self.trial_ms.compare_exchange(due, soon, Relaxed, Relaxed).is_err() {
            return false;
        }
        let mut locked = self.lock();
        locked.health.trial_begins(now);
        self.publish(&locked.health, policy);
        true
    }

    /// Takes over the policy of a new table.
    pub fn adopt(&self, policy: &Policy, now: Time) {
        let mut locked = self.lock();
        locked.health.adopt(policy, now);
        self.publish(&locked.health, policy);
        drop(locked);
        self.shared.epoch.fetch_add(1, Relaxed);
    }

    /// Whether a trial is or will be due.
    pub fn awaits_trial(&self) -> bool {
        self.trial_ms.load(Relaxed) != u64::MAX
    }

    fn publish(&self, health: &Health, policy: &Policy) {
        let view = View { state: health.state(), since: health.since(), open_run: health.open_run() };
        self.view.store(view.pack(), Relaxed);
        let trial = health.trial_at(policy).map_or(u64::MAX, |at| at.0 / 1_000);
        // Whether it awaits one belongs to the plan.
        if (self.trial_ms.swap(trial, Relaxed) == u64::MAX) != (trial == u64::MAX) {
            self.shared.epoch.fetch_add(1, Relaxed);
        }
    }

    fn report(&self, transition: &Transition) {
        self.counters.transitions[transition.to as usize].add(1);
        if let Some(detected) = transition.detected {
            self.shared.detect.record(detected);
        }
        self.shared.epoch.fetch_add(1, Relaxed);
        if matches!(transition.to, State::Suspect | State::Down) {
            self.retired.fetch_add(1, Relaxed);
        }
        if matches!(transition.to, State::Suspect | State::Down | State::Returning) {
            let prober = self.prober.lock().unwrap_or_else(PoisonError::into_inner);
            prober.iter().for_each(|prober| prober.notify_one());
        }
        let cause = transition.cause;
        // A backend that changes its mind all the time must not fill the log.
        self.told.add(cause.at);
        if self.told.sum(cause.at) > TOLD {
            return;
        }
        tracing::info!(
            pool = &*self.shared.name,
            backend = &*self.name,
            from = transition.from.word(),
            to = transition.to.word(),
            cause = cause.kind,
            depth = cause.depth.word(),
            times = cause.times,
            seen_by = if cause.source == Source::Probe { "probe" } else { "traffic" },
            detected_ms = transition.detected.map(|d| d.as_millis() as u64),
            "transition"
        );
    }

    /// A panic while the lock was held leaves at worst one fact half counted; health goes on.
    fn lock(&self) -> MutexGuard<'_, Locked> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
