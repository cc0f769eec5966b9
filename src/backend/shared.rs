//! What the backends of one pool share.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::blame::Failing;
use crate::clock::Time;
use crate::limits::{Bucket, Budget, Gauge, Queue};
use crate::metrics::{Counter, DETECT_BOUNDS, Histogram};
use crate::poison::Poison;
use crate::speaks_first::SpeaksFirst;
use crate::uplink::{Stall, Uplink};

/// One that has not answered often enough to know how long it takes may take this many times as long as the slowest of its pool
/// that has, at least this long, and its way besides; no longer than this, which is all that is known where no other has answered either.
const STRANGER_TIMES: u32 = 10;
const STRANGER_LEAST: Duration = Duration::from_millis(250);
const STRANGER_MOST: Duration = Duration::from_secs(1);

/// Time between two removals by probes in one cell: two looks at who stands in a tier.
const WITHIN_CELL: Duration = Duration::from_millis(200);

static NEXT: AtomicU64 = AtomicU64::new(1);

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
    pub speaks_first: SpeaksFirst,
    /// How long the slowest of those whose time is known takes for its first byte, in microseconds (99th percentile); 0: none is.
    pub usual: AtomicU32,
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
    /// When all of its backends that were asked gave no answers.
    pub stall: Stall,
    /// Tells it from other pools of the process.
    pub number: u64,
    /// The cell that probes alone took out last, and when.
    probe_removal: Mutex<Option<(usize, Time)>>,
    /// Races begun; and clients that had one, by whether the later attempt won it.
    pub races: Counter,
    /// See `races`: no, yes.
    pub raced: [Counter; 2],
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
        // Whoever sees the new number sees what was stored before it.
        self.epoch.fetch_add(1, Release);
    }

    /// After how long one is silent of which little more is known than how far it is, `way`.
    pub(super) fn stranger_silent_after(&self, way: Option<Duration>) -> Duration {
        let usual = Duration::from_micros(self.usual.load(Relaxed).into());
        match way {
            Some(way) if !usual.is_zero() => {
                ((usual * STRANGER_TIMES).max(STRANGER_LEAST) + way * 2).min(STRANGER_MOST)
            }
            _ => STRANGER_MOST,
        }
    }

    /// Whether probes alone may take out a backend of this cell: only one cell in `between`.
    pub(super) fn probes_may_remove(&self, cell: usize, between: Duration, now: Time) -> bool {
        let mut last = self.probe_removal.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of one cell may go together, one look after the other: the last of a tier has to be known as such.
        let apart = |removed| if removed == cell { between.min(WITHIN_CELL) } else { between };
        let allowed = last.is_none_or(|(removed, at)| now.since(at) >= apart(removed));
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
            speaks_first: SpeaksFirst::default(),
            usual: AtomicU32::new(0),
            poison: Poison::default(),
            answers: Tally::default(),
            uplink,
            stall: Stall::default(),
            number: NEXT.fetch_add(1, Relaxed),
            probe_removal: Mutex::default(),
            races: Counter::default(),
            raced: Default::default(),
            replays: Counter::default(),
            refused_full: Counter::default(),
            refused_unreachable: Counter::default(),
            detect: Histogram::new(&DETECT_BOUNDS),
        }
    }
}

/// Backends of a pool that are told apart; more share places.
const PLACES: usize = 64;

/// Answers of the backends of one pool, without an error and with one.
#[derive(Debug)]
pub(super) struct Tally([[AtomicU64; 2]; PLACES]);

/// What a tally was at a moment.
#[derive(Clone, Debug)]
pub(super) struct Mark(Box<[[u64; 2]; PLACES]>);

/// A share of errors is greater than another's when it is this many standard deviations beyond it, and this many times as great.
const BEYOND: f64 = 3.0;
const TIMES: f64 = 1.5;

impl Default for Tally {
    fn default() -> Self {
        Tally(std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))))
    }
}

impl Tally {
    pub(super) fn count(&self, backend: u64, error: bool) {
        self.0[place(backend)][usize::from(error)].fetch_add(1, Relaxed);
    }

    pub(super) fn mark(&self) -> Mark {
        let mut mark = Mark(Box::new([[0; 2]; PLACES]));
        for (at, counters) in mark.0.iter_mut().zip(&self.0) {
            *at = [counters[0].load(Relaxed), counters[1].load(Relaxed)];
        }
        mark
    }
}

fn place(backend: u64) -> usize {
    (backend % PLACES as u64) as usize
}

impl Mark {
    /// Whether nobody else of its pool has had clearly fewer errors since `before` than this backend: what all have alike is nobody's
    /// own. Where the others had no answers there is nobody to compare it with.
    pub(super) fn is_like_the_others(&self, backend: u64, before: &Mark) -> bool {
        let since = |i: usize| [0, 1].map(|kind| self.0[i][kind].saturating_sub(before.0[i][kind]) as f64);
        let [good, bad] = since(place(backend));
        let own = good + bad;
        let mut others =
            (0..PLACES).filter(|i| *i != place(backend)).map(since).filter(|[good, bad]| good + bad >= 1.0);
        let better = |[others_good, others_bad]: [f64; 2]| {
            let others = others_good + others_bad;
            let expected = (others_bad + 1.0) / (others + 2.0);
            let surprising = bad > own * expected + BEYOND * (own * expected * (1.0 - expected)).sqrt();
            let much = bad / own > TIMES * others_bad / others || good / own * 2.0 < others_good / others;
            surprising && much
        };
        let Some(first) = others.next().filter(|_| own >= 1.0) else { return false };
        !better(first) && !others.any(better)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_take_out_cells_far_apart_and_backends_of_one_cell_a_look_apart() {
        let shared = PoolShared::new("p", Arc::default());
        let between = Duration::from_secs(10);
        let at = |ms| Time(1_000_000) + Duration::from_millis(ms);
        assert!(shared.probes_may_remove(0, between, at(0)));
        assert!(!shared.probes_may_remove(0, between, at(100)), "who stands last in the tier is not known yet");
        assert!(shared.probes_may_remove(0, between, at(200)));
        assert!(!shared.probes_may_remove(1, between, at(10_100)), "another cell");
        assert!(shared.probes_may_remove(1, between, at(10_200)));
        assert!(shared.probes_may_remove(0, Duration::ZERO, at(10_200)), "no such guard");
    }

    #[test]
    fn errors_that_all_have_alike_are_nobodys_own() {
        let alike = |one: (u32, u32), others: &[(u32, u32)]| {
            let tally = Tally::default();
            // What was before says nothing.
            (0..1_000).for_each(|i| tally.count(i % 5, false));
            let before = tally.mark();
            for (backend, (good, bad)) in [one].iter().chain(others).enumerate() {
                (0..*good).for_each(|_| tally.count(backend as u64, false));
                (0..*bad).for_each(|_| tally.count(backend as u64, true));
            }
            tally.mark().is_like_the_others(0, &before)
        };
        for (one, others, wanted) in [
            ((0, 4), &[(4, 0)][..], false),
            ((24, 12), &[(36, 0)], false),
            ((388, 12), &[(400, 0)], false),
            ((80, 120), &[(140, 60)], false),
            ((0, 100), &[(40, 60)], false),
            ((0, 4), &[(0, 4)], true),
            ((67, 33), &[(66, 34)], true),
            ((388, 12), &[(387, 13)], true),
            ((0, 20), &[(0, 20), (0, 20), (0, 20)], true),
            ((65, 35), &[(70, 30), (71, 29), (69, 31)], true),
            ((3, 3), &[], false),
            // Several are sick, and one is not.
            ((10, 10), &[(10, 10), (9, 11), (11, 9), (20, 0)], false),
            ((67, 67), &[(67, 67), (67, 67), (67, 67), (134, 0)], false),
            ((0, 20), &[(0, 20), (2, 18)], true),
        ] {
            assert_eq!(alike(one, others), wanted, "{one:?} beside {others:?}");
        }
    }
}
