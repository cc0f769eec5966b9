//! Health of one class of requests on one backend: a method group of a route. Pure: time is an argument.
//!
//! A credential that ran out fails all writes and no read; a lost cache fails one path. When the errors of a backend come from
//! one class while its others are answered, the class goes elsewhere and the others stay. Each class is judged by a cumulative
//! sum as the backend is ([`crate::error_ratio`]); one request now and then tries how the class does, those that may be sent twice
//! sooner than those that may not.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::Time;

/// What is taken for the past before there is one, and its bounds.
const PRIOR_ERRORS: f32 = 1.0;
const PRIOR_ANSWERS: f32 = 100.0;
const PAST_LEAST: f32 = 0.005;
const PAST_MOST: f32 = 0.5;
/// "Many errors", as for a whole backend.
const MANY: f32 = 0.25;
const MANY_TIMES: f32 = 3.0;
const ALARM: f32 = 12.0;
/// The other classes are well when this many of their answers were seen lately, and no more than this part were errors.
const OTHERS: f32 = 8.0;
const OTHERS_ERRORS: f32 = 0.1;
/// After this many answers the older half is forgotten.
const WINDOW: f32 = 128.0;
/// A class without an answer for this long is none of the others.
const LATELY: Duration = Duration::from_secs(10);
/// Pause before a class is tried by a request that may be sent twice, and by one that may not; both double, to some seconds: it
/// would stay away for as long after it is well again.
const TRIAL_REPEATABLE: Duration = Duration::from_secs(1);
const TRIAL_OTHER: Duration = Duration::from_secs(5);
const TRIAL_LONGEST: Duration = Duration::from_secs(8);
/// Good answers in a row that clear a class.
const PROOF: u8 = 2;
/// Classes of one backend that are remembered.
const MOST: usize = 4_096;

#[derive(Clone, Copy, Debug)]
struct Class {
    /// Errors and answers, for the past and for the others' sake.
    errors: f32,
    answers: f32,
    sum: f32,
    /// Errors that the sum is of; they are no past before nothing has come of it.
    pending: f32,
    /// The prefix that most of the sum is from, and how much.
    prefix: u32,
    of_prefix: f32,
    seen: Time,
    failing: Option<Failing>,
}

#[derive(Clone, Copy, Debug)]
struct Failing {
    trial_at: Time,
    pause: Duration,
    proven: u8,
}

/// What an error says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// Something of the backend, as far as can be seen.
    Backend,
    /// Nothing yet: only this class has errors, and too little was seen of the others.
    Nothing,
    /// That its class fails, from now on.
    ClassFails,
    /// What is known of its class.
    Known,
}

/// Whether a request should go to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Avoids {
    /// As any other.
    No,
    /// Elsewhere: its class fails there.
    Yes,
    /// There: it tries it for its class.
    Tries,
}

/// The classes of one backend.
#[derive(Debug, Default)]
pub struct Classes {
    known: HashMap<u64, Class>,
    failing: usize,
}

impl Class {
    fn new(now: Time) -> Class {
        Class { errors: 0.0, answers: 0.0, sum: 0.0, pending: 0.0, prefix: 0, of_prefix: 0.0, seen: now, failing: None }
    }

    fn ratios(&self) -> (f32, f32) {
        let past = ((self.errors - self.pending).max(0.0) + PRIOR_ERRORS) / (self.answers + PRIOR_ANSWERS);
        let past = past.clamp(PAST_LEAST, PAST_MOST);
        (past, (past * MANY_TIMES).clamp(MANY, 0.95))
    }

    fn count(&mut self, error: bool, now: Time) {
        self.errors += f32::from(error);
        self.answers += 1.0;
        if self.answers > WINDOW {
            self.errors /= 2.0;
            self.answers /= 2.0;
        }
        self.seen = now;
    }
}

impl Classes {
    /// Whether any class fails.
    pub fn any_failing(&self) -> bool {
        self.failing > 0
    }

    /// Whether this class fails.
    pub fn is_failing(&self, class: u64) -> bool {
        self.failing > 0 && self.known.get(&class).is_some_and(|class| class.failing.is_some())
    }

    /// Whether a request of this class is to be sent elsewhere: it fails, and this one is no trial. Only one that `may_try` can be;
    /// what is said to be a trial has begun.
    pub fn avoids(&mut self, class: u64, repeatable: bool, may_try: bool, now: Time) -> Avoids {
        let Some(failing) = self.known.get_mut(&class).and_then(|class| class.failing.as_mut()) else {
            return Avoids::No;
        };
        let due = if repeatable { failing.trial_at } else { failing.trial_at + (TRIAL_OTHER - TRIAL_REPEATABLE) };
        if !may_try || now < due {
            return Avoids::Yes;
        }
        failing.trial_at = now + failing.pause;
        Avoids::Tries
    }

    /// An answer without an error; says whether the class is well again.
    pub fn good(&mut self, class: u64, now: Time) -> bool {
        let Some(known) = self.entry(class, now) else { return false };
        if let Some(failing) = &mut known.failing {
            failing.proven += 1;
            failing.pause = TRIAL_REPEATABLE;
            failing.trial_at = now;
            if failing.proven < PROOF {
                return false;
            }
            *known = Class::new(now);
            self.failing -= 1;
            return true;
        }
        known.count(false, now);
        if known.sum > 0.0 {
            let (past, many) = known.ratios();
            let left = (known.sum + ((1.0 - many) / (1.0 - past)).ln()).max(0.0);
            known.of_prefix *= left / known.sum;
            known.sum = left;
            if left == 0.0 {
                known.pending = 0.0;
            }
        }
        false
    }

    /// An error, for a client of `prefix`; `others` says whether there are other prefixes. A class fails only while the other
    /// classes of the backend are well.
    pub fn bad(&mut self, class: u64, prefix: u32, others: bool, now: Time) -> Says {
        let (errors, answers) = self.of_others(class, now);
        let Some(known) = self.entry(class, now) else { return Says::Backend };
        if let Some(failing) = &mut known.failing {
            failing.proven = 0;
            failing.pause = (failing.pause * 2).min(TRIAL_LONGEST);
            failing.trial_at = now + failing.pause;
            return Says::Known;
        }
        let (past, many) = known.ratios();
        let rise = (many / past).ln();
        if known.sum <= 0.0 || known.prefix == prefix {
            known.prefix = prefix;
            let most = if others { ALARM / 2.0 } else { f32::INFINITY };
            let added = rise.min((most - known.of_prefix).max(0.0));
            known.of_prefix += added;
            known.sum += added;
        } else {
            known.sum += rise;
        }
        known.pending += 1.0;
        known.count(true, now);
        if answers < 1.0 || errors > answers * OTHERS_ERRORS {
            return Says::Backend;
        }
        if known.sum < ALARM || answers < OTHERS {
            return if known.sum < 2.0 * ALARM { Says::Nothing } else { Says::Backend };
        }
        known.failing = Some(Failing { trial_at: now + TRIAL_REPEATABLE, pause: TRIAL_REPEATABLE, proven: 0 });
        self.failing += 1;
        Says::ClassFails
    }

    /// Errors and answers of the other classes that were seen lately.
    fn of_others(&self, class: u64, now: Time) -> (f32, f32) {
        let lately = |one: &Class| one.failing.is_none() && now.since(one.seen) <= LATELY;
        let others = self.known.iter().filter(|(key, one)| **key != class && lately(one));
        others.fold((0.0, 0.0), |(errors, answers), (_, one)| (errors + one.errors, answers + one.answers))
    }

    fn entry(&mut self, class: u64, now: Time) -> Option<&mut Class> {
        if self.known.len() >= MOST && !self.known.contains_key(&class) {
            self.known.retain(|_, one| one.failing.is_some() || now.since(one.seen) <= LATELY);
            if self.known.len() >= MOST {
                return None;
            }
        }
        Some(self.known.entry(class).or_insert_with(|| Class::new(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READS: u64 = 1;
    const WRITES: u64 = 2;
    const STEP: Duration = Duration::from_millis(5);

    fn at(ms: u64) -> Time {
        Time(1_000_000 + ms * 1_000)
    }

    #[test]
    fn writes_that_fail_among_reads_that_do_not_go_alone() {
        let mut classes = Classes::default();
        let mut now = at(0);
        let mut failed = None;
        for i in 0..100u32 {
            now = now + STEP;
            if i % 5 == 0 {
                if classes.bad(WRITES, i, true, now) == Says::ClassFails {
                    failed = Some(i);
                    break;
                }
            } else {
                classes.good(READS, now);
            }
        }
        assert!(failed.is_some_and(|i| i <= 30), "{failed:?}");
        assert!(classes.is_failing(WRITES) && !classes.is_failing(READS));
        assert_eq!(classes.avoids(WRITES, false, true, now), Avoids::Yes);
        assert_eq!(classes.avoids(READS, true, true, now), Avoids::No);
        let later = now + Duration::from_secs(2);
        assert_eq!(classes.avoids(WRITES, false, true, later), Avoids::Yes, "what may not be sent twice waits longer");
        assert_eq!(classes.avoids(WRITES, true, false, later), Avoids::Yes, "it tries another one");
        assert_eq!(classes.avoids(WRITES, true, true, later), Avoids::Tries);
        assert!(!classes.good(WRITES, now + Duration::from_secs(2)));
        assert!(classes.good(WRITES, now + Duration::from_secs(2)), "and it is well again");
        assert!(!classes.any_failing());
    }

    #[test]
    fn when_all_fail_it_is_the_backend_and_no_class() {
        let mut classes = Classes::default();
        assert!((0..200u32).all(|i| classes.bad(u64::from(i % 2), i, true, at(u64::from(i))) == Says::Backend));
        let mut alone = Classes::default();
        assert!(
            (0..200u32).all(|i| alone.bad(READS, i, true, at(u64::from(i))) == Says::Backend),
            "there is nothing to compare with"
        );
    }

    #[test]
    fn one_client_alone_fails_no_class_where_there_are_others() {
        let mut classes = Classes::default();
        assert!((0..50).all(|i| !classes.good(READS, at(i))));
        assert!((0..200).all(|i| classes.bad(WRITES, 7, true, at(50 + i)) == Says::Nothing));
        assert!((0..20).any(|i| classes.bad(WRITES, 8 + i, true, at(300)) == Says::ClassFails));
    }

    #[test]
    fn memory_is_bounded() {
        let mut classes = Classes::default();
        assert!((0..100_000).all(|class| !classes.good(class, at(0))));
        assert!(classes.known.len() <= MOST && size_of::<Class>() <= 80);
    }
}
