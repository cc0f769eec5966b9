//! A seeded simulation of health and choosing: backends fail and heal in every way, clients and probes see it, and
//! invariants are checked after each step. No socket, no clock: years pass in seconds.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use sailover::backend::{Backend, Counters, PoolShared};
use sailover::clock::Time;
use sailover::health::{self, Blame, Depth, Evidence, Seen, Source, State};
use sailover::pool::{Choice, Member, NewCell, Policy, Pool, Trial, Want};

const LONGEST: Duration = Duration::from_secs(30);

fn policy(probe_depth: Depth) -> Policy {
    let health = health::Policy { hold_longest: LONGEST, probe_depth: Some(probe_depth), ..health::Policy::default() };
    Policy { health, ..Policy::default() }
}

fn pool(probe_depth: Depth, cells: usize, each: usize, now: Time) -> Pool {
    let shared = Arc::new(PoolShared::new("p", Arc::default()));
    let policy = Arc::new(policy(probe_depth));
    let mut parts = Vec::new();
    let mut members = Vec::new();
    for cell in 0..cells {
        parts.push(NewCell {
            name: Arc::from(format!("c{cell}")),
            tier: 0,
            weight: 1,
            count: each,
            max_connections: u32::MAX,
            capacity: None,
            shared: Arc::default(),
        });
        for i in 0..each {
            let address = format!("10.0.{cell}.{}:80", i + 1).parse().unwrap();
            let counters = Arc::new(Counters::default());
            let backend = Backend::new(shared.clone(), &format!("b{cell}-{i}"), address, counters, &policy.health, now);
            members.push(Member { backend: Arc::new(backend), cell, weight: 1, max_connections: u32::MAX });
        }
    }
    Pool::new(shared, policy, parts, members)
}

/// What a backend is really like.
#[derive(Clone, Copy, Debug, PartialEq, Hash)]
enum Truth {
    Good,
    Refuses,
    Swallows,
    Resets,
    /// Loses this share of handshakes, in thousandths.
    Loses(u32),
}

/// A lie told to the checker, to prove that it would notice.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sabotage {
    None,
    PickDown,
    LoseShare,
    TiltCells,
    DownWithoutEvidence,
    HoldTooLong,
    StayDown,
    Forget,
}

struct World {
    pool: Pool,
    truths: Vec<Truth>,
    last_bad: Vec<Time>,
    now: Time,
    rng: Rng,
    sabotage: Sabotage,
    trace: DefaultHasher,
    broken: Vec<String>,
    downs: u64,
}

impl World {
    fn new(seed: u64, sabotage: Sabotage) -> World {
        let mut rng = Rng::with_seed(seed);
        let now = Time(1_000_000_000);
        let depth = if rng.bool() { Depth::Connect } else { Depth::Answer };
        let pool = pool(depth, rng.usize(2..4), rng.usize(1..4), now);
        let count = pool.members.len();
        World {
            pool,
            truths: vec![Truth::Good; count],
            last_bad: vec![Time(0); count],
            now,
            rng,
            sabotage,
            trace: DefaultHasher::new(),
            broken: Vec::new(),
            downs: 0,
        }
    }

    fn check(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds && self.broken.len() < 5 {
            let text = what();
            self.broken.push(text);
        }
    }

    fn observe(&mut self, member: usize, source: Source, depth: Depth, seen: Seen) {
        let bad = !matches!(seen, Seen::Success { .. });
        if bad && self.sabotage != Sabotage::Forget {
            self.last_bad[member] = self.now;
        }
        let evidence = Evidence { source, depth, seen, began: self.now };
        let backend = self.pool.members[member].backend.clone();
        if let Some(transition) = backend.observe(&self.pool.policy.health, &evidence, self.now) {
            (member, transition.to as u8, self.now.0).hash(&mut self.trace);
            if transition.to == State::Down {
                self.downs += 1;
                let seen = if self.sabotage == Sabotage::DownWithoutEvidence { Time(0) } else { self.last_bad[member] };
                let fresh = self.now.since(seen) <= Duration::from_secs(5);
                self.check(fresh, || format!("down without evidence of the last five seconds: {transition:?}"));
            }
        }
        let (hold, _) = backend.health().hold();
        let hold = if self.sabotage == Sabotage::HoldTooLong { hold + LONGEST } else { hold };
        self.check(hold <= LONGEST, || format!("a hold of {hold:?}"));
    }

    fn probe(&mut self, member: usize) {
        let answer = self.pool.policy.health.probe_depth == Some(Depth::Answer);
        let depth = if answer { Depth::Answer } else { Depth::Connect };
        let lost = |rng: &mut Rng, share: u32| rng.u32(..1_000) < share;
        match self.truths[member] {
            Truth::Refuses => self.observe(member, Source::Probe, Depth::Connect, Seen::Refused),
            Truth::Swallows => self.observe(member, Source::Probe, Depth::Connect, Seen::Silent),
            Truth::Resets if answer => {
                let blame = Blame { prefix: 0, others: false, elsewhere: 0.0, tries_elsewhere: 0 };
                self.observe(member, Source::Probe, Depth::FirstByte, Seen::Reset(blame));
            }
            Truth::Loses(share) if lost(&mut self.rng, share) => {
                self.observe(member, Source::Probe, Depth::Connect, Seen::Silent);
            }
            _ => self.observe(member, Source::Probe, depth, Seen::Success { hits: 0 }),
        }
    }

    /// One client: attempts until one connects, as `dial` makes them.
    fn client(&mut self) {
        let mut tried = Vec::new();
        while tried.len() < 5 {
            let mut untried = (0..self.pool.members.len()).filter(|m| !tried.contains(m));
            let up = untried.any(|m| self.pool.members[m].backend.view().state == State::Up);
            let choice =
                self.pool.pick(&Want { tried: &tried, trial: Trial::Yes, ..Want::default() }, self.now, &mut self.rng);
            let mut member = match choice {
                Choice::Member(m) | Choice::Doubtful(m) => m,
                _ => break,
            };
            let trial = tried.is_empty() && self.pool.members[member].backend.view().state != State::Up;
            if self.sabotage == Sabotage::PickDown {
                let down = self.pool.members.iter().position(|m| m.backend.view().state == State::Down);
                member = down.unwrap_or(member);
            }
            let state = self.pool.members[member].backend.view().state;
            let fine = state != State::Down || !up || trial && self.sabotage != Sabotage::PickDown;
            self.check(fine, || format!("picked a backend that is down while an untried one is up (tried {tried:?})"));
            tried.push(member);
            let lost = match self.truths[member] {
                Truth::Loses(share) => self.rng.u32(..1_000) < share,
                _ => false,
            };
            match self.truths[member] {
                Truth::Refuses => self.observe(member, Source::Traffic, Depth::Connect, Seen::Refused),
                Truth::Swallows => self.observe(member, Source::Traffic, Depth::Connect, Seen::Silent),
                Truth::Loses(_) if lost => self.observe(member, Source::Traffic, Depth::Connect, Seen::Silent),
                Truth::Resets => {
                    let blame = Blame { prefix: self.rng.u32(1..4), others: true, elsewhere: 0.0, tries_elsewhere: 0 };
                    self.observe(member, Source::Traffic, Depth::FirstByte, Seen::Reset(blame));
                    return;
                }
                _ => {
                    let backend = self.pool.members[member].backend.clone();
                    backend.counters.attempts[0].add(1);
                    self.observe(member, Source::Traffic, Depth::Connect, Seen::Success { hits: 0 });
                    self.observe(member, Source::Traffic, Depth::FirstByte, Seen::Success { hits: 0 });
                    return;
                }
            }
        }
    }

    fn shares_sum_to_one(&mut self) {
        let mut sum: f64 = self.pool.shares(self.now).iter().map(|(_, now)| now).sum();
        if self.sabotage == Sabotage::LoseShare {
            sum *= 0.9;
        }
        self.check((sum - 1.0).abs() < 1e-9, || format!("shares sum to {sum}"));
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    /// A minute of success everywhere, after which everything is up and the shares are even.
    fn recover(&mut self) {
        self.truths.fill(Truth::Good);
        if self.sabotage == Sabotage::StayDown {
            self.truths[0] = Truth::Refuses;
        }
        for _ in 0..240 {
            self.pass(Duration::from_millis(250));
            for member in 0..self.truths.len() {
                self.probe(member);
            }
            self.client();
        }
        let states: Vec<State> = self.pool.members.iter().map(|m| m.backend.view().state).collect();
        self.check(states.iter().all(|state| *state == State::Up), || format!("after a minute of success: {states:?}"));
    }

    fn even_cells(&mut self) {
        let cells = self.pool.cells.len();
        let mut counts = vec![0u32; cells];
        for _ in 0..10_000 {
            if let Choice::Member(m) =
                self.pool.pick(&Want { trial: Trial::Yes, ..Want::default() }, self.now, &mut self.rng)
            {
                let cell = if self.sabotage == Sabotage::TiltCells { 0 } else { self.pool.members[m].cell };
                counts[cell] += 1;
            }
        }
        let fair = 10_000.0 / cells as f64;
        let even = counts.iter().all(|count| (f64::from(*count) - fair).abs() <= 200.0);
        self.check(even, || format!("10,000 picks fell on equal cells as {counts:?}"));
    }

    /// Simulates `length`, a few failures an hour.
    fn run(&mut self, length: Duration) {
        let end = self.now + length;
        for member in 0..self.truths.len() {
            self.probe(member);
        }
        while self.now < end {
            // A failure of some backends for some seconds, watched closely; then quiet.
            for member in 0..self.truths.len() {
                self.truths[member] = match self.rng.u32(..10) {
                    0 => Truth::Refuses,
                    1 => Truth::Swallows,
                    2 => Truth::Resets,
                    3 => Truth::Loses(self.rng.u32(1..300)),
                    _ => Truth::Good,
                };
            }
            let steps = self.rng.u32(4..60);
            for _ in 0..steps {
                self.pass(Duration::from_millis(250));
                for member in 0..self.truths.len() {
                    self.probe(member);
                }
                for _ in 0..4 {
                    self.pass(Duration::from_millis(5));
                    self.client();
                }
                self.shares_sum_to_one();
            }
            self.recover();
            let quiet = self.rng.u64(60..36_000);
            self.pass(Duration::from_secs(quiet));
        }
        self.even_cells();
    }
}

fn simulate(seed: u64, sabotage: Sabotage, length: Duration) -> World {
    let mut world = World::new(seed, sabotage);
    world.run(length);
    world
}

const DAY: Duration = Duration::from_secs(86_400);

#[test]
fn years_of_failures_break_no_invariant() {
    let mut downs = 0;
    for seed in 0..50 {
        let world = simulate(seed, Sabotage::None, 40 * DAY);
        assert!(world.broken.is_empty(), "seed {seed}: {:#?}", world.broken);
        downs += world.downs;
    }
    println!("{} simulated years, {downs} entries into down", 50 * 40 / 365);
    assert!(downs > 1_000, "the simulation must have failures to be worth anything: {downs}");
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let trace = |seed| simulate(seed, Sabotage::None, 5 * DAY).trace.finish();
    assert_eq!(trace(1), trace(1));
    assert_ne!(trace(1), trace(2));
}

#[test]
fn each_invariant_is_noticed_when_it_is_broken() {
    for (sabotage, words) in [
        (Sabotage::PickDown, "picked a backend that is down"),
        (Sabotage::LoseShare, "shares sum to"),
        (Sabotage::TiltCells, "fell on equal cells"),
        (Sabotage::DownWithoutEvidence, "without evidence"),
        (Sabotage::Forget, "without evidence"),
        (Sabotage::HoldTooLong, "a hold of"),
        (Sabotage::StayDown, "after a minute of success"),
    ] {
        let world = simulate(3, sabotage, 3 * DAY);
        assert!(world.broken.iter().any(|text| text.contains(words)), "{sabotage:?}: {:?}", world.broken);
    }
}

/// 10 % loss each way on one of two cells, for ten minutes, at several rates: at most two suspicions, never down.
#[test]
fn a_lossy_path_is_not_taken_for_a_dead_one() {
    let mut worst = 0.0f64;
    for rate in [5u64, 20, 50, 200] {
        let mut entries = Vec::new();
        for seed in 0..20 {
            let start = Time(1_000_000_000);
            let pool = pool(Depth::Connect, 2, 1, start);
            let policy = &pool.policy.health;
            let mut rng = Rng::with_seed(seed * 1_000 + rate);
            // Two seconds of calm, then one handshake in five is lost.
            let calm = start + Duration::from_secs(2);
            let lost = |rng: &mut Rng, now: Time| now > calm && rng.f64() < 1.0 - 0.9 * 0.9;
            let mut now = start;
            // Silence is judged a while after an attempt began; in between others succeed.
            let mut judged: std::collections::VecDeque<(Time, Time)> = Default::default();
            let mut next_probe = now;
            let (mut suspects, mut downs) = (0, 0);
            let end = calm + Duration::from_secs(600);
            while now < end {
                now = now + Duration::from_micros(1_000_000 / rate);
                let mut see = |source, seen, began, at: Time| {
                    let evidence = Evidence { source, depth: Depth::Connect, seen, began };
                    let transition = pool.members[0].backend.observe(policy, &evidence, at);
                    suspects += u32::from(transition.is_some_and(|t| t.to == State::Suspect));
                    downs += u32::from(transition.is_some_and(|t| t.to == State::Down));
                    transition.is_some_and(|t| t.to == State::Suspect)
                };
                let mut doubt = false;
                while judged.front().is_some_and(|(at, _)| *at <= now) {
                    let Some((at, began)) = judged.pop_front() else { break };
                    doubt |= see(Source::Traffic, Seen::Silent, began, at);
                }
                if doubt || next_probe <= now {
                    let seen = if lost(&mut rng, now) { Seen::Silent } else { Seen::Success { hits: 0 } };
                    see(Source::Probe, seen, now, now);
                    let up = pool.members[0].backend.view().state == State::Up;
                    next_probe = now + Duration::from_millis(if up { 1_000 } else { 250 });
                }
                let other = Evidence {
                    source: Source::Probe,
                    depth: Depth::Connect,
                    seen: Seen::Success { hits: 0 },
                    began: now,
                };
                pool.members[1].backend.observe(policy, &other, now);
                if matches!(
                    pool.pick(&Want { trial: Trial::Yes, ..Want::default() }, now, &mut rng),
                    Choice::Member(0) | Choice::Doubtful(0)
                ) {
                    if lost(&mut rng, now) {
                        judged.push_back((now + Duration::from_millis(150), now));
                    } else {
                        pool.members[0].backend.connected(policy, Duration::from_millis(1), None, now, now);
                    }
                }
            }
            assert_eq!(downs, 0, "rate {rate}, seed {seed}");
            entries.push(suspects);
        }
        let mean = f64::from(entries.iter().sum::<u32>()) / entries.len() as f64;
        println!("{rate}/s: suspicions in ten minutes {entries:?}, mean {mean:.2}");
        worst = worst.max(f64::from(*entries.iter().max().unwrap_or(&0)));
    }
    assert!(worst <= 2.0, "{worst} suspicions in ten minutes");
}
