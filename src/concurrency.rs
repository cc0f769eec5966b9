//! How many clients may wait for one backend's answers at once, learned from what it shows. Pure.
//!
//! While a backend is as quick as it used to be nothing is limited. Being slow alone is no reason either: a backend that takes
//! longer for each answer has more of them under way, and then as many as come are answered again. But when it is slow and
//! keeps answering fewer than come, or is slow while another backend of its pool is out, more comes than it can do. Then the limit is what it has at that moment,
//! lowered as the gradient of its time says (as in Netflix's concurrency limits, 2018, after TCP Vegas: calm time over present
//! time); when it is quick again the limit rises, and at last is gone. When lowering it has not made the backend any quicker,
//! it was not the crowd, and the present time becomes the measure. Of a backend that says nothing at all no more is asked than a
//! few times what it used to have, or what comes in 0.7 s; and that is its limit at first when it speaks again, because
//! what has gathered meanwhile may be more than its clients will wait for.

use std::time::Duration;

use crate::clock::LOOK;

/// This many times slower, and this much slower, is still as quick as it used to be.
const SAME: f64 = 2.0;
const SAME_BY: Duration = Duration::from_millis(20);
/// The least limit, and the least of a silent one.
const LEAST: f64 = 4.0;
const LEAST_SILENT: f64 = 16.0;
/// A silent backend is asked for at most this many times what it usually had, or for what came in this many looks.
const SILENT_TIMES: f64 = 4.0;
const SILENT_LOOKS: f64 = 7.0;
/// One step lowers the limit by no more than this, and raises it by this and one.
const FALL: f64 = 0.7;
const RISE: f64 = 1.1;
/// Near the limit at which it was too slow last the next step is smaller, as in CUBIC (RFC 9438); and that is forgotten by this much
/// with each.
const NEAR: f64 = 0.7;
const RISE_NEAR: f64 = 1.02;
const RISE_NEAR_BY: f64 = 0.1;
const FORGOTTEN: f64 = 1.01;
/// A limit of this many times what is usual, and this many more, limits nothing; one of a silence must have doubled besides.
const GONE_TIMES: f64 = 8.0;
const GONE: f64 = 64.0;
/// Part of the limit from which there is no room.
const FULL: f64 = 0.9;
/// Weight of one look in what is usual.
const USUAL: f64 = 0.05;
/// This many looks make a window, or as many as its answers take twice over; in this many windows in a row fewer must have been
/// answered than came, by this part and this many.
const WINDOW: u32 = 4;
const WINDOWS: u32 = 3;
const FEWER: f64 = 0.1;
const FEWER_BY: f64 = 3.0;
/// A limit that was halved and has not made the backend quicker by a fifth within this many looks was none of the reason.
const PATIENCE: u32 = 10;
const HELPED: f64 = 0.8;

/// What one look at a backend found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Clients that wait for its first byte.
    pub waiting: u32,
    /// How many came, and how many were answered, since the last look.
    pub came: u32,
    /// See `came`.
    pub answered: u32,
    /// Whether another backend of its pool is out, so that its clients come here.
    pub shifted: bool,
    /// Whether it has been silent as a whole for longer than its answers take.
    pub silent: bool,
    /// Whether it may still work on what somebody has left there without an answer.
    pub left: bool,
    /// Median of its times while nothing is wrong, and of the last few.
    pub calm: Option<Duration>,
    /// See `calm`.
    pub recent: Option<Duration>,
}

/// The limit of one backend.
#[derive(Clone, Debug)]
pub struct Concurrency {
    limit: f64,
    /// How many it has usually, how many come from one look to the next, and of how many looks that is known.
    usual: f64,
    usual_came: f64,
    usual_looks: f64,
    /// Whether the limit is from a silence, and not from a crowd.
    of_silence: bool,
    /// Of the present window: looks, clients that came, and answers; and how many windows had too few answers.
    window: (u32, f64, f64),
    behind: u32,
    /// What was when the limit began, and worst since: the limit, the time; and how many looks ago.
    began: (f64, Duration, u32),
    /// What is taken for calm where the crowd turned out not to be the reason.
    base: Duration,
    /// The limit at which it was too slow last, and was lowered step by step since; forgotten little by little.
    knee: f64,
    falling: bool,
}

impl Default for Concurrency {
    fn default() -> Self {
        Concurrency {
            limit: f64::INFINITY,
            usual: 0.0,
            usual_came: 0.0,
            usual_looks: 0.0,
            of_silence: false,
            window: (0, 0.0, 0.0),
            behind: 0,
            began: (f64::INFINITY, Duration::ZERO, 0),
            base: Duration::ZERO,
            knee: f64::INFINITY,
            falling: false,
        }
    }
}

impl Concurrency {
    /// The limit; `u32::MAX`: none.
    pub fn limit(&self) -> u32 {
        self.limit as u32
    }

    /// Takes in one look.
    pub fn look(&mut self, look: Look) {
        let waiting = f64::from(look.waiting);
        if look.silent {
            // How many it has and for how long is not known yet: what seems silent may be its first answer.
            if self.usual_looks == 0.0 {
                return;
            }
            let most = (self.usual * SILENT_TIMES).max(self.usual_came * SILENT_LOOKS).max(LEAST_SILENT);
            if self.limit.is_infinite() {
                (self.limit, self.of_silence) = (most, true);
                self.began = (most, Duration::ZERO, 0);
            }
            return;
        }
        let window = look.recent.map_or(WINDOW, |recent| WINDOW.max((recent * 2).div_duration_f64(LOOK).ceil() as u32));
        self.window.0 += 1;
        self.window.1 += f64::from(look.came);
        self.window.2 += f64::from(look.answered);
        if self.window.0 >= window {
            let (_, came, answered) = std::mem::take(&mut self.window);
            self.behind = if came - answered > came * FEWER + FEWER_BY { self.behind + 1 } else { 0 };
        }
        if look.answered == 0 {
            // It has spoken since it fell silent. What hangs there from before must not keep others away for ever.
            if self.of_silence && !look.left && look.came == 0 {
                self.rise();
            }
            return;
        }
        let calm = look.calm.map(|calm| calm.max(self.base));
        let slow = calm.zip(look.recent).filter(|(calm, recent)| *recent > (*calm + SAME_BY).max(calm.mul_f64(SAME)));
        if let Some((calm, recent)) = slow {
            if self.limit.is_infinite() {
                if self.behind < WINDOWS && !look.shifted {
                    return;
                }
                self.began = (waiting, recent, 0);
            }
            // Slow after a silence, and there is room: it just takes longer now.
            if self.of_silence && waiting < self.limit * FULL {
                return self.rise();
            }
            self.of_silence = false;
            self.began.1 = self.began.1.max(recent);
            self.began.2 += 1;
            if self.began.2 >= PATIENCE {
                let lowered = self.limit <= self.began.0 / 2.0 || self.limit <= LEAST;
                if lowered && recent > self.began.1.mul_f64(HELPED) {
                    (self.limit, self.knee, self.base) = (f64::INFINITY, f64::INFINITY, recent);
                    return;
                }
                self.began = (self.limit, recent, 0);
            }
            // What the last step took back is not gone yet; or it was not the limit that was reached.
            if self.limit.is_finite() && (waiting > self.limit || waiting < self.limit / 2.0) {
                return;
            }
            if !std::mem::replace(&mut self.falling, true) {
                self.knee = self.limit.min(waiting.max(LEAST));
            }
            let gradient = (SAME * calm.as_secs_f64().max(1e-3) / recent.as_secs_f64()).clamp(FALL, 1.0);
            self.limit = (self.limit.min(waiting.max(1.0)) * gradient).max(LEAST);
            return;
        }
        // As quick as ever: so far the limit is of use.
        if !self.of_silence {
            self.began = (self.limit, Duration::ZERO, 0);
        }
        self.usual_looks += 1.0;
        let weight = USUAL.max(1.0 / self.usual_looks);
        self.usual += (waiting - self.usual) * weight;
        self.usual_came += (f64::from(look.came) - self.usual_came) * weight;
        if look.recent.is_some_and(|recent| recent < self.base / 2) {
            self.base = Duration::ZERO;
        }
        if waiting * 2.0 >= self.limit || look.recent.is_some() {
            self.rise();
        }
    }

    fn rise(&mut self) {
        self.falling = false;
        self.knee *= FORGOTTEN;
        let near = self.limit >= self.knee * NEAR;
        self.limit = if near { self.limit * RISE_NEAR + RISE_NEAR_BY } else { self.limit * RISE + 1.0 };
        let twice = if self.of_silence { self.began.0 * 2.0 } else { 0.0 };
        if self.limit >= (self.usual * GONE_TIMES + GONE).max(twice) {
            (self.limit, self.knee, self.of_silence) = (f64::INFINITY, f64::INFINITY, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A backend with `workers` that take `time_ms` each, `offered` a second: what it served a second.
    fn run(
        concurrency: &mut Concurrency,
        workers: f64,
        time_ms: f64,
        offered: f64,
        seconds: u32,
        shifted: bool,
    ) -> f64 {
        let can = workers / time_ms * 1e3;
        let (mut inside, mut served) = (0.0, 0.0);
        for _ in 0..seconds * 10 {
            // Little's law: what waits is what comes times how long it takes.
            inside = match offered <= can {
                true => offered * time_ms / 1e3,
                false => inside + (offered - can) / 10.0,
            };
            inside = inside.min(concurrency.limit);
            let takes = time_ms.max(inside / can * 1e3);
            served += (inside / takes * 1e3).min(can) / 10.0;
            let time = |ms: f64| Some(Duration::from_secs_f64(ms / 1e3));
            let (calm, recent) = (time(time_ms), time(takes));
            let came = if offered <= can { offered } else { offered.min(can + concurrency.limit - inside) };
            let done = (inside / takes * 1e3).min(can);
            let (came, answered) = ((came / 10.0) as u32, (done / 10.0) as u32);
            concurrency.look(Look {
                waiting: inside as u32,
                came,
                answered,
                shifted,
                silent: false,
                left: false,
                calm,
                recent,
            });
        }
        served / f64::from(seconds)
    }

    /// What was refused of 10 clients a look, for four seconds after a backend that answered at once began to take `late` looks.
    fn refused_when_slower(late: usize) -> u32 {
        let mut concurrency = Concurrency::default();
        let look = Look { came: 10, answered: 10, calm: Some(MS), recent: Some(MS), ..Look::default() };
        (0..10).for_each(|_| concurrency.look(look));
        let (mut came, mut refused) = (Vec::new(), 0);
        for i in 0..40 {
            let waiting: u32 = came.iter().rev().take(late).sum();
            let lets_in = concurrency.limit().saturating_sub(waiting).min(10);
            refused += 10 - lets_in;
            came.push(lets_in);
            let answered = if i >= late { came[i - late] } else { 0 };
            let recent = Some(if i > late { MS * 100 * late as u32 } else { MS });
            let silent = i < late;
            concurrency.look(Look {
                waiting: waiting + lets_in - answered,
                came: lets_in,
                answered,
                silent,
                recent,
                ..look
            });
        }
        refused
    }

    #[test]
    fn what_becomes_slower_at_once_is_given_as_much_as_before() {
        assert_eq!([1, 2, 4, 6].map(refused_when_slower), [0; 4]);
    }

    #[test]
    fn too_much_is_held_back_and_what_can_be_done_is_done() {
        let mut concurrency = Concurrency::default();
        let served = run(&mut concurrency, 10.0, 20.0, 400.0, 5, false);
        assert!(served > 390.0 && concurrency.limit() == u32::MAX, "{served} {concurrency:?}");
        let served = run(&mut concurrency, 10.0, 20.0, 900.0, 20, true);
        assert!(concurrency.limit() < 40 && concurrency.limit() >= 10, "{concurrency:?}");
        assert!(served > 475.0, "{served}");
        run(&mut concurrency, 10.0, 20.0, 200.0, 20, false);
        assert_eq!(concurrency.limit(), u32::MAX, "and then nothing is limited");
    }

    #[test]
    fn one_that_only_takes_longer_may_have_more_at_once() {
        let mut concurrency = Concurrency::default();
        run(&mut concurrency, 1e6, 1.0, 200.0, 5, false);
        let (calm, recent) = (Some(MS), Some(MS * 101));
        for (i, waiting) in [5, 12, 20, 20, 21, 19, 20, 22, 18, 20].repeat(20).into_iter().enumerate() {
            let answered = if i == 0 { 0 } else { 18 + waiting % 4 };
            concurrency.look(Look {
                waiting,
                came: 20,
                answered,
                shifted: false,
                silent: false,
                left: false,
                calm,
                recent,
            });
            assert_eq!(concurrency.limit(), u32::MAX, "{concurrency:?}");
        }
    }

    #[test]
    fn a_limit_that_does_not_help_is_lifted() {
        let mut concurrency = Concurrency::default();
        let (calm, recent) = (Some(MS * 20), Some(MS * 300));
        let mut limited = false;
        for i in 0..200 {
            let waiting = (f64::from(i) * 5.0).min(concurrency.limit) as u32;
            concurrency.look(Look {
                waiting,
                came: 25,
                answered: 20,
                shifted: false,
                silent: false,
                left: false,
                calm,
                recent,
            });
            limited |= concurrency.limit() != u32::MAX;
        }
        assert!(limited && concurrency.limit() == u32::MAX, "{concurrency:?}");
    }

    #[test]
    fn a_limit_that_helps_again_and_again_stays() {
        let mut concurrency = Concurrency::default();
        let crowded = Look {
            waiting: 40,
            came: 24,
            answered: 19,
            shifted: true,
            calm: Some(MS * 26),
            recent: Some(MS * 72),
            ..Look::default()
        };
        (0..4).for_each(|_| concurrency.look(crowded));
        for look in 0..300 {
            // What is seen of it follows its load some looks later.
            let recent = MS * if look % 7 < 2 && concurrency.limit() > 10 { 72 } else { 43 };
            concurrency.look(Look { waiting: concurrency.limit(), answered: 20, recent: Some(recent), ..crowded });
            assert!(concurrency.limit() < 40, "{look} {concurrency:?}");
        }
    }

    #[test]
    fn one_that_is_slower_after_a_silence_and_has_room_is_let_be() {
        let mut concurrency = Concurrency::default();
        let calm =
            Look { waiting: 0, came: 20, answered: 20, calm: Some(MS * 2), recent: Some(MS * 2), ..Look::default() };
        (0..100).for_each(|_| concurrency.look(calm));
        concurrency.look(Look { waiting: 40, answered: 0, silent: true, ..calm });
        assert!((135..=140).contains(&concurrency.limit()), "{concurrency:?}");
        (0..100).for_each(|_| {
            concurrency.look(Look { waiting: 80, recent: Some(MS * 400), ..calm });
            assert!(concurrency.limit() > 80, "{concurrency:?}");
        });
        assert_eq!(concurrency.limit(), u32::MAX);
    }

    #[test]
    fn what_hangs_from_a_silence_keeps_nobody_away_when_it_is_over() {
        let mut concurrency = Concurrency::default();
        let hanging = Look { waiting: 16, silent: true, calm: Some(MS), recent: Some(MS), ..Look::default() };
        concurrency.look(hanging);
        assert_eq!(concurrency.limit(), u32::MAX, "what seems silent may be its first answer");
        concurrency.look(Look { waiting: 1, came: 1, answered: 1, silent: false, ..hanging });
        (0..100).for_each(|_| concurrency.look(hanging));
        assert_eq!(concurrency.limit(), 16);
        (0..100).for_each(|_| concurrency.look(Look { silent: false, left: true, ..hanging }));
        assert_eq!(concurrency.limit(), 16, "all have left, and it has not spoken");
        (0..3).for_each(|_| concurrency.look(Look { silent: false, ..hanging }));
        assert!(concurrency.limit() > 18, "{concurrency:?}");
        (0..30).for_each(|_| concurrency.look(Look { silent: false, ..hanging }));
        assert_eq!(concurrency.limit(), u32::MAX);
    }

    #[test]
    fn what_has_gathered_in_a_silence_is_done_before_more_is_let_in() {
        let mut concurrency = Concurrency::default();
        let calm =
            Look { waiting: 4, came: 13, answered: 13, calm: Some(MS * 23), recent: Some(MS * 25), ..Look::default() };
        (0..100).for_each(|_| concurrency.look(calm));
        concurrency.look(Look { waiting: 100, answered: 0, silent: true, ..calm });
        let limit = concurrency.limit();
        // It has spoken, works on what is left from before, and nothing else is answered yet.
        concurrency.look(Look { waiting: 82, came: 82, answered: 4, ..calm });
        (0..5).for_each(|_| concurrency.look(Look { waiting: 94, came: 12, answered: 0, ..calm }));
        assert!(concurrency.limit() < limit * 3 / 2, "{limit} {concurrency:?}");
        (0..20).for_each(|_| concurrency.look(calm));
        assert_eq!(concurrency.limit(), u32::MAX);
    }

    #[test]
    fn a_silence_of_the_past_does_not_excuse_a_crowd() {
        let mut concurrency = Concurrency::default();
        let calm =
            Look { waiting: 8, came: 40, answered: 40, calm: Some(MS * 20), recent: Some(MS * 20), ..Look::default() };
        (0..100).for_each(|_| concurrency.look(calm));
        concurrency.look(Look { waiting: 40, answered: 0, silent: true, ..calm });
        (0..100).for_each(|_| concurrency.look(calm));
        assert_eq!(concurrency.limit(), u32::MAX, "the silence is over");
        run(&mut concurrency, 10.0, 20.0, 900.0, 20, true);
        assert!(concurrency.limit() < 40, "{concurrency:?}");
    }

    #[test]
    fn a_silent_one_is_asked_for_little() {
        let mut concurrency = Concurrency::default();
        let calm =
            Look { waiting: 8, came: 40, answered: 40, calm: Some(MS * 20), recent: Some(MS * 20), ..Look::default() };
        (0..100).for_each(|_| concurrency.look(calm));
        concurrency.look(Look { waiting: 500, answered: 0, silent: true, ..calm });
        assert!((270..=280).contains(&concurrency.limit()), "{concurrency:?}");
        // What had gathered makes it slow; it gets no more than it can do.
        (0..5).for_each(|_| {
            concurrency.look(Look { waiting: 275.min(concurrency.limit()), recent: Some(MS * 500), ..calm })
        });
        assert!(concurrency.limit() < 70, "{concurrency:?}");
        (0..100).for_each(|_| concurrency.look(calm));
        assert_eq!(concurrency.limit(), u32::MAX);
    }

    #[test]
    fn a_quick_one_may_have_thousands() {
        let mut concurrency = Concurrency::default();
        let look = Look {
            waiting: 5_000,
            came: 9,
            answered: 5,
            shifted: true,
            silent: false,
            left: false,
            calm: Some(MS),
            recent: Some(MS * 15),
        };
        (0..1_000).for_each(|_| concurrency.look(look));
        assert_eq!(concurrency.limit(), u32::MAX);
    }
}
