//! Waiting for the head of an answer, and when to stop.
//!
//! A slow request is not a silent backend. A request is moved to another backend when its own is silent as a whole
//! (`silence`), or when its own kind of request, the same method and path on the same route, has enough answers on record and
//! takes several times as long as the longest of them. Otherwise only the request's own time ends it. Nothing here touches an
//! answer that has begun.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use slab::Slab;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::serve::Connection;
use super::upstream::{self, Place};
use crate::backend::Backend;
use crate::clock::{self, Time};
use crate::health::{Depth, Evidence, Seen, Source};
use crate::poison::KILLS_WITHIN;
use crate::pool::{Policy, Pool};

/// Time between two looks at those that wait.
const LOOK: Duration = Duration::from_millis(10);
/// A look this much later than it was due ran late by our own fault; what is due by then has its turn first.
const LATE: Duration = Duration::from_millis(10);
/// A backend is silent no earlier than this, nor than this many learned 99th percentiles of its first bytes.
const SILENT_FLOOR: Duration = Duration::from_millis(50);
const SILENT_FACTOR: u32 = 5;
/// For whoever tries a doubted backend, which may be slow and not silent.
const TRIED: Duration = Duration::from_secs(1);
/// What may not be sent twice is given up after this long where its backend answers nobody, and later where it takes no connections
/// any more: its client learns that nobody can tell what became of it.
const GIVEN_UP: Duration = Duration::from_millis(900);
const GIVEN_UP_UNREACHED: Duration = Duration::from_millis(1_500);
/// Answers of one kind of request that make a record, and how many times its longest is too long.
const RECORD: u32 = 50;
const RECORD_FACTOR: u32 = 3;
const RECORD_FLOOR: Duration = Duration::from_millis(50);
/// What was carried elsewhere would have taken longer than it waited: this many times as long, as far as anybody can tell.
const AT_LEAST: u32 = 8;
/// Answers after which the longest before is forgotten.
const RECORD_WINDOW: u32 = 1_000;
/// Kinds of request on record in one worker, and for all of them.
const KINDS: usize = 4_096;
/// A body of which nothing went on for this long stands still.
const STANDS: Duration = Duration::from_millis(200);
/// Time between two questions whether a backend takes what is sent.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// The body of an answer has stalled when nothing of it came for this long, or for as long as makes a silence; of one that has
/// shown this many bytes nothing more is asked.
const STALLED: Duration = Duration::from_secs(1);
/// This many bodies that are late together, by what is usual and no less than this, have stalled as well where nothing of any other
/// has come meanwhile.
const LATE_TOGETHER: usize = 5;
const LATE_LEAST: Duration = Duration::from_millis(300);
/// See `STALLED`.
pub const SHOWN: u64 = 64 << 10;
/// A client that leaves after this long without more of a body, or as long as makes a silence, left for that.
const LEAVES: Duration = Duration::from_millis(250);

/// What was decided about a request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It waits.
    Waits,
    /// Its backend is silent, or far slower than ever: it goes elsewhere.
    Move,
    /// Its time is up.
    TimedOut,
    /// It may not be sent twice, and its backend answers nobody.
    GivenUp,
    /// Its client has not gone on with its body for too long.
    Stalled,
}

/// A request that waits, as [`Wait::begin`] is told.
pub struct Request {
    /// Where it was sent.
    pub backend: Arc<Backend>,
    /// By which policy.
    pub policy: Arc<Policy>,
    /// On which connection.
    pub place: Place,
    /// Out of which pool, with the members that it went to.
    pub pool: Arc<Pool>,
    /// See `pool`.
    pub tried: Vec<usize>,
    /// The client's connection, where its body still comes by it alone.
    pub body: Option<Arc<Connection>>,
    /// Whether others may be on it (HTTP/2).
    pub shared: bool,
    /// The client's prefix.
    pub prefix: u32,
    /// Its own time.
    pub timeout: Duration,
    /// How long its client may take for the next bytes of its body, where the connection does not look after that.
    pub idle: Duration,
    /// Whether it may be sent twice.
    pub movable: bool,
    /// Whether it may not, whatever happens.
    pub once: bool,
    /// Its kind, for the record.
    pub kind: u64,
    /// Its class.
    pub class: u64,
}

struct Entry {
    request: Request,
    /// When the whole request was sent; while its body comes, when the last of it was.
    since: Time,
    /// Whether the whole request was sent.
    complete: bool,
    /// When its record says that it takes too long.
    unusual_at: Option<Time>,
    /// Whether that was held against its backend.
    accused: bool,
    /// When the kernel was asked last whether the backend takes what is sent, and whether it does not.
    full: (Time, bool),
    /// Whether the sending was ended because the backend has answered already; and when that was looked for last.
    early: (Time, bool),
    verdict: Verdict,
    /// Whether it has waited for longer than a poison takes.
    harmless: bool,
}

#[derive(Clone, Copy, Default)]
struct Record {
    answers: u32,
    longest: [Duration; 2],
}

impl Record {
    fn longest(&self) -> Duration {
        self.longest[0].max(self.longest[1])
    }
}

/// An answer whose body is under way, as [`Answer::begin`] is told.
pub struct Body {
    /// Whose it is.
    pub backend: Arc<Backend>,
    /// By which policy.
    pub policy: Arc<Policy>,
    /// The client, and its prefix.
    pub client: Arc<Connection>,
    /// See `client`.
    pub prefix: u32,
    /// The class of its request.
    pub class: u64,
    /// When its attempt began.
    pub began: Time,
    /// Whether its client speaks HTTP/2, whose streams have windows that we do not see.
    pub h2: bool,
}

/// How a client left an answer that was not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It had waited for more of it.
    Waiting,
    /// It had got some of it, and more was coming.
    Served,
    /// It was too early to tell.
    Nothing,
}

struct Coming {
    body: Body,
    /// When some of it came last, or its head did.
    since: Time,
    /// Whether any of it came.
    begun: bool,
    stalled: bool,
}

impl Coming {
    /// Whether it is the client that takes nothing, as far as can be seen.
    fn is_clients(&self) -> bool {
        if self.body.h2 { self.begun } else { self.body.client.link.is_blocked() }
    }

    /// Whether its body is later than those of its backend used to be, and nothing of any other has come since its head came.
    fn is_late(&self, now: Time) -> bool {
        let backend = &self.body.backend;
        let late = |usual: Duration| now.since(self.since) >= LATE_LEAST.max(usual).max(silent_after(backend));
        !self.begun
            && !self.stalled
            && backend.silence.bodies.late_after(self.since).is_some_and(late)
            && !self.is_clients()
    }
}

/// The longest answers of what is on record in any worker: for those that have answered little of it themselves.
static SHARED_RECORDS: LazyLock<Mutex<HashMap<u64, Record>>> = LazyLock::new(Mutex::default);

thread_local! {
    static WAITING: RefCell<Slab<Entry>> = const { RefCell::new(Slab::new()) };
    static COMING: RefCell<Slab<Coming>> = const { RefCell::new(Slab::new()) };
    static RECORDS: RefCell<HashMap<u64, Record>> = RefCell::default();
    static BEGUN: Arc<Notify> = Arc::new(Notify::new());
}

/// A request's place among those that wait; dropping it takes it out. Stays on its worker's thread.
#[derive(Debug)]
pub struct Wait(usize);

impl Wait {
    /// A request is being sent; `complete` says whether all of it was.
    pub fn begin(request: Request, complete: bool, now: Time) -> Wait {
        let entry = Entry {
            request,
            since: now,
            complete: false,
            unusual_at: None,
            accused: false,
            full: (now, false),
            early: (now, false),
            verdict: Verdict::Waits,
            harmless: false,
        };
        let wait = WAITING.with_borrow_mut(|waiting| {
            if waiting.is_empty() {
                BEGUN.with(|begun| begun.notify_one());
            }
            Wait(waiting.insert(entry))
        });
        if complete {
            wait.complete(now);
        }
        wait
    }

    /// Some of its body was sent.
    pub fn goes_on(&self, now: Time) {
        WAITING.with_borrow_mut(|waiting| {
            if let Some(entry) = waiting.get_mut(self.0) {
                entry.since = now;
            }
        });
    }

    /// The whole request was sent.
    pub fn complete(&self, now: Time) {
        WAITING.with_borrow_mut(|waiting| {
            let Some(entry) = waiting.get_mut(self.0).filter(|entry| !entry.complete) else { return };
            entry.complete = true;
            entry.since = now;
            // Only once: whoever is unusual everywhere is unusual by nature.
            let first = entry.request.tried.is_empty();
            entry.unusual_at = first.then(|| record(entry.request.kind)).flatten().map(|unusual| now + unusual);
            entry.request.backend.asked(entry.request.prefix, now);
        });
    }

    /// Whether it was held against its backend that it hangs.
    pub fn has_hung(&self) -> bool {
        WAITING.with_borrow(|waiting| waiting.get(self.0).is_some_and(|entry| entry.accused))
    }

    /// What was decided about it.
    pub fn verdict(&self) -> Verdict {
        WAITING.with_borrow(|waiting| waiting.get(self.0).map_or(Verdict::Waits, |entry| entry.verdict))
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let entry = WAITING.try_with(|waiting| waiting.borrow_mut().try_remove(self.0));
        if let Ok(Some(entry)) = entry
            && entry.complete
        {
            entry.request.backend.waits_no_more(entry.since);
        }
    }
}

/// An answer's place among those whose bodies are under way; dropping it takes it out. Stays on its worker's thread.
#[derive(Debug)]
pub struct Answer(usize);

impl Answer {
    /// The head of an answer has come that says how long its body is.
    pub fn begin(body: Body, now: Time) -> Answer {
        let coming = Coming { body, since: now, begun: false, stalled: false };
        COMING.with_borrow_mut(|answers| {
            if answers.is_empty() {
                BEGUN.with(|begun| begun.notify_one());
            }
            Answer(answers.insert(coming))
        })
    }

    /// Some of the body came.
    pub fn goes_on(&self, now: Time) {
        COMING.with_borrow_mut(|answers| {
            if let Some(coming) = answers.get_mut(self.0) {
                // What a stall took is not what is usual.
                if !coming.begun && !coming.stalled {
                    coming.body.backend.silence.bodies.learn(now.since(coming.since));
                }
                (coming.since, coming.begun) = (now, true);
            }
        });
    }

    /// Its client leaves it.
    pub fn left(&self, now: Time) -> Left {
        COMING.with_borrow(|answers| {
            let Some(coming) = answers.get(self.0) else { return Left::Nothing };
            let late = LEAVES.max(silent_after(&coming.body.backend));
            match now.since(coming.since) >= late && !coming.is_clients() {
                true => Left::Waiting,
                false if coming.begun => Left::Served,
                false => Left::Nothing,
            }
        })
    }

    /// Whether it has stalled, and was held against its backend.
    pub fn has_stalled(&self) -> bool {
        COMING.with_borrow(|answers| answers.get(self.0).is_some_and(|coming| coming.stalled))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let _ = COMING.try_with(|answers| answers.borrow_mut().try_remove(self.0));
    }
}

/// Puts the time of an answer on record.
pub fn learn(kind: u64, took: Duration) {
    RECORDS.with_borrow_mut(|records| {
        if records.len() >= KINDS && !records.contains_key(&kind) {
            // So many kinds are paths with identifiers in them, which never get a record anyway.
            records.clear();
        }
        let record = records.entry(kind).or_default();
        record.answers += 1;
        record.longest[0] = record.longest[0].max(took);
        if record.answers.is_multiple_of(RECORD) {
            let mut shared = SHARED_RECORDS.lock().unwrap_or_else(PoisonError::into_inner);
            if shared.len() >= KINDS && !shared.contains_key(&kind) {
                shared.clear();
            }
            let all = shared.entry(kind).or_default();
            all.answers += RECORD;
            all.longest[0] = all.longest[0].max(record.longest());
            if all.answers.is_multiple_of(RECORD_WINDOW) {
                all.longest = [Duration::ZERO, all.longest[0]];
            }
        }
        if record.answers.is_multiple_of(RECORD_WINDOW) {
            record.longest = [Duration::ZERO, record.longest[0]];
        }
    });
}

/// After how long a request of this kind takes unusually long.
fn record(kind: u64) -> Option<Duration> {
    // What was never answered here is a path with an identifier in it, more often than not: others know as little.
    let own = RECORDS.with_borrow(|records| records.get(&kind).copied())?;
    let longest = if own.answers >= RECORD {
        own.longest()
    } else {
        let shared = SHARED_RECORDS.lock().unwrap_or_else(PoisonError::into_inner).get(&kind).copied()?;
        shared.longest().max(own.longest())
    };
    Some((longest * RECORD_FACTOR).max(RECORD_FLOOR))
}

/// After how long without a first byte to anybody a backend is silent.
fn silent_after(backend: &Backend) -> Duration {
    let one = match backend.first_byte.learned() {
        Some((_, p99)) => SILENT_FLOOR.max(p99 * SILENT_FACTOR).max(backend.slow_for()),
        None => backend.stranger_silent_after(),
    };
    backend.many_silent_after().map_or(one, |many| many.min(one))
}

/// Looks at those that wait, for as long as the worker lives.
pub async fn watch() {
    let begun = BEGUN.with(Arc::clone);
    loop {
        begun.notified().await;
        loop {
            let due = Instant::now() + LOOK;
            sleep_until(due).await;
            if WAITING.with_borrow(Slab::is_empty) && COMING.with_borrow(Slab::is_empty) {
                break;
            }
            let (now, late) = (clock::now(), due.elapsed() > LATE);
            look(now, late);
            if !late {
                look_at_bodies(now);
            }
        }
    }
}

/// Finds answers that have stalled behind their heads. Each is an error of its backend, unless it is the client that takes nothing.
fn look_at_bodies(now: Time) {
    COMING.with_borrow_mut(|answers| {
        let mut late: HashMap<u64, usize> = HashMap::new();
        for (_, coming) in answers.iter().filter(|(_, coming)| coming.is_late(now)) {
            *late.entry(coming.body.backend.id).or_default() += 1;
        }
        for (_, coming) in answers.iter_mut().filter(|(_, coming)| !coming.stalled) {
            let limit = STALLED.max(silent_after(&coming.body.backend));
            let together = late.get(&coming.body.backend.id).is_some_and(|late| *late >= LATE_TOGETHER);
            if together && coming.is_late(now) || !coming.is_clients() && now.since(coming.since) >= limit {
                coming.stalled = true;
                let body = &coming.body;
                body.backend.replied(&body.policy.health, body.prefix, body.class, true, body.began, now);
            }
        }
    });
}

/// What is done once nothing is borrowed any more.
enum Step {
    Cut(Place),
    Overdue(Place, u64),
}

/// What a look knows of one backend, for all that wait there.
#[derive(Clone, Copy)]
struct Judged {
    /// After how long without a first byte to anybody it is silent.
    limit: Duration,
    /// Whether it is found so now; and whether it was before, and has answered nobody since.
    found: bool,
    stays_mute: bool,
    /// Whether its address no longer answers at all.
    vanished: bool,
    /// Since when it is doubted.
    in_doubt: Option<Time>,
}

/// Why a request goes elsewhere: one of these at least.
#[derive(Clone, Copy)]
struct Reason {
    /// It takes unusually long for its kind.
    unusual: bool,
    /// Its backend is silent as a whole.
    silent: bool,
}

/// One look at all that wait.
struct Look {
    now: Time,
    judged: HashMap<u64, Judged>,
    /// Backends that were found silent, since when, and whether that is evidence.
    mute: Vec<(Arc<Backend>, Arc<Policy>, Time, bool)>,
    steps: Vec<Step>,
}

/// Looks at all that wait. After a late look the answers that came meanwhile are read before anybody is called silent.
fn look(now: Time, late: bool) {
    let mut look = Look { now, judged: HashMap::new(), mute: Vec::new(), steps: Vec::new() };
    WAITING.with_borrow_mut(|waiting| {
        for (_, entry) in waiting.iter_mut().filter(|(_, entry)| entry.verdict == Verdict::Waits) {
            if !look.ends(entry) && !late {
                match entry.complete {
                    true => look.moves(entry),
                    false => entry.looks_for_an_early_answer(now),
                }
            }
        }
    });
    look.conclude();
}

impl Entry {
    /// Whether the next bytes are to come from the client: meanwhile the backend has nothing to answer for.
    fn is_clients_turn(&mut self, now: Time) -> bool {
        if self.complete {
            return false;
        }
        let request = &self.request;
        match &request.body {
            Some(client) => client.link.awaits_body() && !client.link.expects.load(Relaxed),
            // Beside others its turn cannot be seen from its connection: it is not where the backend takes nothing.
            None if now.since(self.since) < request.timeout || request.shared => true,
            None => {
                if now.since(self.full.0) >= ASK_AGAIN {
                    self.full = (now, upstream::is_full(request.place));
                }
                !self.full.1
            }
        }
    }

    /// Whether nobody can tell any more what becomes of it: it may not be sent twice, and nothing has come from its backend since it
    /// was written, which is down for that. One that takes no connections may still answer those that it has, for a while.
    fn is_given_up(&self, waited: Duration) -> bool {
        let backend = &self.request.backend;
        // Whoever comes after the doubt tries it for others, and has his own time.
        self.complete
            && self.request.once
            && backend.silence.heard_at() <= self.since
            && backend.doubted_since().is_some_and(|since| self.since < since)
            && (backend.answers_nobody() || waited >= GIVEN_UP_UNREACHED && backend.fell_silent())
            && backend.first_byte.learned().is_some()
            && waited >= silent_after(backend)
    }

    /// The engine reads no answer while the backend does not take a piece of the body: so the body ends where an answer is there.
    fn looks_for_an_early_answer(&mut self, now: Time) {
        let stands = !self.request.shared && now.since(self.since) >= STANDS && !self.early.1;
        if stands && now.since(self.early.0) >= ASK_AGAIN {
            self.early = (now, upstream::answers_early(self.request.place));
            if self.early.1 {
                upstream::stop_sending(self.request.place);
            }
        }
    }

    /// Whether it takes longer than its kind has on record, and several times what its own backend takes: the record may be that of a
    /// nearer one.
    fn is_unusual(&self, now: Time) -> bool {
        let backend = &self.request.backend;
        let usual = || backend.pace().0.map_or_else(|| silent_after(backend), |calm| calm * RECORD_FACTOR);
        self.unusual_at.is_some_and(|at| at <= now) && now.since(self.since) >= usual()
    }

    /// Holds it against its backend that it hangs: what was written later is answered, and sooner, so this is no slowness of the
    /// backend.
    fn accuse(&mut self, now: Time) {
        let (request, backend) = (&self.request, &self.request.backend);
        let longer = |unusual: Duration| now.since(self.since) >= unusual;
        if !self.accused && backend.silence.answered_since(self.since) && record(request.kind).is_some_and(longer) {
            self.accused = true;
            backend.replied(&request.policy.health, request.prefix, request.class, true, self.since, now);
        }
    }

    /// Whether a cut would lead anywhere: to another backend that answers sooner, with a token of the budget for it.
    fn has_way(&self, reason: Reason, now: Time) -> bool {
        let (request, backend) = (&self.request, &self.request.backend);
        let mut tried = request.tried.clone();
        tried.extend(request.pool.members.iter().position(|member| member.backend.id == backend.id));
        let lively = request.shared && upstream::others_talk(request.place);
        // One that has not answered either since this one fell silent is no better.
        let since = if reason.unusual { self.since } else { backend.silence.first() };
        let better = |other: &Backend| other.silence.answers_sooner(since, now);
        !lively && request.pool.has_untried(&tried, false, better) && backend.shared.budget.extra(now)
    }
}

impl Look {
    /// Ends a request whose time is up, and one whose client does not go on with its body.
    fn ends(&mut self, entry: &mut Entry) -> bool {
        let clients_turn = entry.is_clients_turn(self.now);
        let (request, waited) = (&entry.request, self.now.since(entry.since));
        // Any byte keeps a connection of HTTP/2, so each of its bodies has a bound of its own.
        let stalled = clients_turn && request.body.is_none() && waited >= request.idle;
        let given_up = waited >= GIVEN_UP && entry.is_given_up(waited);
        if !stalled && !given_up && (clients_turn || waited < request.timeout) {
            return false;
        }
        entry.verdict = match (stalled, given_up) {
            (true, _) => Verdict::Stalled,
            (_, true) => Verdict::GivenUp,
            _ => Verdict::TimedOut,
        };
        self.steps.push(match request.shared {
            true => Step::Overdue(request.place, request.backend.id),
            false => Step::Cut(request.place),
        });
        true
    }

    /// Sends a request elsewhere that has a reason and a way.
    fn moves(&mut self, entry: &mut Entry) {
        let now = self.now;
        if now.since(entry.since) >= KILLS_WITHIN && !entry.harmless {
            entry.harmless = true;
            entry.request.pool.shared.poison.acquit(entry.request.kind);
        }
        let Some(reason) = self.reason(entry) else { return };
        if !entry.request.movable || !entry.has_way(reason, now) {
            return;
        }
        entry.verdict = Verdict::Move;
        self.steps.push(Step::Cut(entry.request.place));
        if reason.silent {
            entry.request.backend.moved_silent(now);
        } else {
            // Where it takes as long, its answer makes the record longer: what has become slower is not moved for ever.
            entry.request.backend.moved_slow(now.since(entry.since) * AT_LEAST);
        }
    }

    fn reason(&mut self, entry: &mut Entry) -> Option<Reason> {
        let now = self.now;
        let judged = self.judge(&entry.request);
        let (request, waited) = (&entry.request, now.since(entry.since));
        let backend = &request.backend;
        let tries = judged.in_doubt.is_some_and(|since| entry.since >= since);
        let doubted = judged.in_doubt.is_some() && backend.silence.quiet(judged.limit, now);
        let silent = judged.found || judged.stays_mute && !tries;
        let patience = TRIED.min(request.timeout / 2);
        let limit = if tries && !silent { judged.limit.max(patience) } else { judged.limit };
        if doubted && !silent && waited >= limit && !self.mute.iter().any(|(known, ..)| known.id == backend.id) {
            // The one client that tries a doubted backend has its answer.
            let alone = backend.others_than(request.prefix, now);
            self.mute.push((backend.clone(), request.policy.clone(), entry.since, !alone));
        }
        // What tries it for others tells whether it is slow or silent.
        let may_be = !tries || silent || waited >= patience;
        let (shared, vanished) = (request.shared, judged.vanished);
        let unusual = may_be && entry.is_unusual(now);
        if unusual {
            entry.accuse(now);
        }
        let reason = Reason { unusual: unusual && !shared, silent: silent || doubted || vanished };
        (reason.unusual || reason.silent && waited >= limit).then_some(reason)
    }

    /// Judges the backend of a request, once for all that wait there.
    fn judge(&mut self, request: &Request) -> Judged {
        let (now, backend) = (self.now, &request.backend);
        let mute = &mut self.mute;
        *self.judged.entry(backend.id).or_insert_with(|| {
            let (limit, in_doubt) = (silent_after(backend), backend.doubted_since());
            // Those that were there before it was doubted tell nothing new.
            let found =
                backend.silence.mute(limit, now).filter(|found| in_doubt.is_none_or(|since| found.since >= since));
            if let Some(found) = found {
                // One client prefix makes no transition where there are others; its requests are moved all the same.
                let alone = found.only.is_some_and(|prefix| backend.others_than(prefix, now));
                mute.push((backend.clone(), request.policy.clone(), found.since, !alone));
            }
            Judged {
                limit,
                found: found.is_some(),
                // Whoever waited before it fell silent waits for ever, and has nobody beside him any more.
                stays_mute: backend.silence.stays_mute(limit, now),
                vanished: backend.vanished(),
                in_doubt,
            }
        })
    }

    /// Records what was found, and cuts what is to be cut.
    fn conclude(self) {
        for (backend, policy, began, evidence) in self.mute {
            if evidence {
                let evidence = Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen: Seen::Mute, began };
                backend.observe(&policy.health, &evidence, self.now);
            }
        }
        for step in self.steps {
            match step {
                Step::Cut(place) => upstream::cut(place),
                Step::Overdue(place, backend) => {
                    // Nobody new comes to a connection that is going to be cut.
                    upstream::renew(backend);
                    upstream::overdue(place);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_workers_have_on_record_serves_one_that_has_little() {
        let (kind, usual) = (0x5a11, Duration::from_millis(40));
        let other = std::thread::spawn(move || {
            (0..RECORD - 1).for_each(|_| learn(kind, usual));
            let early = record(kind);
            learn(kind, usual);
            (early, record(kind))
        });
        assert_eq!(other.join().expect("it ends"), (None, Some(usual * RECORD_FACTOR)));
        assert_eq!(record(kind), None, "nothing of the kind was answered here");
        learn(kind, usual / 2);
        assert_eq!(record(kind), Some(usual * RECORD_FACTOR));
        learn(kind, usual * 2);
        assert_eq!(record(kind), Some(usual * 2 * RECORD_FACTOR), "nor is anybody moved sooner than its own says");
    }
}
