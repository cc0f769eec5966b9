//! The health of one backend: a pure state machine. Time is an argument; no I/O, no async, no randomness.
//!
//! ```text
//!              first success                 refusals, silence, resets
//!   unknown ──────────────────▶ up ─────────────────────────────────────▶ suspect
//!      │                        ▲ ▲        success at the blamed depth      │  │
//!      │ fall probes failed     │ └────────────────────────────────────────┘  │ a probe agrees,
//!      ▼                        │ ramp over                                    │ or it goes on
//!    down ◀─────────────────────┼──────────────────────────────────────────────┘
//!      │                        │        (a suspicion older than a hold returns by a ramp too)
//!      └─ hold over, and ──▶ returning
//!         rise successes
//! ```
//!
//! Besides, `fall` probes take a backend from `up` to `down` where no client says otherwise; and what is `unknown` or
//! `returning` is judged like what is `up`.
//!
//! Evidence has depth: what was seen at one depth is cleared only by success at that depth or deeper. `suspect`
//! is cheap and entered quickly, because a suspect backend is only last in its tier; `down` needs agreement.
//!
//! Silence is judged by a sequential test (Wald 1945, one-sided): `n` attempts in a row without an answer are
//! the path's own loss with probability `loss^n`, and count when that is at most `SUSPECT_ODDS`. The loss is
//! learned by two exponentially weighted averages, a quick and a slow one, of which the greater holds.

use std::time::Duration;

use crate::clock::Time;

/// Chance of a false alarm per run of silence that makes a backend suspect.
const SUSPECT_ODDS: f64 = 1e-4;
/// The same for `down`; and this many in a row that even the worst path would hardly do it, because what was
/// learned of a path may be young.
const DOWN_ODDS: f64 = 1e-6;
const DOWN_LEAST: u32 = 8;
/// Fewest attempts, and least time from first to last, that count as silence.
const SILENCE_LEAST: u32 = 3;
const SILENCE_SPREAD: Duration = Duration::from_millis(50);
/// Bounds of the learned loss.
const LOSS_LEAST: f64 = 0.01;
const LOSS_MOST: f64 = 0.30;
/// The learned loss is taken a quarter higher, because it is an estimate.
const LOSS_MARGIN: f64 = 1.25;
const LOSS_QUICK: f64 = 1.0 / 30.0;
const LOSS_SLOW: f64 = 1.0 / 1_000.0;
/// Refusals in a row that make a backend suspect, and those that make a suspect one down without a probe.
const REFUSALS_SUSPECT: u32 = 2;
const REFUSALS_DOWN: u32 = 4;
/// Resets count only when they are spread at least this far: two clients of one moment are one observation.
const RESET_SPREAD: Duration = Duration::from_millis(10);
/// First and longest pause between trials of a backend that no probe can clear.
const TRIAL_FIRST: Duration = Duration::from_secs(1);
const TRIAL_LONGEST: Duration = Duration::from_secs(8);
const TRIAL_LONGEST_OF_ERRORS: Duration = Duration::from_secs(2);
/// Good answers in a row that a backend owes which was doubted for its errors: one alone proves little of a ratio.
const PROOF: u32 = 16;
/// Its ramp is this many times as quick where errors were all that was seen of it.
const QUICKER: u32 = 3;
/// A doubt that clients raise again this soon after a probe cleared it is for clients to settle.
const DENIAL: Duration = Duration::from_secs(10);
/// A return to `down` within this many holds of the last return is a relapse.
const RELAPSE_HOLDS: u32 = 10;
/// A backend that fails again within `FLAPS` of becoming well must stay well for `STEADY_TIMES` as long as it last did before it
/// returns; that demand fades by `STEADY_FADES` each time. One that fails and works in turn stays out until it no longer does.
const FLAPS: Duration = Duration::from_secs(5);
const STEADY_TIMES: u32 = 2;
const STEADY_FADES: f64 = 0.7;

/// State of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// Nothing has been seen yet.
    Unknown,
    /// Fit.
    Up,
    /// Last in its tier until the doubt is settled.
    Suspect,
    /// No traffic.
    Down,
    /// Fit within its ramp.
    Returning,
}

impl State {
    /// All states.
    pub const ALL: [State; 5] = [State::Unknown, State::Up, State::Suspect, State::Down, State::Returning];

    /// The word for logs, status and metrics.
    pub fn word(self) -> &'static str {
        match self {
            State::Unknown => "unknown",
            State::Up => "up",
            State::Suspect => "suspect",
            State::Down => "down",
            State::Returning => "returning",
        }
    }
}

/// How far into a conversation a fact was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Depth {
    /// The handshake.
    Connect,
    /// The first byte of an answer.
    FirstByte,
    /// A whole answer of the right content.
    Answer,
}

impl Depth {
    /// The word for logs and status.
    pub fn word(self) -> &'static str {
        match self {
            Depth::Connect => "connect",
            Depth::FirstByte => "first byte",
            Depth::Answer => "answer",
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
    /// How deep what failed in a row went, while nothing has cleared it.
    pub open_run: Option<Depth>,
    /// Whether it returns without having been away.
    pub quick: bool,
}

impl View {
    /// In one word.
    pub fn pack(self) -> u64 {
        let run = self.open_run.map_or(0, |depth| depth as u64 + 1);
        (self.since.0 / 1_000) << 8 | u64::from(self.quick) << 7 | run << 4 | self.state as u64
    }

    /// Out of one word.
    pub fn unpack(bits: u64) -> View {
        let state = State::ALL[(bits & 0xf) as usize % State::ALL.len()];
        let open_run = match bits >> 4 & 0x7 {
            0 => None,
            1 => Some(Depth::Connect),
            2 => Some(Depth::FirstByte),
            _ => Some(Depth::Answer),
        };
        View { state, since: Time((bits >> 8) * 1_000), open_run, quick: bits & 0x80 != 0 }
    }

    /// Share of its full weight that a backend in this state gets, 0 to 1.
    pub fn ramp_share(self, policy: &Policy, now: Time) -> f64 {
        match self.state {
            State::Up => 1.0,
            State::Returning => ramp_share(self.since, ramp(policy, self.quick), now),
            _ => 0.0,
        }
    }
}

/// Who saw a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An active check.
    Probe,
    /// A client's connection.
    Traffic,
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Seen {
    /// Success; `hits` counts the successes at connect depth since the last step, this one included.
    Success {
        /// At least 1 for an attempt, 0 for a deeper success of a connection already counted.
        hits: u32,
    },
    /// A reset or an ICMP error instead of a handshake.
    Refused,
    /// No answer within the time for it.
    Silent,
    /// A reset or a close before the first byte.
    Reset(Blame),
    /// A probe's answer was not the wanted one.
    Wrong,
    /// A probe's answer was not the one that its digest belongs to.
    Corrupt,
    /// Requests wait, and nobody gets a first byte for longer than it takes; judged by `silence`.
    Mute,
    /// More answers are errors than used to be, or one more of a backend that is doubted for it; judged by `ratio`.
    Errors,
    /// A TLS handshake failed; the words say how.
    Tls(&'static str),
}

/// How much a reset says about the backend and not about the client whose bytes came before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Blame {
    /// The client's prefix, hashed.
    pub prefix: u32,
    /// Whether clients of other prefixes are active: then one prefix gives at most half of what is needed.
    pub others: bool,
    /// Share of this prefix's connections that end so on other backends, 0 to 1.
    pub elsewhere: f64,
    /// How many of its connections those backends have had since the first that ended so.
    pub tries_elsewhere: u32,
}

/// One fact about one backend.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// Who saw it.
    pub source: Source,
    /// How deep.
    pub depth: Depth,
    /// What.
    pub seen: Seen,
    /// When the attempt or the probe began. What began before the present state says nothing about it.
    pub began: Time,
}

/// Why a backend is in its state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cause {
    /// Who saw it last.
    pub source: Source,
    /// What was seen.
    pub kind: &'static str,
    /// How deep.
    pub depth: Depth,
    /// How often in a row.
    pub times: u32,
    /// When.
    pub at: Time,
}

/// A change of state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transition {
    /// Before.
    pub from: State,
    /// After.
    pub to: State,
    /// Why.
    pub cause: Cause,
    /// From the first failed evidence to leaving `up`; `None` for other transitions.
    pub detected: Option<Duration>,
}

/// What the pool's configuration says about health.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Failed probes in a row before `down`.
    pub fall: u32,
    /// Successes in a row before a return.
    pub rise: u32,
    /// First hold.
    pub hold_first: Duration,
    /// Longest hold.
    pub hold_longest: Duration,
    /// Length of the ramp.
    pub ramp: Duration,
    /// How deep the probe looks; `None` without a probe.
    pub probe_depth: Option<Depth>,
    /// Whether it looks at another port: then it cannot deny what traffic saw.
    pub probe_elsewhere: bool,
    /// Time between two cells that probes alone take out.
    pub between_probe_removals: Duration,
    /// Whether a backend that was down stays out until an operator lets it return.
    pub asks_operator: bool,
}

/// The configuration's defaults.
impl Default for Policy {
    fn default() -> Self {
        Policy {
            fall: 2,
            rise: 2,
            hold_first: Duration::from_secs(1),
            hold_longest: Duration::from_secs(60),
            ramp: Duration::from_secs(10),
            probe_depth: Some(Depth::Connect),
            probe_elsewhere: false,
            between_probe_removals: Duration::from_secs(10),
            asks_operator: false,
        }
    }
}

/// Failures of one kind in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Run {
    count: u32,
    first: Time,
    last: Time,
}

impl Run {
    fn push(&mut self, at: Time) {
        if self.count == 0 {
            self.first = at;
        }
        self.count += 1;
        // Attempts are judged in the order they end, not in the order they began.
        self.first = self.first.min(at);
        self.last = self.last.max(at);
    }

    fn spread(&self) -> Duration {
        self.last.since(self.first)
    }
}

/// Resets in a row, by client prefix. More than eight prefixes need no telling apart.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Resets {
    run: Run,
    prefixes: [(u32, u32); 8],
    used: usize,
    elsewhere: f64,
    others: bool,
}

impl Resets {
    fn push(&mut self, blame: Blame, at: Time) {
        self.run.push(at);
        self.elsewhere = if self.run.count == 1 { blame.elsewhere } else { self.elsewhere.max(blame.elsewhere) };
        self.others |= blame.others;
        if let Some((_, count)) = self.prefixes[..self.used].iter_mut().find(|(prefix, _)| *prefix == blame.prefix) {
            *count += 1;
        } else if self.used < self.prefixes.len() {
            self.prefixes[self.used] = (blame.prefix, 1);
            self.used += 1;
        }
    }

    fn convincing(&self) -> bool {
        let needed = needed(self.elsewhere, SUSPECT_ODDS).max(2);
        let each = if self.others || self.used > 1 { needed.div_ceil(2) } else { needed };
        let counted: u32 = self.prefixes[..self.used].iter().map(|(_, count)| (*count).min(each)).sum();
        counted >= needed && self.run.spread() >= RESET_SPREAD
    }
}

/// Smallest `n` with `rate^n <= odds`.
fn needed(rate: f64, odds: f64) -> u32 {
    let rate = rate.clamp(LOSS_LEAST, 0.99);
    // A hair of tolerance: 0.01^2 must be 1e-4 in floating point too.
    ((odds.ln() / rate.ln()) - 1e-9).ceil() as u32
}

/// Health of one backend.
#[derive(Clone, Debug)]
pub struct Health {
    state: State,
    since: Time,
    cause: Option<Cause>,
    /// Deepest depth of what speaks against the backend.
    blamed: Depth,
    /// Whether traffic, and not probes alone, speaks against it.
    seen_by_traffic: bool,
    refusals: u32,
    /// Clients' TLS handshakes that failed in a row.
    tls_failures: u32,
    silence: Run,
    resets: Resets,
    first_failure: Option<Time>,
    last_failure: Time,
    probe_failures: u32,
    /// How deep the last failed probe came.
    probe_failed: Depth,
    /// When a probe last cleared what traffic had seen, and whether it has lost its say by doing so too often.
    cleared_by_probe: Option<Time>,
    probe_distrusted: bool,
    /// Since when probes have failed while clients were served, and when one did last after which a client was served. And whether that
    /// was so when the present doubt came up: then failing probes say nothing about it.
    probe_fails_since: Option<Time>,
    probe_denied: Option<Time>,
    probe_lies: bool,
    successes: u32,
    /// Good answers to clients that must come before a return; 0: the rest decides.
    proof: u32,
    /// Whether anything but errors was seen of it since it was last well; and whether it returns from errors alone.
    was_away: bool,
    quick: bool,
    loss_quick: f64,
    loss_slow: f64,
    hold: Duration,
    hold_until: Time,
    /// Since when all has gone well, from a failure on; and how long that must last before it returns.
    steady_since: Option<Time>,
    must_be_steady: Duration,
    /// An operator has let it return.
    let_return: bool,
    returned: Option<Time>,
    trial_at: Time,
    trial_pause: Duration,
    /// When a failure last made the next trial wait longer. Whoever had come before then tells nothing more.
    postponed: Time,
    /// Whether it was added to a pool that others carry.
    newcomer: bool,
}

impl Health {
    /// A backend nothing is known about. Without a probe it is taken for `up`: only traffic can tell.
    pub fn new(policy: &Policy, now: Time) -> Health {
        Health {
            state: if policy.probe_depth.is_some() { State::Unknown } else { State::Up },
            since: now,
            cause: None,
            blamed: Depth::Connect,
            seen_by_traffic: false,
            refusals: 0,
            tls_failures: 0,
            silence: Run::default(),
            resets: Resets::default(),
            first_failure: None,
            last_failure: Time(0),
            probe_failures: 0,
            probe_failed: Depth::Connect,
            cleared_by_probe: None,
            probe_distrusted: false,
            probe_fails_since: None,
            probe_denied: None,
            probe_lies: false,
            successes: 0,
            proof: 0,
            was_away: false,
            quick: false,
            loss_quick: 0.0,
            loss_slow: 0.0,
            hold: policy.hold_first,
            hold_until: now,
            steady_since: None,
            must_be_steady: Duration::ZERO,
            let_return: false,
            returned: None,
            trial_at: now,
            trial_pause: TRIAL_FIRST,
            postponed: Time(0),
            newcomer: false,
        }
    }

    /// The present state.
    pub fn state(&self) -> State {
        self.state
    }

    /// When the present state began.
    pub fn since(&self) -> Time {
        self.since
    }

    /// Why the present state began; `None` before the first transition.
    pub fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// Deepest depth of what speaks against the backend.
    pub fn blamed(&self) -> Depth {
        self.blamed
    }

    /// Whether traffic, and not probes alone, speaks against the backend.
    pub fn seen_by_traffic(&self) -> bool {
        self.seen_by_traffic
    }

    /// When traffic last failed on it; `Time(0)`: never.
    pub fn last_failure(&self) -> Time {
        self.last_failure
    }

    /// Whether clients have begun to speak against it.
    pub fn open_by_traffic(&self) -> bool {
        self.resets.run.count > 0 || self.refusals > self.probe_failures || self.silence.count > self.probe_failures
    }

    /// Whether one more failed probe takes it out.
    pub fn would_fall(&self, policy: &Policy) -> bool {
        self.probe_failures + 1 >= policy.fall
    }

    /// The present hold, and when it ends: later where it must be well for some time.
    pub fn hold(&self) -> (Duration, Time) {
        let steady = self.steady_since.map_or(Time(0), |since| since + self.must_be_steady);
        (self.hold, self.hold_until.max(steady))
    }

    /// The learned loss of the path with its margin, 0.01 to 0.30.
    pub fn loss(&self) -> f64 {
        (self.loss_quick.max(self.loss_slow) * LOSS_MARGIN).clamp(LOSS_LEAST, LOSS_MOST)
    }

    /// What the data plane reads of it.
    pub fn view(&self) -> View {
        View { state: self.state, since: self.since, open_run: self.open_run(), quick: self.quick }
    }

    /// Deepest depth at which a run of failures is open: a success that deep must come through [`Health::step`].
    pub fn open_run(&self) -> Option<Depth> {
        if self.resets.run.count > 0
            || self.tls_failures > 0
            || self.probe_failures > 0 && self.probe_failed == Depth::FirstByte
        {
            Some(Depth::FirstByte)
        } else if self.refusals > 0 || self.silence.count > 0 || self.probe_failures > 0 {
            Some(Depth::Connect)
        } else {
            None
        }
    }

    /// When a client's connection should next try a backend that no probe can clear; `None` when a probe can,
    /// or nothing is wrong.
    pub fn trial_at(&self, policy: &Policy) -> Option<Time> {
        let doubted = matches!(self.state, State::Suspect | State::Down);
        (doubted && self.out_of_sight(policy)).then(|| match self.state {
            State::Down => self.trial_at.max(self.hold_until),
            _ => self.trial_at,
        })
    }

    /// Whether no probe can clear what speaks against the backend.
    fn out_of_sight(&self, policy: &Policy) -> bool {
        self.proof > 0
            || policy.probe_depth.is_none_or(|depth| depth < self.blamed)
            || self.seen_by_traffic && (policy.probe_elsewhere || self.probe_distrusted || self.probe_lies)
    }

    /// Takes over another policy: nothing may be blamed so deep that neither traffic nor the new probe can clear it.
    pub fn adopt(&mut self, policy: &Policy, now: Time) {
        self.blamed = self.blamed.min(policy.probe_depth.unwrap_or(Depth::FirstByte).max(Depth::FirstByte));
        if policy.probe_depth.is_none() && self.state == State::Unknown {
            self.state = State::Up;
            self.since = now;
        }
        self.hold = self.hold.clamp(policy.hold_first, policy.hold_longest);
    }

    /// It is new where others carry the clients: it begins as one that returns.
    pub fn comes_late(&mut self, policy: &Policy, now: Time) {
        self.newcomer = !policy.ramp.is_zero();
        if self.newcomer && self.state == State::Up {
            (self.state, self.since) = (State::Returning, now);
        }
    }

    /// A TLS handshake ended well: those that failed before were not all.
    pub fn shook_hands(&mut self) {
        self.tls_failures = 0;
    }

    /// A probe failed, and a client was served at `good`. Only what comes after a failure denies it: whoever dies has served somebody
    /// just before.
    pub fn denies_probe(&mut self, good: Time, now: Time) {
        let since = *self.probe_fails_since.get_or_insert(now);
        if good > since {
            self.probe_denied = Some(now);
        }
    }

    /// A probe succeeds again.
    pub fn believes_probes(&mut self) {
        (self.probe_fails_since, self.probe_denied) = (None, None);
        self.probe_lies = false;
    }

    /// Notes that a trial is under way, so that the next waits for its pause.
    pub fn trial_begins(&mut self, now: Time) {
        self.trial_at = now + self.trial_pause;
    }

    /// Takes one fact and returns the change of state it makes, if any.
    pub fn step(&mut self, policy: &Policy, evidence: &Evidence, now: Time) -> Option<Transition> {
        match evidence.seen {
            Seen::Success { hits } => self.success(policy, evidence, hits, now),
            _ => self.failure(policy, evidence, now),
        }
    }

    fn success(&mut self, policy: &Policy, evidence: &Evidence, hits: u32, now: Time) -> Option<Transition> {
        let settled = matches!(self.state, State::Unknown | State::Up | State::Returning);
        // Evidence older than a doubt does not settle it.
        let current = settled || evidence.began >= self.since;
        if !current || !settled && evidence.source == Source::Probe && self.out_of_sight(policy) {
            return None;
        }
        if settled {
            self.learn_loss(hits, self.silence.count);
        }
        self.refusals = 0;
        self.silence = Run::default();
        if evidence.source == Source::Probe || evidence.depth >= self.probe_failed {
            self.probe_failures = 0;
        }
        if evidence.depth >= Depth::FirstByte {
            self.resets = Resets::default();
            self.tls_failures = 0;
        }
        if settled && self.open_run().is_none() {
            self.first_failure = None;
        }
        let cause = |times| Cause { source: evidence.source, kind: "success", depth: evidence.depth, times, at: now };
        match self.state {
            State::Unknown if self.newcomer => self.enter(State::Returning, cause(1), policy, now),
            State::Unknown => self.enter(State::Up, cause(1), policy, now),
            State::Up => None,
            State::Returning if now.since(self.since) >= ramp(policy, self.quick) => {
                self.enter(State::Up, cause(1), policy, now)
            }
            State::Returning => None,
            State::Suspect | State::Down if self.proof > 0 => {
                if evidence.source == Source::Probe || evidence.depth < self.blamed {
                    return None;
                }
                self.successes += 1;
                if self.state == State::Down {
                    self.steady_since.get_or_insert(now);
                }
                self.trial_pause = TRIAL_FIRST;
                self.trial_at = now;
                let enough = self.successes >= self.proof.max(policy.rise) && self.may_return(policy, now);
                if enough { self.enter(State::Returning, cause(self.successes), policy, now) } else { None }
            }
            State::Suspect if evidence.depth >= self.blamed => {
                let long = now.since(self.since) >= policy.hold_first;
                if evidence.source == Source::Probe && self.seen_by_traffic {
                    self.cleared_by_probe = Some(now);
                }
                self.enter(if long { State::Returning } else { State::Up }, cause(1), policy, now)
            }
            State::Down if evidence.depth >= self.blamed => {
                self.successes += 1;
                self.steady_since.get_or_insert(now);
                // One trial that went well calls for the next at once.
                self.trial_pause = TRIAL_FIRST;
                self.trial_at = now;
                let enough = self.successes >= policy.rise && self.may_return(policy, now);
                if enough { self.enter(State::Returning, cause(self.successes), policy, now) } else { None }
            }
            State::Suspect | State::Down => None,
        }
    }

    fn failure(&mut self, policy: &Policy, evidence: &Evidence, now: Time) -> Option<Transition> {
        let probe = evidence.source == Source::Probe;
        // A probe under way when a doubt comes up, and failing, is an answer to it.
        if evidence.began < self.since && !(probe && self.state == State::Suspect) {
            return None;
        }
        if probe && self.probe_lies && matches!(self.state, State::Suspect | State::Down) {
            return None;
        }
        self.first_failure.get_or_insert(evidence.began);
        self.successes = 0;
        if probe {
            self.probe_failures += 1;
            self.probe_failed = evidence.depth;
        } else {
            self.last_failure = now;
        }
        let settled = matches!(self.state, State::Unknown | State::Up | State::Returning);
        self.was_away &= !settled;
        self.was_away |= !matches!(evidence.seen, Seen::Errors | Seen::Wrong | Seen::Corrupt);
        let (kind, times) = match evidence.seen {
            Seen::Refused => {
                self.refusals += 1;
                ("refused", self.refusals)
            }
            Seen::Silent if evidence.depth == Depth::Connect => {
                self.silence.push(evidence.began);
                ("silent", self.silence.count)
            }
            Seen::Silent => ("silent", self.probe_failures),
            Seen::Reset(blame) => {
                if !probe {
                    self.resets.push(blame, evidence.began);
                }
                ("reset", if probe { self.probe_failures } else { self.resets.run.count })
            }
            Seen::Tls(kind) => {
                self.tls_failures += 1;
                (kind, if probe { self.probe_failures } else { self.tls_failures })
            }
            Seen::Mute => ("silent", 1),
            Seen::Errors => ("errors", 1),
            Seen::Wrong | Seen::Success { .. } => ("wrong answer", self.probe_failures),
            Seen::Corrupt => ("wrong content", self.probe_failures),
        };
        let cause = Cause { source: evidence.source, kind, depth: evidence.depth, times, at: now };
        match self.state {
            State::Unknown | State::Up | State::Returning => {
                let silent = self.silence.count >= SILENCE_LEAST.max(needed(self.loss(), SUSPECT_ODDS))
                    && self.silence.spread() >= SILENCE_SPREAD;
                let judged = matches!(evidence.seen, Seen::Mute | Seen::Errors);
                let doubtful = self.refusals >= REFUSALS_SUSPECT
                    || silent
                    || judged
                    || self.resets.convincing()
                    || self.tls_failures >= REFUSALS_SUSPECT;
                let fallen = probe && self.probe_failures >= policy.fall && self.beyond_loss(evidence, SUSPECT_ODDS);
                if !fallen && !doubtful {
                    return None;
                }
                self.blamed = evidence.depth;
                // A client may have seen it before the probe that makes it certain.
                self.seen_by_traffic = !probe || self.open_by_traffic();
                // A probe that denied the same a moment ago does not see what clients see.
                let lately = |at: Option<Time>| self.seen_by_traffic && at.is_some_and(|at| now.since(at) < DENIAL);
                self.probe_lies = lately(self.probe_denied);
                self.probe_distrusted = lately(self.cleared_by_probe);
                self.owe_proof(evidence);
                self.trial_pause = TRIAL_FIRST;
                self.trial_at = now + TRIAL_FIRST;
                self.enter(if fallen { State::Down } else { State::Suspect }, cause, policy, now)
            }
            State::Suspect => {
                let isolated = matches!(evidence.seen, Seen::Reset(_)) && !probe && !self.resets.convincing();
                if !isolated {
                    self.blamed = self.blamed.max(evidence.depth);
                }
                self.seen_by_traffic |= !probe;
                // A probe that agrees has its say again.
                self.probe_distrusted &= !probe;
                self.postpone_trial(evidence, now);
                let fallen = probe && self.probe_failures >= policy.fall && self.beyond_loss(evidence, SUSPECT_ODDS);
                let enough = self.silence.count >= DOWN_LEAST.max(needed(self.loss(), DOWN_ODDS));
                let agreed = probe && (!is_silence(evidence) || enough || fallen);
                self.owe_proof(evidence);
                let judged = matches!(evidence.seen, Seen::Mute | Seen::Errors);
                let goes_on = self.refusals >= REFUSALS_DOWN
                    || is_silence(evidence) && enough
                    || judged
                    || !probe && self.tls_failures >= REFUSALS_DOWN;
                if agreed || goes_on { self.enter(State::Down, cause, policy, now) } else { None }
            }
            State::Down => {
                self.seen_by_traffic |= !probe;
                // One probe in a while is not what takes a backend out either.
                let fails = !probe || self.probe_failures >= policy.fall && self.beyond_loss(evidence, SUSPECT_ODDS);
                if fails && self.steady_since.is_some_and(|since| evidence.began >= since) {
                    self.ends_steady(policy, now);
                }
                self.owe_proof(evidence);
                self.postpone_trial(evidence, now);
                None
            }
        }
    }

    /// Errors that clients saw are cleared by what clients see, and by more than one good answer.
    fn owe_proof(&mut self, evidence: &Evidence) {
        if evidence.seen == Seen::Errors {
            self.proof = PROOF;
        }
    }

    /// A trial that failed makes the next one wait longer; what probes see does not.
    fn postpone_trial(&mut self, evidence: &Evidence, now: Time) {
        if evidence.source == Source::Probe || evidence.began < self.postponed {
            return;
        }
        self.postponed = now;
        // What was doubted for its errors no probe can clear; whoever tries it may be sent elsewhere, and loses little.
        let longest = if self.proof > 0 { TRIAL_LONGEST_OF_ERRORS } else { TRIAL_LONGEST };
        self.trial_pause = (self.trial_pause * 2).min(longest);
        self.trial_at = self.trial_at.max(now + self.trial_pause);
    }

    /// Whether a silent attempt is more than the path's own loss; any other failure is.
    fn beyond_loss(&self, evidence: &Evidence, odds: f64) -> bool {
        if !is_silence(evidence) {
            return true;
        }
        // A path that never lost anything is believed at once: `fall` alone decides, as configured.
        self.loss() <= LOSS_LEAST && evidence.source == Source::Probe || self.silence.count >= needed(self.loss(), odds)
    }

    fn learn_loss(&mut self, hits: u32, misses: u32) {
        for (rate, alpha) in [(&mut self.loss_quick, LOSS_QUICK), (&mut self.loss_slow, LOSS_SLOW)] {
            *rate *= (1.0 - alpha).powi(hits.min(100_000) as i32);
            for _ in 0..misses.min(64) {
                *rate += (1.0 - *rate) * alpha;
            }
        }
    }

    fn enter(&mut self, to: State, cause: Cause, policy: &Policy, now: Time) -> Option<Transition> {
        let from = self.state;
        let left_up = matches!(from, State::Up | State::Returning) && matches!(to, State::Suspect | State::Down);
        let detected = left_up.then(|| now.since(self.first_failure.unwrap_or(now)));
        if to == State::Down {
            self.next_hold(policy, now);
            self.ends_steady(policy, now);
            self.hold_until = now + self.hold;
            self.successes = 0;
            self.let_return = false;
            self.trial_at = self.trial_at.max(self.hold_until);
        }
        if to == State::Returning && from == State::Down {
            self.returned = Some(now);
        }
        if matches!(to, State::Up | State::Returning) {
            self.refusals = 0;
            self.silence = Run::default();
            self.resets = Resets::default();
            self.probe_failures = 0;
            self.first_failure = None;
            self.blamed = Depth::Connect;
            self.seen_by_traffic = false;
            (self.probe_distrusted, self.probe_lies) = (false, false);
            self.quick = self.proof > 0 && !self.was_away;
            self.was_away = false;
            self.proof = 0;
            self.tls_failures = 0;
        }
        self.state = to;
        self.since = now;
        self.cause = Some(cause);
        Some(Transition { from, to, cause, detected })
    }

    fn may_return(&self, policy: &Policy, now: Time) -> bool {
        // A doubt is no failure that anybody has to look after.
        let steady = now.since(self.steady_since.unwrap_or(now)) >= self.must_be_steady;
        let allowed = self.let_return || steady && !policy.asks_operator;
        self.state == State::Suspect || now >= self.hold_until && allowed
    }

    /// It fails again.
    fn ends_steady(&mut self, policy: &Policy, now: Time) {
        if let Some(steady) = self.steady_since.take().map(|since| now.since(since)) {
            let must = if steady <= FLAPS { steady * STEADY_TIMES } else { Duration::ZERO };
            self.must_be_steady = self.must_be_steady.mul_f64(STEADY_FADES).max(must).min(policy.hold_longest);
        }
    }

    /// Whether nothing but an operator's word keeps it from returning.
    pub fn waits_for_operator(&self, policy: &Policy, now: Time) -> bool {
        self.state == State::Down
            && policy.asks_operator
            && !self.let_return
            && now >= self.hold_until
            && self.successes >= policy.rise.max(self.proof)
    }

    /// Whether it has answered those well that tried it last.
    pub fn proves_itself(&self) -> bool {
        self.successes > 0
    }

    /// Whether it has begun its proof, and owes more of it.
    pub fn owes_more(&self) -> bool {
        (1..self.proof).contains(&self.successes)
    }

    /// An operator lets it return, as soon as it is well; says whether that changes anything. His word stands for most of its
    /// proof.
    pub fn let_return(&mut self) -> bool {
        self.proof = self.proof.min(1);
        self.state == State::Down && !std::mem::replace(&mut self.let_return, true)
    }

    /// The hold halves with each full hold spent up, and doubles with a relapse.
    fn next_hold(&mut self, policy: &Policy, now: Time) {
        let Some(returned) = self.returned else {
            self.hold = policy.hold_first;
            return;
        };
        let mut calm = now.since(returned);
        let relapse = calm <= self.hold * RELAPSE_HOLDS;
        let mut hold = self.hold;
        while calm >= hold && hold > policy.hold_first {
            calm -= hold;
            hold /= 2;
        }
        if relapse {
            hold *= 2;
        } else {
            (self.steady_since, self.must_be_steady) = (None, Duration::ZERO);
        }
        self.hold = hold.clamp(policy.hold_first, policy.hold_longest);
    }
}

fn is_silence(evidence: &Evidence) -> bool {
    evidence.seen == Seen::Silent && evidence.depth == Depth::Connect
}

/// How long a backend returns: one that has only answered errors was there all the time, and needs less.
fn ramp(policy: &Policy, quick: bool) -> Duration {
    if quick { policy.ramp / QUICKER } else { policy.ramp }
}

/// Share of its full weight that a returning backend gets: grows in a straight line from a tenth.
pub fn ramp_share(since: Time, ramp: Duration, now: Time) -> f64 {
    if ramp.is_zero() {
        return 1.0;
    }
    (0.1 + 0.9 * now.since(since).as_secs_f64() / ramp.as_secs_f64()).min(1.0)
}

#[cfg(test)]
mod tests;
