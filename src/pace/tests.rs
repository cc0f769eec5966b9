//! Simulations: backends under load with their times and losses, clients drawn by the shares, and looks as the control thread takes them.

use super::*;
use crate::estimate::Estimate;
use fastrand::Rng;

const STEP: Duration = Duration::from_millis(100);
const LOST_KNOWN_AFTER: Duration = Duration::from_millis(200);

/// Backends under load, each with its time and its loss, and clients drawn by the shares.
struct Rig {
    estimates: Vec<Estimate>,
    handshakes: Vec<[u64; 2]>,
    /// Lost in this look and in the one before, and not known yet.
    lost: Vec<[u64; 2]>,
    paces: Vec<Pace>,
    now: Time,
    rng: Rng,
    /// This part of all requests takes this many times as long by nature; and of those at the first backend.
    long: (f64, f64),
    long_of_first: (f64, f64),
    /// And all of those take this many milliseconds more.
    more_of_first: f64,
    /// Whether requests go by connections that are kept: there are no handshakes.
    kept: bool,
    /// What was carried elsewhere from the first backend, by bucket.
    moved: [u32; BUCKETS],
}

impl Rig {
    fn new(count: usize) -> Rig {
        let now = Time(1_000_000);
        let estimates: Vec<Estimate> = (0..count).map(|_| Estimate::default()).collect();
        let paces = estimates.iter().map(|_| Pace::new(now)).collect();
        Rig {
            estimates,
            handshakes: vec![[0; 2]; count],
            lost: vec![[0; 2]; count],
            paces,
            now,
            rng: Rng::with_seed(7),
            long: (0.0, 1.0),
            long_of_first: (0.0, 1.0),
            more_of_first: 0.0,
            kept: false,
            moved: [0; BUCKETS],
        }
    }

    /// Runs for a time at `rate` a second; each backend's time in milliseconds and its loss.
    fn run(&mut self, seconds: f64, rate: f64, of: &[(f64, f64)]) {
        for _ in 0..(seconds * 10.0) as usize {
            self.now = self.now + STEP;
            let shares: f64 = self.paces.iter().map(Pace::share).sum();
            for _ in 0..(rate / 10.0) as usize {
                let mut point = self.rng.f64() * shares;
                let to = self.paces.iter().position(|pace| {
                    point -= pace.share();
                    point < 0.0
                });
                let to = to.unwrap_or(0);
                let (ms, loss) = of[to];
                let lost = self.rng.f64() < loss;
                self.handshakes[to][0] += u64::from(!lost && !self.kept);
                self.lost[to][0] += u64::from(lost);
                if !lost {
                    let (part, times) =
                        if to == 0 && self.long_of_first.0 > 0.0 { self.long_of_first } else { self.long };
                    let long = if self.rng.f64() < part { times } else { 1.0 };
                    let jitter = (0.8 + 0.6 * self.rng.f64()) * long;
                    let more = if to == 0 { self.more_of_first } else { 0.0 };
                    self.estimates[to].record(Duration::from_secs_f64((ms * jitter + more) / 1e3));
                }
            }
            for (lost, handshakes) in self.lost.iter_mut().zip(&mut self.handshakes) {
                handshakes[1] += lost[1];
                *lost = [0, lost[0]];
            }
            self.judge();
        }
    }

    /// One look at each, and what follows from it.
    fn judge(&mut self) {
        let looks: Vec<Look> = (0..self.paces.len())
            .map(|i| {
                let seen = self.seen(i);
                self.paces[i].look(seen, None, self.now)
            })
            .collect();
        let mut alike = Alike::default();
        looks.iter().enumerate().for_each(|(i, look)| alike.add(i, *look, self.now));
        for (i, look) in looks.into_iter().enumerate() {
            self.paces[i].judge(look, alike.but(i), self.now);
        }
    }

    fn seen(&self, i: usize) -> Seen {
        let first_bytes = self.estimates[i].ever();
        let handshakes = self.handshakes[i];
        let moved = if i == 0 { self.moved } else { [0; BUCKETS] };
        Seen { first_bytes, moved, handshakes, lost_known_after: LOST_KNOWN_AFTER }
    }

    fn share(&self, of: usize) -> f64 {
        self.paces[of].share() / self.paces.iter().map(Pace::share).sum::<f64>()
    }
}

#[test]
fn a_slow_one_keeps_a_trickle_and_comes_back_when_it_is_quick() {
    for (calm, slow) in [(1.0, 401.0), (30.0, 430.0), (20.0, 400.0)] {
        let mut rig = Rig::new(2);
        rig.run(10.0, 400.0, &[(calm, 0.0), (calm, 0.0)]);
        assert_eq!(rig.share(0), 0.5);
        rig.run(1.0, 400.0, &[(slow, 0.0), (calm, 0.0)]);
        assert!(rig.share(0) < 0.02, "{calm}: {}", rig.share(0));
        rig.run(30.0, 400.0, &[(slow, 0.0), (calm, 0.0)]);
        assert!((0.002..0.02).contains(&rig.share(0)), "{calm}: {}", rig.share(0));
        rig.run(5.0, 400.0, &[(calm, 0.0), (calm, 0.0)]);
        assert!(rig.share(0) > 0.45, "{calm}: {}", rig.share(0));
    }
}

#[test]
fn few_clients_are_enough_to_see_a_slow_one() {
    for rate in [10.0, 30.0, 60.0, 100.0] {
        let mut took: Vec<f64> = (0..20)
            .map(|seed| {
                let mut rig = Rig::new(2);
                rig.rng = Rng::with_seed(seed);
                rig.run(300.0 / rate, rate, &[(2.0, 0.0), (2.0, 0.0)]);
                let mut seconds = 0.0;
                while rig.paces[0].share() > 0.1 && seconds < 60.0 {
                    rig.run(0.1, rate, &[(402.0, 0.0), (2.0, 0.0)]);
                    seconds += 0.1;
                }
                seconds
            })
            .collect();
        took.sort_unstable_by(f64::total_cmp);
        // Some seven of its answers.
        assert!(took[10] <= 0.2 + 14.0 / rate && took[19] <= 0.4 + 28.0 / rate, "{rate}: {took:?}");
    }
}

#[test]
fn what_came_before_the_first_look_is_known_by_it() {
    let mut rig = Rig::new(2);
    (0..2).for_each(|i| (0..500).for_each(|_| rig.estimates[i].record(Duration::from_micros(400))));
    rig.run(0.2, 0.0, &[(0.4, 0.0), (0.4, 0.0)]);
    assert!(rig.paces[0].calm().is_some());
}

#[test]
fn a_far_one_that_slows_is_seen_against_its_own_past() {
    let mut rig = Rig::new(2);
    rig.run(20.0, 400.0, &[(150.0, 0.0), (2.0, 0.0)]);
    assert_eq!(rig.share(0), 0.5, "far is not slow");
    rig.run(1.5, 400.0, &[(550.0, 0.0), (2.0, 0.0)]);
    assert!(rig.share(0) < 0.15, "{}", rig.share(0));
}

#[test]
fn the_jitter_of_a_far_one_excuses_no_near_one() {
    let mut rig = Rig::new(2);
    rig.run(20.0, 400.0, &[(2.0, 0.0), (100.0, 0.0)]);
    rig.run(1.0, 400.0, &[(42.0, 0.0), (120.0, 0.0)]);
    assert!(rig.share(0) < 0.1, "{}", rig.share(0));
}

#[test]
fn when_all_slow_down_alike_nobody_loses_anything() {
    // The same factor, the same amount on very different calms, and few clients.
    for (calm, slow, rate) in [
        ([2.0, 2.0, 2.0], [100.0, 100.0, 100.0], 400.0),
        ([0.2, 1.0, 0.6], [400.0, 401.0, 401.0], 200.0),
        ([150.0, 2.0, 30.0], [550.0, 402.0, 430.0], 200.0),
        ([0.3, 0.6, 3.0], [400.0, 401.0, 403.0], 30.0),
    ] {
        for seed in 0..10 {
            let mut rig = Rig::new(3);
            rig.rng = Rng::with_seed(seed);
            let of = |ms: [f64; 3]| ms.map(|ms| (ms, 0.0));
            rig.run(10.0, rate, &of(calm));
            let mut least: f64 = 1.0;
            for _ in 0..200 {
                rig.run(0.1, rate, &of(slow));
                least = rig.paces.iter().map(Pace::share).fold(least, f64::min);
            }
            for _ in 0..30 {
                rig.run(0.1, rate, &of(calm));
                least = rig.paces.iter().map(Pace::share).fold(least, f64::min);
            }
            assert!(least >= 0.3, "{calm:?} {seed}: {least}");
        }
    }
}

#[test]
fn the_less_slow_of_two_keeps_its_share_while_little_is_known_of_the_other() {
    for seed in 0..20 {
        let mut rig = Rig::new(2);
        rig.rng = Rng::with_seed(seed);
        rig.run(10.0, 60.0, &[(2.0, 0.0), (2.0, 0.0)]);
        rig.run(1.0, 60.0, &[(100.0, 0.0), (400.0, 0.0)]);
        assert!(rig.paces[1].share() < 0.5, "{seed}: {}", rig.paces[1].share());
        for _ in 0..200 {
            rig.run(0.1, 60.0, &[(100.0, 0.0), (400.0, 0.0)]);
            assert!(rig.paces[0].share() > 0.9, "{seed}: {}", rig.paces[0].share());
        }
    }
}

#[test]
fn the_first_to_answer_late_is_not_blamed_while_another_is_silent() {
    let mut rig = Rig::new(2);
    rig.run(10.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    let share_beside = |quiet: Option<u64>, answers_ms: Option<u64>, later: u64| {
        let mut paces = rig.paces.clone();
        let more = [Estimate::default(), Estimate::default()];
        for look in 1..=2 {
            let now = rig.now + Duration::from_secs(later) + STEP * look;
            (0..10).for_each(|_| more[0].record(Duration::from_millis(402)));
            answers_ms.into_iter().for_each(|ms| (0..2).for_each(|_| more[1].record(Duration::from_millis(ms))));
            let looks = [0, 1].map(|i| {
                let mut seen = rig.seen(i);
                seen.first_bytes.iter_mut().zip(more[i].ever()).for_each(|(count, more)| *count += more);
                paces[i].look(seen, quiet.filter(|_| i == 1).map(Duration::from_millis), now)
            });
            let mut alike = Alike::default();
            looks.iter().enumerate().for_each(|(i, look)| alike.add(i, *look, now));
            paces[0].judge(looks[0], alike.but(0), now);
        }
        paces[0].share()
    };
    assert!(share_beside(None, Some(2), 0) < 0.02, "the other one answers as ever");
    assert_eq!(share_beside(None, None, 0), 1.0, "it has not answered since");
    assert_eq!(share_beside(Some(400), None, 0), 1.0, "nobody knows yet how late the other one is");
    assert_eq!(share_beside(None, Some(402), 0), 1.0, "its first answers come as late");
    assert!(share_beside(Some(60_000), None, 60) < 0.02, "one that has hung there for a minute excuses nobody");
}

#[test]
fn chance_moves_nothing() {
    for (rate, loss) in [(300.0, 0.01), (60.0, 0.0), (20.0, 0.0)] {
        let mut rig = Rig::new(3);
        for second in 0..600 {
            rig.run(1.0, rate, &[(2.0, loss), (8.0, 0.0), (30.0, loss)]);
            assert!((0..3).all(|i| rig.paces[i].share() == 1.0), "{rate}: {second}");
        }
    }
}

#[test]
fn requests_that_differ_by_nature_cost_nobody_a_share() {
    let (mut cut, mut worst) = (0, (0, 0.0, 0.0, 0.0));
    for part in [0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.8] {
        for times in [20.0, 200.0] {
            // A quiet night before a day, too.
            for (night, day) in [(20.0, 20.0), (60.0, 60.0), (400.0, 400.0), (20.0, 400.0)] {
                let mut rig = Rig::new(2);
                rig.long = (part, times);
                rig.run(120.0, night, &[(5.0, 0.0), (5.0, 0.0)]);
                let mut of_this = 0;
                for _ in 0..3_000 {
                    rig.run(0.1, day, &[(5.0, 0.0), (5.0, 0.0)]);
                    of_this += u32::from((0..2).any(|i| rig.share(i) < 0.3));
                }
                cut += of_this;
                if of_this > worst.0 {
                    worst = (of_this, part, times, day);
                }
            }
        }
    }
    // Of 240,000 looks.
    assert!(cut <= 500 && worst.0 <= 100, "{cut}, {worst:?}");
}

#[test]
fn one_of_two_servers_behind_an_address_is_seen_to_be_slow() {
    for rate in [20.0, 60.0, 200.0, 400.0] {
        let mut took: Vec<f64> = (0..20)
            .map(|seed| {
                let mut rig = Rig::new(2);
                rig.rng = Rng::with_seed(seed);
                rig.run(30.0, rate, &[(2.0, 0.0), (2.0, 0.0)]);
                rig.long_of_first = (0.5, 200.0);
                let mut seconds = 0.0;
                while rig.paces[0].share() > 0.1 && seconds < 60.0 {
                    rig.run(0.1, rate, &[(2.0, 0.0), (2.0, 0.0)]);
                    seconds += 0.1;
                }
                seconds
            })
            .collect();
        took.sort_unstable_by(f64::total_cmp);
        assert!(took[10] <= 0.5 + 30.0 / rate && took[19] <= 1.0 + 100.0 / rate, "{rate}: {took:?}");
    }
}

#[test]
fn a_slow_one_that_answers_in_bursts_is_seen() {
    let mut rig = Rig::new(2);
    rig.run(20.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    for look in 0..50 {
        if look % 5 == 0 {
            (0..30).for_each(|_| rig.estimates[0].record(Duration::from_millis(402)));
        }
        // The other one goes on.
        (0..10).for_each(|_| rig.estimates[1].record(Duration::from_millis(2)));
        rig.now = rig.now + STEP;
        rig.judge();
    }
    assert!(rig.paces[0].share() < 0.1, "{}", rig.paces[0].share());
}

#[test]
fn what_was_carried_elsewhere_in_time_makes_nobody_quicker() {
    let mut rig = Rig::new(2);
    rig.run(10.0, 400.0, &[(1.0, 0.0), (1.0, 0.0)]);
    rig.run(2.0, 400.0, &[(401.0, 0.0), (1.0, 0.0)]);
    let trickle = rig.paces[0].share();
    let bucket = (0..BUCKETS).find(|bucket| upper_us(*bucket) >= 60_000).expect("it has one");
    for i in 0..100 {
        rig.now = rig.now + STEP;
        rig.moved[bucket] += u32::from(i % 4 == 0);
        // One of four is waited for, and takes as long as ever.
        if i % 8 == 7 {
            rig.estimates[0].record(Duration::from_millis(401));
        }
        (0..20).for_each(|_| rig.estimates[1].record(Duration::from_millis(1)));
        rig.judge();
        assert!(rig.paces[0].share() <= trickle, "{i}: {}", rig.paces[0].share());
    }
}

#[test]
fn a_hiccup_costs_no_share() {
    let mut rig = Rig::new(2);
    rig.run(20.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    // What came while it stood still is answered in one look.
    for i in 0..30 {
        rig.estimates[0].record(Duration::from_millis(10 + 5 * i));
    }
    rig.run(1.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    assert_eq!(rig.paces[0].share(), 1.0);
}

#[test]
fn one_that_stays_a_little_slower_gets_what_that_is_worth() {
    let mut rig = Rig::new(2);
    rig.run(20.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    rig.run(2.0, 400.0, &[(402.0, 0.0), (2.0, 0.0)]);
    rig.run(10.0, 400.0, &[(10.0, 0.0), (2.0, 0.0)]);
    let share = rig.paces[0].share();
    assert!((0.2..0.8).contains(&share), "{share}");
}

#[test]
fn a_slow_one_is_seen_among_requests_that_differ() {
    for (part, times, within) in [(0.1, 20.0, 0.4), (0.4, 20.0, 0.6), (0.35, 150.0, 1.0), (0.45, 150.0, 1.0)] {
        let mut rig = Rig::new(2);
        rig.long = (part, times);
        rig.run(20.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
        rig.more_of_first = 400.0;
        rig.run(within, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
        assert!(rig.share(0) < 0.15, "{part}: {}", rig.share(0));
    }
}

#[test]
fn nobody_is_judged_by_answers_of_long_ago() {
    let mut rig = Rig::new(2);
    rig.run(10.0, 100.0, &[(2.0, 0.0), (2.0, 0.0)]);
    rig.run(3.0, 100.0, &[(402.0, 0.0), (402.0, 0.0)]);
    for _ in 0..300 {
        rig.run(0.1, 0.0, &[(402.0, 0.0), (402.0, 0.0)]);
        let shares: Vec<f64> = rig.paces.iter().map(Pace::share).collect();
        assert!(shares.iter().all(|share| *share >= 0.3), "{shares:?}");
    }
}

#[test]
fn a_lossy_path_loses_its_share_and_one_like_all_others_does_not() {
    let mut rig = Rig::new(2);
    rig.run(10.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    rig.run(2.0, 400.0, &[(2.0, 0.12), (2.0, 0.0)]);
    assert!(rig.share(0) < 0.1, "{} {:?}", rig.share(0), rig.paces[0].handshakes);
    rig.run(8.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    assert!(rig.share(0) > 0.45, "{}", rig.share(0));
    rig.run(20.0, 400.0, &[(2.0, 0.1), (2.0, 0.1)]);
    assert!((rig.share(0) - 0.5).abs() < 0.25, "{}", rig.share(0));
}

#[test]
fn a_lossy_path_is_seen_at_once() {
    let mut looks: Vec<u32> = (0..20)
        .map(|seed| {
            let mut rig = Rig::new(2);
            rig.rng = Rng::with_seed(seed);
            rig.run(10.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
            let mut looks = 0;
            while rig.paces[0].share() == 1.0 && looks < 100 {
                rig.run(0.1, 400.0, &[(2.0, 0.19), (2.0, 0.0)]);
                looks += 1;
            }
            looks
        })
        .collect();
    looks.sort_unstable();
    // Two of these pass before the first loss is known.
    assert!(looks[10] <= 5 && looks[19] <= 9, "{looks:?}");
}

#[test]
fn chance_brings_no_lossy_one_back() {
    let lossy = [(1.0, 0.125), (1.0, 0.0)];
    let mut parts: Vec<f64> = (0..300)
        .map(|seed| {
            let mut rig = Rig::new(2);
            rig.rng = Rng::with_seed(seed);
            rig.run(4.0, 400.0, &[(1.0, 0.0), (1.0, 0.0)]);
            rig.run(1.5, 400.0, &lossy);
            let look = |rig: &mut Rig| {
                rig.run(0.1, 400.0, &lossy);
                rig.share(0)
            };
            (0..65).map(|_| look(&mut rig)).sum::<f64>() / 65.0
        })
        .collect();
    parts.sort_unstable_by(f64::total_cmp);
    assert!(parts[150] < 0.025 && parts[299] < 0.05, "{} {:?}", parts[150], &parts[290..]);
}

#[test]
fn few_clients_are_enough_to_bring_a_lossy_one_back_and_a_lossy_one_stays_small() {
    let of_lossy = |loss: f64| [(20.0, loss), (20.0, 0.0), (20.0, 0.0)];
    let (mut took, mut part) = (Vec::new(), Vec::new());
    for seed in 0..20 {
        let mut rig = Rig::new(3);
        rig.rng = Rng::with_seed(seed);
        rig.run(10.0, 200.0, &of_lossy(0.0));
        rig.run(5.0, 200.0, &of_lossy(0.1));
        let mut shares = 0.0;
        for _ in 0..300 {
            rig.run(0.1, 200.0, &of_lossy(0.1));
            shares += rig.share(0);
        }
        part.push(shares / 300.0);
        rig.run(2.0, 200.0, &of_lossy(0.5));
        let mut seconds = 0.0;
        while rig.share(0) < 0.3 {
            rig.run(0.1, 200.0, &of_lossy(0.0));
            seconds += 0.1;
        }
        took.push(seconds);
    }
    for list in [&mut took, &mut part] {
        list.sort_unstable_by(f64::total_cmp);
    }
    assert!(took[10] < 9.0 && took[19] < 12.0, "{took:?}");
    assert!(part[10] < 0.04 && part[19] < 0.08, "{part:?}");
}

/// A way that became so long that every handshake seems lost.
#[test]
fn one_that_lost_everything_needs_few_handshakes_to_come_back() {
    let mut took = Vec::new();
    for seed in 0..20 {
        let mut rig = Rig::new(3);
        rig.rng = Rng::with_seed(seed);
        let of_first = |loss: f64| [(20.0, loss), (20.0, 0.0), (20.0, 0.0)];
        rig.run(4.0, 200.0, &of_first(0.0));
        rig.run(8.0, 200.0, &of_first(1.0));
        let mut seconds = 0.0;
        while rig.share(0) < 0.25 {
            rig.run(0.1, 200.0, &of_first(0.0));
            seconds += 0.1;
        }
        took.push(seconds);
    }
    took.sort_unstable_by(f64::total_cmp);
    assert!(took[10] < 7.0 && took[19] < 13.0, "{took:.1?}");
}

#[test]
fn a_lossy_one_comes_back_by_answers_where_connections_are_kept() {
    let mut rig = Rig::new(2);
    rig.run(10.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    rig.run(3.0, 400.0, &[(2.0, 0.3), (2.0, 0.0)]);
    assert!(rig.share(0) < 0.05, "{}", rig.share(0));
    rig.kept = true;
    rig.run(15.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    assert!(rig.share(0) > 0.4, "{}", rig.share(0));
}

#[test]
fn many_clients_make_a_slow_ones_part_of_them_smaller() {
    let [mut few, mut many] = [100.0, 400.0].map(|rate| {
        let mut rig = Rig::new(2);
        rig.run(10.0, rate, &[(2.0, 0.0), (2.0, 0.0)]);
        rig.run(3.0, rate, &[(402.0, 0.0), (2.0, 0.0)]);
        rig
    });
    assert_eq!((few.paces[0].share(), many.paces[0].share()), (TRICKLE[1], TRICKLE[0]));
    few.run(12.0, 100.0, &[(2.0, 0.0), (2.0, 0.0)]);
    many.run(6.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    assert!(few.share(0) > 0.45 && many.share(0) > 0.45, "{} {}", few.share(0), many.share(0));
}

#[test]
fn a_share_waits_until_losses_would_be_known() {
    let mut rig = Rig::new(2);
    rig.run(10.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    rig.run(2.0, 400.0, &[(2.0, 0.5), (2.0, 0.0)]);
    rig.run(0.3, 0.0, &[(2.0, 0.0), (2.0, 0.0)]);
    let small = rig.paces[0].share();
    assert!(small < SMALL, "{small}");
    let mut look = |well: u64, lost: u64| {
        rig.now = rig.now + STEP;
        rig.handshakes[0][0] += well;
        rig.handshakes[0][1] += lost;
        rig.judge();
        rig.paces[0].share()
    };
    assert_eq!((look(12, 0), look(4, 0)), (small, small));
    // Those that were lost beside them are known now.
    assert_eq!((look(4, 5), look(12, 0), look(4, 0)), (small, small, small));
    // They are not forgotten at once.
    assert_eq!(look(4, 0), small);
    for _ in 0..40 {
        look(0, 0);
    }
    assert!(look(4, 0) > small, "they have stood for as long as it takes");
}

#[test]
fn a_burst_of_loss_is_nothing_where_no_other_backend_loses_less() {
    let mut rig = Rig::new(2);
    let burst = |rig: &mut Rig| {
        let before = rig.handshakes[0];
        rig.now = rig.now + STEP;
        rig.handshakes[0] = [before[0] + 36, before[1] + 12];
        rig.judge();
        rig.paces[0].share()
    };
    rig.run(10.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    let mut alone = Rig::new(1);
    alone.run(10.0, 200.0, &[(2.0, 0.0)]);
    assert_eq!((burst(&mut alone), burst(&mut rig)), (1.0, LOSSY_TRICKLE[0]));
}

#[test]
fn without_clients_a_share_comes_back_by_itself() {
    let mut rig = Rig::new(2);
    rig.run(10.0, 400.0, &[(2.0, 0.0), (2.0, 0.0)]);
    rig.run(2.0, 400.0, &[(500.0, 0.0), (2.0, 0.0)]);
    rig.run(80.0, 0.0, &[(2.0, 0.0), (2.0, 0.0)]);
    assert_eq!(rig.paces[0].share(), 1.0);
}
