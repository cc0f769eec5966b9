//! Requests that kill whoever receives them.
//!
//! What a backend had received when it died may have been the reason, and sent on it would kill the next one. When one
//! request alone was lost a moment after it was sent, and the backend refuses connections since, that request is taken for the
//! reason: it goes nowhere else, and nothing of its fingerprint goes to anybody within the window. Where several were lost, or
//! the backend lives, each is sent on once at most; when a second backend has died with it, it is stopped in the same way. What
//! others of the same fingerprint were answered to is innocent.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Time;

/// A backend that dies this long after it was given something may have died of it.
pub const KILLS_WITHIN: Duration = Duration::from_millis(250);

/// Whole seconds for which a death is remembered, at least ten and a part, and an answer.
const WINDOW: u64 = 11;
const INNOCENT: u64 = 60;
/// Backends that have to die with one fingerprint before nothing of it is sent to anybody within the window.
const KILLS: usize = 2;
/// Fingerprints remembered for one pool. When so many die at once it is the backends, and nothing more is sent on.
const MOST: usize = 4_096;

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// Backends that died with it, 0: none; and when the last one did.
    died_on: [u64; KILLS],
    died: u64,
    /// When it was last answered.
    answered: u64,
}

impl Known {
    fn lives(&self, now: Time) -> bool {
        self.has_killed(now) > 0 || self.is_innocent(now)
    }

    /// How many backends died with it within the window.
    fn has_killed(&self, now: Time) -> usize {
        if self.died + WINDOW > now.seconds() { self.died_on.iter().filter(|on| **on != 0).count() } else { 0 }
    }

    fn is_innocent(&self, now: Time) -> bool {
        self.answered > 0 && self.answered + INNOCENT > now.seconds()
    }
}

/// Marks of fingerprints that were acquitted; this many of them are too many to tell anything.
const MARKS: usize = 65_536;
const MARKED: u32 = 8_192;

/// What backends of one pool died with, and what they answered after others had died with it.
#[derive(Debug, Default)]
pub struct Poison {
    known: Mutex<HashMap<u64, Known>>,
    /// Whether anything has killed lately; in seconds since the process began.
    last: AtomicU64,
    acquitted: Acquitted,
}

/// Which fingerprints were answered, or waited for long without harm, by one bit each (a Bloom filter of one hash): a hit by
/// chance lets a request be sent on once, as always.
#[derive(Debug)]
struct Acquitted {
    marks: Box<[AtomicU64]>,
    marked: AtomicU32,
}

impl Default for Acquitted {
    fn default() -> Self {
        Acquitted { marks: (0..MARKS / 64).map(|_| AtomicU64::new(0)).collect(), marked: AtomicU32::new(0) }
    }
}

impl Acquitted {
    fn at(&self, fingerprint: u64) -> (&AtomicU64, u64) {
        let place = fingerprint as usize % MARKS;
        (&self.marks[place / 64], 1 << (place % 64))
    }
}

impl Poison {
    /// The backend `on` died with a request or session of this fingerprint: whether it may be sent to another. What is known to
    /// be answered may; anything else until a second backend has died with it in the window.
    pub fn may_go_on(&self, fingerprint: u64, on: u64, innocent: bool, now: Time) -> bool {
        let mut known = self.lock();
        if known.len() >= MOST {
            known.retain(|_, one| one.lives(now));
            if known.len() >= MOST {
                return false;
            }
        }
        let one = known.entry(fingerprint).or_default();
        if innocent || one.is_innocent(now) {
            return true;
        }
        if one.has_killed(now) == 0 {
            one.died_on = [0; KILLS];
        }
        if !one.died_on.contains(&on)
            && let Some(free) = one.died_on.iter_mut().find(|on| **on == 0)
        {
            *free = on;
        }
        one.died = now.seconds();
        self.last.store(now.seconds().max(1), Relaxed);
        one.has_killed(now) < KILLS
    }

    /// Something of this fingerprint did no harm: it was answered, or has waited for longer than a poison takes.
    pub fn acquit(&self, fingerprint: u64) {
        let (word, bit) = self.acquitted.at(fingerprint);
        if word.load(Relaxed) & bit != 0 {
            return;
        }
        if self.acquitted.marked.fetch_add(1, Relaxed) >= MARKED {
            self.acquitted.marks.iter().for_each(|word| word.store(0, Relaxed));
            self.acquitted.marked.store(0, Relaxed);
        }
        word.fetch_or(bit, Relaxed);
    }

    /// Whether something of this fingerprint did no harm, as far as is remembered.
    pub fn is_acquitted(&self, fingerprint: u64) -> bool {
        let (word, bit) = self.acquitted.at(fingerprint);
        word.load(Relaxed) & bit != 0
    }

    /// Whether nothing else that is unknown was lost with the backend `on` lately.
    pub fn alone(&self, fingerprint: u64, on: u64, now: Time) -> bool {
        let known = self.lock();
        let lost_there = |one: &Known| one.died + 1 >= now.seconds() && one.died_on.contains(&on);
        !known.iter().any(|(other, one)| *other != fingerprint && lost_there(one))
    }

    /// A backend died of this fingerprint beyond doubt: within the window nothing of it is sent to anybody. `false`: it was
    /// answered before, and is not to blame.
    pub fn convict(&self, fingerprint: u64, now: Time) -> bool {
        let mut known = self.lock();
        if known.get(&fingerprint).is_some_and(|one| one.is_innocent(now)) {
            return false;
        }
        known.insert(fingerprint, Known { died_on: [u64::MAX; KILLS], died: now.seconds(), answered: 0 });
        self.last.store(now.seconds().max(1), Relaxed);
        true
    }

    /// Something of this fingerprint was answered.
    pub fn answered(&self, fingerprint: u64, now: Time) {
        let mut known = self.lock();
        if known.len() >= MOST && !known.contains_key(&fingerprint) {
            known.retain(|_, one| one.lives(now));
            if known.len() >= MOST {
                return;
            }
        }
        *known.entry(fingerprint).or_default() = Known { answered: now.seconds().max(1), ..Known::default() };
    }

    /// Whether this fingerprint has killed more than one backend within the window, and was not answered.
    pub fn kills(&self, fingerprint: u64, now: Time) -> bool {
        let last = self.last.load(Relaxed);
        last > 0
            && last + WINDOW > now.seconds()
            && self.lock().get(&fingerprint).is_some_and(|one| one.has_killed(now) >= KILLS && !one.is_innocent(now))
    }

    /// Whether a backend died of this fingerprint beyond doubt within the window.
    pub fn is_convicted(&self, fingerprint: u64, now: Time) -> bool {
        let last = self.last.load(Relaxed);
        let convicted = |one: &Known| one.has_killed(now) > 0 && one.died_on.contains(&u64::MAX);
        last > 0 && last + WINDOW > now.seconds() && self.lock().get(&fingerprint).is_some_and(convicted)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: u64) -> Time {
        Time(second * 1_000_000)
    }

    #[test]
    fn what_kills_goes_on_once_and_after_the_second_death_nowhere() {
        let poison = Poison::default();
        assert!(poison.may_go_on(1, 7, false, at(100)) && !poison.kills(1, at(100)));
        assert!(poison.may_go_on(1, 7, false, at(100)) && !poison.kills(1, at(100)), "the same one again is no second");
        assert!(!poison.may_go_on(1, 8, false, at(101)) && poison.kills(1, at(101)));
        assert!(!poison.kills(2, at(101)));
        assert!(!poison.kills(1, at(112)) && poison.may_go_on(1, 9, false, at(112)), "and the window ends");
    }

    #[test]
    fn the_only_one_that_was_lost_with_a_backend_can_be_convicted() {
        let poison = Poison::default();
        assert!(poison.may_go_on(1, 7, false, at(100)) && poison.alone(1, 7, at(100)));
        assert!(poison.may_go_on(2, 8, false, at(100)) && poison.alone(1, 7, at(100)), "that was another backend");
        assert!(poison.may_go_on(3, 7, false, at(100)) && !poison.alone(1, 7, at(100)));
        assert!(poison.convict(1, at(100)));
        assert!(
            poison.is_convicted(1, at(105)) && !poison.is_convicted(3, at(105)) && !poison.is_convicted(1, at(111))
        );
        assert!(poison.kills(1, at(105)) && !poison.kills(3, at(105)) && !poison.kills(1, at(111)));
    }

    #[test]
    fn what_is_answered_is_no_poison() {
        let poison = Poison::default();
        assert!((1..10).all(|i| poison.may_go_on(1, i, true, at(100))), "known from elsewhere");
        poison.answered(2, at(100));
        assert!((1..10).all(|i| poison.may_go_on(2, i, false, at(150))) && !poison.kills(2, at(150)));
        assert!(!poison.convict(2, at(150)) && !poison.kills(2, at(150)));
    }

    #[test]
    fn what_did_no_harm_is_acquitted_until_too_much_is() {
        let poison = Poison::default();
        poison.acquit(5);
        assert!(poison.is_acquitted(5) && !poison.is_acquitted(6));
        (0..u64::from(MARKED) + 10).for_each(|i| poison.acquit(i * 8 + 7));
        assert!(!poison.is_acquitted(5), "then all is forgotten");
    }

    #[test]
    fn memory_is_bounded() {
        let poison = Poison::default();
        let went = (0..20_000).filter(|&fingerprint| poison.may_go_on(fingerprint, 7, false, at(100))).count();
        assert!(went <= MOST, "{went}");
        (0..20_000).for_each(|fingerprint| poison.answered(fingerprint, at(100)));
        assert!(poison.lock().len() <= MOST);
        assert!(poison.may_go_on(5, 7, false, at(170)), "and forgotten again");
    }
}
