//! How old a backend's data may be, where its pool says so.
//!
//! A cell that comes back may hold the data of yesterday, and answer with them as if nothing had been. Where a pool names the
//! header that carries their version, a backend gets clients only when it has said itself that its data are new enough. What it
//! said is forgotten when it refuses a connection or goes down: whoever begins anew has to say it again.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::{HeaderMap, HeaderName};

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
}

impl Version {
    /// Whether the backend's data are too old, or may be.
    pub fn is_old(&self) -> bool {
        self.said.load(Relaxed) < self.least.load(Relaxed)
    }

    /// What the backend said; `None`: nothing since it was last away.
    pub fn said(&self) -> Option<u64> {
        self.said.load(Relaxed).checked_sub(1)
    }

    /// What is asked for.
    pub fn least(&self) -> Option<u64> {
        self.least.load(Relaxed).checked_sub(1)
    }

    /// Takes what an answer said, `None` for nothing; returns whether that changes if the data are too old.
    pub fn says(&self, version: Option<u64>) -> bool {
        let before = self.is_old();
        self.said.store(version.map_or(0, |version| version.saturating_add(1)), Relaxed);
        self.is_old() != before
    }

    /// Logs whether the data of this backend are too old.
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

    /// Takes what a new table asks for; returns whether that changes if the data are too old.
    pub fn asks(&self, least: Option<u64>) -> bool {
        let before = self.is_old();
        self.least.store(least.map_or(0, |least| least.saturating_add(1)), Relaxed);
        self.is_old() != before
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test a failed expectation is a failed test.
mod tests {
    use super::*;

    #[test]
    fn data_are_old_until_they_say_otherwise() {
        let version = Version::default();
        assert!(!version.is_old(), "nothing is asked for");
        assert!(version.asks(Some(0)) && version.is_old(), "asked for, and nothing said");
        assert!(version.says(Some(0)) && !version.is_old());
        assert!(version.asks(Some(42)) && version.is_old());
        assert!(!version.says(Some(41)) && version.is_old());
        assert!(version.says(Some(42)) && !version.is_old());
        assert_eq!((version.said(), version.least()), (Some(42), Some(42)));
        assert!(version.says(None) && version.is_old(), "forgotten");
        assert!(version.asks(None) && !version.is_old());
        assert!(!version.says(Some(u64::MAX)));
        assert!(!version.asks(Some(u64::MAX)), "the greatest there is will do");
    }

    #[test]
    fn a_version_is_one_number() {
        let wanted = Wanted { header: HeaderName::from_static("x-data-version"), at_least: 1 };
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
