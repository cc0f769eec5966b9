//! Shares, tiers, affinity and caps, on backends whose states are set by evidence.

use std::collections::HashMap;

use super::*;
use crate::backend::Counters;
use crate::health::{Depth, Evidence, Seen, Source};

const NOW: Time = Time(100_000_000);

/// Cells of (tier, weight, backends); all backends are up.
fn pool(policy: Policy, cells: &[(u8, u32, usize)]) -> Pool {
    let shared = Arc::new(PoolShared::new("p", Arc::default()));
    let policy = Arc::new(policy);
    let mut parts = Vec::new();
    let mut members = Vec::new();
    for (cell, (tier, weight, count)) in cells.iter().enumerate() {
        parts.push(NewCell {
            name: Arc::from(format!("c{cell}")),
            tier: *tier,
            weight: *weight,
            count: *count,
            max_connections: u32::MAX,
            capacity: None,
            shared: Arc::default(),
        });
        for i in 0..*count {
            let name = format!("10.0.{cell}.{i}:80");
            let address = name.parse().expect("an address");
            let backend =
                Backend::new(shared.clone(), &name, address, Arc::new(Counters::default()), &policy.health, NOW);
            backend.success(&policy.health, Source::Probe, Depth::Connect, NOW, NOW);
            members.push(Member { backend: Arc::new(backend), cell, weight: 1, max_connections: u32::MAX });
        }
    }
    Pool::new(shared, policy, parts, members)
}

fn refuse(pool: &Pool, member: usize, source: Source) {
    let evidence = Evidence { source, depth: Depth::Connect, seen: Seen::Refused, began: NOW };
    pool.members[member].backend.observe(&pool.policy.health, &evidence, NOW);
}

fn suspect(pool: &Pool, member: usize) {
    refuse(pool, member, Source::Traffic);
    refuse(pool, member, Source::Traffic);
    assert_eq!(pool.members[member].backend.view().state, State::Suspect);
}

fn down(pool: &Pool, member: usize) {
    suspect(pool, member);
    refuse(pool, member, Source::Probe);
    assert_eq!(pool.members[member].backend.view().state, State::Down);
}

fn shares(pool: &Pool) -> Vec<f64> {
    pool.shares(NOW).into_iter().map(|(_, now)| (now * 1_000.0).round() / 1_000.0).collect()
}

/// How often each member is chosen for 20,000 fresh clients.
fn picks(pool: &Pool, pins: bool) -> HashMap<usize, f64> {
    let mut rng = Rng::with_seed(7);
    let mut counts = HashMap::new();
    for i in 0..20_000u64 {
        let want = Want { pin: pins.then(|| xxh3_64(&i.to_le_bytes())), trial: Trial::Yes, ..Want::default() };
        match pool.pick(&want, NOW, &mut rng) {
            Choice::Member(m) | Choice::Doubtful(m) => *counts.entry(m).or_default() += 1.0 / 20_000.0,
            _ => {}
        }
    }
    counts
}

#[test]
fn equal_cells_get_equal_shares_however_many_backends_they_have() {
    for balance in [Balance::TwoChoices, Balance::RoundRobin, Balance::LeastConnections] {
        let pool = pool(Policy { balance, ..Policy::default() }, &[(0, 1, 1), (0, 1, 9)]);
        assert_eq!(shares(&pool), [0.5, 0.5]);
        let picks = picks(&pool, false);
        assert!((picks[&0] - 0.5).abs() < 0.02, "{balance:?} {picks:?}");
        assert!((1..10).all(|m| (picks[&m] - 0.5 / 9.0).abs() < 0.01), "{balance:?} {picks:?}");
    }
}

/// One cell is silent, and the other one holds requests too. Long polls show no stall of all.
#[test]
fn what_takes_long_by_nature_is_not_late() {
    for (takes, late) in [(Duration::from_millis(1), true), (Duration::from_secs(30), false)] {
        let pool = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1)]);
        let (uplink, backends) = (&pool.shared.uplink, [0, 1].map(|member: usize| &pool.members[member].backend));
        uplink.set_cells(2, 2);
        (0..2).for_each(|cell| backends[cell].stands_in(cell));
        (0..100).for_each(|_| backends[1].heard(Some(takes), NOW));
        let (since, later) = (NOW + Duration::from_millis(10), NOW + Duration::from_secs(1));
        uplink.connected(backends[0].id, later);
        backends[1].asked(1, since);
        assert_eq!(uplink.vouches_by_answers(backends[0].id, &pool.shared.stall, since, later), !late, "{takes:?}");
    }
}

#[test]
fn weights_of_cells_and_backends_hold() {
    for balance in [Balance::TwoChoices, Balance::RoundRobin] {
        let mut pool = pool(Policy { balance, ..Policy::default() }, &[(0, 3, 2), (0, 1, 1)]);
        pool.members[0].weight = 4;
        assert_eq!(shares(&pool), [0.75, 0.25]);
        let picks = picks(&pool, false);
        if balance == Balance::RoundRobin {
            assert!((picks[&0] - 0.6).abs() < 0.01 && (picks[&1] - 0.15).abs() < 0.01, "{picks:?}");
        }
        assert!(picks[&0] > 2.0 * picks[&1], "{picks:?}");
    }
}

/// It has no connection, and the other one hundreds.
#[test]
fn a_backend_that_has_a_part_of_its_share_gets_no_more_by_having_few_connections() {
    let pool = pool(Policy { balance: Balance::LeastConnections, ..Policy::default() }, &[(0, 1, 2)]);
    let _held: Vec<_> = (0..100).map(|_| pool.members[0].backend.in_flight.take(u32::MAX)).collect();
    pool.members[1].backend.keep_share(0.1);
    let picks = picks(&pool, false);
    assert!((picks[&1] - 0.1).abs() < 0.02, "{picks:?}");
}

#[test]
fn round_robin_turns_are_smooth() {
    assert_eq!(turns(&[7, 8], &[2.0, 1.0]).len(), 3);
    let order = turns(&[0, 1], &[3.0, 1.0]);
    assert_eq!(order.iter().filter(|m| **m == 0).count(), 3);
    let long = turns(&(0..1_000).collect::<Vec<_>>(), &(0..1_000).map(|i| 1.0 + i as f64).collect::<Vec<_>>());
    assert!(long.len() <= 6_000, "{}", long.len());
}

#[test]
fn a_cell_with_a_tenth_of_its_backends_gets_its_share_as_the_design_says() {
    let pool = pool(Policy::default(), &[(0, 1, 10), (0, 1, 10)]);
    (1..10).for_each(|m| down(&pool, m));
    assert_eq!(shares(&pool), [0.123, 0.877]);
    let picks = picks(&pool, false);
    let fair = 1.0 / 11.0;
    assert!(picks.values().all(|share| *share < 1.5 * fair), "{picks:?}");
}

#[test]
fn the_next_tier_takes_what_a_tier_cannot() {
    let pool = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1), (1, 1, 1)]);
    assert_eq!(shares(&pool), [0.5, 0.5, 0.0]);
    down(&pool, 0);
    assert_eq!(shares(&pool), [0.0, 0.5, 0.5]);
    down(&pool, 1);
    assert_eq!(shares(&pool), [0.0, 0.0, 1.0]);
}

#[test]
fn a_drain_moves_share_inside_the_tier_and_opens_the_next_only_when_nothing_is_left() {
    let pool = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1), (1, 1, 1)]);
    let drain = |m: usize| {
        pool.members[m].backend.drained.store(true, Relaxed);
        pool.shared.changed();
    };
    drain(0);
    assert_eq!(shares(&pool), [0.0, 1.0, 0.0]);
    assert!(!picks(&pool, false).contains_key(&0));
    drain(1);
    assert_eq!(shares(&pool), [0.0, 0.0, 1.0]);
}

#[test]
fn suspects_come_last_in_their_tier_and_before_the_next() {
    let pool = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1), (1, 1, 1)]);
    suspect(&pool, 0);
    let mut rng = Rng::with_seed(1);
    let pick =
        |tried: &[usize], rng: &mut Rng| pool.pick(&Want { tried, trial: Trial::Yes, ..Want::default() }, NOW, rng);
    let first = picks(&pool, false);
    assert!(!first.contains_key(&0) && first.contains_key(&2), "{first:?}");
    assert_eq!(pick(&[1], &mut rng), Choice::Member(2));
    assert_eq!(pick(&[1, 2], &mut rng), Choice::Doubtful(0));
    assert_eq!(pick(&[1, 2, 0], &mut rng), Choice::Nothing);
}

#[test]
fn a_race_goes_to_another_cell_first() {
    let pool = pool(Policy::default(), &[(0, 1, 4), (0, 1, 1)]);
    let mut rng = Rng::with_seed(1);
    for _ in 0..100 {
        let want = Want { tried: &[0], racing: Some(0), trial: Trial::Yes, ..Want::default() };
        assert_eq!(pool.pick(&want, NOW, &mut rng), Choice::Member(4));
        let want = Want { tried: &[0, 4], racing: Some(0), trial: Trial::Yes, ..Want::default() };
        assert!(matches!(pool.pick(&want, NOW, &mut rng), Choice::Member(1..=3)));
    }
}

#[test]
fn when_all_are_down_all_are_tried_or_none() {
    let all = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1)]);
    let none = pool(Policy { when_all_down: WhenAllDown::Refuse, ..Policy::default() }, &[(0, 1, 1), (0, 1, 1)]);
    for pool in [&all, &none] {
        down(pool, 0);
        down(pool, 1);
    }
    let picks_all = picks(&all, false);
    assert!(picks_all.contains_key(&0) && picks_all.contains_key(&1), "{picks_all:?}");
    assert!(picks(&none, false).is_empty());
    let mut rng = Rng::with_seed(1);
    assert_eq!(all.pick(&Want { tried: &[0], trial: Trial::Yes, ..Want::default() }, NOW, &mut rng), Choice::Member(1));
}

#[test]
fn who_has_tried_all_others_tries_those_that_are_down() {
    let operator = health::Policy { asks_operator: true, ..health::Policy::default() };
    let kinds = [
        (Policy::default(), Choice::Member(0)),
        (Policy { when_all_down: WhenAllDown::Refuse, ..Policy::default() }, Choice::Nothing),
        (Policy { health: operator, ..Policy::default() }, Choice::Nothing),
    ];
    for (policy, wanted) in kinds {
        let mut pool = pool(policy, &[(0, 1, 1), (0, 1, 1), (0, 1, 1)]);
        down(&pool, 0);
        suspect(&pool, 1);
        let pick =
            |pool: &Pool, tried: &[usize]| pool.pick(&Want { tried, ..Want::default() }, NOW, &mut Rng::with_seed(1));
        assert_eq!([pick(&pool, &[2]), pick(&pool, &[1, 2])], [Choice::Doubtful(1), wanted]);
        assert_eq!(pool.has_untried(&[1, 2], true, |_| true), wanted != Choice::Nothing);
        assert!(!pool.has_untried(&[1, 2], false, |_| true), "it does not err, it refuses");
        // What is too much for the others is not for them.
        pool.members[2].max_connections = 0;
        assert_eq!(pick(&pool, &[1]), Choice::Full);
    }
}

#[test]
fn a_full_backend_is_skipped_and_all_full_is_said() {
    let mut pool = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1)]);
    pool.members[0].max_connections = 0;
    let counts = picks(&pool, false);
    assert!(!counts.contains_key(&0) && (counts[&1] - 1.0).abs() < 1e-6, "{counts:?}");
    pool.members[1].max_connections = 0;
    let mut rng = Rng::with_seed(1);
    assert_eq!(pool.pick(&Want { trial: Trial::Yes, ..Want::default() }, NOW, &mut rng), Choice::Full);
}

#[test]
fn pinned_clients_stay_and_only_those_of_a_failed_cell_move() {
    let pool = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 3), (0, 1, 3), (0, 1, 3)]);
    let mut rng = Rng::with_seed(3);
    let mut place = |pool: &Pool, i: u64| match pool.pick(
        &Want { pin: Some(xxh3_64(&i.to_le_bytes())), trial: Trial::Yes, ..Want::default() },
        NOW,
        &mut rng,
    ) {
        Choice::Member(m) | Choice::Doubtful(m) => m,
        other => panic!("{other:?}"),
    };
    let before: Vec<usize> = (0..3_000).map(|i| place(&pool, i)).collect();
    assert_eq!(before, (0..3_000).map(|i| place(&pool, i)).collect::<Vec<_>>());
    for cell in 0..3 {
        let share = before.iter().filter(|m| **m / 3 == cell).count() as f64 / 3_000.0;
        assert!((share - 1.0 / 3.0).abs() < 0.04, "{share}");
    }
    (0..3).for_each(|m| down(&pool, m));
    for (i, old) in before.iter().enumerate() {
        let new = place(&pool, i as u64);
        if *old >= 3 { assert_eq!(new, *old, "client {i}") } else { assert!(new >= 3) }
    }
}

#[test]
fn a_suspect_backend_keeps_its_pinned_clients_with_a_race_beside() {
    let pool = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 1), (0, 1, 1)]);
    let of_a: Vec<u64> = (0..200u64)
        .map(|i| xxh3_64(&i.to_le_bytes()))
        .filter(|pin| {
            pool.pick(&Want { pin: Some(*pin), trial: Trial::Yes, ..Want::default() }, NOW, &mut Rng::with_seed(1))
                == Choice::Member(0)
        })
        .collect();
    assert!(of_a.len() > 60);
    suspect(&pool, 0);
    for pin in of_a {
        let want = Want { pin: Some(pin), trial: Trial::Yes, ..Want::default() };
        assert_eq!(pool.pick(&want, NOW, &mut Rng::with_seed(1)), Choice::Doubtful(0));
    }
}

#[test]
fn a_suspect_that_answers_nobody_keeps_no_pinned_clients() {
    let pool = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 1), (0, 1, 1)]);
    suspect(&pool, 0);
    pool.members[0].backend.silence.wrote(1, NOW);
    let doubtful = |now: Time| {
        let pick = |pin| pool.pick(&Want { pin: Some(pin), ..Want::default() }, now, &mut Rng::with_seed(1));
        (0..200u64).filter(|i| pick(xxh3_64(&i.to_le_bytes())) == Choice::Doubtful(0)).count()
    };
    assert!(doubtful(NOW) > 60);
    assert_eq!(doubtful(NOW + ANSWERS_NOBODY), 0);
}

#[test]
fn a_returning_backend_gets_its_share_of_its_pinned_clients() {
    let pool = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 1), (0, 1, 1)]);
    let before = picks(&pool, true)[&0];
    down(&pool, 0);
    let later = NOW + Duration::from_secs(2);
    for _ in 0..2 {
        pool.members[0].backend.success(&pool.policy.health, Source::Probe, Depth::Connect, later, later);
    }
    assert_eq!(pool.members[0].backend.view().state, State::Returning);
    let share = |at: Time| {
        let mut rng = Rng::with_seed(7);
        let pins = (0..20_000u64).map(|i| xxh3_64(&i.to_le_bytes()));
        let of_a = pins.filter(|pin| {
            pool.pick(&Want { pin: Some(*pin), trial: Trial::Yes, ..Want::default() }, at, &mut rng)
                == Choice::Member(0)
        });
        of_a.count() as f64 / 20_000.0
    };
    let (early, middle, late) =
        (share(later), share(later + Duration::from_secs(4)), share(later + Duration::from_secs(10)));
    assert!(
        early < 0.2 * before && middle > early && middle < before && (late - before).abs() < 0.01,
        "{early} {middle} {late} {before}"
    );
}

#[test]
fn maglev_moves_few_clients_when_a_member_comes() {
    let nine = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 9)]);
    let ten = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 10)]);
    let tables = [&nine, &ten].map(|pool| Maglev::new(pool.members.iter().map(|m| (m.backend.address, m.weight))));
    let moved = (0..10_000u64)
        .filter(|i| tables[0].lookup(xxh3_64(&i.to_le_bytes())) != tables[1].lookup(xxh3_64(&i.to_le_bytes())));
    let moved = moved.count() as f64 / 10_000.0;
    assert!((0.08..0.2).contains(&moved), "{moved}");
}

#[test]
fn the_alias_table_draws_by_weight() {
    let alias = Alias::new(&[1.0, 0.0, 3.0]);
    let mut rng = Rng::with_seed(5);
    let mut counts = [0u32; 3];
    (0..40_000).for_each(|_| counts[alias.draw(&mut rng)] += 1);
    assert!(counts[1] == 0 && (counts[2] as f64 / 40_000.0 - 0.75).abs() < 0.01, "{counts:?}");
}

#[test]
fn with_affinity_a_drain_opens_no_later_tier_either() {
    let pool = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 12), (0, 1, 12), (1, 1, 1)]);
    for m in 0..12 {
        pool.members[m].backend.drained.store(true, Relaxed);
    }
    pool.shared.changed();
    let counts = picks(&pool, true);
    assert!(!counts.contains_key(&24) && counts.keys().all(|m| *m >= 12), "{counts:?}");
    for m in 0..6 {
        pool.members[m].backend.drained.store(false, Relaxed);
    }
    pool.shared.changed();
    assert!(!picks(&pool, true).contains_key(&24));
}

#[test]
fn with_affinity_the_rest_of_a_cell_shares_its_clients() {
    let pool = pool(Policy { affinity: Affinity::ClientIp, ..Policy::default() }, &[(0, 1, 50), (0, 1, 50)]);
    (5..50).for_each(|m| down(&pool, m));
    let counts = picks(&pool, true);
    let of_rest: Vec<f64> = (0..5).map(|m| counts[&m]).collect();
    let fair = of_rest.iter().sum::<f64>() / 5.0;
    assert!(of_rest.iter().all(|share| *share < 1.5 * fair), "{of_rest:?}");
}

#[test]
fn trials_of_a_whole_pool_are_bounded() {
    let pool = pool(Policy::default(), &[(0, 1, 100), (0, 1, 1)]);
    let blame = health::Blame { prefix: 1, others: false, elsewhere: 0.0, tries_elsewhere: 0 };
    for m in 0..100 {
        for ms in [0, 20] {
            let at = NOW + Duration::from_millis(ms);
            let evidence =
                Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen: Seen::Reset(blame), began: at };
            pool.members[m].backend.observe(&pool.policy.health, &evidence, at);
        }
        assert_eq!(pool.members[m].backend.view().state, State::Suspect);
    }
    let mut rng = Rng::with_seed(1);
    let at = NOW + Duration::from_secs(2);
    let trials = (0..2_000)
        .filter(|_| pool.pick(&Want { trial: Trial::Yes, ..Want::default() }, at, &mut rng) != Choice::Member(100))
        .count();
    assert_eq!(trials, 10);
}

#[test]
fn what_hangs_at_a_silent_backend_keeps_no_trial_away() {
    let policy = Policy {
        health: health::Policy { probe_depth: Some(Depth::Connect), ..Default::default() },
        ..Policy::default()
    };
    let pool = pool(policy, &[(0, 1, 1), (0, 1, 1)]);
    let backend = &pool.members[0].backend;
    let evidence = Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen: Seen::Mute, began: NOW };
    for looks in 0..10 {
        backend.observe(&pool.policy.health, &evidence, NOW + Duration::from_millis(10) * looks);
    }
    assert_ne!(backend.view().state, State::Up);
    (0..16).for_each(|_| backend.silence.wrote(1, NOW));
    backend.limit_waiting(16);
    let mut rng = Rng::with_seed(1);
    let later = NOW + Duration::from_secs(20);
    let picked = (0..50).filter(|_| {
        let want = Want { trial: Trial::Yes, ..Want::default() };
        pool.pick(&want, later, &mut rng) == Choice::Member(0)
    });
    assert_eq!(picked.count(), 1, "one trial, and nobody else");
}

#[test]
fn who_can_goes_elsewhere_while_a_backend_owes_its_clients_their_first_bytes() {
    const MS: Duration = Duration::from_millis(1);
    let hanging_for = |cells: &[(u8, u32, usize)], policy: Policy, owing: &[usize], time: Duration| {
        let pool = pool(policy, cells);
        for member in &pool.members {
            (0..100).for_each(|_| member.backend.heard(Some(MS * 2), NOW - time));
        }
        for &member in owing {
            (0..3).for_each(|_| pool.members[member].backend.silence.wrote(1, NOW - time));
        }
        pool
    };
    let hanging = |cells: &_, policy, owing: &_| hanging_for(cells, policy, owing, MS * 20);
    let share = |pool: &Pool, member: usize| picks(pool, false).get(&member).copied().unwrap_or(0.0);
    let two = [(0, 1, 1), (0, 1, 1)];

    let one_hangs = hanging(&two, Policy::default(), &[0]);
    assert_eq!(share(&one_hangs, 0), 0.0);
    one_hangs.members[0].backend.heard(Some(MS * 20), NOW);
    assert!(share(&one_hangs, 0) > 0.48, "the next first byte ends it");
    for (time, some) in [(4, true), (10, false), (900, false), (1_000, true)] {
        let pool = hanging_for(&two, Policy::default(), &[0], MS * time);
        assert_eq!(share(&pool, 0) > 0.0, some, "{time} ms");
    }
    assert!(share(&hanging(&two, Policy::default(), &[0, 1]), 0) > 0.48, "nobody is better");
    let alike = hanging(&two, Policy::default(), &[0]);
    alike.members[1].backend.heard(Some(MS * 20), NOW);
    assert!(share(&alike, 0) > 0.48, "the other one answers no sooner");
    assert!(
        share(&hanging(&[(0, 1, 1), (1, 1, 1)], Policy::default(), &[0]), 0) > 0.99,
        "no reason to use the next tier"
    );
    let ignored = Policy { first_byte: FirstByte::Ignore, ..Policy::default() };
    assert!(share(&hanging(&two, ignored, &[0]), 0) > 0.48, "where first bytes say nothing");
    let siblings = hanging(&[(0, 1, 2), (0, 1, 2)], Policy::default(), &[0]);
    assert!(share(&siblings, 0) == 0.0 && share(&siblings, 1) > 0.35, "its own cell has another");
}

#[test]
fn sessions_are_spare_where_others_are_short_of_theirs() {
    let spare = |pool: &Pool, used: &[f64]| -> Vec<i64> {
        pool.spare(used, NOW).into_iter().map(|spare| spare.max(0.0).floor() as i64).collect()
    };
    let two = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1)]);
    assert_eq!(spare(&two, &[0.0, 1_000.0]), [0, 450]);
    assert_eq!(spare(&two, &[495.0, 505.0]), [0, 0]);
    assert_eq!(spare(&two, &[1.0, 6.0]), [0, 0], "that may be chance");
    two.members[0].backend.drained.store(true, Relaxed);
    two.shared.changed();
    assert_eq!(spare(&two, &[0.0, 1_000.0]), [0, 0], "what is drained is its share");

    let doubted = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1)]);
    down(&doubted, 0);
    assert_eq!(spare(&doubted, &[0.0, 1_000.0]), [0, 0]);
    suspect(&doubted, 1);
    assert_eq!(spare(&doubted, &[0.0, 1_000.0]), [0, 0], "nobody is better");

    let full = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1)]);
    full.members[0].backend.limit_waiting(0);
    assert_eq!(spare(&full, &[0.0, 1_000.0]), [0, 0], "the other has no room");
    let tiers = pool(Policy::default(), &[(0, 1, 1), (1, 1, 1)]);
    assert_eq!(spare(&tiers, &[600.0, 400.0]), [0, 400], "the next tier is not needed any more");
}

#[test]
fn a_hiccup_moves_no_more_than_the_other_cells_share() {
    let pool = pool(Policy::default(), &[(0, 99, 1), (0, 1, 1)]);
    for member in &pool.members {
        (0..100).for_each(|_| member.backend.heard(Some(Duration::from_millis(2)), NOW - Duration::from_millis(20)));
    }
    (0..3).for_each(|_| pool.members[0].backend.silence.wrote(1, NOW - Duration::from_millis(20)));
    let picks = picks(&pool, false);
    assert!(picks[&1] < 0.03, "{picks:?}");
}

#[test]
fn who_was_sent_to_a_limited_backend_counts_before_he_has_written() {
    let pool = pool(Policy::default(), &[(0, 1, 1)]);
    pool.members[0].backend.limit_waiting(10);
    let mut rng = Rng::with_seed(7);
    let mut sent = Vec::new();
    while sent.len() < 100 {
        let Choice::Member(member) = pool.pick(&Want::default(), NOW, &mut rng) else { break };
        sent.push(pool.take_place(member, NOW).expect("there is a place"));
    }
    assert_eq!(sent.len(), 10, "in one moment no more than the limit");
    pool.members[0].backend.silence.forget(NOW + Duration::from_secs(1));
    assert_eq!(pool.pick(&Want::default(), NOW, &mut rng), Choice::Member(0), "they never came");
}

#[test]
fn of_ramp_and_pace_the_lesser_counts() {
    let pool = pool(Policy::default(), &[(0, 1, 1), (0, 1, 1)]);
    let backend = &pool.members[0].backend;
    backend.comes_late(&pool.policy.health, NOW);
    let share = |pace: f64, ramped: Duration| {
        backend.keep_share(pace);
        backend.share_now(&pool.policy.health, NOW + ramped)
    };
    let begun = share(1.0, Duration::ZERO);
    assert!((begun - 0.1).abs() < 0.001, "{begun}");
    assert_eq!(share(0.03, Duration::ZERO), 0.03);
    assert_eq!(share(0.5, Duration::from_secs(9)), 0.5);
}
