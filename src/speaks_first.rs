//! How the sessions of a pool begin, learned from those that were: whether a backend owes them a first byte.
//!
//! Some protocols let the server speak first, in some the client asks, and some servers never answer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::config::FirstByte;

/// Sessions that teach a manner, and after how many the older half of them is forgotten.
const ENOUGH: u32 = 16;
const WINDOW: u32 = 1_024;
/// Unanswered sessions of one client prefix that are counted of this many, where there are clients of others: less than what changes
/// anything, or one that opens sessions and leaves would blind us for all. And prefixes that are told apart.
const OF_ONE: u32 = WINDOW / 128;
const PREFIXES: usize = 256;

/// How the sessions of a pool begin.
#[derive(Debug, Default)]
pub struct SpeaksFirst {
    /// The backend spoke first.
    server_first: AtomicU32,
    /// The client did, and was answered.
    asked: AtomicU32,
    /// The client did, and was not answered while others were.
    unanswered: AtomicU32,
    /// Those of `unanswered`, by prefix.
    of_prefix: Mutex<HashMap<u32, u32>>,
}

/// When a first byte is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owes {
    /// Never.
    Nothing,
    /// After the client's first bytes.
    AnAnswer,
    /// As soon as the connection stands.
    AGreeting,
}

impl SpeaksFirst {
    /// A session whose backend spoke, before or after its client.
    pub fn spoke(&self, first: bool) {
        let count = if first { &self.server_first } else { &self.asked };
        self.count(count);
    }

    /// A session of `prefix` that ended without an answer, of a backend that answered others meanwhile; `others` says whether it has
    /// answered clients of other prefixes.
    pub fn was_silent(&self, prefix: u32, others: bool) {
        let mut of_prefix = self.of_prefix.lock().unwrap_or_else(PoisonError::into_inner);
        if of_prefix.len() >= PREFIXES && !of_prefix.contains_key(&prefix) {
            of_prefix.clear();
        }
        let count = of_prefix.entry(prefix).or_default();
        if others && *count >= OF_ONE {
            return;
        }
        *count += 1;
        drop(of_prefix);
        self.count(&self.unanswered);
    }

    fn count(&self, one: &AtomicU32) {
        one.fetch_add(1, Relaxed);
        let all = [&self.server_first, &self.asked, &self.unanswered];
        if all.iter().map(|count| count.load(Relaxed)).sum::<u32>() > WINDOW {
            all.iter().for_each(|count| count.store(count.load(Relaxed) / 2, Relaxed));
            let mut of_prefix = self.of_prefix.lock().unwrap_or_else(PoisonError::into_inner);
            of_prefix.values_mut().for_each(|count| *count /= 2);
            of_prefix.retain(|_, count| *count > 0);
        }
    }

    /// What is owed, as far as was learned.
    pub fn owes(&self, wanted: FirstByte) -> Owes {
        let [first, asked, unanswered] =
            [&self.server_first, &self.asked, &self.unanswered].map(|count| count.load(Relaxed));
        let all = first + asked + unanswered;
        match wanted {
            FirstByte::Ignore => Owes::Nothing,
            FirstByte::Expect if first > asked => Owes::AGreeting,
            FirstByte::Expect => Owes::AnAnswer,
            // One in fifty that is never answered is more than chance, and enough of them at once would look like a failure.
            FirstByte::Learn if all < ENOUGH || unanswered * 50 > all => Owes::Nothing,
            FirstByte::Learn if first * 10 > all * 9 => Owes::AGreeting,
            FirstByte::Learn if first * 10 < all => Owes::AnAnswer,
            FirstByte::Learn => Owes::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manner(server_first: u32, asked: u32, unanswered: u32) -> SpeaksFirst {
        let manner = SpeaksFirst::default();
        (0..server_first).for_each(|_| manner.spoke(true));
        (0..asked).for_each(|_| manner.spoke(false));
        (0..unanswered).for_each(|_| manner.was_silent(1, false));
        manner
    }

    #[test]
    fn what_is_owed_is_learned() {
        assert_eq!(manner(0, 15, 0).owes(FirstByte::Learn), Owes::Nothing, "too few");
        assert_eq!(manner(0, 100, 0).owes(FirstByte::Learn), Owes::AnAnswer);
        assert_eq!(manner(100, 0, 0).owes(FirstByte::Learn), Owes::AGreeting);
        assert_eq!(manner(50, 50, 0).owes(FirstByte::Learn), Owes::Nothing, "now so, now otherwise");
        assert_eq!(manner(0, 100, 3).owes(FirstByte::Learn), Owes::Nothing, "some servers never answer");
        assert_eq!(manner(0, 100, 3).owes(FirstByte::Expect), Owes::AnAnswer);
        assert_eq!(manner(0, 100, 0).owes(FirstByte::Ignore), Owes::Nothing);
    }

    #[test]
    fn one_client_that_opens_sessions_and_leaves_changes_nothing_for_the_others() {
        let manner = manner(0, 900, 0);
        for _ in 0..50 {
            (0..100).for_each(|_| manner.spoke(false));
            (0..100).for_each(|_| manner.was_silent(7, true));
            assert_eq!(manner.owes(FirstByte::Learn), Owes::AnAnswer);
        }
        (0..40).for_each(|prefix| manner.was_silent(prefix, true));
        assert_eq!(manner.owes(FirstByte::Learn), Owes::Nothing, "many of them say how the pool is");
        (0..50_000).for_each(|prefix| manner.was_silent(prefix, true));
        assert!(manner.of_prefix.lock().expect("no panic").len() <= PREFIXES);
    }

    #[test]
    fn what_was_learned_is_forgotten_for_what_is_seen_now() {
        let manner = manner(0, 2_000, 0);
        (0..20_000).for_each(|_| manner.spoke(true));
        assert_eq!(manner.owes(FirstByte::Learn), Owes::AGreeting);
    }
}
