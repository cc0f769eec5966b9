//! Who says that a backend failed: the rule that keeps one client from steering health.
//!
//! What comes after a client's own bytes may be the client's doing. A reset then counts only from client
//! prefixes that this backend answered within the last minute, each for at most half of what a transition needs
//! while there are others, and only beyond what the same prefix meets on the pool's other backends.
//! Memory is bounded: a table of fixed size for each backend with traffic, and one for each pool.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::clock::Time;
use crate::health::Blame;

/// A prefix counts for this many seconds after its last answer.
const ANSWERED: u64 = 60;
/// Other prefixes are active when one was answered within this many seconds.
const ACTIVE: u64 = 10;
/// A prefix without a new failure is forgotten after this many seconds.
const FAILING: u64 = 30;
/// Slots for answered prefixes; a power of two. A collision forgets the older prefix.
const SLOTS: usize = 1_024;
/// Most failing prefixes remembered for one pool, and most backends for each.
const MOST_FAILING: usize = 1_024;
const MOST_BACKENDS: usize = 32;

/// The prefix of a client, /24 or /56, hashed to 32 bits; never 0.
pub fn prefix(client: IpAddr) -> u32 {
    let bytes = match client.to_canonical() {
        IpAddr::V4(v4) => u64::from(v4.to_bits() >> 8) | 1 << 63,
        IpAddr::V6(v6) => (v6.to_bits() >> 72) as u64,
    };
    let hash = xxhash_rust::xxh3::xxh3_64(&bytes.to_le_bytes()) as u32;
    hash.max(1)
}

/// Prefixes that one backend answered, and when; allocated with the first answer.
#[derive(Debug, Default)]
pub struct Answered(OnceLock<Box<[AtomicU64]>>);

impl Answered {
    /// Notes an answer: one relaxed store.
    pub fn note(&self, prefix: u32, now: Time) {
        let slots = self.0.get_or_init(|| (0..SLOTS).map(|_| AtomicU64::new(0)).collect());
        slots[prefix as usize % SLOTS].store(u64::from(prefix) << 32 | now.seconds() & 0xffff_ffff, Relaxed);
    }

    fn lately(&self, prefix: u32, now: Time) -> bool {
        let Some(slots) = self.0.get() else { return false };
        let slot = slots[prefix as usize % SLOTS].load(Relaxed);
        slot >> 32 == u64::from(prefix) && (slot & 0xffff_ffff) + ANSWERED >= now.seconds()
    }

    /// Whether other prefixes were answered within the last seconds.
    pub fn others(&self, prefix: u32, now: Time) -> bool {
        let Some(slots) = self.0.get() else { return false };
        slots
            .iter()
            .map(|slot| slot.load(Relaxed))
            .any(|slot| slot != 0 && slot >> 32 != u64::from(prefix) && (slot & 0xffff_ffff) + ACTIVE >= now.seconds())
    }
}

#[derive(Debug, Default)]
struct Tally {
    /// Backend, failures, answers.
    backends: Vec<(u64, u32, u32)>,
    last: u64,
}

impl Tally {
    fn of(&mut self, backend: u64) -> Option<&mut (u64, u32, u32)> {
        match self.backends.iter().position(|(id, ..)| *id == backend) {
            Some(i) => self.backends.get_mut(i),
            None if self.backends.len() < MOST_BACKENDS => {
                self.backends.push((backend, 0, 0));
                self.backends.last_mut()
            }
            None => None,
        }
    }
}

/// Prefixes of one pool whose connections lately ended without an answer.
#[derive(Debug, Default)]
pub struct Failing {
    used: AtomicU32,
    tallies: Mutex<HashMap<u32, Tally>>,
}

impl Failing {
    /// Notes an answer, for prefixes under suspicion only.
    pub fn answered(&self, prefix: u32, backend: u64) {
        if self.used.load(Relaxed) == 0 {
            return;
        }
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, _, answers)) = tallies.get_mut(&prefix).and_then(|tally| tally.of(backend)) {
            *answers = answers.saturating_add(1);
        }
    }

    /// Notes a connection of `prefix` that `backend` ended without an answer, and says what it is worth:
    /// `None` when this backend never answered the prefix lately.
    pub fn failed(&self, prefix: u32, backend: u64, answered: &Answered, now: Time) -> Option<Blame> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        if tallies.len() >= MOST_FAILING && !tallies.contains_key(&prefix) {
            tallies.retain(|_, tally| tally.last + FAILING > now.seconds());
            if tallies.len() >= MOST_FAILING {
                // So many failing prefixes are an attack or a failure seen by all; either way others will tell.
                tallies.clear();
            }
        }
        let tally = tallies.entry(prefix).or_default();
        if tally.last + FAILING <= now.seconds() {
            tally.backends.clear();
        }
        tally.last = now.seconds();
        if let Some((_, failures, _)) = tally.of(backend) {
            *failures = failures.saturating_add(1);
        }
        let elsewhere = tally
            .backends
            .iter()
            .filter(|(id, failures, _)| *id != backend && *failures > 0)
            .map(|(_, failures, answers)| f64::from(*failures) / f64::from(failures + answers))
            .fold(0.0, f64::max);
        let tries_elsewhere = tally
            .backends
            .iter()
            .filter(|(id, ..)| *id != backend)
            .map(|(_, failures, answers)| failures.saturating_add(*answers))
            .fold(0, u32::saturating_add);
        self.used.store(tallies.len() as u32, Relaxed);
        drop(tallies);
        let others = answered.others(prefix, now);
        answered.lately(prefix, now).then_some(Blame { prefix, others, elsewhere, tries_elsewhere })
    }

    /// Forgets prefixes without new failures; called now and then.
    pub fn sweep(&self, now: Time) {
        if self.used.load(Relaxed) == 0 {
            return;
        }
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        tallies.retain(|_, tally| tally.last + FAILING > now.seconds());
        self.used.store(tallies.len() as u32, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time(1_000_000_000);

    #[test]
    fn a_prefix_is_a_24_or_a_56() {
        let of = |text: &str| prefix(text.parse().expect("an address"));
        assert_eq!(of("192.0.2.1"), of("192.0.2.254"));
        assert_ne!(of("192.0.2.1"), of("192.0.3.1"));
        assert_eq!(of("2001:db8::1"), of("2001:db8:0:00ff::1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:0100::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.9"));
    }

    #[test]
    fn a_client_that_was_never_answered_says_nothing() {
        let (failing, answered) = (Failing::default(), Answered::default());
        assert_eq!(failing.failed(7, 1, &answered, NOW), None);
        answered.note(7, NOW);
        let blame = failing.failed(7, 1, &answered, NOW).expect("answered lately");
        assert_eq!(blame, Blame { prefix: 7, others: false, elsewhere: 0.0, tries_elsewhere: 0 });
        assert_eq!(failing.failed(7, 1, &answered, Time(NOW.0 + 61_000_000)), None);
    }

    #[test]
    fn what_a_client_meets_everywhere_is_its_own_doing() {
        let (failing, answered) = (Failing::default(), Answered::default());
        answered.note(7, NOW);
        answered.note(8, NOW);
        failing.failed(7, 2, &answered, NOW);
        failing.failed(7, 2, &answered, NOW);
        failing.answered(7, 2);
        let blame = failing.failed(7, 1, &answered, NOW).expect("answered lately");
        assert!(blame.others && (blame.elsewhere - 2.0 / 3.0).abs() < 1e-9, "{blame:?}");
        failing.sweep(Time(NOW.0 + 31_000_000));
        assert_eq!(failing.used.load(Relaxed), 0);
    }
}
