//! How old a backend's data may be, where its pool says so.
//!
//! A cell that comes back may hold the data of yesterday, and answer with them as if nothing had been. Where a pool names the
//! header that carries their version, a backend gets clients only when it has said itself that its data are new enough. What it
//! said is forgotten when it refuses a connection or goes down: whoever begins anew has to say it again.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

use http::{HeaderMap, HeaderName};
use xxhash_rust::xxh3::xxh3_64;

use crate::clock::Time;

/// What a pool asks of its backends' data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The header of answers that carries the version: a whole number, which grows.
    pub header: HeaderName,
    /// The oldest that will do.
    pub at_least: u64,
}

impl Wanted {
    /// The version that an answer carries. One that carries two of them, or something else than digits, carries none.
    pub fn read(&self, headers: &HeaderMap) -> Option<u64> {
        let mut values = headers.get_all(&self.header).iter();
        let value = values.next().filter(|_| values.next().is_none())?;
        let digits = value.to_str().ok()?.trim();
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        digits.parse().ok()
    }
}

/// The version of one backend's data, and the one that is asked for.
#[derive(Debug, Default)]
pub struct Version {
    /// One more than what it said; 0: nothing yet.
    said: AtomicU64,
    /// One more than what is asked for; 0: nothing is.
    least: AtomicU64,
    /// The header that says it, hashed: another one counts otherwise.
    header: AtomicU64,
    /// When what it had said was forgotten last. What was asked before that was perhaps answered by the one before.
    forgotten: AtomicU64,
}

impl Version {
    /// Whether the backend's data are too old, or may be.
    pub fn is_old(&self) -> bool {
        self.said.load(Relaxed) < self.least.load(Relaxed)
    }

    /// What the backend said; `None`: nothing since it was last away.
    pub fn said(&self) -> Option<u64> {
        self.said.load(SeqCst).checked_sub(1)
    }

    /// What is asked for.
    pub fn least(&self) -> Option<u64> {
        self.least.load(SeqCst).checked_sub(1)
    }

    /// Whether an answer of this version shows data that are too old.
    pub fn is_too_old(&self, version: u64) -> bool {
        self.least().is_some_and(|least| version < least)
    }

    /// Takes what an answer said to what was asked at `began`; returns whether that changes if the data are too old.
    pub fn says(&self, version: u64, began: Time) -> bool {
        if began.0 <= self.forgotten.load(SeqCst) {
            return false;
        }
        self.becomes(version.saturating_add(1))
    }

    /// Forgets what it said; returns whether that changes if the data are too old.
    pub fn forget(&self, now: Time) -> bool {
        self.forgotten.store(now.0, SeqCst);
        self.becomes(0)
    }

    fn becomes(&self, said: u64) -> bool {
        let (before, least) = (self.said.swap(said, SeqCst), self.least.load(SeqCst));
        (before < least) != (said < least)
    }

    /// Takes what a new table asks for; returns whether that is something else.
    pub fn asks(&self, wanted: Option<&Wanted>, now: Time) -> bool {
        let header = wanted.map_or(0, |wanted| xxh3_64(wanted.header.as_str().as_bytes()));
        let least = wanted.map_or(0, |wanted| wanted.at_least.saturating_add(1));
        let another = self.header.swap(header, SeqCst) != header;
        if another {
            self.forget(now);
        }
        self.least.swap(least, SeqCst) != least || another
    }

    /// Logs what has changed for this backend.
    pub fn tell(&self, pool: &str, backend: &str) {
        match (self.said(), self.least()) {
            // It was away; whether that matters its health tells.
            (None, asked) => {
                tracing::debug!(pool, backend, asked, "no clients before it has said how new its data are")
            }
            (version, asked) if self.is_old() => {
                tracing::warn!(pool, backend, version, asked, "no clients: its data are too old");
            }
            (version, asked) => tracing::info!(pool, backend, version, asked, "its data are new enough"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test a failed expectation is a failed test.
mod tests {
    use super::*;

    fn wanted(header: &'static str, at_least: u64) -> Wanted {
        Wanted { header: HeaderName::from_static(header), at_least }
    }

    #[test]
    fn data_are_old_until_they_say_otherwise() {
        let version = Version::default();
        let asks = |least| version.asks(Some(&wanted("x-v", least)), Time(1));
        assert!(!version.is_old(), "nothing is asked for");
        assert!(asks(0) && version.is_old(), "asked for, and nothing said");
        assert!(version.says(0, Time(2)) && !version.is_old());
        assert!(asks(42) && version.is_old());
        assert!(!asks(42), "nothing new");
        assert!(!version.says(41, Time(2)) && version.is_old());
        assert!(version.is_too_old(41) && !version.is_too_old(42));
        assert!(version.says(42, Time(2)) && !version.is_old());
        assert_eq!((version.said(), version.least()), (Some(42), Some(42)));
        assert!(
            asks(u64::MAX) && version.says(u64::MAX, Time(2)) && !version.is_old(),
            "the greatest there is will do"
        );
        assert!(version.asks(None, Time(1)) && !version.is_old());
    }

    #[test]
    fn what_was_asked_before_it_was_away_says_nothing() {
        let version = Version::default();
        version.asks(Some(&wanted("x-v", 42)), Time(1));
        assert!(version.says(42, Time(2)) && version.forget(Time(5)) && version.is_old());
        assert!(!version.says(42, Time(5)) && version.is_old(), "asked before");
        assert!(version.says(42, Time(6)) && !version.is_old());
        assert!(
            version.asks(Some(&wanted("x-other", 42)), Time(7)) && version.is_old(),
            "another header counts otherwise"
        );
    }

    #[test]
    fn a_version_is_one_number() {
        let wanted = wanted("x-data-version", 1);
        let read = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            values.iter().for_each(|value| _ = headers.append("x-data-version", value.parse().unwrap()));
            wanted.read(&headers)
        };
        assert_eq!(read(&["7"]), Some(7));
        assert_eq!(read(&[" 18446744073709551615 "]), Some(u64::MAX));
        for none in [&[][..], &["7", "8"], &[""], &["+7"], &["-7"], &["7.0"], &["18446744073709551616"], &["v7"]] {
            assert_eq!(read(none), None, "{none:?}");
        }
    }
}
