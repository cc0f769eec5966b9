//! Attempts and races: a connection to one backend, for one client, before one deadline.
//!
//! 1. The pool names a member; an attempt begins.
//! 2. It connects: done. It is refused or unreachable: the next member at once, which costs no budget.
//! 3. It is silent: at its race time a second attempt begins beside it, in another cell when there is one. The
//!    first is never given up: it stays open until it connects, fails, another wins, or the client's time ends.
//! 4. An attempt that is still silent at its own judgement time is evidence. One that lost before is kept until
//!    then by `watch`, because losing says nothing; then it is closed by a reset.
//!
//! Learned times say when the next attempt begins. They never say when one is given up.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use fastrand::Rng;
use tokio::time::Sleep;

use crate::backend::{Backend, Outcome};
use crate::clock::{self, Time};
use crate::health::{Depth, Evidence, Seen, Source, State};
use crate::host::Host;
use crate::limits::Permit;
use crate::pool::{Choice, Policy, Pool, Trial, Want};
use crate::tls;

/// A race begins no earlier than this after an attempt.
const RACE_FLOOR: Duration = Duration::from_millis(20);
/// Nor earlier than the learned median and this.
const RACE_ABOVE_MEDIAN: Duration = Duration::from_millis(10);
/// With nothing learned a race begins after this.
const RACE_COLD: Duration = Duration::from_millis(100);
/// An attempt is judged no earlier than this: a path may become several times slower without being dead.
const JUDGE_FLOOR: Duration = Duration::from_millis(150);
/// Nor earlier than this many learned 99th percentiles.
const JUDGE_FACTOR: u32 = 4;
/// With nothing learned an attempt is judged after this.
const JUDGE_COLD: Duration = Duration::from_millis(1_000);
/// With TLS all of these take this many times as long.
const TLS_FACTOR: u32 = 3;
/// A timer that runs later than this ran late by our own fault and proves no silence.
const LATE: Duration = Duration::from_millis(10);
/// Most attempts open at once for one client.
const OPEN: usize = 3;
/// Pause before a member is tried a second time.
const AGAIN: Duration = Duration::from_millis(100);

/// What opens connections: the kernel, or a test's script.
pub trait Network {
    /// A connection on its way.
    type Opening: Opening;
    /// Begins one.
    ///
    /// # Errors
    /// What the system call itself says.
    fn open(&self, backend: &Backend, policy: &Policy, rng: &mut Rng) -> io::Result<Self::Opening>;
    /// Whether its connections are ready only after a TLS handshake.
    fn shakes_hands(&self, _policy: &Policy) -> bool {
        false
    }
}

/// A connection on its way.
pub trait Opening: Send + Unpin + 'static {
    /// What it becomes.
    type Connection;
    /// Ready with the connection and the handshake's duration as the kernel measured it, or with the error.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<(Self::Connection, Duration)>>;
    /// Asks the kernel once more whether the peer has answered.
    fn answered(&self) -> bool;
    /// Whether the peer has answered and a TLS handshake with it is under way.
    fn shaking_hands(&self) -> bool {
        false
    }
    /// Closes a connection that nobody wants, by a reset.
    fn discard(connection: Self::Connection);
}

/// The client on whose behalf we dial.
pub trait Client {
    /// Whether it went away. Asked only when dialling takes longer than usual.
    fn gone(&self) -> bool;
    /// Its prefix, hashed, where backends are told of it before a TLS handshake: how that ends may be about it.
    fn told_of(&self) -> Option<u32> {
        None
    }
}

/// One attempt that failed, for the access log.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The backend's name.
    pub backend: Arc<str>,
    /// What happened, in a few words.
    pub cause: String,
}

/// A connection, and how it came about.
pub struct Dialled<C> {
    /// The connection.
    pub connection: C,
    /// Index of the member in the pool.
    pub member: usize,
    /// One of the backend's connections.
    pub permit: Permit,
    /// When the attempt that won began, and when it had its connection.
    pub began: Time,
    /// See `began`.
    pub connected: Time,
    /// The kernel's time for the handshake.
    pub handshake: Duration,
}

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DialError {
    /// Every backend that could serve is full.
    Full,
    /// No backend connected: all failed, or the time was up.
    Unreachable,
    /// The client went away.
    ClientGone,
}

/// What is told of the dialling, whatever its end.
#[derive(Debug, Default)]
pub struct Story {
    /// Attempts begun.
    pub attempts: u32,
    /// Whether two were open at once.
    pub raced: bool,
    /// Those that failed.
    pub failures: Vec<Failure>,
}

struct Attempt<O> {
    member: usize,
    opening: O,
    permit: Permit,
    /// Of the process, for all but one of a client's open attempts.
    extra: Option<Permit>,
    began: Time,
    judge_at: Time,
    judged: bool,
}

impl<O> Attempt<O> {
    /// How an attempt ends that nobody waits for any longer.
    fn abandoned(&self) -> Outcome {
        if self.judged { Outcome::Silent } else { Outcome::Lost }
    }
}

/// Counts what came of a client's race, however it ends.
struct Race<'a> {
    pool: &'a Pool,
    begun: bool,
    /// By the later attempt.
    won: bool,
}

impl Drop for Race<'_> {
    fn drop(&mut self) {
        self.pool.shared.raced[usize::from(self.won)].add(u64::from(self.begun));
    }
}

enum Event<C> {
    Ended(usize, io::Result<(C, Duration)>),
    Timer,
}

/// A member that was chosen before dialling, and one of its backend's connections.
#[derive(Debug)]
pub struct First {
    /// Index of the member in the pool.
    pub member: usize,
    /// Whether it is in doubt: another attempt belongs beside it.
    pub doubtful: bool,
    /// One of the backend's connections.
    pub permit: Permit,
}

/// Chooses a member, with room, for one client that nothing is being dialled for.
///
/// # Errors
/// [`DialError::Full`] or [`DialError::Unreachable`].
pub fn choose_first(host: &Host, pool: &Pool, want: &Want<'_>, now: Time, rng: &mut Rng) -> Result<First, DialError> {
    match choose(host, pool, want, false, now, rng) {
        Chosen::Member(member, doubtful, permit, _) => Ok(First { member, doubtful, permit }),
        Chosen::Full => Err(DialError::Full),
        Chosen::Nothing | Chosen::NoBudget => Err(DialError::Unreachable),
    }
}

/// What is to be dialled.
pub struct Order<'a> {
    /// Ours to count by.
    pub host: &'a Host,
    /// To a backend of this pool.
    pub pool: &'a Arc<Pool>,
    /// What pins the client.
    pub pin: Option<u64>,
    /// The backend that was chosen before, if one was.
    pub first: Option<First>,
    /// Members that are tried again only when nothing else is left.
    pub tried: Vec<usize>,
    /// This moment.
    pub begin: Time,
}

/// Connects `client` to a backend of a pool. `timer` is the connection's own timer, reused for its later waits.
///
/// # Errors
/// [`DialError`]; the details are in `story`.
pub async fn dial<N: Network>(
    network: &N,
    order: Order<'_>,
    client: &impl Client,
    mut timer: Pin<&mut Sleep>,
    rng: &mut Rng,
    story: &mut Story,
) -> Result<Dialled<<N::Opening as Opening>::Connection>, DialError> {
    let deadline = order.begin + order.pool.policy.connect_timeout;
    // The clock is read after each wait; nothing before a wait takes long.
    let mut now = order.begin;
    let mut dialling = Dialling {
        race: Race { pool: order.pool, begun: false, won: false },
        next: Some((now, false)),
        network,
        order,
        told_of: client.told_of(),
        rng,
        story,
        open: [const { None }; OPEN],
        pause: AGAIN,
    };
    loop {
        if dialling.is_due(now) {
            if dialling.begin_next(now)? {
                continue;
            }
        } else if dialling.is_over() {
            return Err(DialError::Unreachable);
        }
        let wake = dialling.wakes_at(deadline);
        timer.as_mut().reset(wake.instant());
        let event = wait(&mut dialling.open, timer.as_mut()).await;
        now = clock::now();
        match event {
            Event::Ended(place, Ok((connection, handshake))) => {
                if let Some(dialled) = dialling.wins(place, connection, handshake, now) {
                    return Ok(dialled);
                }
            }
            Event::Ended(place, Err(error)) => dialling.fails(place, &error, now),
            Event::Timer if client.gone() => {
                abandon(dialling.order.pool, &dialling.open);
                return Err(DialError::ClientGone);
            }
            Event::Timer => {
                dialling.judge(wake, now);
                if now >= deadline {
                    dialling.gives_up();
                    return Err(DialError::Unreachable);
                }
            }
        }
    }
}

/// One client's dialling.
struct Dialling<'a, N: Network> {
    network: &'a N,
    order: Order<'a>,
    told_of: Option<u32>,
    rng: &'a mut Rng,
    story: &'a mut Story,
    open: [Option<Attempt<N::Opening>>; OPEN],
    /// When the next attempt begins, and whether as a race: now, at a race time, or (`None`) not yet known.
    next: Option<(Time, bool)>,
    /// Before what failed is tried again.
    pause: Duration,
    race: Race<'a>,
}

impl<N: Network> Dialling<'_, N> {
    fn running(&self) -> usize {
        self.open.iter().flatten().count()
    }

    fn may_begin(&self) -> bool {
        self.story.attempts < self.order.pool.policy.attempts && self.running() < OPEN
    }

    fn is_due(&self, now: Time) -> bool {
        self.next.is_some_and(|(at, _)| at <= now) && self.may_begin()
    }

    /// Whether nothing is open, and nothing more will be.
    fn is_over(&self) -> bool {
        self.running() == 0 && (self.next.is_none() || !self.may_begin())
    }

    fn wakes_at(&self, deadline: Time) -> Time {
        let judge_at =
            self.open.iter().flatten().filter(|attempt| !attempt.judged).map(|attempt| attempt.judge_at).min();
        let next = self.next.filter(|_| self.may_begin()).map(|(at, _)| at);
        [judge_at, next].into_iter().flatten().fold(deadline, Time::min)
    }

    /// Begins the attempt that is due, or says by `next` when to ask again. False: there is none now.
    fn begin_next(&mut self, now: Time) -> Result<bool, DialError> {
        let race = self.next.is_some_and(|(_, race)| race);
        let pool = self.order.pool;
        let silent_cell = self.open.iter().flatten().next_back().map(|attempt| pool.members[attempt.member].cell);
        let want = Want {
            pin: self.order.pin,
            tried: &self.order.tried,
            racing: silent_cell,
            trial: Trial::Yes,
            ..Want::default()
        };
        let chosen = match self.order.first.take() {
            Some(First { member, doubtful, permit }) => Chosen::Member(member, doubtful, permit, None),
            None => choose(self.order.host, pool, &want, race, now, self.rng),
        };
        match chosen {
            Chosen::Member(member, doubtful, permit, extra) => {
                self.start(member, doubtful, permit, extra, now);
                return Ok(true);
            }
            // Ask again after a while: the budget and the room renew themselves, and the attempt may end before.
            Chosen::NoBudget | Chosen::Full if self.running() > 0 => self.next = Some((now + RACE_COLD, race)),
            Chosen::Full => return Err(DialError::Full),
            Chosen::Nothing if self.running() == 0 && self.order.tried.is_empty() => {
                return Err(DialError::Unreachable);
            }
            // Everything was tried once. What failed a moment ago may be back: try it again, slower.
            Chosen::Nothing | Chosen::NoBudget => {
                self.order.tried = self.open.iter().flatten().map(|attempt| attempt.member).collect();
                self.next = Some((now + self.pause, race));
                self.pause *= 2;
            }
        }
        Ok(false)
    }

    fn start(&mut self, member: usize, doubtful: bool, permit: Permit, extra: Option<Permit>, now: Time) {
        let (pool, beside) = (self.order.pool, self.running() > 0);
        let (backend, policy) = (&pool.members[member].backend, &*pool.policy);
        self.order.tried.push(member);
        self.story.attempts += 1;
        self.story.raced |= beside;
        self.race.begun |= beside;
        let opening = match self.network.open(backend, policy, self.rng) {
            Ok(opening) => opening,
            Err(error) => {
                failed(self.order.host, policy, backend, &error, true, None, now, now, self.story);
                self.next = Some((now, false));
                return;
            }
        };
        let shakes_hands = self.network.shakes_hands(policy);
        let learned = shakes_hands.then(|| backend.tls_handshake.learned()).flatten();
        let (race, judge) = learned.map_or_else(|| delays(backend, policy), delays_after);
        self.next = policy.race.then(|| (if doubtful { now } else { now + race }, true));
        let attempt = Attempt { member, opening, permit, extra, began: now, judge_at: now + judge, judged: false };
        if let Some(place) = self.open.iter_mut().find(|place| place.is_none()) {
            *place = Some(attempt);
        }
    }

    /// An attempt has its connection: the others are watched to their own ends.
    fn wins(
        &mut self,
        place: usize,
        connection: <N::Opening as Opening>::Connection,
        handshake: Duration,
        now: Time,
    ) -> Option<Dialled<<N::Opening as Opening>::Connection>> {
        let mut attempt = self.open[place].take()?;
        let (pool, shakes_hands) = (self.order.pool, self.network.shakes_hands(&self.order.pool.policy));
        let member = &pool.members[attempt.member];
        let shaken = shakes_hands.then(|| now.since(attempt.began));
        member.backend.connected(&pool.policy.health, handshake, shaken, attempt.began, now);
        pool.cells[member.cell].shared.handshake.record(handshake);
        self.race.won = self.open.iter().flatten().any(|other| other.began < attempt.began);
        // One attempt of a client needs no descriptor beyond its connection's: now it is the winner.
        if let Some(loser) = self.open.iter_mut().flatten().find(|loser| loser.extra.is_none()) {
            loser.extra = attempt.extra.take();
        }
        watch_losers(pool, &mut self.open, self.told_of, shakes_hands);
        Some(Dialled {
            connection,
            member: attempt.member,
            permit: attempt.permit,
            began: attempt.began,
            connected: now,
            handshake,
        })
    }

    fn fails(&mut self, place: usize, error: &io::Error, now: Time) {
        let Some(attempt) = self.open[place].take() else { return };
        let Order { host, pool, .. } = self.order;
        let backend = &pool.members[attempt.member].backend;
        failed(host, &pool.policy, backend, error, false, self.told_of, attempt.began, now, self.story);
        // Nothing was sent, and nothing is waited for: the next attempt costs no budget.
        self.next = Some((now, false));
    }

    /// Judges the attempts whose time has come; the timer was to run at `wake`.
    fn judge(&mut self, wake: Time, now: Time) {
        let (pool, late) = (self.order.pool, now.since(wake) > LATE);
        for attempt in self.open.iter_mut().flatten().filter(|attempt| !attempt.judged && attempt.judge_at <= now) {
            attempt.judged = true;
            let backend = &pool.members[attempt.member].backend;
            judge(&pool.policy, backend, &attempt.opening, attempt.began, late, now);
        }
    }

    /// The client's time is up.
    fn gives_up(&mut self) {
        let pool = self.order.pool;
        for attempt in self.open.iter().flatten() {
            let backend = pool.members[attempt.member].backend.name.clone();
            self.story.failures.push(Failure { backend, cause: "silent".into() });
        }
        watch_losers(pool, &mut self.open, self.told_of, self.network.shakes_hands(&pool.policy));
    }
}

enum Chosen {
    Member(usize, bool, Permit, Option<Permit>),
    Full,
    Nothing,
    NoBudget,
}

/// A member with room, and what an attempt beside another one needs besides: a descriptor, and a token for a race.
fn choose(host: &Host, pool: &Pool, want: &Want<'_>, race: bool, now: Time, rng: &mut Rng) -> Chosen {
    let mut passed = want.tried.to_vec();
    let (mut full, mut spared) = (false, false);
    loop {
        let want = Want { tried: &passed, ..*want };
        let (member, doubtful) = match pool.pick(&want, now, rng) {
            Choice::Member(member) => (member, false),
            Choice::Doubtful(member) => (member, true),
            Choice::Full => return Chosen::Full,
            Choice::Nothing if full => return Chosen::Full,
            Choice::Nothing => return Chosen::Nothing,
        };
        let down = pool.members[member].backend.view().state == State::Down;
        if down && spared {
            // What is too much for those that are well is nothing for those that are not.
            return Chosen::Full;
        }
        let Some(permit) = pool.take_place(member, now) else {
            spared |= !down;
            // Another connection took the last place since the choice, or the cell as a whole has enough.
            full = true;
            let cell = &pool.cells[pool.members[member].cell];
            match cell.capacity {
                Some(_) => passed.extend(cell.members.clone()),
                None => passed.push(member),
            }
            continue;
        };
        if want.racing.is_none() {
            return Chosen::Member(member, doubtful, permit, None);
        }
        let Some(extra) = host.extra_attempts.take(host.max_extra.load(std::sync::atomic::Ordering::Relaxed)) else {
            return Chosen::NoBudget;
        };
        if race && !pool.shared.budget.extra(now) {
            return Chosen::NoBudget;
        }
        pool.shared.races.add(u64::from(race));
        return Chosen::Member(member, doubtful, permit, Some(extra));
    }
}

/// When a race begins after an attempt at this backend, and when the attempt is judged.
pub fn delays(backend: &Backend, policy: &Policy) -> (Duration, Duration) {
    let (race, judge) = delays_of_tcp(backend);
    // TLS takes a round trip or two more, and some computing at the other end.
    if policy.tls.is_some() { (race * TLS_FACTOR, judge * TLS_FACTOR) } else { (race, judge) }
}

fn delays_of_tcp(backend: &Backend) -> (Duration, Duration) {
    // A first byte takes a round trip at least: where connections are kept there is more to learn from first bytes.
    let learned = backend.handshake.learned().or_else(|| backend.first_byte.learned());
    learned.map_or((RACE_COLD, JUDGE_COLD), delays_after)
}

fn delays_after((median, p99): (Duration, Duration)) -> (Duration, Duration) {
    let race = RACE_FLOOR.max(p99).max(median + RACE_ABOVE_MEDIAN);
    (race, JUDGE_FLOOR.max(p99 * JUDGE_FACTOR))
}

/// Counts a failed attempt, and takes it as evidence unless the error is our own.
#[allow(clippy::too_many_arguments)]
fn failed(
    host: &Host,
    policy: &Policy,
    backend: &Backend,
    error: &io::Error,
    at_once: bool,
    told_of: Option<u32>,
    began: Time,
    now: Time,
    story: &mut Story,
) {
    story.failures.push(Failure { backend: backend.name.clone(), cause: word(error) });
    // "No route" and "prohibited" are ours when connect(2) itself says so. Later they are a router's word.
    let routers = [libc::ENETUNREACH, libc::EACCES, libc::EPERM];
    let routers_word = !at_once && error.raw_os_error().is_some_and(|errno| routers.contains(&errno));
    let ours = !routers_word && host.local_errors.count(error);
    let outcome = if ours || at_once && !is_refusal(error) {
        Outcome::Local
    } else {
        accuse(policy, backend, error, told_of, began, now)
    };
    backend.counters.attempts[outcome as usize].add(1);
}

/// Takes an error of an attempt as evidence.
fn accuse(
    policy: &Policy,
    backend: &Backend,
    error: &io::Error,
    told_of: Option<u32>,
    began: Time,
    now: Time,
) -> Outcome {
    let handshake =
        tls::failure(error).or((error.kind() == io::ErrorKind::UnexpectedEof).then_some("handshake failed"));
    // Linux says "refused" to a reset in answer to a SYN. This one came after the handshake, and before any byte of the client.
    let ended = is_reset(error);
    if let Some(prefix) = told_of.filter(|_| ended || handshake.is_some_and(tls::may_be_the_clients)) {
        backend.unanswered(&policy.health, prefix, true, began, now);
        return Outcome::Refused;
    }
    if ended {
        backend.unanswered(&policy.health, 0, false, began, now);
        return Outcome::Refused;
    }
    let (outcome, depth, seen) = match handshake {
        Some(kind) => (Outcome::Refused, Depth::FirstByte, Seen::Tls(kind)),
        None if error.kind() == io::ErrorKind::TimedOut => (Outcome::Silent, Depth::Connect, Seen::Silent),
        None => (Outcome::Refused, Depth::Connect, Seen::Refused),
    };
    backend.observe(&policy.health, &Evidence { source: Source::Traffic, depth, seen, began }, now);
    outcome
}

/// Takes the silence of an attempt as evidence, unless we were late ourselves or the answer is there after all.
fn judge(policy: &Policy, backend: &Backend, opening: &impl Opening, began: Time, late: bool, now: Time) {
    if late {
        return;
    }
    let (depth, seen) = if opening.shaking_hands() {
        (Depth::FirstByte, Seen::Tls("handshake silent"))
    } else if opening.answered() {
        return;
    } else {
        (Depth::Connect, Seen::Silent)
    };
    let evidence = Evidence { source: Source::Traffic, depth, seen, began };
    backend.observe(&policy.health, &evidence, now);
}

/// Counts the attempts of a client that got none of them.
fn abandon<O>(pool: &Pool, open: &[Option<Attempt<O>>]) {
    for attempt in open.iter().flatten() {
        pool.members[attempt.member].backend.counters.attempts[attempt.abandoned() as usize].add(1);
    }
}

async fn wait<O: Opening>(open: &mut [Option<Attempt<O>>], mut timer: Pin<&mut Sleep>) -> Event<O::Connection> {
    poll_fn(|context| {
        for (place, attempt) in open.iter_mut().enumerate() {
            if let Some(attempt) = attempt
                && let Poll::Ready(result) = attempt.opening.poll(context)
            {
                return Poll::Ready(Event::Ended(place, result));
            }
        }
        timer.as_mut().poll(context).map(|()| Event::Timer)
    })
    .await
}

/// Hands the attempts that lost to a task of their own.
fn watch_losers<O: Opening>(pool: &Pool, open: &mut [Option<Attempt<O>>], told_of: Option<u32>, shakes_hands: bool) {
    for attempt in open.iter_mut().filter_map(Option::take) {
        let backend = pool.members[attempt.member].backend.clone();
        if attempt.judged {
            backend.counters.attempts[attempt.abandoned() as usize].add(1);
        } else {
            tokio::spawn(watch(attempt, backend, pool.policy.clone(), told_of, shakes_hands));
        }
    }
}

/// Keeps an attempt that lost until its own judgement time: connected by then is a sample, refused or still
/// silent is evidence. Dropping the connection resets it.
async fn watch<O: Opening>(
    mut attempt: Attempt<O>,
    backend: Arc<Backend>,
    policy: Arc<Policy>,
    told_of: Option<u32>,
    shakes_hands: bool,
) {
    let mut timer = std::pin::pin!(tokio::time::sleep_until(attempt.judge_at.instant()));
    let ended = poll_fn(|context| {
        if let Poll::Ready(result) = attempt.opening.poll(context) {
            return Poll::Ready(Some(result));
        }
        timer.as_mut().poll(context).map(|()| None)
    })
    .await;
    let now = clock::now();
    let (began, judge_at) = (attempt.began, attempt.judge_at);
    let mut outcome = Outcome::Lost;
    match ended {
        Some(Ok((connection, handshake))) => {
            O::discard(connection);
            backend.handshake.record(handshake);
            if shakes_hands {
                backend.shook_hands(now.since(began));
            }
            backend.success(&policy.health, Source::Traffic, Depth::Connect, began, now);
        }
        Some(Err(error)) if tls::failure(&error).is_some() || ended_by_peer(&error) => {
            outcome = accuse(&policy, &backend, &error, told_of, began, now);
        }
        Some(Err(_)) => {}
        None => {
            outcome = Outcome::Silent;
            judge(&policy, &backend, &attempt.opening, began, now.since(judge_at) > LATE, now);
        }
    }
    backend.counters.attempts[outcome as usize].add(1);
}

fn ended_by_peer(error: &io::Error) -> bool {
    is_reset(error) || is_refusal(error) || error.kind() == io::ErrorKind::UnexpectedEof
}

/// Whether the peer ended a connection whose handshake it had finished.
pub fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// Whether the peer, or a router before it, said no to a handshake.
pub fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable)
}

/// The few words by which the access log names an error.
pub fn word(error: &io::Error) -> String {
    if let Some(kind) = tls::failure(error) {
        return format!("TLS: {kind}");
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused".into(),
        io::ErrorKind::ConnectionReset => "reset".into(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "unreachable".into(),
        io::ErrorKind::TimedOut => "timed out".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
