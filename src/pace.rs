//! How a backend does against its own past, and the share of its clients that it keeps for it. Pure: time is an argument.
//!
//! A far cloud is not a slow one, so each backend is measured by its own calm: what its first bytes took while nothing was
//! wrong. What counts is how many times slower it is than that, against the others of its pool: when all slow down alike nobody
//! loses anything. Requests differ by nature, and a few may all be long ones: the median and the ninth decile are slow only when
//! they are beyond what chance would make of so many. Handshakes that are never answered count in the same way.
//!
//! The share falls with a power of the slowness, at once, to a trickle; it never falls to nothing, because the trickle is
//! what shows that the backend has recovered. It is given back in steps, each only after fresh answers at the new share were as
//! quick as they used to be: what the backend carries well decides, not a clock.

use std::time::Duration;

use crate::clock::{LOOK, Time};
use crate::estimate::{BUCKETS, upper_us};

/// Answers that make a judgement, and answers that make one of the ninth decile.
const ENOUGH: f64 = 8.0;
const ENOUGH_FOR_TAIL: f64 = 10.0;
/// Answers that teach the calm first, and later.
const ENOUGH_FOR_CALM: f64 = 20.0;
const TAUGHT_BY: f64 = 100.0;
/// Each look forgets this part of what it saw before, as long as enough is left.
const FORGET: f64 = 0.3;
/// This many times slower is still the same, and this much.
const SAME: f64 = 2.0;
const SAME_BY_US: f64 = 5_000.0;
/// And this much of what is usual: the jitter of a far one excuses nobody.
const SAME_PART: f64 = 0.3;
/// The ninth decile of a few dozen answers is less certain.
const SAME_TAIL: f64 = 3.0;
/// What is judged of its answers, and by what of its calm: between the two there is room for the mixture of its requests.
const MEDIAN: f64 = 0.5;
const CALM_MEDIAN: f64 = 0.7;
const TAIL: f64 = 0.9;
const CALM_TAIL: f64 = 0.95;
/// So many answers in a row that are all slow, in so many looks, are no mixture and no hiccup; or so many more that chance makes
/// so many once in this many times.
const STREAK: f64 = 7.0;
const STREAK_LOOKS: u32 = 2;
/// And without a streak slow ones must have been seen in more than one look of those that are not forgotten.
const SLOW_LOOKS: f64 = 1.5;
const STREAK_BY_CHANCE: f64 = 1e-6;
const MOST_LONG: f64 = 0.6;
/// Standard deviations that a quantile of so many answers may be off.
const QUANTILE_SIGMAS: f64 = 3.0;
/// The share falls with the square of the slowness, and with the fourth power where answers come this much later; but no lower
/// than a power of the time says: a client feels that, and not the factor.
const POWER: f64 = 2.0;
const MUCH_US: f64 = 400_000.0;
const POWER_OF_TIME: f64 = 1.5;
/// Least share: what shows this many answers a second of a backend that has all of its share, within these bounds. Each of them
/// is a client's, and a hundredth of these must not notice.
const TRICKLE_ANSWERS: f64 = 0.5;
const TRICKLE: [f64; 2] = [0.0025, 0.005];
/// How fast that follows, by look, upwards and downwards: those that fail to come for a second or two, because it is in doubt, change
/// little.
const COME_MORE: f64 = 0.1;
const COME_LESS: f64 = 0.02;
/// A share grows by this, no sooner than this after the last change.
const GROWTH: f64 = 1.6;
const GROWTH_EVERY: Duration = Duration::from_millis(200);
/// Fresh answers, and fresh handshakes, that a growth needs.
const FRESH: f64 = 2.0;
/// A trickle shows little in a long time: below this share one good answer is enough, and a growth is this.
const SMALL: f64 = 0.1;
const SMALL_GROWTH: f64 = 3.0;
const FRESH_HANDSHAKES: f64 = 24.0;
/// As few as a backend that loses what it lost would bring through this seldom; and standard deviations that what it lost may be off.
const LUCK: f64 = 0.25;
const LEAST_HANDSHAKES: f64 = 4.0;
/// This many that were lost in a row say that all are.
const LOST_RUN: f64 = 5.0;
const CHANCE_SIGMAS: f64 = 1.5;
/// Below this share this many in a row are enough for one growth, by this.
const FEW_BELOW: f64 = 0.2;
const FEW_HANDSHAKES: f64 = 12.0;
const GROWTH_BY_FEW: f64 = 2.4;
/// Where there are twice as many answers as handshakes, connections are kept: then this many answers speak for it, over this
/// time, once it has lost no handshake for long.
const KEPT: Duration = Duration::from_secs(1);
const FEW_ANSWERS: f64 = 12.0;
const LOST_LONG_AGO: Duration = Duration::from_secs(5);
/// Where so little is left in memory of those that were lost at this share.
const FORGOTTEN_LOST: f64 = 1.0;
/// What waits for longer than this without an answer excuses nobody's slowness any more.
const EXCUSES_FOR: Duration = Duration::from_secs(3);
/// Nobody seems slow by answers older than this, nor beside one whose last answer is older, and may be from before it became as slow.
const CURRENT: Duration = Duration::from_millis(300);
/// Who has not answered anybody for this long is waited for no more.
const STALE: Duration = Duration::from_secs(10);
/// Without any client for this long a share grows by itself, because only clients can tell.
const UNSEEN: Duration = Duration::from_secs(5);
/// How fast the calm follows, by look: downwards, upwards with all others, and upwards alone. Half a minute of too much work
/// must not become the measure of what is too much.
const LEARN_DOWN: f64 = 0.01;
const LEARN_UP: f64 = 0.002;
const LEARN_ALONE: f64 = 0.001;
/// This many looks teach it alike.
const FIRST_LOOKS: u32 = 50;
/// Handshakes that make a judgement of loss, those of them lost, and the loss beyond the others' that is still the same.
const ENOUGH_HANDSHAKES: f64 = 20.0;
const ENOUGH_LOST: f64 = 3.0;
/// Lost ones that are enough where its share is small because it lost some before.
const LOST_AGAIN: f64 = 2.0;
const SAME_LOSS: f64 = 0.03;
/// And this many standard deviations of what that loss would do by chance.
const LOSS_SIGMAS: f64 = 2.0;
/// And of what the last three looks alone would do, which are looked at ten times a second.
const QUICK_SIGMAS: f64 = 3.0;
/// Share of one that loses more than that: what shows this many handshakes a second, within these bounds. Each loss costs a client
/// a race, so there is little reason for more.
const LOSSY_HANDSHAKES: f64 = 4.0;
const LOSSY_TRICKLE: [f64; 2] = [0.02, 0.03];
/// Each look forgets this part of the handshakes it saw before: half of them in a second.
const FORGET_HANDSHAKES: f64 = 0.07;

/// Counts by bucket of time, as [`crate::estimate`] has them.
#[derive(Clone, Debug)]
struct Times {
    counts: [f32; BUCKETS],
    total: f64,
}

impl Default for Times {
    fn default() -> Self {
        Times { counts: [0.0; BUCKETS], total: 0.0 }
    }
}

impl Times {
    fn add(&mut self, bucket: usize, count: u32) {
        self.counts[bucket] += count as f32;
        self.total += f64::from(count);
    }

    /// Part of them that took longer.
    fn above(&self, us: f64) -> f64 {
        let above: f64 = (0..BUCKETS).filter(|i| f64::from(upper_us(*i)) > us).map(|i| f64::from(self.counts[i])).sum();
        if self.total > 0.0 { above / self.total } else { 0.0 }
    }

    fn extend(&mut self, by: &Times) {
        self.counts.iter_mut().zip(by.counts).for_each(|(count, more)| *count += more);
        self.total += by.total;
    }

    fn scale(&mut self, by: f64) {
        self.counts.iter_mut().for_each(|count| *count *= by as f32);
        self.total *= by;
    }

    fn quantile_us(&self, q: f64) -> f64 {
        let rank = self.total * q;
        let mut seen = 0.0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += f64::from(*count);
            if seen >= rank && seen > 0.0 {
                return f64::from(upper_us(bucket));
            }
        }
        f64::from(upper_us(BUCKETS - 1))
    }

    /// What this quantile is at least, whatever chance made of so many.
    fn least_us(&self, q: f64) -> f64 {
        self.quantile_us((q - QUANTILE_SIGMAS * (q * (1.0 - q) / self.total).sqrt()).max(0.0))
    }
}

/// Binary logarithms of what the first bytes of a backend take while nothing is wrong, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Calm {
    median: f64,
    /// What the median and the ninth decile are measured by.
    for_median: f64,
    for_tail: f64,
    /// Part of them that take long by nature. No logarithm.
    long: f64,
}

impl Calm {
    fn of(times: &Times, before: Option<Calm>) -> Calm {
        let of = |q: f64| times.quantile_us(q).log2();
        let median = of(MEDIAN);
        let long = times.above(before.map_or(median, |calm| calm.median).exp2() * SAME);
        Calm { median, for_median: of(CALM_MEDIAN), for_tail: of(CALM_TAIL), long }
    }

    /// This many answers in a row that all take long are no chance.
    fn streak(self) -> f64 {
        STREAK.max(STREAK_BY_CHANCE.ln() / self.long.clamp(1e-3, MOST_LONG).ln())
    }

    fn follow(self, now: Calm, follow: impl Fn(f64, f64) -> f64) -> Calm {
        Calm {
            median: follow(self.median, now.median),
            for_median: follow(self.for_median, now.for_median),
            for_tail: follow(self.for_tail, now.for_tail),
            long: follow(self.long, now.long),
        }
    }
}

/// What a look is told of one backend: counts that only ever rise (and wrap).
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// First bytes by bucket; and the same of what was carried elsewhere, and would have taken at least this long.
    pub first_bytes: [u32; BUCKETS],
    /// See `first_bytes`.
    pub moved: [u32; BUCKETS],
    /// Handshakes that ended well, and those that were never answered.
    pub handshakes: [u64; 2],
    /// A handshake that was lost is known this long after it began: what speaks for a backend must have stood for that time.
    pub lost_known_after: Duration,
}

impl Default for Seen {
    fn default() -> Self {
        Seen { first_bytes: [0; BUCKETS], moved: [0; BUCKETS], handshakes: [0; 2], lost_known_after: Duration::ZERO }
    }
}

/// By how much a backend is slower than its calm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slower {
    /// This many times, at least 1.
    pub times: f64,
    /// This many microseconds.
    pub by_us: f64,
}

impl Slower {
    const NOT: Slower = Slower { times: 1.0, by_us: 0.0 };

    /// Taking `same` times as long is still the same.
    fn than(calm: f64, now: f64, same: f64) -> Slower {
        let (times, by_us) = (now / calm * SAME / same, now - calm);
        if by_us < SAME_BY_US.max(calm * SAME_PART) || times < 1.0 { Slower::NOT } else { Slower { times, by_us } }
    }

    fn max(self, other: Slower) -> Slower {
        Slower { times: self.times.max(other.times), by_us: self.by_us.max(other.by_us) }
    }
}

/// What one look found, before it is compared with the others'.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    /// How much slower than its calm; `None`: too few answers to tell.
    pub slower: Option<Slower>,
    /// The same by the newest answers alone, or by what waits there and is not answered, where that is more; nobody is judged by so
    /// little, but it may excuse others.
    pub latest: Option<Slower>,
    /// When the newest of its answers came, if not too long ago to be of any use.
    pub newest: Option<Time>,
    /// Part of the handshakes that were lost; `None`: too few.
    pub loss: Option<f64>,
    /// The same of the last few looks, of a backend that has all of its share.
    pub quick_loss: Option<f64>,
}

/// The pace of one backend.
#[derive(Clone, Debug)]
pub struct Pace {
    before: Seen,
    came: u32,
    recent: Times,
    /// The last of its answers, as long as none of them was as quick as it used to be, and in how many looks they came.
    streak: Times,
    streak_looks: u32,
    streak_began: Time,
    /// How many looks saw any slow one, of those that it remembers.
    slow_looks: f64,
    /// Whether the last that saw anything did.
    still_slow: bool,
    /// What teaches the calm: so many that they are no chance.
    taught_by: Times,
    /// Median of the answers of the last look that saw any, and when that was.
    newest: Option<(f64, Time)>,
    /// Answers and handshakes since the share last changed.
    fresh: Times,
    fresh_handshakes: [f64; 2],
    /// Handshakes since the last that was lost, or the last change; and since when the handshakes speak for it.
    unbroken: f64,
    carries_since: Option<Time>,
    handshakes: [f64; 2],
    quick_handshakes: [f64; 2],
    calm: Option<Calm>,
    taught: u32,
    share: f64,
    /// Whether handshakes were the reason for less than all of it, and the least it keeps for that reason.
    lossy: bool,
    lossy_trickle: f64,
    /// Part of its handshakes that it loses when it does, at least; and how many have been lost since the last look that saw one end well.
    lost_part: f64,
    lost_run: f64,
    /// When a handshake was found lost last.
    lost_at: Time,
    /// Answers of a look while it has all of its share, over some seconds.
    usually_come: f64,
    changed: Time,
    seen: Time,
}

impl Pace {
    /// Of a backend of which nothing was looked at yet: what it has shown by the first look counts in that.
    pub fn new(now: Time) -> Pace {
        Pace {
            before: Seen::default(),
            came: 0,
            recent: Times::default(),
            streak: Times::default(),
            streak_looks: 0,
            streak_began: now,
            slow_looks: 0.0,
            still_slow: false,
            taught_by: Times::default(),
            newest: None,
            fresh: Times::default(),
            fresh_handshakes: [0.0; 2],
            unbroken: 0.0,
            carries_since: None,
            handshakes: [0.0; 2],
            quick_handshakes: [0.0; 2],
            calm: None,
            taught: 0,
            share: 1.0,
            lossy: false,
            lossy_trickle: LOSSY_TRICKLE[1],
            lost_part: 0.0,
            lost_run: 0.0,
            lost_at: now,
            usually_come: 0.0,
            changed: now,
            seen: now,
        }
    }

    /// The share of its clients that it keeps, above 0 to 1.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// How many answers it knows of; wraps.
    pub fn answers(&self) -> u32 {
        self.before.first_bytes.iter().fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// How many came since it was asked last, of so many that ever came (which wraps).
    pub fn came(&mut self, ever: u32) -> u32 {
        ever.wrapping_sub(std::mem::replace(&mut self.came, ever))
    }

    /// The calm median; `None` before it was learned.
    pub fn calm(&self) -> Option<Duration> {
        self.calm.map(|calm| Duration::from_secs_f64(calm.median.exp2() / 1e6))
    }

    /// The median of the last few answers; `None` where they are too few.
    pub fn recent(&self) -> Option<Duration> {
        (self.recent.total >= ENOUGH).then(|| Duration::from_secs_f64(self.recent.quantile_us(0.5) / 1e6))
    }

    /// Leaves aside what came since the last look: our own clocks stood still.
    pub fn skip(&mut self, seen: Seen) {
        self.before = seen;
    }

    /// Takes in what came since the last look, and how long somebody has waited while nobody was answered.
    pub fn look(&mut self, seen: Seen, quiet: Option<Duration>, now: Time) -> Look {
        let (mut came, mut newest) = (0.0, Times::default());
        if self.recent.total * (1.0 - FORGET) >= ENOUGH {
            self.recent.scale(1.0 - FORGET);
            self.slow_looks *= 1.0 - FORGET;
        }
        if self.taught_by.total * (1.0 - FORGET) >= TAUGHT_BY {
            self.taught_by.scale(1.0 - FORGET);
        }
        let mut moved = false;
        for bucket in 0..BUCKETS {
            let new = seen.first_bytes[bucket].wrapping_sub(self.before.first_bytes[bucket]);
            if new > 0 {
                self.fresh.add(bucket, new);
                came += f64::from(new);
            }
            // What was carried elsewhere would have taken longer than that: it says that the backend is slow, or nothing.
            let gone = seen.moved[bucket].wrapping_sub(self.before.moved[bucket]);
            let gone = if self.is_slow(f64::from(upper_us(bucket))) { gone } else { 0 };
            moved |= gone > 0;
            if let Some(new) = new.checked_add(gone).filter(|new| *new > 0) {
                self.recent.add(bucket, new);
                self.taught_by.add(bucket, new);
                newest.add(bucket, new);
            }
        }
        if moved && self.share < 1.0 {
            self.begin_afresh(now);
        }
        let [well, lost] = [0, 1].map(|i| seen.handshakes[i].saturating_sub(self.before.handshakes[i]) as f64);
        if lost > 0.0 {
            self.lost_at = now;
        }
        self.lost_run = if well > 0.0 { 0.0 } else { self.lost_run + lost };
        for (i, new) in [well, lost].into_iter().enumerate() {
            self.handshakes[i] = self.handshakes[i] * (1.0 - FORGET_HANDSHAKES) + new;
            self.quick_handshakes[i] = self.quick_handshakes[i] * (1.0 - FORGET) + new;
            self.fresh_handshakes[i] += new;
            self.unbroken = if i == 1 && new > 0.0 { 0.0 } else { self.unbroken + new };
            came += new;
        }
        self.before = seen;
        if self.share >= 1.0 {
            let by = if newest.total > self.usually_come { COME_MORE } else { COME_LESS };
            self.usually_come += (newest.total - self.usually_come) * by;
        }
        if came > 0.0 {
            self.seen = now;
        }
        self.go_on(&newest, now);
        let quick_loss =
            (self.share >= 1.0).then(|| part_lost(self.quick_handshakes, ENOUGH_HANDSHAKES, ENOUGH_LOST)).flatten();
        if newest.total > 0.0 {
            self.newest = Some((newest.quantile_us(0.5), now));
        }
        let newest = self.newest.filter(|(_, at)| now.since(*at) <= STALE);
        let quiet = quiet.filter(|quiet| *quiet <= EXCUSES_FOR).map(|quiet| quiet.as_micros() as f64);
        let latest = newest.map(|(median, _)| median).into_iter().chain(quiet).reduce(f64::max);
        let latest = self.calm.zip(latest).map(|(calm, latest)| Slower::than(calm.median.exp2(), latest, SAME));
        Look {
            slower: self.slower(self.newest.is_some_and(|(_, at)| at == now)),
            latest,
            newest: newest.map(|(_, at)| at),
            loss: self.loss(),
            quick_loss,
        }
    }

    fn go_on(&mut self, newest: &Times, now: Time) {
        let Some(calm) = self.calm else { return };
        if newest.total == 0.0 {
            return;
        }
        self.still_slow = self.is_slow(newest.quantile_us(1.0));
        self.slow_looks += f64::from(u8::from(self.still_slow));
        if Slower::than(calm.median.exp2(), newest.quantile_us(0.0), SAME).times <= SAME {
            self.end_streak();
            return;
        }
        if self.streak_looks == 0 {
            self.streak_began = now;
        }
        self.streak_looks += 1;
        if self.streak.total * (1.0 - FORGET) >= calm.streak() {
            self.streak.scale(1.0 - FORGET);
        }
        self.streak.extend(newest);
    }

    fn end_streak(&mut self) {
        (self.streak, self.streak_looks) = (Times::default(), 0);
    }

    /// Whether all that came lately is slow, and too much for chance.
    fn in_streak(&self) -> bool {
        let enough = |calm: Calm| self.streak.total >= calm.streak() && self.streak_looks >= STREAK_LOOKS;
        self.calm.is_some_and(enough)
    }

    fn is_slow(&self, us: f64) -> bool {
        self.calm.is_some_and(|calm| Slower::than(calm.for_median.exp2(), us, SAME).times > SAME)
    }

    /// `came` says that answers came just now: the others' newest may say that all is over.
    fn slower(&self, came: bool) -> Option<Slower> {
        let calm = self.calm?;
        let whole = self.share >= 1.0;
        if came && self.in_streak() {
            // What was carried elsewhere would have taken longer than it waited: fresh answers say how much.
            let answers = if whole || self.fresh.total < 1.0 { 0.0 } else { self.fresh.quantile_us(MEDIAN) };
            let median = self.streak.quantile_us(MEDIAN).max(answers);
            return Some(Slower::than(calm.median.exp2(), median, SAME));
        }
        let judged = if whole { &self.recent } else { &self.fresh };
        let enough = match self.share {
            share if share < SMALL => 1.0,
            share if share < 1.0 => FRESH,
            _ => ENOUGH,
        };
        if judged.total < enough || whole && !came {
            return None;
        }
        if whole && (self.slow_looks < SLOW_LOOKS || !self.still_slow) {
            return Some(Slower::NOT);
        }
        // One that was slow has to show that it no longer is.
        let median = if whole { judged.least_us(MEDIAN) } else { judged.quantile_us(MEDIAN) };
        let of_median = Slower::than(calm.for_median.exp2(), median, SAME);
        let of_tail = || Slower::than(calm.for_tail.exp2(), judged.least_us(TAIL), SAME_TAIL);
        Some(if judged.total >= ENOUGH_FOR_TAIL && self.taught >= FIRST_LOOKS {
            of_median.max(of_tail())
        } else {
            of_median
        })
    }

    fn loss(&self) -> Option<f64> {
        match self.share < 1.0 {
            true => part_lost(self.fresh_handshakes, ENOUGH, if self.lossy { LOST_AGAIN } else { ENOUGH_LOST }),
            false => part_lost(self.handshakes, ENOUGH_HANDSHAKES, ENOUGH_LOST),
        }
    }

    /// Whether it loses more than the others, and more than by chance.
    fn loses(&self, look: Look, alike: Others) -> bool {
        let of = if self.share < 1.0 { self.fresh_handshakes } else { self.handshakes };
        let exceeds = |loss: Option<f64>, others: Option<f64>, [well, lost]: [f64; 2], sigmas: f64| {
            let same = others.unwrap_or(0.0) + SAME_LOSS;
            loss.is_some_and(|loss| loss > same + sigmas * (same / (well + lost)).sqrt())
        };
        // In so short a time it must be known that others lose less.
        let others = alike.quick_loss.or(alike.loss);
        exceeds(look.loss, alike.loss, of, LOSS_SIGMAS)
            || others.is_some() && exceeds(look.quick_loss, others, self.quick_handshakes, QUICK_SIGMAS)
    }

    /// Judges a look against what the least affected other backend of the pool showed. Says whether the share changed.
    pub fn judge(&mut self, look: Look, alike: Others, now: Time) -> bool {
        // What is the same for all is the same factor, or the same amount: a far backend and a near one behind one slow thing.
        let slowness = look.slower.map(|slower| match alike.slower {
            Some(others) => (slower.times / others.times).min(slower.by_us / others.by_us.max(1.0)),
            None => slower.times,
        });
        let by_us = |slower: Option<Slower>| slower.map_or(0.0, |slower| slower.by_us);
        let by_us = by_us(look.slower) - by_us(alike.slower);
        // Nobody has answered since it became slow: perhaps they are all as slow.
        let unknown = self.in_streak() && alike.newest.is_some_and(|newest| newest < self.streak_began);
        let unclear = (alike.unclear || unknown) && look.slower.is_some_and(|slower| slower.times > SAME);
        let slowness = slowness.filter(|_| !unclear);
        self.learn(unclear || slowness.is_some_and(|slowness| slowness > SAME), look.slower.is_some());

        let for_pace = slowness.filter(|slowness| *slowness > SAME).map(|slowness| {
            let of_factor = (SAME / slowness).powf(POWER * (1.0 + (by_us / MUCH_US).clamp(0.0, 1.0)));
            of_factor.max((SAME_BY_US / by_us.max(SAME_BY_US)).powf(POWER_OF_TIME)).max(self.trickle())
        });
        if self.share >= 1.0 {
            let a_second = self.handshakes.iter().sum::<f64>() * FORGET_HANDSHAKES / LOOK.as_secs_f64();
            self.lossy_trickle = (LOSSY_HANDSHAKES / a_second).clamp(LOSSY_TRICKLE[0], LOSSY_TRICKLE[1]);
        }
        let for_loss = self.loses(look, alike).then_some(self.lossy_trickle);
        let target = for_pace.unwrap_or(1.0).min(for_loss.unwrap_or(1.0));
        if for_loss.is_some() {
            self.lossy = true;
            let [well, lost] = if self.share < 1.0 { self.fresh_handshakes } else { self.handshakes };
            let (of, part) = (well + lost, lost / (well + lost).max(1.0));
            self.lost_part = (part - CHANCE_SIGMAS * (part * (1.0 - part) / of.max(1.0)).sqrt()).max(0.0);
        }
        if self.lossy && self.lost_run >= LOST_RUN {
            self.lost_part = 1.0;
        }
        // A few slow ones keep a share from growing; to make it smaller takes as many as they did at first.
        let certain = self.share >= 1.0 || for_loss.is_some() || self.in_streak();
        if target < self.share && certain {
            self.set(target, now);
            return true;
        }
        if self.share >= 1.0 || unclear {
            return false;
        }
        if target <= self.share {
            // As bad as it was: what is judged next must be newer.
            self.begin_afresh(now);
            return false;
        }
        let [well, lost] = self.fresh_handshakes;
        let small = self.share < SMALL;
        let many = well + lost >= FRESH_HANDSHAKES && lost <= SAME_LOSS * (well + lost);
        let few = self.unbroken >= self.few_handshakes() && self.handshakes[1] < FORGOTTEN_LOST;
        let carries = many || self.share < FEW_BELOW && few;
        self.carries_since = self.carries_since.or(Some(now)).filter(|_| carries);
        let carried = self.carries_since.is_some_and(|since| now.since(since) >= self.before.lost_known_after);
        let by_handshakes = self.lossy && self.share >= self.lossy_trickle || self.calm.is_none();
        let by_answers = now.since(self.changed) >= KEPT && self.fresh.total >= FEW_ANSWERS.max(2.0 * (well + lost));
        let kept = by_answers && now.since(self.lost_at) >= LOST_LONG_AGO;
        let proven = if by_handshakes { carried || kept } else { self.fresh.total >= if small { 1.0 } else { FRESH } };
        let unseen = now.since(self.seen.max(self.changed)) >= UNSEEN;
        if proven && now.since(self.changed) >= GROWTH_EVERY || unseen {
            // So many handshakes prove more than a few answers.
            let growth = match proven {
                true if by_handshakes && many => GROWTH * GROWTH,
                true if by_handshakes => GROWTH_BY_FEW,
                true if small => SMALL_GROWTH,
                _ => GROWTH,
            };
            self.set((self.share * growth).min(target), now);
            return true;
        }
        false
    }

    /// This many handshakes in a row are none that it would have lost: the fewer, the more it lost.
    fn few_handshakes(&self) -> f64 {
        (LUCK.ln() / (1.0 - self.lost_part).max(1e-6).ln()).clamp(LEAST_HANDSHAKES, FEW_HANDSHAKES)
    }

    /// The least it keeps where it is slow.
    fn trickle(&self) -> f64 {
        let a_second = self.usually_come / LOOK.as_secs_f64();
        (TRICKLE_ANSWERS / a_second).clamp(TRICKLE[0], TRICKLE[1])
    }

    fn set(&mut self, share: f64, now: Time) {
        if self.share >= 1.0 {
            self.handshakes = [0.0; 2];
        }
        self.share = share;
        self.begin_afresh(now);
        if share >= 1.0 {
            self.lossy = false;
            self.recent = Times::default();
            self.taught_by = Times::default();
            self.end_streak();
            self.handshakes = [0.0; 2];
            self.quick_handshakes = [0.0; 2];
        }
    }

    /// What is judged next is newer than this.
    fn begin_afresh(&mut self, now: Time) {
        self.changed = now;
        self.fresh = Times::default();
        self.fresh_handshakes = [0.0; 2];
        self.unbroken = 0.0;
        self.carries_since = None;
    }

    fn learn(&mut self, alone: bool, any: bool) {
        if self.taught_by.total < ENOUGH_FOR_CALM {
            return;
        }
        let now = Calm::of(&self.taught_by, self.calm);
        let first = (self.taught < FIRST_LOOKS && !alone).then(|| 1.0 / f64::from(self.taught + 1));
        let follow = |calm: f64, now: f64| match now < calm {
            true => calm + (now - calm) * first.unwrap_or(LEARN_DOWN),
            false if alone || self.share < 1.0 => calm + (now - calm) * LEARN_ALONE,
            // No logarithm here: of those that slow down alike, by factor or by amount, none may seem to recover sooner.
            false => (calm.exp2() + (now.exp2() - calm.exp2()) * first.unwrap_or(LEARN_UP)).log2(),
        };
        self.calm = Some(match self.calm {
            None => now,
            Some(calm) if any => calm.follow(now, follow),
            Some(calm) => calm,
        });
        self.taught = self.taught.saturating_add(u32::from(any));
    }
}

/// Part of the handshakes that were lost, where they are enough; a few are none.
fn part_lost([well, lost]: [f64; 2], enough: f64, some: f64) -> Option<f64> {
    (well + lost >= enough).then(|| if lost >= some { lost / (well + lost) } else { 0.0 })
}

/// What the least affected of a pool's backends show: the measure of what is the same for all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alike {
    times: Least,
    by_us: Least,
    loss: Least,
    quick_loss: Least,
    /// Those that have answered of late, but too long ago to tell, or too little.
    stale: Least,
    /// Microseconds since the newest answer of each.
    age: Least,
    now: Time,
}

/// What the least affected of a backend's fellows showed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Others {
    /// How much slower it is; `None`: nothing is known of any.
    slower: Option<Slower>,
    /// Whether they have answers, but none of them is new enough to blame one that is slow.
    unclear: bool,
    /// When the newest of their answers came.
    newest: Option<Time>,
    loss: Option<f64>,
    quick_loss: Option<f64>,
}

/// The two least of some values, and whose they are.
#[derive(Clone, Copy, Debug, Default)]
struct Least([Option<(f64, usize)>; 2]);

impl Least {
    fn add(&mut self, of: usize, value: Option<f64>) {
        let Some(value) = value else { return };
        let two = &mut self.0;
        if two[0].is_none_or(|(least, _)| value < least) {
            *two = [Some((value, of)), two[0]];
        } else if two[1].is_none_or(|(least, _)| value < least) {
            two[1] = Some((value, of));
        }
    }

    fn but(&self, of: usize) -> Option<f64> {
        self.0.iter().flatten().find(|(_, by)| *by != of).map(|(value, _)| *value)
    }
}

impl Alike {
    /// Takes in what the backend number `of` showed.
    pub fn add(&mut self, of: usize, look: Look, now: Time) {
        let current = look.newest.is_some_and(|at| now.since(at) <= CURRENT);
        let slower = look.slower.into_iter().chain(look.latest).reduce(Slower::max).filter(|_| current);
        self.age.add(of, look.newest.map(|at| now.since(at).as_micros() as f64));
        self.now = now;
        self.stale.add(of, look.newest.filter(|_| slower.is_none()).map(|_| 0.0));
        self.times.add(of, slower.map(|slower| slower.times));
        self.by_us.add(of, slower.map(|slower| slower.by_us));
        self.loss.add(of, look.loss);
        self.quick_loss.add(of, look.quick_loss);
    }

    /// The least that any but this one showed.
    pub fn but(&self, of: usize) -> Others {
        let slower = self.times.but(of).zip(self.by_us.but(of)).map(|(times, by_us)| Slower { times, by_us });
        let unclear = slower.is_none() && self.stale.but(of).is_some();
        let newest = self.age.but(of).map(|age| Time(self.now.0.saturating_sub(age as u64)));
        Others { slower, unclear, newest, loss: self.loss.but(of), quick_loss: self.quick_loss.but(of) }
    }
}

#[cfg(test)]
mod tests;
