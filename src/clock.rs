//! Time as a number: microseconds since the process began, monotonic.
//!
//! Pure modules take it as an argument, atomics can hold it, and tests that pause tokio's clock pause it too.

use std::ops::{Add, Sub};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// A moment, in microseconds since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

/// The control thread looks at what the backends did this often.
pub const LOOK: Duration = Duration::from_millis(100);

static EPOCH: OnceLock<Instant> = OnceLock::new();

fn epoch() -> Instant {
    *EPOCH.get_or_init(|| {
        // One second before the first question, so that differences against `Time::default()` are never zero.
        let now = Instant::now();
        now.checked_sub(Duration::from_secs(1)).unwrap_or(now)
    })
}

/// This moment.
pub fn now() -> Time {
    of(Instant::now())
}

/// The moment of an instant.
pub fn of(instant: Instant) -> Time {
    Time(instant.saturating_duration_since(epoch()).as_micros() as u64)
}

impl Time {
    /// The time from `earlier` to this moment; zero when that lies in the future.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    /// The moment as an instant, without a look at the clock.
    pub fn instant(self) -> Instant {
        epoch() + Duration::from_micros(self.0)
    }

    /// This moment on the wall clock, by that clock's present reading.
    pub fn wall(self) -> SystemTime {
        SystemTime::now().checked_sub(now().since(self)).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// This moment as RFC 3339 text in UTC.
    pub fn rfc3339(self) -> String {
        humantime::format_rfc3339_millis(self.wall()).to_string()
    }

    /// Whole seconds since the process began.
    pub fn seconds(self) -> u64 {
        self.0 / 1_000_000
    }
}

impl Add<Duration> for Time {
    type Output = Time;
    fn add(self, duration: Duration) -> Time {
        Time(self.0.saturating_add(duration.as_micros().min(u128::from(u64::MAX)) as u64))
    }
}

impl Sub<Duration> for Time {
    type Output = Time;
    fn sub(self, duration: Duration) -> Time {
        Time(self.0.saturating_sub(duration.as_micros().min(u128::from(u64::MAX)) as u64))
    }
}
