//! Whether a backend answers with more errors than it used to: a cumulative sum (Page 1954) over its answers.
//!
//! Each answer adds the logarithm of how much more likely it is under "many errors" than under the backend's own past; the
//! sum never falls below zero, and an alarm is due when it reaches `ALARM`. A third of errors is seen after a dozen
//! answers, nothing but errors after four, and a backend that always had some errors is measured against those.
//! A client prefix gives at most half of what an alarm needs while there are others, and what it meets on other backends too
//! is taken for its own doing.

use crate::health::Blame;

/// What is taken for the past before there is one.
const PRIOR_ERRORS: f64 = 1.0;
const PRIOR_ANSWERS: f64 = 100.0;
/// Bounds of the past's ratio.
const PAST_LEAST: f64 = 0.005;
const PAST_MOST: f64 = 0.5;
/// "Many errors": at least this ratio, and at least this many times the past's.
const MANY: f64 = 0.25;
const MANY_TIMES: f64 = 3.0;
/// Odds of a false alarm are about `exp(-ALARM)` for each answer.
const ALARM: f64 = 12.0;
/// Answers after which the past is halved.
const WINDOW: f64 = 4_096.0;

/// The errors of one backend.
#[derive(Clone, Debug, Default)]
pub struct ErrorRatio {
    /// The past: errors, and all answers.
    errors: f64,
    answers: f64,
    /// The sum, the part of each client prefix in it, and what it will be to the past when nothing comes of it.
    sum: f64,
    prefixes: [(u32, f64); 8],
    used: usize,
    pending: f64,
}

impl ErrorRatio {
    /// Whether errors are being watched: then good answers count too.
    pub fn open(&self) -> bool {
        self.sum > 0.0
    }

    /// Takes answers without an error.
    pub fn good(&mut self, count: u64) {
        self.remember(0.0, count as f64);
        if self.sum > 0.0 {
            let (past, many) = self.ratios(0.0);
            let fall = ((1.0 - many) / (1.0 - past)).ln() * count as f64;
            let left = (self.sum + fall).max(0.0);
            let scale = left / self.sum;
            self.prefixes[..self.used].iter_mut().for_each(|(_, part)| *part *= scale);
            self.sum = left;
            if self.sum == 0.0 {
                // It was no alarm, so it belongs to the past.
                let pending = std::mem::take(&mut self.pending);
                self.remember(pending, pending);
                self.used = 0;
            }
        }
    }

    /// Takes one error; says whether an alarm is due, which forgets the sum.
    pub fn bad(&mut self, blame: Blame) -> bool {
        let (past, many) = self.ratios(blame.elsewhere);
        let rise = (many / past).ln();
        self.pending += 1.0;
        let crowd = blame.others || self.used > 1;
        let slot = match self.prefixes[..self.used].iter().position(|(prefix, _)| *prefix == blame.prefix) {
            Some(slot) => slot,
            None if self.used < self.prefixes.len() => {
                self.prefixes[self.used] = (blame.prefix, 0.0);
                self.used += 1;
                self.used - 1
            }
            // More than eight prefixes need no telling apart.
            None => 0,
        };
        let most = if crowd { ALARM / 2.0 } else { f64::INFINITY };
        let part = &mut self.prefixes[slot].1;
        let added = rise.min((most - *part).max(0.0));
        *part += added;
        self.sum += added;
        let alarm = self.sum >= ALARM;
        if alarm {
            self.sum = 0.0;
            self.used = 0;
            self.pending = 0.0;
        }
        alarm
    }

    /// Takes an error that is known for one: it belongs to the past of a backend that goes on so.
    pub fn known(&mut self) {
        self.remember(1.0, 1.0);
    }

    fn remember(&mut self, errors: f64, answers: f64) {
        self.errors += errors;
        self.answers += answers;
        if self.answers > WINDOW {
            self.errors /= 2.0;
            self.answers /= 2.0;
        }
    }

    /// The past's ratio of errors, and the one that would be many.
    fn ratios(&self, elsewhere: f64) -> (f64, f64) {
        let own = (self.errors + PRIOR_ERRORS) / (self.answers + PRIOR_ANSWERS);
        let past = own.max(elsewhere).clamp(PAST_LEAST, PAST_MOST);
        (past, (past * MANY_TIMES).clamp(MANY, 0.95))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fastrand::Rng;

    fn blame(prefix: u32, others: bool) -> Blame {
        Blame { prefix, others, elsewhere: 0.0, tries_elsewhere: 0 }
    }

    /// Answers until the alarm, with errors at `rate`.
    fn until_alarm(ratio: &mut ErrorRatio, rate: f64, most: u32, rng: &mut Rng) -> Option<u32> {
        for answer in 1..=most {
            if rng.f64() < rate {
                if ratio.bad(blame(rng.u32(1..100), true)) {
                    return Some(answer);
                }
            } else {
                ratio.good(1);
            }
        }
        None
    }

    #[test]
    fn a_third_of_errors_is_seen_as_well_as_nothing_else() {
        let mut rng = Rng::with_seed(1);
        for (rate, most) in [(1.0, 5), (0.87, 12), (0.6, 30), (0.33, 120)] {
            let mut worst = 0;
            for _ in 0..200 {
                let mut ratio = ErrorRatio::default();
                ratio.good(2_000);
                worst = worst.max(until_alarm(&mut ratio, rate, 1_000, &mut rng).expect("an alarm"));
            }
            assert!(worst <= most, "{rate}: {worst} answers");
        }
    }

    #[test]
    fn what_was_always_so_is_no_alarm() {
        let mut rng = Rng::with_seed(2);
        for rate in [0.001, 0.01, 0.05] {
            let mut ratio = ErrorRatio::default();
            // The first hundreds teach the past.
            until_alarm(&mut ratio, rate, 500, &mut rng);
            let alarms = (0..100).filter(|_| until_alarm(&mut ratio, rate, 1_000, &mut rng).is_some()).count();
            assert!(alarms <= 1, "{rate}: {alarms} alarms in 100,000 answers");
        }
    }

    #[test]
    fn one_prefix_alone_makes_no_alarm_where_there_are_others() {
        let mut ratio = ErrorRatio::default();
        assert!((0..1_000).all(|_| !ratio.bad(blame(1, true))));
        assert!((0..10).any(|_| ratio.bad(blame(2, true))), "a second prefix agrees");
        let mut alone = ErrorRatio::default();
        assert!((0..5).any(|_| alone.bad(blame(1, false))), "there is nobody else");
    }

    #[test]
    fn what_a_client_meets_everywhere_is_its_own_doing() {
        let mut ratio = ErrorRatio::default();
        ratio.good(1_000);
        let everywhere = Blame { prefix: 1, others: false, elsewhere: 1.0, tries_elsewhere: 0 };
        let alarm = (0..10).position(|_| ratio.bad(everywhere));
        assert!(alarm.is_none_or(|at| at >= 8), "{alarm:?}");
    }
}
