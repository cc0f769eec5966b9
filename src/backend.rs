//! One upstream: its health, what was learned about it, and its counters. Shared by workers and control, and
//! kept over reloads for as long as pool, name and address stay the same.
//!
//! Every mutable fact about a failure lives here. A success in state `up` takes no lock; all other evidence
//! takes the backend's own short mutex and runs `health::step` on the thread that saw it.

mod errors;
mod shared;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::blame::Answered;
use crate::class::Classes;
use crate::clock::{self, Time};
use crate::concurrency::{self, Concurrency};
use crate::error_ratio::ErrorRatio;
use crate::estimate::Estimate;
use crate::health::{Blame, Depth, Evidence, Health, Policy, Seen, Source, State, Transition, View};
use crate::limits::{Gauge, Window};
use crate::metrics::Counter;
use crate::pace::{self, Pace};
use crate::silence::Silence;
use crate::tell;
use crate::version::Version;

use errors::EVERYWHERE;
use shared::Mark;
pub use shared::PoolShared;

/// Transitions of one backend that are logged in ten seconds; the counters tell of the others.
const TOLD: u64 = 20;

/// Clients that were served so lately outweigh a probe that fails, and the contradiction is shown for this long.
const CONTRADICTION_MS: u64 = 2_000;
const CONTRADICTION_SHOWN_MS: u64 = 3_000;
/// Another backend's handshake vouches for the network only if it came at least this long after the silent attempt began, or one
/// handshake time if that is longer; for a probe it may have come this long before.
const LIFE_FLOOR: Duration = Duration::from_millis(20);
const PROBE_SLACK: Duration = Duration::from_secs(1);

/// An answer later than this, or than five times the 99th percentile, comes from a backend that others may have taken for silent; it
/// counts for them too, for this many at most.
const LATE: Duration = Duration::from_millis(50);
const LATE_FOR: u32 = 8;
/// And for this long the next ones are thought to take as long.
const TOOK_FOR: Duration = Duration::from_secs(1);
/// First bytes that take as long as can be learned are no sign of anything.
pub const TOO_LONG: Duration = Duration::from_secs(3);
/// What is known to be slow is silent after this at the latest.
const SLOW_FOR: Duration = Duration::from_secs(1);
/// For the limit of a silent backend: silent after this, or five times the 99th percentile of its first bytes.
const SILENT: Duration = Duration::from_millis(250);
/// And where many wait, this many times the 96th.
const MANY_FACTOR: u32 = 5;
/// No first byte to anybody for this, and for this many times the 99th percentile, is a reason to go elsewhere for now.
const HANGS: Duration = Duration::from_millis(5);
const HANGS_TIMES: u32 = 2;
/// Clients that may wait at a backend whose limit is taken up by what others left there.
const TRIALS: u32 = 4;
/// For how long a backend is found silent while others answer, before that counts.
const MUTE_FOR: Duration = Duration::from_millis(30);
/// Clients of a backend that is out have found their places after this.
const OUT_LATELY: Duration = Duration::from_secs(60);

/// A client that gave up after this, or five times the 99th percentile, has seen a silence.
const GAVE_UP: Duration = Duration::from_secs(1);

/// A client whose request cannot be repeated is used for a trial only if nobody else has made one for this long.
const LATE_TRIAL_MS: u64 = 4_000;

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
    /// How often its share was cut for its pace.
    pub paced: Counter,
    /// How often a class of requests began to fail alone.
    pub class_failures: Counter,
    /// Probes that failed while clients were served.
    pub contradictions: Counter,
    /// Bursts of answers that denied clients something.
    pub denial_bursts: Counter,
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
    /// Learned times of TLS handshakes, those of TCP included, where we wait for them.
    pub tls_handshake: Estimate,
    /// Learned times from the client's bytes to the first byte of an answer.
    pub first_byte: Estimate,
    /// The same of what was carried elsewhere; and how many were, since its last answer, for its silence.
    moved: Estimate,
    moved_silent: AtomicU32,
    /// Clients that it answered.
    pub answered: Answered,
    /// Requests that wait for their first byte.
    pub silence: Silence,
    /// Rises when its connections are no longer to be trusted: then nobody takes an idle one again.
    pub retired: AtomicU32,
    /// Answers without an error that `ratio` does not know of yet, and whether it must know at once.
    good: AtomicU64,
    watched: AtomicBool,
    ratio: Mutex<ErrorRatio>,
    /// What the pool's answers were when the errors began that are being looked at, and until when they are not looked at anew.
    errors_since: Mutex<Option<(Mark, Time)>>,
    /// Its classes of requests, looked at until this moment (in milliseconds since the process began), and whether any fails.
    classes: Mutex<Classes>,
    classes_until: AtomicU64,
    class_fails: AtomicBool,
    /// The same for answers that deny a client something (401, 403, 429).
    undenied: AtomicU64,
    denials: Mutex<ErrorRatio>,
    /// When a burst of them was told of last, in whole seconds since the process began.
    denials_told: AtomicU64,
    /// The number of its cell in the process.
    cell: AtomicUsize,
    /// When a client last got what it came for, and when a probe last said otherwise in vain; in milliseconds since the
    /// process began.
    good_ms: AtomicU64,
    contradicted_ms: AtomicU64,
    /// Whether probes failed since the last good one while clients were served.
    probe_denied: AtomicBool,
    /// The others of its tier, which has several cells, are out: probes alone leave it in.
    pub last_standing: AtomicBool,
    /// Wakes its prober, when it has one.
    pub prober: Mutex<Option<Arc<Notify>>>,
    /// When it is probed next, in milliseconds since the process began; 0: never.
    pub next_probe_ms: AtomicU64,
    /// When its certificate ends, in seconds since 1970, as a probe saw it last; 0: none was seen.
    pub certificate_expiry: AtomicI64,
    /// Whether an operator took it out.
    pub drained: AtomicBool,
    /// How old its data are.
    pub version: Version,
    /// How it does against its own past; `None` before it has had clients.
    pace: Mutex<Option<Box<Pace>>>,
    /// Share of its clients that it keeps for that, in ten-thousandths.
    pace_share: AtomicU32,
    /// How many clients may wait for its answers at once, as far as it was learned.
    concurrency: Mutex<Concurrency>,
    most_waiting: AtomicU32,
    /// Transitions of the last ten seconds.
    told: Window,
    view: AtomicU64,
    /// Next trial in milliseconds since the process began; `u64::MAX`: none is due.
    trial_ms: AtomicU64,
    locked: Mutex<Locked>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        if *self.class_fails.get_mut() {
            self.shared.classes_failing.fetch_sub(1, Relaxed);
        }
    }
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
        let in_flight: Arc<Gauge> = Arc::default();
        in_flight.tells(&shared.queue);
        let health = Health::new(policy, now);
        let view = health.view();
        Backend {
            id: NEXT_ID.fetch_add(1, Relaxed),
            name: name.into(),
            address,
            shared,
            counters,
            in_flight,
            handshake: Estimate::default(),
            tls_handshake: Estimate::default(),
            first_byte: Estimate::default(),
            moved: Estimate::default(),
            moved_silent: AtomicU32::new(0),
            answered: Answered::default(),
            silence: Silence::default(),
            retired: AtomicU32::new(0),
            good: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            ratio: Mutex::default(),
            errors_since: Mutex::default(),
            classes: Mutex::default(),
            classes_until: AtomicU64::new(0),
            class_fails: AtomicBool::new(false),
            undenied: AtomicU64::new(0),
            denials: Mutex::default(),
            denials_told: AtomicU64::new(0),
            cell: AtomicUsize::new(0),
            good_ms: AtomicU64::new(0),
            contradicted_ms: AtomicU64::new(0),
            probe_denied: AtomicBool::new(false),
            last_standing: AtomicBool::new(false),
            prober: Mutex::default(),
            next_probe_ms: AtomicU64::new(0),
            certificate_expiry: AtomicI64::new(0),
            drained: AtomicBool::new(false),
            version: Version::default(),
            pace: Mutex::default(),
            pace_share: AtomicU32::new(10_000),
            concurrency: Mutex::default(),
            most_waiting: AtomicU32::new(u32::MAX),
            told: Window::default(),
            view: AtomicU64::new(view.pack()),
            trial_ms: AtomicU64::new(u64::MAX),
            locked: Mutex::new(Locked { health, hits_known: 0 }),
        }
    }

    /// It is new where others carry the pool's clients: it begins with a small share.
    pub fn comes_late(&self, policy: &Policy, now: Time) {
        let mut locked = self.lock();
        locked.health.comes_late(policy, now);
        self.publish(&locked.health, policy);
    }

    /// An operator has let it in again. When it has served nobody for as long as a ramp takes, it is as cold as a new one.
    pub fn is_let_in_again(&self, policy: &Policy, now: Time) {
        if now.0 / 1_000 >= self.good_ms.load(Relaxed) + policy.ramp.as_millis() as u64 {
            self.comes_late(policy, now);
        }
    }

    /// The present state.
    pub fn view(&self) -> View {
        View::unpack(self.view.load(Relaxed))
    }

    /// Whether it gets no clients however well it is: an operator took it out, or its data are too old.
    pub fn is_closed(&self) -> bool {
        self.drained.load(Relaxed) || self.version.is_old()
    }

    /// Whether it is closed only until it has said how new its data are.
    pub fn owes_version(&self) -> bool {
        let down = self.view().state == State::Down || self.drained.load(Relaxed);
        self.version.is_old() && self.version.said().is_none() && !down
    }

    /// Whether new clients are meant for it: `up`, or `returning`, and not closed.
    pub fn fit(&self) -> bool {
        matches!(self.view().state, State::Up | State::Returning) && !self.is_closed()
    }

    /// An answer to what was asked at `began` said which version its data have; `None`: it had to say it and did not, or the
    /// backend may have begun anew.
    pub fn says_version(&self, version: Option<u64>, began: Time, now: Time) {
        let changed = version.map_or_else(|| self.version.forget(now), |version| self.version.says(version, began));
        if changed {
            self.shared.changed();
            if self.version.is_old() {
                self.probe_now();
            }
            if !self.told_too_often(now) {
                self.version.tell(&self.shared.name, &self.name);
            }
        }
    }

    /// Share of its full weight that it gets now, 0 to 1, by state and by ramp or pace, whichever is less; drains apart.
    pub fn share_now(&self, policy: &Policy, now: Time) -> f64 {
        self.view().ramp_share(policy, now).min(self.pace_share())
    }
}

impl Backend {
    /// Share of its clients that it keeps for how it does against its own past, above 0 to 1.
    pub fn pace_share(&self) -> f64 {
        f64::from(self.pace_share.load(Relaxed)) / 10_000.0
    }

    /// The calm and the present median of its first bytes, each where it is known.
    pub fn pace(&self) -> (Option<Duration>, Option<Duration>) {
        let pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.as_ref().map_or((None, None), |pace| (pace.calm(), pace.recent()))
    }

    /// Takes in what was seen of it since the last look; `None`: it never had a client, or the look is too `late` to tell its time
    /// from ours. `shifted` says that a backend of its pool is out; a handshake that was lost is known `lost_known_after` it began.
    pub fn look(&self, shifted: bool, late: bool, lost_known_after: Duration, now: Time) -> Option<pace::Look> {
        let [ok, silent] = [Outcome::Ok, Outcome::Silent].map(|outcome| self.counters.attempts[outcome as usize].get());
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        if pace.is_none() && ok + silent == 0 {
            return None;
        }
        self.silence.forget(now);
        let (first_bytes, moved) = (self.first_byte.ever(), self.moved.ever());
        let seen = pace::Seen { first_bytes, moved, handshakes: [ok, silent], lost_known_after };
        let pace = pace.get_or_insert_with(|| Box::new(Pace::new(now)));
        if late {
            pace.skip(seen);
            pace.came(self.silence.wrote_ever());
            return None;
        }
        let before = pace.answers();
        let look = pace.look(seen, self.silence.quiet_for(now), now);
        let waiting = self.silence.waiting() + self.silence.abandoned();
        let came = pace.came(self.silence.wrote_ever());
        if waiting > 0 || came > 0 || self.most_waiting.load(Relaxed) != u32::MAX {
            let crowded = concurrency::Look {
                waiting,
                came,
                answered: pace.answers().wrapping_sub(before),
                shifted,
                silent: self.silence.quiet(self.late_after(SILENT), now),
                left: self.silence.abandoned() > 0,
                calm: pace.calm(),
                recent: pace.recent(),
            };
            let mut concurrency = self.concurrency.lock().unwrap_or_else(PoisonError::into_inner);
            concurrency.look(crowded);
            let limit = concurrency.limit();
            if limit > self.most_waiting.swap(limit, Relaxed) {
                self.shared.queue.freed();
            }
        }
        Some(look)
    }

    /// For how long one that is known to be slow is no more silent than it was, a second at most; nothing otherwise.
    pub fn slow_for(&self) -> Duration {
        // The longest of its last answers may be one that is long by nature.
        let usual = || self.pace().1.unwrap_or(SLOW_FOR).min(self.silence.took());
        if self.pace_share() < 1.0 { (usual() * 2).min(SLOW_FOR) } else { Duration::ZERO }
    }

    /// After how long without a first byte to anybody it is silent, where it has not answered often enough to tell by that.
    pub fn stranger_silent_after(&self) -> Duration {
        self.shared.stranger_silent_after(self.handshake.learned().map(|(_, p99)| p99))
    }

    /// After how long many that wait make a silence, whatever the slowest hundredth takes: one request in fifty that takes seconds by
    /// nature must not hide it for as long. `None`: few wait, little is known, or long ones are no rarity.
    pub fn many_silent_after(&self) -> Option<Duration> {
        let usual = self.first_byte.but_one_in_25().filter(|usual| *usual < TOO_LONG && self.silence.many_wait())?;
        Some((usual * MANY_FACTOR).max(SILENT).max(self.slow_for()))
    }

    fn late_after(&self, floor: Duration) -> Duration {
        self.first_byte.learned().map_or(floor, |(_, p99)| floor.max(p99 * 5))
    }

    /// Whether nobody has got a first byte for a little longer than that takes, though several wait: who can go elsewhere goes
    /// elsewhere, until the next first byte. No evidence, and nothing is remembered of it.
    pub fn hangs(&self, now: Time) -> bool {
        self.silence.hangs(HANGS, now)
            && self.first_byte.learned().is_some_and(|(_, p99)| self.silence.hangs(HANGS.max(p99 * HANGS_TIMES), now))
    }

    /// From when on who asks it tries it for others: it is in doubt. In whole milliseconds, and no earlier.
    pub fn doubted_since(&self) -> Option<Time> {
        let view = self.view();
        matches!(view.state, State::Suspect | State::Down).then(|| view.since + Duration::from_millis(1))
    }

    /// Whether it is thought to fail, so that whoever comes tries it for others.
    pub fn is_doubted(&self) -> bool {
        matches!(self.view().state, State::Suspect | State::Down) || self.class_fails.load(Relaxed)
    }

    /// Whether others have got its clients lately: it is down, and not for more than a minute.
    pub fn is_out(&self, now: Time) -> bool {
        let view = self.view();
        view.state == State::Down && now.since(view.since) <= OUT_LATELY
    }

    /// How many clients may wait for its answers at once; `None`: nothing was learned that limits them.
    pub fn most_waiting(&self) -> Option<u32> {
        Some(self.most_waiting.load(Relaxed)).filter(|most| *most != u32::MAX)
    }

    /// Limits it as if that had been learned.
    #[cfg(test)]
    pub fn limit_waiting(&self, most: u32) {
        self.most_waiting.store(most, Relaxed);
    }

    /// Gives it that share as if its pace had told.
    #[cfg(test)]
    pub fn keep_share(&self, share: f64) {
        self.pace_share.store((share * 10_000.0) as u32, Relaxed);
    }

    /// Whether it may take one more client, of at most `most` connections. However much was left there, a few may wait: somebody
    /// has to find out when it answers again.
    pub fn has_room(&self, most: u32) -> bool {
        let limit = self.most_waiting.load(Relaxed);
        let waiting = self.silence.waiting() + self.silence.coming();
        self.in_flight.used() < most
            && (limit == u32::MAX || waiting < limit.min(TRIALS) || waiting + self.silence.abandoned() < limit)
    }

    /// Somebody was sent there. Where a limit was learned he counts from now on, not only when he has written: many may be sent in
    /// one moment.
    pub fn comes(&self, now: Time) {
        if self.most_waiting.load(Relaxed) != u32::MAX {
            self.silence.comes(now);
        }
    }

    /// A client that began to wait at `since` no longer does.
    pub fn waits_no_more(&self, since: Time) {
        let waited = clock::now().since(since);
        self.silence.left(since, waited >= self.late_after(GAVE_UP));
        self.shared.queue.freed();
    }

    /// Judges a look; says whether the share changed.
    pub fn judge(&self, look: pace::Look, alike: pace::Others, now: Time) -> bool {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pace) = pace.as_mut() else { return false };
        if !pace.judge(look, alike, now) {
            return false;
        }
        let before = self.pace_share.swap((pace.share() * 10_000.0) as u32, Relaxed);
        if before == 10_000 || pace.share() >= 1.0 {
            self.counters.paced.add(u64::from(before == 10_000));
            if !self.told_too_often(now) {
                let ms = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e3);
                tracing::info!(
                    pool = &*self.shared.name,
                    backend = &*self.name,
                    share = pace.share(),
                    calm_ms = ms(pace.calm()),
                    slowness = look.slower.map(|slower| slower.times),
                    loss = look.loss,
                    "pace"
                );
            }
        }
        true
    }

    fn told_too_often(&self, now: Time) -> bool {
        self.told.add(now);
        self.told.sum(now) > TOLD
    }
}

impl Backend {
    /// A copy of its health, for reports.
    pub fn health(&self) -> Health {
        self.lock().health.clone()
    }

    /// A handshake of a client's attempt that ended well, and how long it took with TLS, where that was waited for.
    pub fn connected(&self, policy: &Policy, handshake: Duration, tls: Option<Duration>, began: Time, now: Time) {
        self.handshake.record(handshake);
        tls.into_iter().for_each(|took| self.shook_hands(took));
        self.counters.attempts[Outcome::Ok as usize].add(1);
        self.shows_life(now);
        let view = self.view();
        if view.state != State::Up || view.open_run.is_some() {
            self.success(policy, Source::Traffic, Depth::Connect, began, now);
        }
    }

    /// A TLS handshake that ended well.
    pub fn shook_hands(&self, took: Duration) {
        self.tls_handshake.record(took);
        if self.view().open_run == Some(Depth::FirstByte) {
            self.lock().health.shook_hands();
        }
    }

    /// The first byte of an answer to a client of `prefix`.
    pub fn answered(&self, policy: &Policy, prefix: u32, took: Duration, began: Time, now: Time) {
        self.heard(Some(took), now);
        self.went_well(prefix, now);
        let view = self.view();
        if view.state != State::Up || view.open_run == Some(Depth::FirstByte) {
            self.success(policy, Source::Traffic, Depth::FirstByte, began, now);
        }
    }

    /// A whole request was written to it for a client of `prefix`, or what a client says first was.
    pub fn asked(&self, prefix: u32, now: Time) {
        self.silence.wrote(prefix, now);
        // What takes so long by nature, as long polls do, is no debt whose lateness anybody could see.
        if self.first_byte.but_one_in_25().is_none_or(|usual| usual < TOO_LONG) {
            self.shared.uplink.asked(self.id, now);
        }
    }

    /// A request was carried elsewhere that would have taken this long, and others of its kind never had: the backend is slow.
    pub fn moved_slow(&self, took: Duration) {
        self.moved.record(took);
    }

    /// A request was carried elsewhere because the backend is silent; or slow, as its last answer showed or its next one will.
    pub fn moved_silent(&self, now: Time) {
        let took = self.silence.took();
        if took > self.late_after(LATE) && now.since(self.silence.heard_at()) <= TOOK_FOR {
            self.moved.record(took);
        } else {
            self.moved_silent.fetch_add(1, Relaxed);
        }
    }

    /// The first byte of an answer to a request; `took` is `None` where it came before the whole request had.
    pub fn heard(&self, took: Option<Duration>, now: Time) {
        if let Some(took) = took.filter(|_| self.moved_silent.load(Relaxed) > 0) {
            let moved = self.moved_silent.swap(0, Relaxed);
            if took > self.late_after(LATE) {
                // They would have had an answer as late as this one.
                (0..moved.min(LATE_FOR)).for_each(|_| self.moved.record(took));
            }
        }
        self.silence.heard(took, now);
        if let Some(took) = took {
            self.first_byte.record(took);
            self.shared.uplink.answered(self.id, now - took);
        }
    }

    /// Whether it was given up because nothing came from it any more, and nothing has come since.
    pub fn vanished(&self) -> bool {
        self.is_down_and_says_nothing("refused") || self.fell_silent()
    }

    /// The same, where it takes no connections or answers none: one that refuses them may be about to finish what it has.
    pub fn fell_silent(&self) -> bool {
        self.is_down_and_says_nothing("silent")
    }

    /// Whether it is in doubt or down because it answers nobody (not because it takes no connections alone), and has not since.
    pub fn answers_nobody(&self) -> bool {
        let view = self.view();
        matches!(view.state, State::Suspect | State::Down)
            && self.silence.heard_at() < view.since
            && self.health().cause().is_some_and(|cause| cause.kind == "silent" && cause.depth >= Depth::FirstByte)
    }

    fn is_down_and_says_nothing(&self, kind: &str) -> bool {
        let view = self.view();
        view.state == State::Down
            && self.silence.heard_at() < view.since
            && self.health().cause().is_some_and(|cause| cause.kind == kind)
    }

    /// Whether it is doubted for nothing but its errors: it answers, and whoever asks it for want of a better one loses little.
    pub fn errs(&self) -> bool {
        let doubted = matches!(self.view().state, State::Suspect | State::Down);
        doubted && self.health().cause().is_some_and(|cause| cause.kind == "errors")
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
            Some(Blame { prefix, others: false, elsewhere: 0.0, tries_elsewhere: 0 })
        };
        if let Some(blame) = blame {
            // Of a client alone it must be known how it does elsewhere: a reset may be an answer to its bytes.
            let unknown = if blame.others { 0.0 } else { 1.0 / f64::from(blame.tries_elsewhere.saturating_add(2)) };
            let of_ratio = Blame { elsewhere: blame.elsewhere.max(unknown), ..blame };
            if of_ratio.elsewhere < EVERYWHERE {
                self.went_wrong(policy, Depth::FirstByte, of_ratio, began, now);
            }
            let seen = Seen::Reset(blame);
            self.observe(policy, &Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen, began }, now);
        }
    }

    /// A probe that succeeded, as deep as it looks.
    pub fn probed(&self, policy: &Policy, depth: Depth, began: Time, now: Time) {
        self.counters.probes[0].add(1);
        self.shows_life(now);
        if self.probe_denied.swap(false, Relaxed) {
            self.lock().health.believes_probes();
        }
        let view = self.view();
        if view.state != State::Up || view.open_run.is_some() {
            self.success(policy, Source::Probe, depth, began, now);
        }
    }

    /// A success seen by `source`.
    pub fn success(&self, policy: &Policy, source: Source, depth: Depth, began: Time, now: Time) {
        self.observe(policy, &Evidence { source, depth, seen: Seen::Success { hits: 0 }, began }, now);
    }

    /// Whether an operator who says `wanted` means it: its name or its address.
    pub fn is_called(&self, wanted: &str) -> bool {
        *self.name == *wanted || wanted.parse() == Ok(self.address)
    }

    /// Says in which cell it stands, by the cell's number.
    pub fn stands_in(&self, cell: usize) {
        self.cell.store(cell, Relaxed);
        self.shared.uplink.stands_in(self.id, self.shared.number, cell);
    }

    /// A handshake with it was finished.
    fn shows_life(&self, now: Time) {
        self.shared.uplink.connected(self.id, now);
    }

    /// Whether probes failed within the last seconds while clients were served: then the clients are believed.
    pub fn contradicts_probes(&self, now: Time) -> bool {
        let at = self.contradicted_ms.load(Relaxed);
        at > 0 && now.0 / 1_000 < at + CONTRADICTION_SHOWN_MS
    }

    /// Whether a failure counts: errors only where another one has fewer, silence only while somebody else answers, and what probes
    /// say only where no client says otherwise, and not of all cells at once.
    fn counts(&self, health: &mut Health, policy: &Policy, evidence: &Evidence, now: Time) -> bool {
        let probe = evidence.source == Source::Probe;
        if evidence.seen == Seen::Errors && self.errs_like_the_others(health, now) {
            return false;
        }
        let silent = match evidence.seen {
            Seen::Silent => evidence.depth == Depth::Connect,
            Seen::Mute => true,
            _ => false,
        };
        if silent {
            let answers = evidence.seen == Seen::Mute;
            let usual = match answers {
                true if self.silence.many_wait() => self.first_byte.but_one_in_25(),
                true => self.first_byte.learned().map(|(_, p99)| p99),
                false => self.handshake.learned().map(|(_, p99)| p99),
            };
            let race = usual.unwrap_or_default().max(LIFE_FLOOR);
            // What was under way when everything stopped must not look like life. A probe is one of two at least.
            let since = if probe { evidence.began - PROBE_SLACK } else { evidence.began + race };
            let vouched = match answers {
                true => self.shared.uplink.vouches_by_answers(self.id, &self.shared.stall, since, now),
                false => self.shared.uplink.vouches(self.id, since, now),
            };
            if !vouched {
                return false;
            }
            // When all have become slower alike, one of them has to be the first to answer again.
            if answers && self.silence.accused(now) < MUTE_FOR {
                return false;
            }
        }
        if !probe || !matches!(health.state(), State::Up | State::Returning) || health.open_by_traffic() {
            return true;
        }
        let good = self.good_ms.load(Relaxed);
        if good > 0 && now.0 / 1_000 <= good + CONTRADICTION_MS && good >= health.last_failure().0 / 1_000 {
            self.counters.contradictions.add(1);
            health.denies_probe(Time(good * 1_000), now);
            self.probe_denied.store(true, Relaxed);
            self.contradicted_ms.store((now.0 / 1_000).max(1), Relaxed);
            return false;
        }
        let falls = health.would_fall(policy);
        if falls && self.last_standing.load(Relaxed) && !policy.between_probe_removals.is_zero() {
            self.contradicted_ms.store((now.0 / 1_000).max(1), Relaxed);
            return false;
        }
        !falls || self.shared.probes_may_remove(self.cell.load(Relaxed), policy.between_probe_removals, now)
    }

    /// Takes one fact; logs and publishes the transition it makes.
    pub fn observe(&self, policy: &Policy, evidence: &Evidence, now: Time) -> Option<Transition> {
        let probes_another = evidence.source == Source::Probe && policy.probe_elsewhere;
        if evidence.seen == Seen::Refused && !probes_another {
            self.says_version(None, now, now);
        }
        let mut locked = self.lock();
        let mut evidence = *evidence;
        match evidence.seen {
            Seen::Success { .. } => {}
            Seen::Reset(_) | Seen::Wrong | Seen::Corrupt | Seen::Tls(_) | Seen::Errors => self.shows_life(now),
            // A router may refuse as well.
            Seen::Refused | Seen::Silent | Seen::Mute => {}
        }
        if !matches!(evidence.seen, Seen::Success { .. }) && !self.counts(&mut locked.health, policy, &evidence, now) {
            return None;
        }
        if let Seen::Success { hits } = &mut evidence.seen {
            let known = self.counters.attempts[Outcome::Ok as usize].get();
            *hits = known.saturating_sub(locked.hits_known).min(u64::from(u32::MAX)) as u32;
            *hits += u32::from(evidence.source == Source::Probe);
            locked.hits_known = known;
        }
        let transition = locked.health.step(policy, &evidence, now);
        if transition.is_some_and(|transition| matches!(transition.to, State::Up | State::Returning)) {
            self.silence.begins_anew();
        }
        self.publish(&locked.health, policy);
        drop(locked);
        if let Some(transition) = &transition {
            self.report(transition);
        }
        transition
    }

    /// Claims the next trial: a client's connection for a backend that no probe can clear. At most one caller
    /// gets it, and the next only after a pause. `late` says that this client would lose something by it.
    pub fn claim_trial(&self, policy: &Policy, late: bool, now: Time) -> bool {
        let due = self.trial_ms.load(Relaxed);
        if due > now.0 / 1_000 || self.is_closed() {
            return false;
        }
        // One that has begun to prove itself risks little.
        if late && due + LATE_TRIAL_MS > now.0 / 1_000 && !self.lock().health.proves_itself() {
            return false;
        }
        let soon = now.0 / 1_000 + 1_000;
        let allowed = self.lock().health.owes_more() || self.shared.budget.trial(now);
        if !allowed || self.trial_ms.compare_exchange(due, soon, Relaxed, Relaxed).is_err() {
            return false;
        }
        let mut locked = self.lock();
        locked.health.trial_begins(now);
        self.publish(&locked.health, policy);
        true
    }

    /// An operator lets it return as soon as it is well; says whether that changes anything.
    pub fn let_return(&self) -> bool {
        let changes = self.lock().health.let_return();
        if changes {
            self.probe_now();
        }
        changes
    }

    /// Takes over the policy of a new table.
    pub fn adopt(&self, policy: &Policy, now: Time) {
        let mut locked = self.lock();
        locked.health.adopt(policy, now);
        self.publish(&locked.health, policy);
        drop(locked);
        self.shared.changed();
    }

    /// Whether a trial is or will be due.
    pub fn awaits_trial(&self) -> bool {
        self.trial_ms.load(Relaxed) != u64::MAX
    }

    fn publish(&self, health: &Health, policy: &Policy) {
        self.view.store(health.view().pack(), Relaxed);
        let trial = health.trial_at(policy).map_or(u64::MAX, |at| at.0 / 1_000);
        // Whether it awaits one belongs to the plan.
        if (self.trial_ms.swap(trial, Relaxed) == u64::MAX) != (trial == u64::MAX) {
            self.shared.changed();
        }
    }

    fn report(&self, transition: &Transition) {
        self.counters.transitions[transition.to as usize].add(1);
        if let Some(detected) = transition.detected {
            self.shared.detect.record(detected);
        }
        self.shared.changed();
        if matches!(transition.to, State::Suspect | State::Down) {
            self.retired.fetch_add(1, Relaxed);
        }
        if transition.to == State::Down {
            self.says_version(None, transition.cause.at, transition.cause.at);
        }
        if matches!(transition.to, State::Suspect | State::Down | State::Returning) {
            self.probe_now();
        }
        let cause = transition.cause;
        // A backend that changes its mind all the time must not fill the log.
        if self.told_too_often(cause.at) {
            return;
        }
        let cell = self.shared.uplink.cell_name(self.cell.load(Relaxed)).unwrap_or_default();
        tell::transition(&self.shared.name, &cell, &self.name, transition);
    }

    /// Lets its prober ask at once, when it has one.
    pub fn probe_now(&self) {
        let prober = self.prober.lock().unwrap_or_else(PoisonError::into_inner);
        prober.iter().for_each(|prober| prober.notify_one());
    }

    /// A panic while the lock was held leaves at worst one fact half counted; health goes on.
    fn lock(&self) -> MutexGuard<'_, Locked> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
