//! Caps and budgets. Each belongs to the process, one listener, one pool or one backend; none is divided by
//! workers, and none is shared between pools.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use tokio::sync::Notify;

use crate::clock::Time;

/// Number of things in use at once. The bound is given with each request, because a reload may change it.
#[derive(Debug, Default)]
pub struct Gauge {
    used: AtomicU32,
    freed: Notify,
    waiting: AtomicU32,
}

/// One thing in use; dropping it gives it back.
#[derive(Debug)]
pub struct Permit(Arc<Gauge>);

impl Gauge {
    /// Takes one if fewer than `limit` are in use.
    pub fn take(self: &Arc<Self>, limit: u32) -> Option<Permit> {
        // A refusal leaves the gauge alone: it must not look like a place that became free.
        let taken = self.used.fetch_update(Relaxed, Relaxed, |used| (used < limit).then_some(used + 1));
        taken.is_ok().then(|| Permit(self.clone()))
    }

    /// How many are in use.
    pub fn used(&self) -> u32 {
        self.used.load(Relaxed)
    }

    /// Waits until one may have become free.
    pub async fn freed(&self) {
        self.waiting.fetch_add(1, Relaxed);
        let _leave = Leave(&self.waiting);
        self.freed.notified().await;
    }

    fn give_back(&self) {
        self.used.fetch_sub(1, Relaxed);
        if self.waiting.load(Relaxed) > 0 {
            self.freed.notify_waiters();
        }
    }
}

struct Leave<'a>(&'a AtomicU32);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.give_back();
    }
}

/// Counts per second over the last seconds, without a lock.
#[derive(Debug, Default)]
pub struct Window {
    /// Second in the upper half, count in the lower.
    slots: [AtomicU64; 16],
}

impl Window {
    /// Seconds that [`Window::sum`] looks back.
    pub const SECONDS: u64 = 10;

    /// Counts one at `now`.
    pub fn add(&self, now: Time) {
        let second = now.seconds() & 0xffff_ffff;
        let slot = &self.slots[(second % 16) as usize];
        let mut seen = slot.load(Relaxed);
        loop {
            let next = if seen >> 32 == second { seen + 1 } else { second << 32 | 1 };
            match slot.compare_exchange_weak(seen, next, Relaxed, Relaxed) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }

    /// Count of the last ten seconds, the present one included.
    pub fn sum(&self, now: Time) -> u64 {
        let second = now.seconds() & 0xffff_ffff;
        let slots = self.slots.iter().map(|slot| slot.load(Relaxed));
        slots
            .filter(|slot| (slot >> 32) + Self::SECONDS > second && slot >> 32 <= second)
            .map(|slot| slot & 0xffff_ffff)
            .sum()
    }
}

/// Tokens of one pool for races and retries: a tenth of the client attempts of the last ten seconds, and ten a
/// second besides (the scheme of Finagle's retry budget).
#[derive(Debug, Default)]
pub struct Budget {
    clients: Window,
    extras: Window,
    trials: Window,
    refused: AtomicU64,
}

impl Budget {
    /// Notes one client's first attempt.
    pub fn client(&self, now: Time) {
        self.clients.add(now);
    }

    /// Takes one token for an extra attempt, unless there is none.
    pub fn extra(&self, now: Time) -> bool {
        if self.extras.sum(now) < self.clients.sum(now) / 10 + 10 * Window::SECONDS {
            self.extras.add(now);
            return true;
        }
        self.refused.fetch_add(1, Relaxed);
        false
    }

    /// Takes one token for a trial of a doubtful backend: one in a hundred clients, and at least one a second.
    pub fn trial(&self, now: Time) -> bool {
        let allowed = self.trials.sum(now) < (self.clients.sum(now) / 100).max(Window::SECONDS);
        if allowed {
            self.trials.add(now);
        }
        allowed
    }

    /// How many extra attempts were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_gauge_never_exceeds_its_limit_and_returns_to_zero() {
        let gauge = Arc::new(Gauge::default());
        let held: Vec<_> = (0..5).filter_map(|_| gauge.take(3)).collect();
        assert_eq!((held.len(), gauge.used()), (3, 3));
        drop(held);
        assert_eq!(gauge.used(), 0);
    }

    #[test]
    fn the_budget_is_a_tenth_of_ten_seconds_and_a_hundred_and_renews_itself() {
        let budget = Budget::default();
        let start = Time(100_000_000);
        for i in 0..4_000u64 {
            budget.client(start + Duration::from_millis(i * 10 / 4));
        }
        let now = start + Duration::from_millis(9_999);
        assert_eq!((0..1_000).filter(|_| budget.extra(now)).count(), 500);
        assert_eq!(budget.refused(), 500);
        let later = now + Duration::from_secs(11);
        assert_eq!((0..1_000).filter(|_| budget.extra(later)).count(), 100);
    }
}
