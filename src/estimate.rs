//! Learned times: a histogram of bounded relative error that forgets.
//!
//! Buckets grow by a fixed ratio as in DDSketch (Masson, Rim, Lee 2019): four to an octave, so a quantile is
//! right within 19 %. Every `WINDOW` samples all counts are halved, so what was learned fades with the traffic
//! that would contradict it. Recording is one relaxed addition; readers take a cached quantile.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// Samples after which all counts are halved.
const WINDOW: u32 = 1_024;
/// Quantiles are computed anew after this many samples (each of the first ones).
const REFRESH: u32 = 16;
/// Below this many samples nothing has been learned.
const ENOUGH: u32 = 8;
/// 50 us and 64 quarter octaves above it: 3.3 s.
pub const BUCKETS: usize = 64;
const LOWEST_US: f64 = 50.0;

/// The distribution of one kind of time of one backend.
#[derive(Debug)]
pub struct Estimate {
    /// All that ever was, which wraps; and how much of it is forgotten.
    counts: [AtomicU32; BUCKETS],
    forgotten: [AtomicU32; BUCKETS],
    total: AtomicU32,
    median_us: AtomicU32,
    p96_us: AtomicU32,
    p99_us: AtomicU32,
}

impl Default for Estimate {
    fn default() -> Self {
        Estimate {
            counts: [const { AtomicU32::new(0) }; BUCKETS],
            forgotten: [const { AtomicU32::new(0) }; BUCKETS],
            total: AtomicU32::new(0),
            median_us: AtomicU32::new(0),
            p96_us: AtomicU32::new(0),
            p99_us: AtomicU32::new(0),
        }
    }
}

impl Estimate {
    /// Adds one sample.
    pub fn record(&self, time: Duration) {
        self.counts[bucket(time)].fetch_add(1, Relaxed);
        let total = self.total.fetch_add(1, Relaxed) + 1;
        if total < 4 * ENOUGH || total.is_multiple_of(REFRESH) {
            self.refresh(total);
        }
    }

    /// How often each bucket was ever met; wraps.
    pub fn ever(&self) -> [u32; BUCKETS] {
        std::array::from_fn(|i| self.counts[i].load(Relaxed))
    }

    fn remembered(&self, bucket: usize) -> u32 {
        self.counts[bucket].load(Relaxed).wrapping_sub(self.forgotten[bucket].load(Relaxed))
    }

    /// The learned median and 99th percentile; `None` before enough samples.
    pub fn learned(&self) -> Option<(Duration, Duration)> {
        let median = self.median_us.load(Relaxed);
        (median > 0).then(|| {
            (Duration::from_micros(u64::from(median)), Duration::from_micros(u64::from(self.p99_us.load(Relaxed))))
        })
    }

    /// The learned 96th percentile; `None` before enough samples.
    pub fn but_one_in_25(&self) -> Option<Duration> {
        Some(self.p96_us.load(Relaxed)).filter(|us| *us > 0).map(|us| Duration::from_micros(u64::from(us)))
    }

    /// Two threads may do this at once: a few samples are then counted once more or less, which a window of a
    /// thousand does not feel.
    fn refresh(&self, total: u32) {
        if total >= WINDOW {
            let mut kept = 0;
            for bucket in 0..BUCKETS {
                let half = self.remembered(bucket) / 2;
                self.forgotten[bucket].store(self.counts[bucket].load(Relaxed).wrapping_sub(half), Relaxed);
                kept += half;
            }
            self.total.store(kept, Relaxed);
        }
        if total >= ENOUGH {
            self.median_us.store(self.quantile(0.5), Relaxed);
            self.p96_us.store(self.quantile(0.96), Relaxed);
            self.p99_us.store(self.quantile(0.99), Relaxed);
        }
    }

    fn quantile(&self, q: f64) -> u32 {
        let total: u32 = (0..BUCKETS).map(|bucket| self.remembered(bucket)).sum();
        let rank = (f64::from(total) * q).ceil().max(1.0) as u32;
        let mut seen = 0;
        for i in 0..BUCKETS {
            seen += self.remembered(i);
            if seen >= rank {
                return upper_us(i);
            }
        }
        upper_us(BUCKETS - 1)
    }
}

fn bucket(time: Duration) -> usize {
    let us = (time.as_secs_f64() * 1e6).max(LOWEST_US);
    (((us / LOWEST_US).log2() * 4.0) as usize).min(BUCKETS - 1)
}

/// Upper end of a bucket in microseconds.
pub fn upper_us(bucket: usize) -> u32 {
    (LOWEST_US * 2f64.powf((bucket as f64 + 1.0) / 4.0)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_fifth() {
        let estimate = Estimate::default();
        assert_eq!(estimate.learned(), None);
        for i in 0..1000u64 {
            estimate.record(Duration::from_micros(1_000 + i));
        }
        let (median, p99) = estimate.learned().expect("a thousand samples are enough");
        assert!((1_400..1_900).contains(&(median.as_micros() as u32)), "{median:?}");
        assert!((1_950..2_400).contains(&(p99.as_micros() as u32)), "{p99:?}");
    }

    #[test]
    fn a_slower_path_is_learned_within_a_hundredth_of_the_window_and_the_old_one_fades() {
        let estimate = Estimate::default();
        for _ in 0..5_000 {
            estimate.record(Duration::from_millis(1));
        }
        for _ in 0..32 {
            estimate.record(Duration::from_millis(80));
        }
        let (median, p99) = estimate.learned().expect("learned");
        assert!(median < Duration::from_millis(2) && p99 > Duration::from_millis(75), "{median:?} {p99:?}");
        for _ in 0..5_000 {
            estimate.record(Duration::from_millis(80));
        }
        assert!(estimate.learned().expect("learned").0 > Duration::from_millis(75));
    }
}
