//! More than the backends can do: what is served is served in time, and the rest is told at once.

use std::time::{Duration, Instant};

use crate::support::backend::{Backend, Mode};
use crate::support::load::{Load, Manner, Samples};
use crate::support::proxy::Proxy;

/// Four at once, 20 ms each: 200 a second.
const WORK: Mode = Mode::Work(4, 20);
const CAN: f64 = 200.0;

struct Rig {
    backends: Vec<Backend>,
    proxy: Proxy,
}

fn rig(capacity: &str, face: &str) -> Rig {
    let backends: Vec<Backend> = ["a", "b", "c"].map(Backend::start).into();
    backends.iter().for_each(|backend| backend.set(WORK));
    let cells: Vec<String> = backends
        .iter()
        .zip(["a", "b", "c"])
        .map(|(backend, name)| format!("{name}: {{ {capacity} backends: [ '{}' ] }}", backend.address))
        .collect();
    let proxy = Proxy::start(&format!(
        "pools:\n  shop: {{ cells: {{ {} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, {face} }} ]",
        cells.join(", ")
    ));
    for backend in &backends {
        proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    }
    Rig { backends, proxy }
}

/// 480 requests a second for 18 seconds; at 6 s one of three cells dies, at 12 s another.
fn half_the_world(rig: &Rig, kept: bool) -> Samples {
    let start = Instant::now();
    let until =
        |at: f64| std::thread::sleep((start + Duration::from_secs_f64(at)).saturating_duration_since(Instant::now()));
    let manner = Manner { kept, ..Manner::default() };
    let load = Load::start_with(None, rig.proxy.address(0), 480.0, Duration::from_secs(18), manner);
    until(6.0);
    rig.backends[0].set(Mode::Refuse);
    until(12.0);
    rig.backends[1].set(Mode::Refuse);
    load.finish()
}

fn judge(name: &str, samples: &Samples) {
    let calm = samples.between(2.0, 6.0).good();
    let calm_p99 = calm.quantile(0.99).as_secs_f64() * 1e3;
    println!("{name}: calm p99 {calm_p99:.0} ms, {} failed", samples.between(1.0, 6.0).failed());
    for (from, to, cells) in [(7.0, 12.0, 2.0), (13.0, 18.0, 1.0)] {
        let (served, refused) = (samples.between(from, to).good(), samples.between(from, to).bad());
        let goodput = served.0.len() as f64 / (to - from);
        let p99 = served.quantile(0.99).as_secs_f64() * 1e3;
        println!(
            "{name}: {cells} cells: {goodput:.0}/s of {:.0}, p99 {p99:.0} ms, refused after {:.1} ms (p99), {:?}",
            CAN * cells,
            refused.quantile(0.99).as_secs_f64() * 1e3,
            refused.errors()
        );
        assert!(goodput >= CAN * cells * 0.9, "{name}: {cells} cells: {goodput}");
        assert!(p99 <= calm_p99 * 3.0, "{name}: {cells} cells: {p99} ms, calm {calm_p99} ms");
    }
}

#[test]
#[ignore = "18 s; make show"]
fn survivors_do_what_they_can_by_what_they_showed() {
    let rig = rig("", "http: { routes: [ { pool: shop } ] }");
    judge("learned, http", &half_the_world(&rig, true));
}

#[test]
#[ignore = "18 s; make show"]
fn survivors_do_what_they_can_by_what_was_declared() {
    let rig = rig("capacity: 200/s,", "http: { routes: [ { pool: shop } ] }");
    judge("declared, http", &half_the_world(&rig, true));
}

#[test]
#[ignore = "18 s; make show"]
fn survivors_do_what_they_can_under_tcp() {
    let rig = rig("", "tcp: shop");
    judge("learned, tcp", &half_the_world(&rig, false));
}

/// All cells stall for five seconds under clients that give up after one and try four times.
fn storm(name: &str, face: &str) {
    let rig = rig("", face);
    let start = Instant::now();
    let until =
        |at: f64| std::thread::sleep((start + Duration::from_secs_f64(at)).saturating_duration_since(Instant::now()));
    let manner = Manner { patience: Duration::from_secs(1), tries: 4, ..Manner::default() };
    let load = Load::start_with(None, rig.proxy.address(0), 400.0, Duration::from_secs(18), manner);
    until(5.0);
    rig.backends.iter().for_each(|backend| backend.set(Mode::Stall(4, 20)));
    until(10.0);
    rig.backends.iter().for_each(|backend| backend.set(WORK));
    let samples = load.finish();
    let good = |from: f64, to: f64| {
        let all = samples.between(from, to);
        (all.0.len() - all.failed()) as f64 / (to - from)
    };
    let (before, after) = (good(1.0, 5.0), good(15.0, 18.0));
    let by_second: Vec<u32> = (0..18).map(|at| good(f64::from(at), f64::from(at + 1)) as u32).collect();
    let retries = rig.proxy.metric("sailover_request_retries_total", &[]);
    println!(
        "{name}: good before {before:.0}/s, from 5 s after the stall on {after:.0}/s, {retries} retries of ours; {by_second:?}"
    );
    assert!(after >= before * 0.95, "{name}: {before} before, {after} after");
    assert!(retries <= samples.0.len() as f64 * 0.1);
}

#[test]
#[ignore = "18 s; make show"]
fn a_storm_of_retries_ends_with_its_cause() {
    storm("storm, http", "http: { routes: [ { pool: shop } ] }");
}

#[test]
#[ignore = "20 s; make show"]
fn a_storm_of_retries_ends_with_its_cause_under_tcp() {
    storm("storm, tcp", "tcp: shop");
}
