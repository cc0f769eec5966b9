//! More than the backends can do, where it is declared what that is: what is served is served in time, and the rest is told at
//! once. The drills have the same without a declaration.

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

fn rig() -> Rig {
    let backends: Vec<Backend> = ["a", "b", "c"].map(Backend::start).into();
    backends.iter().for_each(|backend| backend.set(WORK));
    let cells: Vec<String> = backends
        .iter()
        .zip(["a", "b", "c"])
        .map(|(backend, name)| format!("{name}: {{ capacity: 200/s, backends: [ '{}' ] }}", backend.address))
        .collect();
    let proxy = Proxy::start(&format!(
        "pools:\n  shop: {{ cells: {{ {} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, http: {{ routes: [ {{ pool: shop }} ] }} }} ]",
        cells.join(", ")
    ));
    for backend in &backends {
        proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    }
    Rig { backends, proxy }
}

/// 480 requests a second for 18 seconds; at 6 s one of three cells dies, at 12 s another.
fn half_the_world(rig: &Rig) -> Samples {
    let start = Instant::now();
    let until =
        |at: f64| std::thread::sleep((start + Duration::from_secs_f64(at)).saturating_duration_since(Instant::now()));
    let manner = Manner { kept: true, ..Manner::default() };
    let load = Load::start_with(None, rig.proxy.address(0), 480.0, Duration::from_secs(18), manner);
    until(6.0);
    rig.backends[0].set(Mode::Refuse);
    until(12.0);
    rig.backends[1].set(Mode::Refuse);
    load.finish()
}

fn judge(samples: &Samples) {
    let calm = samples.between(2.0, 6.0).good();
    let calm_p99 = calm.quantile(0.99).as_secs_f64() * 1e3;
    println!("declared: calm p99 {calm_p99:.0} ms, {} failed", samples.between(1.0, 6.0).failed());
    for (from, to, cells) in [(7.0, 12.0, 2.0), (13.0, 18.0, 1.0)] {
        let (served, refused) = (samples.between(from, to).good(), samples.between(from, to).bad());
        let goodput = served.0.len() as f64 / (to - from);
        let p99 = served.quantile(0.99).as_secs_f64() * 1e3;
        println!(
            "declared: {cells} cells: {goodput:.0}/s of {:.0}, p99 {p99:.0} ms, refused after {:.1} ms (p99), {:?}",
            CAN * cells,
            refused.quantile(0.99).as_secs_f64() * 1e3,
            refused.errors()
        );
        assert!(goodput >= CAN * cells * 0.9, "declared: {cells} cells: {goodput}");
        assert!(p99 <= calm_p99 * 3.0, "declared: {cells} cells: {p99} ms, calm {calm_p99} ms");
    }
}

#[test]
#[ignore = "18 s; make show"]
fn survivors_do_what_they_can_by_what_was_declared() {
    judge(&half_the_world(&rig()));
}
