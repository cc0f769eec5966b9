//! What the backends of one pool share.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Time;
use crate::limits::{Bucket, Budget, Gauge, Queue};
use crate::manner::Manner;
use crate::metrics::{Counter, DETECT_BOUNDS, Histogram};
use crate::poison::Poison;
use crate::uplink::Uplink;
use crate::witness::Failing;

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
    /// How its sessions begin.
    pub manner: Manner,
    /// Backends at which a class of requests fails.
    pub classes_failing: AtomicU32,
    /// When the next session may be ended for the balance.
    pub rebalancing: Bucket,
    /// Clients that wait for a place.
    pub queue: Arc<Queue>,
    /// What was sent on after a backend had died with it.
    pub poison: Poison,
    /// Answers of all of them.
    pub(super) answers: Tally,
    /// Which cells of the process show life.
    pub uplink: Arc<Uplink>,
    /// The cell that probes alone took out last, and when.
    probe_removal: Mutex<Option<(usize, Time)>>,
    /// Races begun, and races won by the later attempt.
    pub races: [Counter; 2],
    /// Sessions carried to another backend because the first did not answer.
    pub replays: Counter,
    /// Clients refused because the pool was at its cap, or all backends were full.
    pub refused_full: Counter,
    /// Clients refused because no backend connected in time.
    pub refused_unreachable: Counter,
    /// From the first failed evidence to leaving `up`, in seconds.
    pub detect: Histogram,
}

impl PoolShared {
    /// What shares follow from has changed.
    pub fn changed(&self) {
        self.epoch.fetch_add(1, Relaxed);
    }

    /// Whether probes alone may take out a backend of this cell: only one cell in `between`.
    pub(super) fn probes_may_remove(&self, cell: usize, between: Duration, now: Time) -> bool {
        let mut last = self.probe_removal.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = last.is_none_or(|(removed, at)| removed == cell || now.since(at) >= between);
        if allowed {
            *last = Some((cell, now));
        }
        allowed
    }

    /// The state of a pool that is new.
    pub fn new(name: &str, uplink: Arc<Uplink>) -> PoolShared {
        let (queue, connections): (Arc<Queue>, Arc<Gauge>) = Default::default();
        connections.tells(&queue);
        PoolShared {
            name: name.into(),
            connections,
            classes_failing: AtomicU32::new(0),
            rebalancing: Bucket::default(),
            queue,
            budget: Budget::default(),
            epoch: AtomicU64::new(1),
            failing: Failing::default(),
            manner: Manner::default(),
            poison: Poison::default(),
            answers: Tally::default(),
            uplink,
            probe_removal: Mutex::default(),
            races: Default::default(),
            replays: Counter::default(),
            refused_full: Counter::default(),
            refused_unreachable: Counter::default(),
            detect: Histogram::new(&DETECT_BOUNDS),
        }
    }
}

/// Answers, without an error and with one.
#[derive(Debug, Default)]
pub(super) struct Tally {
    good: AtomicU64,
    bad: AtomicU64,
}

/// What two tallies, one backend's and its pool's, were at a moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mark {
    own: [f64; 2],
    all: [f64; 2],
}

/// A share of errors is greater than another's when it is so many standard deviations beyond it, and so many times as great.
const BEYOND: f64 = 3.0;
const TIMES: f64 = 1.5;

impl Tally {
    pub(super) fn count(&self, error: bool) {
        let counter = if error { &self.bad } else { &self.good };
        counter.fetch_add(1, Relaxed);
    }

    fn read(&self) -> [f64; 2] {
        [&self.good, &self.bad].map(|counter| counter.load(Relaxed) as f64)
    }

    pub(super) fn mark(&self, all: &Tally) -> Mark {
        Mark { own: self.read(), all: all.read() }
    }
}

impl Mark {
    /// Whether a backend has had no more errors since `before` than the others of its pool: what all have alike is nobody's own.
    /// Where the others had no answers there is nobody to compare it with.
    pub(super) fn is_like_the_others(&self, before: &Mark) -> bool {
        let [good, bad] = [0, 1].map(|i| self.own[i] - before.own[i]);
        let [others_good, others_bad] =
            [(0, good), (1, bad)].map(|(i, own)| (self.all[i] - before.all[i] - own).max(0.0));
        let (own, others) = (good + bad, others_good + others_bad);
        if others < 1.0 || own < 1.0 {
            return false;
        }
        let expected = (others_bad + 1.0) / (others + 2.0);
        let surprising = bad > own * expected + BEYOND * (own * expected * (1.0 - expected)).sqrt();
        let much = bad / own > TIMES * others_bad / others || good / own * 2.0 < others_good / others;
        !(surprising && much)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_all_have_alike_are_nobodys_own() {
        let alike = |one: (u32, u32), others: (u32, u32)| {
            let (own, all) = (Tally::default(), Tally::default());
            // What was before says nothing.
            (0..1_000).for_each(|_| all.count(false));
            let before = own.mark(&all);
            for (count, error, ours) in
                [(one.0, false, true), (one.1, true, true), (others.0, false, false), (others.1, true, false)]
            {
                (0..count).for_each(|_| all.count(error));
                (0..count).filter(|_| ours).for_each(|_| own.count(error));
            }
            own.mark(&all).is_like_the_others(&before)
        };
        for (one, others, wanted) in [
            ((0, 4), (4, 0), false),
            ((24, 12), (36, 0), false),
            ((388, 12), (400, 0), false),
            ((80, 120), (140, 60), false),
            ((0, 100), (40, 60), false),
            ((0, 4), (0, 4), true),
            ((67, 33), (66, 34), true),
            ((388, 12), (387, 13), true),
            ((0, 20), (0, 60), true),
            ((65, 35), (280, 120), true),
            ((3, 3), (0, 0), false),
        ] {
            assert_eq!(alike(one, others), wanted, "{one:?} beside {others:?}");
        }
    }
}
