//! The machine step by step: each rule of the module's doc, and the ways in which it must not move.

use super::*;

struct Bench {
    health: Health,
    policy: Policy,
    now: Time,
}

impl Bench {
    fn new(policy: Policy) -> Bench {
        let now = Time(100_000_000);
        let mut bench = Bench { health: Health::new(&policy, now), policy, now };
        bench.ok(Source::Probe, policy.probe_depth.unwrap_or(Depth::Connect));
        assert_eq!(bench.health.state(), State::Up);
        bench
    }

    fn after(&mut self, ms: u64) -> &mut Bench {
        self.now = self.now + Duration::from_millis(ms);
        self
    }

    fn see(&mut self, source: Source, depth: Depth, seen: Seen) -> Option<State> {
        let evidence = Evidence { source, depth, seen, began: self.now };
        self.health.step(&self.policy, &evidence, self.now).map(|transition| transition.to)
    }

    fn ok(&mut self, source: Source, depth: Depth) -> Option<State> {
        self.see(source, depth, Seen::Success { hits: 1 })
    }

    fn refused(&mut self) -> Option<State> {
        self.see(Source::Traffic, Depth::Connect, Seen::Refused)
    }

    fn silent(&mut self) -> Option<State> {
        self.see(Source::Traffic, Depth::Connect, Seen::Silent)
    }

    fn reset(&mut self, prefix: u32, others: bool, elsewhere: f64) -> Option<State> {
        self.see(
            Source::Traffic,
            Depth::FirstByte,
            Seen::Reset(Blame { prefix, others, elsewhere, tries_elsewhere: 0 }),
        )
    }

    /// Takes it down by refusal.
    fn down(&mut self) {
        self.refused();
        self.refused();
        assert_eq!(self.see(Source::Probe, Depth::Connect, Seen::Refused), Some(State::Down));
    }

    /// Waits out the hold and brings it back to `up`.
    fn back(&mut self) {
        let (_, until) = self.health.hold();
        self.now = self.now.max(until);
        self.ok(Source::Probe, Depth::Connect);
        let (_, until) = self.health.hold();
        self.now = self.now.max(until);
        assert_eq!(self.ok(Source::Probe, Depth::Connect), Some(State::Returning));
        self.after(10_000);
        assert_eq!(self.ok(Source::Probe, Depth::Connect), Some(State::Up));
    }
}

#[test]
fn two_refusals_in_a_row_make_it_suspect_and_an_agreeing_probe_down() {
    let mut bench = Bench::new(Policy::default());
    assert_eq!(bench.refused(), None);
    bench.ok(Source::Traffic, Depth::Connect);
    assert_eq!(bench.refused(), None);
    assert_eq!(bench.refused(), Some(State::Suspect));
    assert_eq!(bench.see(Source::Probe, Depth::Connect, Seen::Refused), Some(State::Down));
    assert!(bench.health.seen_by_traffic());
}

#[test]
fn a_suspicion_that_a_probe_denies_is_over() {
    let mut bench = Bench::new(Policy::default());
    bench.refused();
    bench.refused();
    assert_eq!(bench.after(100).ok(Source::Probe, Depth::Connect), Some(State::Up));
}

#[test]
fn silence_needs_three_in_a_row_spread_over_fifty_milliseconds() {
    let mut bench = Bench::new(Policy::default());
    assert_eq!((bench.silent(), bench.silent(), bench.silent(), bench.silent()), (None, None, None, None));
    assert_eq!(bench.after(50).silent(), Some(State::Suspect));
    let mut bench = Bench::new(Policy::default());
    bench.silent();
    bench.after(60).silent();
    bench.ok(Source::Traffic, Depth::Connect);
    assert_eq!(bench.after(60).silent(), None);
}

#[test]
fn on_a_path_that_loses_a_fifth_more_silence_is_needed() {
    let mut bench = Bench::new(Policy::default());
    for i in 0..5_000 {
        bench.after(20);
        if i % 5 == 0 {
            bench.silent()
        } else {
            bench.ok(Source::Traffic, Depth::Connect)
        };
    }
    assert_eq!(bench.health.state(), State::Up);
    assert!((0.2..=0.3).contains(&bench.health.loss()), "{}", bench.health.loss());
    bench.ok(Source::Traffic, Depth::Connect);
    let needed = (1..).find(|_| bench.after(20).silent().is_some()).unwrap_or(0);
    assert!((6..=8).contains(&needed), "{needed}");
    // One silent probe agrees with a suspicion only on a path that does not lose by itself.
    assert_eq!(bench.see(Source::Probe, Depth::Connect, Seen::Silent), None);
}

#[test]
fn a_tcp_probe_never_clears_a_reset_after_accept() {
    let mut bench = Bench::new(Policy::default());
    bench.reset(1, false, 0.0);
    assert_eq!(bench.after(10).reset(1, false, 0.0), Some(State::Suspect));
    for _ in 0..100 {
        assert_eq!(bench.after(100).ok(Source::Probe, Depth::Connect), None);
        assert_eq!(bench.ok(Source::Traffic, Depth::Connect), None);
    }
    assert!(bench.health.trial_at(&bench.policy).is_some_and(|at| at <= bench.now));
    assert_eq!(bench.ok(Source::Traffic, Depth::FirstByte), Some(State::Returning));
}

#[test]
fn a_probe_that_goes_deep_enough_clears_it_and_no_trial_is_due() {
    let mut bench = Bench::new(Policy { probe_depth: Some(Depth::Answer), ..Policy::default() });
    bench.reset(1, false, 0.0);
    assert_eq!(bench.after(10).reset(1, false, 0.0), Some(State::Suspect));
    assert_eq!(bench.health.trial_at(&bench.policy), None);
    assert_eq!(bench.after(10).ok(Source::Probe, Depth::Answer), Some(State::Up));
}

#[test]
fn one_prefix_gives_half_of_what_is_needed_while_there_are_others() {
    let mut bench = Bench::new(Policy::default());
    for _ in 0..100 {
        assert_eq!(bench.after(20).reset(7, true, 0.0), None);
    }
    assert_eq!(bench.after(20).reset(8, true, 0.0), Some(State::Suspect));
}

#[test]
fn what_a_prefix_meets_elsewhere_too_needs_many_more() {
    let mut bench = Bench::new(Policy::default());
    for n in 1..14 {
        assert_eq!(bench.after(20).reset(7, false, 0.5), None, "{n}");
    }
    assert_eq!(bench.after(20).reset(7, false, 0.5), Some(State::Suspect));
}

#[test]
fn trials_wait_longer_after_each_failure_and_at_most_eight_seconds() {
    let mut bench = Bench::new(Policy::default());
    bench.reset(1, false, 0.0);
    bench.after(10).reset(1, false, 0.0);
    let mut pauses = Vec::new();
    for _ in 0..6 {
        let at = bench.health.trial_at(&bench.policy).expect("a trial will be due");
        pauses.push(at.since(bench.now).as_secs());
        bench.now = at;
        bench.health.trial_begins(at);
        bench.reset(1, false, 0.0);
    }
    assert_eq!(pauses, [1, 2, 4, 8, 8, 8]);
}

#[test]
fn one_trial_that_goes_on_being_silent_postpones_the_next_once() {
    let mut bench = Bench::new(Policy::default());
    assert_eq!(bench.see(Source::Traffic, Depth::FirstByte, Seen::Mute), Some(State::Suspect));
    assert_eq!(bench.after(1).see(Source::Traffic, Depth::FirstByte, Seen::Mute), Some(State::Down));
    let at = bench.health.trial_at(&bench.policy).expect("a trial will be due");
    bench.now = at;
    bench.health.trial_begins(at);
    for _ in 0..500 {
        bench.after(10);
        let evidence = Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen: Seen::Mute, began: at };
        bench.health.step(&bench.policy, &evidence, bench.now);
    }
    assert!(bench.health.trial_at(&bench.policy).expect("a trial will be due") < at + Duration::from_secs(5));
}

#[test]
fn failed_probes_alone_take_it_down_after_fall_and_blame_no_traffic() {
    let mut bench = Bench::new(Policy { fall: 3, probe_depth: Some(Depth::Answer), ..Policy::default() });
    assert_eq!(bench.see(Source::Probe, Depth::Answer, Seen::Wrong), None);
    assert_eq!(bench.see(Source::Probe, Depth::Answer, Seen::Wrong), None);
    assert_eq!(bench.see(Source::Probe, Depth::Answer, Seen::Wrong), Some(State::Down));
    assert!(!bench.health.seen_by_traffic());
    // Traffic that connects does not contradict what was seen deeper.
    assert_eq!(bench.after(5_000).ok(Source::Traffic, Depth::Connect), None);
}

#[test]
fn a_return_waits_for_hold_and_rise_and_goes_by_a_ramp() {
    let mut bench = Bench::new(Policy::default());
    bench.down();
    assert_eq!(bench.after(500).ok(Source::Probe, Depth::Connect), None);
    assert_eq!(bench.after(400).ok(Source::Probe, Depth::Connect), None);
    assert_eq!(bench.after(200).ok(Source::Probe, Depth::Connect), Some(State::Returning));
    assert_eq!(bench.after(9_000).ok(Source::Traffic, Depth::Connect), None);
    assert_eq!(bench.after(1_000).ok(Source::Traffic, Depth::Connect), Some(State::Up));
    assert!((ramp_share(Time(0), Policy::default().ramp, Time(5_000_000)) - 0.55).abs() < 1e-9);
}

#[test]
fn a_relapse_doubles_the_hold_up_to_the_longest_and_calm_halves_it() {
    let mut bench = Bench::new(Policy::default());
    let mut holds = Vec::new();
    for _ in 0..8 {
        bench.down();
        holds.push(bench.health.hold().0.as_secs());
        let (_, until) = bench.health.hold();
        bench.now = until;
        bench.ok(Source::Probe, Depth::Connect);
        let must = bench.health.must_be_steady.as_millis() as u64;
        bench.after(must).ok(Source::Probe, Depth::Connect);
        assert_eq!(bench.health.state(), State::Returning);
        bench.after(300);
    }
    assert_eq!(holds, [1, 2, 4, 8, 16, 32, 60, 60]);
    bench.down();
    bench.back();
    bench.after(3_600_000);
    bench.down();
    assert_eq!(bench.health.hold().0.as_secs(), 1);
}

#[test]
fn one_that_fails_and_works_in_turn_stays_out_until_it_no_longer_does() {
    for (period, phase) in [(3_500, 0), (3_500, 400), (3_500, 900), (2_000, 300), (8_000, 600)] {
        let mut bench = Bench::new(Policy::default());
        bench.after(phase);
        let (mut downs, mut back) = (0, None);
        // Five minutes of it, then none. A probe each second, and clients while there are any.
        for tick in 0..4_000_u64 {
            bench.after(100);
            let ill = tick < 3_000 && tick * 100 % period < period / 2;
            let before = bench.health.state();
            if before != State::Down {
                if ill {
                    bench.refused()
                } else {
                    bench.ok(Source::Traffic, Depth::Answer)
                };
            }
            if tick % 10 == 0 {
                let seen = if ill { Seen::Refused } else { Seen::Success { hits: 1 } };
                bench.see(Source::Probe, Depth::Connect, seen);
            }
            downs += u32::from(before != State::Down && bench.health.state() == State::Down);
            if tick >= 3_000 && bench.health.state() == State::Returning {
                back.get_or_insert(tick - 3_000);
            }
        }
        assert!(downs <= 4, "every {period} ms from {phase}: down {downs} times");
        let within = period / 100 + 40;
        assert!(back.is_some_and(|back| back <= within), "every {period} ms from {phase}: {back:?} of {within}");
    }
}

#[test]
fn evidence_from_before_the_present_state_changes_nothing() {
    let mut bench = Bench::new(Policy::default());
    let before = bench.now;
    bench.after(100).down();
    bench.back();
    for _ in 0..10 {
        let evidence = Evidence { source: Source::Traffic, depth: Depth::Connect, seen: Seen::Refused, began: before };
        assert_eq!(bench.health.step(&bench.policy, &evidence, bench.now), None);
    }
    let mut bench = Bench::new(Policy::default());
    let before = bench.now;
    bench.after(100).refused();
    bench.refused();
    let evidence =
        Evidence { source: Source::Traffic, depth: Depth::Answer, seen: Seen::Success { hits: 1 }, began: before };
    assert_eq!(bench.health.step(&bench.policy, &evidence, bench.now), None);
    assert_eq!(bench.health.state(), State::Suspect);
}

#[test]
fn without_a_probe_a_backend_begins_up_and_comes_back_by_trials() {
    let mut bench = Bench::new(Policy { probe_depth: None, ..Policy::default() });
    for _ in 0..4 {
        bench.after(10).refused();
    }
    assert_eq!(bench.health.state(), State::Down);
    let at = bench.health.trial_at(&bench.policy).expect("a trial is the only way back");
    assert!(at >= bench.health.hold().1);
    bench.now = at;
    bench.ok(Source::Traffic, Depth::Connect);
    assert_eq!(bench.ok(Source::Traffic, Depth::Connect), Some(State::Returning));
}

#[test]
fn detection_is_measured_from_the_first_failure() {
    let mut bench = Bench::new(Policy::default());
    bench.refused();
    bench.after(40);
    let evidence = Evidence { source: Source::Traffic, depth: Depth::Connect, seen: Seen::Refused, began: bench.now };
    let transition = bench.health.step(&bench.policy, &evidence, bench.now).expect("suspect");
    assert_eq!(transition.detected, Some(Duration::from_millis(40)));
}

#[test]
fn a_probe_of_another_port_does_not_deny_what_traffic_saw() {
    let mut bench = Bench::new(Policy { probe_elsewhere: true, ..Policy::default() });
    bench.refused();
    assert_eq!(bench.refused(), Some(State::Suspect));
    assert_eq!(bench.after(100).ok(Source::Probe, Depth::Connect), None);
    assert!(bench.health.trial_at(&bench.policy).is_some());
    assert_eq!(bench.after(100).ok(Source::Traffic, Depth::Connect), Some(State::Up));
}

#[test]
fn a_probe_that_denies_what_comes_back_loses_its_say_until_it_agrees() {
    let mut bench = Bench::new(Policy { probe_depth: Some(Depth::Answer), ..Policy::default() });
    let doubt = |bench: &mut Bench| {
        bench.after(100).reset(1, false, 0.0);
        bench.after(10).reset(1, false, 0.0)
    };
    assert_eq!(doubt(&mut bench), Some(State::Suspect));
    assert_eq!(bench.after(10).ok(Source::Probe, Depth::Answer), Some(State::Up));
    assert_eq!(doubt(&mut bench), Some(State::Suspect));
    assert_eq!(bench.after(10).ok(Source::Probe, Depth::Answer), None);
    assert!(bench.health.trial_at(&bench.policy).is_some());
    assert_eq!(bench.after(10).see(Source::Probe, Depth::Answer, Seen::Wrong), Some(State::Down));
    assert!(bench.health.trial_at(&bench.policy).is_none(), "a probe that agreed may bring it back");
}

#[test]
fn another_policy_leaves_nothing_that_cannot_be_cleared() {
    let mut bench = Bench::new(Policy { probe_depth: Some(Depth::Answer), ..Policy::default() });
    bench.see(Source::Probe, Depth::Answer, Seen::Wrong);
    assert_eq!(bench.see(Source::Probe, Depth::Answer, Seen::Wrong), Some(State::Down));
    bench.policy.probe_depth = None;
    let now = bench.now;
    bench.health.adopt(&bench.policy, now);
    bench.now = bench.health.trial_at(&bench.policy).expect("trials are the way back");
    bench.ok(Source::Traffic, Depth::FirstByte);
    assert_eq!(bench.ok(Source::Traffic, Depth::FirstByte), Some(State::Returning));
}

#[test]
fn answers_to_clients_clear_probes_that_hang_before_the_first_byte() {
    let mut bench = Bench::new(Policy { probe_depth: Some(Depth::Answer), ..Policy::default() });
    for _ in 0..10 {
        assert_eq!(bench.after(1_000).see(Source::Probe, Depth::FirstByte, Seen::Silent), None);
        assert_eq!(bench.health.open_run(), Some(Depth::FirstByte));
        bench.ok(Source::Traffic, Depth::FirstByte);
    }
}

#[test]
fn one_stray_reset_does_not_deepen_a_doubt() {
    let mut bench = Bench::new(Policy::default());
    bench.refused();
    bench.refused();
    bench.reset(1, true, 0.0);
    assert_eq!(bench.health.blamed(), Depth::Connect);
    assert_eq!(bench.after(10).ok(Source::Probe, Depth::Connect), Some(State::Up));
}

#[test]
fn errors_that_a_probe_sees_too_are_still_cleared_by_trials_and_not_for_ever_fatal() {
    let mut bench = Bench::new(Policy { probe_depth: Some(Depth::Answer), ..Policy::default() });
    assert_eq!(bench.see(Source::Traffic, Depth::Answer, Seen::Errors), Some(State::Suspect));
    bench.after(20);
    assert_eq!(bench.see(Source::Probe, Depth::Answer, Seen::Wrong), Some(State::Down));
    bench.after(60_000);
    assert_eq!(bench.ok(Source::Probe, Depth::Answer), None, "what clients saw is for clients to clear");
    assert!(bench.health.trial_at(&bench.policy).is_some_and(|at| at <= bench.now), "so one of them is asked");
    for good in 1..=PROOF {
        let to = bench.after(10).ok(Source::Traffic, Depth::Answer);
        assert_eq!(to, (good == PROOF).then_some(State::Returning), "{good}");
    }
}

/// What has only answered errors was there all the time. What was away as well is cold, and has its whole ramp.
#[test]
fn who_returns_from_errors_alone_has_a_third_of_the_ramp() {
    for (also, quick) in [(None, true), (Some((Depth::Connect, Seen::Refused)), false)] {
        let mut bench = Bench::new(Policy::default());
        assert_eq!(bench.see(Source::Traffic, Depth::Answer, Seen::Errors), Some(State::Suspect));
        assert_eq!(bench.after(20).see(Source::Traffic, Depth::Answer, Seen::Errors), Some(State::Down));
        also.into_iter().for_each(|(depth, seen)| _ = bench.after(20).see(Source::Traffic, depth, seen));
        bench.after(60_000);
        (1..PROOF).for_each(|_| assert_eq!(bench.after(10).ok(Source::Traffic, Depth::Answer), None));
        assert_eq!(bench.after(10).ok(Source::Traffic, Depth::Answer), Some(State::Returning));
        let view = View::unpack(bench.health.view().pack());
        assert_eq!((view.quick, view.open_run), (quick, None));
        let third = bench.policy.ramp / 3;
        let share = view.ramp_share(&bench.policy, bench.now + third);
        assert_eq!(share > 0.99, quick, "{share}");
        let up = bench.after(third.as_millis() as u64 + 1).ok(Source::Traffic, Depth::Answer);
        assert_eq!(up, quick.then_some(State::Up));
    }
}

#[test]
fn who_is_doubted_for_errors_is_tried_every_two_seconds_and_for_silence_less_and_less() {
    let pause = |seen: Seen, depth: Depth| {
        let mut bench = Bench::new(Policy { probe_depth: None, ..Policy::default() });
        (0..8).for_each(|_| _ = bench.after(100).see(Source::Traffic, depth, seen));
        bench.health.trial_at(&bench.policy).expect("a trial will be due").since(bench.now)
    };
    assert_eq!(pause(Seen::Errors, Depth::Answer), TRIAL_LONGEST_OF_ERRORS);
    assert_eq!(pause(Seen::Mute, Depth::FirstByte), TRIAL_LONGEST);
}

#[test]
fn one_more_error_takes_back_what_good_answers_proved() {
    let mut bench = Bench::new(Policy::default());
    assert_eq!(bench.see(Source::Traffic, Depth::Answer, Seen::Errors), Some(State::Suspect));
    (1..PROOF).for_each(|_| assert_eq!(bench.after(10).ok(Source::Traffic, Depth::Answer), None));
    assert_eq!(bench.after(10).see(Source::Traffic, Depth::Answer, Seen::Errors), Some(State::Down));
    bench.after(2_000);
    assert_eq!(bench.ok(Source::Traffic, Depth::FirstByte), None, "a first byte is no answer");
    (1..PROOF).for_each(|_| assert_eq!(bench.after(10).ok(Source::Traffic, Depth::Answer), None));
    assert_eq!(bench.after(10).ok(Source::Traffic, Depth::Answer), Some(State::Returning));
}

#[test]
fn a_silence_of_the_whole_backend_is_a_doubt_at_once_and_an_answer_clears_it() {
    let mut bench = Bench::new(Policy::default());
    assert_eq!(bench.see(Source::Traffic, Depth::FirstByte, Seen::Mute), Some(State::Suspect));
    bench.after(10);
    assert_eq!(bench.ok(Source::Probe, Depth::Connect), None, "a handshake does not clear it");
    assert_eq!(bench.ok(Source::Traffic, Depth::FirstByte), Some(State::Up));
}

#[test]
fn failed_handshakes_in_tls_are_told_by_their_name() {
    let mut bench = Bench::new(Policy::default());
    assert_eq!(bench.see(Source::Traffic, Depth::FirstByte, Seen::Tls("expired")), None);
    assert_eq!(bench.after(20).see(Source::Traffic, Depth::FirstByte, Seen::Tls("expired")), Some(State::Suspect));
    assert_eq!(bench.health.cause().map(|cause| cause.kind), Some("expired"));
    assert_eq!(bench.after(20).ok(Source::Probe, Depth::Connect), None);
}

#[test]
fn only_clients_who_are_served_after_a_probe_has_failed_make_it_a_liar() {
    for (served_after, agrees) in [(200, true), (500, false)] {
        let mut bench = Bench::new(Policy::default());
        let failed = bench.now;
        for _ in 0..8 {
            let now = bench.after(250).now;
            // The last client was served while the first probe was under way, or long after it had failed.
            bench.health.denies_probe(failed + Duration::from_millis(served_after), now);
        }
        bench.refused();
        assert_eq!(bench.refused(), Some(State::Suspect));
        assert_eq!(bench.health.trial_at(&bench.policy).is_some(), !agrees);
        let down = bench.see(Source::Probe, Depth::Connect, Seen::Refused);
        assert_eq!(down, agrees.then_some(State::Down));
        if !agrees {
            bench.health.believes_probes();
            assert_eq!(
                bench.after(100).ok(Source::Probe, Depth::Connect),
                Some(State::Up),
                "and believes one that succeeds"
            );
        }
    }
}
