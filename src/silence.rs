//! Whether a backend as a whole is silent: requests wait, and since they were written nobody has got a first byte from it.
//!
//! One slow request is not a silent cell. What counts is what was written since the last first byte to anybody, so a
//! request that has been waiting while others were answered proves nothing. Counters without a lock, shared by workers.
//!
//! What nobody waits for any more may be worked on all the same: a backend that stalls, or is late, keeps what it was given
//! before. So whoever leaves a silent backend is remembered until enough that was written after him is answered.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Time;
use crate::estimate::Estimate;

/// Fewest requests that wait, of those written since the last first byte.
const LEAST: u32 = 3;

/// This many that wait, all of them written since the last first byte, are no mixture of slow requests.
const MANY: u32 = 8;

/// A body is late after this many learned 99th percentiles of what lies between a head and its body.
const LATE_BODY: u32 = 5;
/// What hangs for longer than this either is accused, or is no silence.
const HANGS_FOR: Duration = Duration::from_secs(1);
/// What its last answers took says for this long how long answers take now.
const TOOK_FOR: Duration = Duration::from_secs(1);
/// This many that left are done with for each answer to what was written after them.
const FREED: u32 = 2;
/// Most that are remembered of those that left a silent backend, or are on their way; and for how long of the former.
const LEFT: usize = 4_096;
const LEFT_FOR: Duration = Duration::from_secs(10);
/// Who has not written after this time has nothing to write, or found no way.
const COMING_FOR: Duration = Duration::from_millis(500);

/// What waits at one backend.
#[derive(Debug, Default)]
pub struct Silence {
    waiting: AtomicU32,
    /// Written since the last first byte: how many, when the first of them, by which client prefix, and whether by others too.
    written: AtomicU32,
    first: AtomicU64,
    prefix: AtomicU32,
    mixed: AtomicBool,
    /// When the last first byte came; and when the newest request was written of those that were answered.
    heard: AtomicU64,
    answered: AtomicU64,
    /// How long the last answers took, in microseconds: the longest, which is halved with each that took less.
    took: AtomicU64,
    /// How many were ever written; wraps.
    ever: AtomicU32,
    /// When it was accused first since the last first byte; 0: it was not. And whether it was found silent since then.
    accused: AtomicU64,
    found: AtomicBool,
    /// How many have given up, since the last first byte, what took longer than answers take.
    gave_up: AtomicU32,
    /// When the requests were written whose clients gave up since the last first byte; and how many these are.
    abandoned: Mutex<VecDeque<Time>>,
    abandoned_count: AtomicU32,
    /// When the clients set out that have not written yet, while it matters; and how many these are.
    coming: Mutex<VecDeque<Time>>,
    coming_count: AtomicU32,
    /// How the bodies of its answers follow their heads.
    pub bodies: Bodies,
}

/// How the bodies of a backend's answers follow their heads, where these say how long they are.
#[derive(Debug, Default)]
pub struct Bodies {
    /// When some of any body came last, for anybody.
    heard: AtomicU64,
    gaps: Estimate,
}

impl Bodies {
    /// The first bytes of a body came this long after its head.
    pub fn learn(&self, gap: Duration) {
        self.gaps.record(gap);
    }

    /// Some of a body came.
    pub fn heard(&self, now: Time) {
        self.heard.store(now.0, Relaxed);
    }

    /// After how long a body is late whose head came at `since`, several times what is usual; `None`: little is known, or some of
    /// a body has come since then.
    pub fn late_after(&self, since: Time) -> Option<Duration> {
        let (_, p99) = self.gaps.learned()?;
        (self.heard.load(Relaxed) < since.0).then_some(p99 * LATE_BODY)
    }
}

/// A silence that has lasted too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mute {
    /// Since when.
    pub since: Time,
    /// The one client prefix that saw it; `None`: several did.
    pub only: Option<u32>,
}

impl Silence {
    /// A whole request was written for a client of `prefix`.
    pub fn wrote(&self, prefix: u32, now: Time) {
        self.waiting.fetch_add(1, Relaxed);
        self.ever.fetch_add(1, Relaxed);
        if self.coming() > 0 {
            change(&self.coming, &self.coming_count, |coming| _ = coming.pop_front());
        }
        if self.written.fetch_add(1, Relaxed) == 0 {
            self.first.store(now.0, Relaxed);
            self.prefix.store(prefix, Relaxed);
            self.mixed.store(false, Relaxed);
        } else if self.prefix.load(Relaxed) != prefix {
            self.mixed.store(true, Relaxed);
        }
    }

    /// A request that was written at `since` no longer waits, whether it was answered or not; `late` says that it waited for longer
    /// than an answer takes.
    pub fn left(&self, since: Time, late: bool) {
        self.waiting.fetch_sub(1, Relaxed);
        // One of those that were written since the last first byte is no witness any more.
        if since.0 >= self.first.load(Relaxed) {
            let _ = self.written.fetch_update(Relaxed, Relaxed, |written| written.checked_sub(1));
        }
        if self.heard.load(Relaxed) < since.0 {
            self.gave_up.fetch_add(u32::from(late), Relaxed);
            self.keep(|abandoned| {
                if abandoned.len() >= LEFT {
                    abandoned.pop_front();
                }
                abandoned.push_back(since);
            });
        }
    }

    /// A first byte came, for anybody: of what was written `took` ago, where that is known.
    pub fn heard(&self, took: Option<Duration>, now: Time) {
        if let Some(took) = took {
            let written = Time(now.0.saturating_sub(took.as_micros() as u64));
            self.answered.fetch_max(written.0, Relaxed);
            self.took.store((took.as_micros() as u64).max(self.took.load(Relaxed) / 2), Relaxed);
            if self.abandoned() > 0 {
                // A backend need not work in the order in which it was asked.
                self.keep(|abandoned| {
                    let mut freed = 0;
                    abandoned.retain(|since| {
                        freed += u32::from(*since <= written);
                        *since > written || freed > FREED
                    });
                });
            }
        }
        self.written.store(0, Relaxed);
        if self.gave_up.load(Relaxed) > 0 {
            self.gave_up.store(0, Relaxed);
        }
        if self.found.load(Relaxed) {
            self.found.store(false, Relaxed);
        }
        if self.accused.load(Relaxed) > 0 {
            self.accused.store(0, Relaxed);
        }
        self.heard.store(now.0, Relaxed);
    }

    /// It is believed again: what was written before tells nothing about it any more, and what is written next is a beginning.
    pub fn begins_anew(&self) {
        self.written.store(0, Relaxed);
        self.gave_up.store(0, Relaxed);
        self.accused.store(0, Relaxed);
        self.found.store(false, Relaxed);
    }

    /// Accuses it, and says for how long it has been accused since the last first byte.
    pub fn accused(&self, now: Time) -> Duration {
        let first = self.accused.compare_exchange(0, now.0, Relaxed, Relaxed).err();
        first.map_or(Duration::ZERO, |first| now.since(Time(first)))
    }

    /// How many were ever written; wraps.
    pub fn wrote_ever(&self) -> u32 {
        self.ever.load(Relaxed)
    }

    /// When the last first byte came; `Time(0)`: never.
    pub fn heard_at(&self) -> Time {
        Time(self.heard.load(Relaxed))
    }

    /// When the first was written that nobody has had a first byte since.
    pub fn first(&self) -> Time {
        Time(self.first.load(Relaxed))
    }

    /// How many were left that it may still work on.
    pub fn abandoned(&self) -> u32 {
        self.abandoned_count.load(Relaxed)
    }

    /// Somebody is on the way and will write something soon, if anything.
    pub fn comes(&self, now: Time) {
        change(&self.coming, &self.coming_count, |coming| {
            if coming.len() < LEFT {
                coming.push_back(now);
            }
        });
    }

    /// How many are on the way.
    pub fn coming(&self) -> u32 {
        self.coming_count.load(Relaxed)
    }

    /// Forgets what was left long ago, and who never came.
    pub fn forget(&self, now: Time) {
        if self.abandoned() > 0 {
            self.keep(|abandoned| abandoned.retain(|since| now.since(*since) < LEFT_FOR));
        }
        if self.coming() > 0 {
            change(&self.coming, &self.coming_count, |coming| coming.retain(|since| now.since(*since) < COMING_FOR));
        }
    }

    fn keep(&self, keep: impl FnOnce(&mut VecDeque<Time>)) {
        change(&self.abandoned, &self.abandoned_count, keep);
    }

    /// How many requests wait.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Relaxed)
    }

    /// Whether it would answer what is written now, as far as one can tell: it has answered something that was written since
    /// then, or nothing is left to answer.
    pub fn answers_since(&self, since: Time) -> bool {
        self.written.load(Relaxed) == 0 || self.answered.load(Relaxed) >= since.0
    }

    /// Whether it has answered something that was written after `since`.
    pub fn answered_since(&self, since: Time) -> bool {
        self.answered.load(Relaxed) > since.0
    }

    /// Whether it has answered since `since`, in less time than has passed from then to `now`: a silence that began then is no
    /// slowness that is the same for all.
    pub fn answers_sooner(&self, since: Time, now: Time) -> bool {
        self.answers_since(since) && self.answers_within(now.since(since), now)
    }

    /// How long its last answers took, the longest of them; quick ones since then make it less.
    pub fn took(&self) -> Duration {
        Duration::from_micros(self.took.load(Relaxed))
    }

    /// Whether its last answers took less than `time`, and a margin; an answer of long ago says nothing.
    pub fn answers_within(&self, time: Duration, now: Time) -> bool {
        now.since(self.heard_at()) >= TOOK_FOR || time > self.took() * 5 / 4
    }

    /// Whether something was written `limit` ago or longer, and nobody has got a first byte since.
    pub fn quiet(&self, limit: Duration, now: Time) -> bool {
        self.quiet_for(now).is_some_and(|quiet| quiet >= limit)
    }

    /// How long something has been waiting without a first byte to anybody.
    pub fn quiet_for(&self, now: Time) -> Option<Duration> {
        (self.written.load(Relaxed) > 0).then(|| now.since(Time(self.first.load(Relaxed))))
    }

    /// Whether several wait that were written since the last first byte, the first of them for `limit` or longer but not for long:
    /// too early to accuse it, but no time to send others there. Later it is a matter of evidence.
    pub fn hangs(&self, limit: Duration, now: Time) -> bool {
        self.written.load(Relaxed) >= LEAST && self.quiet(limit, now) && !self.quiet(HANGS_FOR, now)
    }

    /// Whether so many wait without a first byte to anybody that they cannot all be slow by nature, where few are.
    pub fn many_wait(&self) -> bool {
        self.written.load(Relaxed).min(self.waiting.load(Relaxed)) >= MANY
    }

    /// Whether it was found silent and has not answered since: those that were carried elsewhere leave that standing for the
    /// last one.
    pub fn stays_mute(&self, limit: Duration, now: Time) -> bool {
        self.found.load(Relaxed) && self.quiet(limit, now)
    }

    /// The silence, when it has lasted for `limit`. Remembered until the next first byte.
    pub fn mute(&self, limit: Duration, now: Time) -> Option<Mute> {
        let written = self.written.load(Relaxed).min(self.waiting.load(Relaxed));
        let since = Time(self.first.load(Relaxed));
        let only = (!self.mixed.load(Relaxed)).then(|| self.prefix.load(Relaxed));
        // Those who were there before and lost their patience have seen the same.
        let seen_by = written.saturating_add(self.gave_up.load(Relaxed));
        let mute = written > 0 && seen_by >= LEAST && now.since(since) >= limit;
        if mute {
            self.found.store(true, Relaxed);
        }
        mute.then_some(Mute { since, only })
    }
}

/// Changes a list, and says how long it is then.
fn change(list: &Mutex<VecDeque<Time>>, count: &AtomicU32, change: impl FnOnce(&mut VecDeque<Time>)) {
    let mut list = list.lock().unwrap_or_else(PoisonError::into_inner);
    change(&mut list);
    count.store(list.len() as u32, Relaxed);
    if list.is_empty() {
        *list = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);
    const START: Time = Time(1_000_000_000);

    #[test]
    fn three_that_wait_since_the_last_first_byte_are_a_silence() {
        let silence = Silence::default();
        silence.wrote(1, START);
        silence.wrote(1, START + LIMIT / 2);
        assert_eq!(silence.mute(LIMIT, START + LIMIT), None, "two are too few");
        silence.wrote(2, START + LIMIT);
        assert_eq!(silence.mute(LIMIT, START + LIMIT / 2), None, "too early");
        assert_eq!(silence.mute(LIMIT, START + LIMIT), Some(Mute { since: START, only: None }));
    }

    #[test]
    fn slow_requests_that_wait_while_others_are_answered_are_none() {
        let silence = Silence::default();
        for _ in 0..10 {
            silence.wrote(1, START);
        }
        silence.heard(None, START);
        silence.left(START, false);
        assert_eq!(silence.mute(LIMIT, START + LIMIT * 100), None);
        for _ in 0..2 {
            silence.wrote(1, START + LIMIT);
        }
        assert_eq!(silence.mute(LIMIT, START + LIMIT * 100), None, "two were written since");
    }

    #[test]
    fn once_found_it_stays_silent_to_the_last_that_waits() {
        let silence = Silence::default();
        (0..3).for_each(|_| silence.wrote(1, START));
        assert!(!silence.stays_mute(LIMIT, START + LIMIT));
        assert!(silence.mute(LIMIT, START + LIMIT).is_some());
        (0..2).for_each(|_| silence.left(START, false));
        assert!(silence.mute(LIMIT, START + LIMIT).is_none() && silence.stays_mute(LIMIT, START + LIMIT));
        silence.heard(None, START + LIMIT);
        silence.wrote(1, START + LIMIT);
        assert!(!silence.stays_mute(LIMIT, START + LIMIT * 10));
    }

    #[test]
    fn patience_that_ended_is_a_witness_until_the_next_first_byte() {
        let silence = Silence::default();
        for i in 0..2 {
            silence.wrote(1, START + LIMIT * i);
            silence.left(START + LIMIT * i, true);
        }
        assert_eq!(silence.mute(LIMIT, START + LIMIT * 3), None, "nobody waits");
        silence.wrote(1, START + LIMIT * 3);
        assert_eq!(silence.mute(LIMIT, START + LIMIT * 3), None, "too early");
        assert!(silence.mute(LIMIT, START + LIMIT * 4).is_some());
        silence.heard(None, START + LIMIT * 4);
        silence.wrote(1, START + LIMIT * 5);
        assert_eq!(silence.mute(LIMIT, START + LIMIT * 10), None);
    }

    #[test]
    fn once_believed_again_it_is_judged_by_what_is_written_next() {
        let silence = Silence::default();
        (0..5).for_each(|_| silence.wrote(1, START));
        (0..2).for_each(|_| silence.left(START, true));
        assert!(silence.mute(LIMIT, START + LIMIT).is_some() && silence.accused(START + LIMIT).is_zero());
        silence.begins_anew();
        assert_eq!(silence.mute(LIMIT, START + LIMIT * 9), None);
        let later = START + LIMIT * 10;
        silence.wrote(1, later);
        assert!(
            silence.mute(LIMIT, later + LIMIT).is_none() && !silence.stays_mute(LIMIT, later + LIMIT),
            "one is slow"
        );
        assert_eq!(silence.accused(later + LIMIT * 9), Duration::ZERO, "and nothing before is held against it");
        assert_eq!(silence.accused(later + LIMIT * 10), LIMIT);
        (0..2).for_each(|_| silence.wrote(1, later));
        assert_eq!(silence.mute(LIMIT, later + LIMIT), Some(Mute { since: later, only: Some(1) }));
        silence.left(START, false);
        assert!(silence.mute(LIMIT, later + LIMIT).is_some(), "one of those before is no witness that leaves");
    }

    #[test]
    fn those_on_the_way_are_counted_until_they_write_or_never_come() {
        let silence = Silence::default();
        (0..3).for_each(|_| silence.comes(START));
        silence.wrote(1, START);
        assert_eq!((silence.coming(), silence.waiting()), (2, 1));
        silence.forget(START + COMING_FOR / 2);
        assert_eq!(silence.coming(), 2);
        silence.forget(START + COMING_FOR);
        assert_eq!(silence.coming(), 0);
    }

    #[test]
    fn a_body_is_late_by_what_is_usual_while_none_begins() {
        let bodies = Bodies::default();
        assert_eq!(bodies.late_after(START), None, "nothing is known");
        bodies.heard(START);
        (0..20).for_each(|_| bodies.learn(LIMIT / 50));
        assert_eq!(bodies.late_after(START), None, "some of one has come");
        let late = bodies.late_after(START + LIMIT).expect("enough is known");
        assert!((LIMIT / 10..LIMIT / 7).contains(&late), "{late:?}");
        (0..20).for_each(|_| bodies.learn(LIMIT));
        assert!(bodies.late_after(START + LIMIT).expect("enough is known") >= LIMIT * 5, "what is usual may take long");
    }

    #[test]
    fn clients_that_went_away_do_not_count() {
        let silence = Silence::default();
        for _ in 0..3 {
            silence.wrote(1, START);
            silence.left(START, false);
        }
        assert_eq!(silence.mute(LIMIT, START + LIMIT), None);
        silence.wrote(1, START);
        assert_eq!(silence.waiting(), 1);
    }

    #[test]
    fn who_answers_as_late_as_another_one_is_silent_answers_no_sooner() {
        let silence = Silence::default();
        silence.wrote(1, START);
        silence.heard(Some(LIMIT * 8), START + LIMIT * 8);
        silence.left(START, false);
        assert!(silence.answers_since(START) && !silence.answers_sooner(START, START + LIMIT * 8));
        assert!(silence.answers_sooner(START, START + LIMIT * 11));
        let later = START + LIMIT * 8 + TOOK_FOR;
        assert!(silence.answers_sooner(later, later + LIMIT), "a slow answer of long ago holds nobody back");
        // Quick answers soon outweigh a slow one.
        (0..8).for_each(|_| silence.heard(Some(LIMIT / 50), START + LIMIT * 8));
        assert!(silence.answers_sooner(START, START + LIMIT));
    }

    #[test]
    fn what_was_left_unanswered_may_still_be_worked_on() {
        let silence = Silence::default();
        silence.heard(None, START);
        for i in 1..=5 {
            silence.wrote(1, START + LIMIT * i);
            silence.left(START + LIMIT * i, false);
        }
        assert_eq!((silence.waiting(), silence.abandoned()), (0, 5));
        // What was written third is answered: those after it are still to come, and perhaps one of those before it.
        silence.heard(Some(LIMIT * 10), START + LIMIT * 13);
        assert_eq!(silence.abandoned(), 3);
        silence.heard(Some(LIMIT * 10), START + LIMIT * 13);
        assert_eq!(silence.abandoned(), 2);
        assert!(silence.answers_since(START + LIMIT * 3) && silence.answers_since(START + LIMIT * 100));
        silence.wrote(1, START + LIMIT * 14);
        assert!(silence.answers_since(START + LIMIT * 3) && !silence.answers_since(START + LIMIT * 4));
        silence.left(START + LIMIT * 14, false);
        silence.keep(|abandoned| abandoned.truncate(2));
        silence.forget(START + LEFT_FOR);
        assert_eq!(silence.abandoned(), 2);
        silence.forget(START + LEFT_FOR * 2);
        assert_eq!(silence.abandoned(), 0);
        // Whoever is answered leaves nothing behind.
        silence.wrote(1, START);
        silence.heard(Some(LIMIT), START + LIMIT);
        silence.left(START, false);
        assert_eq!(silence.abandoned(), 0);
    }
}
