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

/// Two bursts a second, each gone within a tenth of one: that is no queue that stands.
#[test]
fn a_burst_now_and_then_is_served() {
    let a = Backend::start("a");
    let proxy = Proxy::start(&format!(
        "pools: {{ shop: {{ cells: {{ a: {{ capacity: 80/s, backends: [ '{}' ] }} }} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, http: {{ routes: [ {{ pool: shop }} ] }} }} ]",
        a.address
    ));
    proxy.wait_health(&a.address.to_string(), "up", Duration::from_secs(5));
    let address = proxy.address(0);
    let mut served = 0;
    for _ in 0..8 {
        let begin = Instant::now();
        let burst: Vec<_> = (0..8)
            .map(|_| {
                std::thread::spawn(move || {
                    let ask = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
                    crate::http::raw(address, ask).starts_with("HTTP/1.1 200")
                })
            })
            .collect();
        served += burst.into_iter().map(|one| u32::from(one.join().unwrap())).sum::<u32>();
        std::thread::sleep((begin + Duration::from_millis(500)).saturating_duration_since(Instant::now()));
    }
    assert!(served >= 61, "{served} of 64");
}

/// What can be served goes to those who matter most, and who comes first is served first.
#[test]
fn what_a_capacity_leaves_goes_by_priority() {
    let a = Backend::start("a");
    let proxy = Proxy::start(&format!(
        "pools: {{ shop: {{ cells: {{ a: {{ capacity: 50/s, backends: [ '{}' ] }} }} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, http: {{ routes: [ {{ path: /high, pool: shop, priority: high }}, {{ pool: shop, priority: low }} ] }} }} ]",
        a.address
    ));
    proxy.wait_health(&a.address.to_string(), "up", Duration::from_secs(5));
    let address = proxy.address(0);
    let ask = move |path: &'static str| {
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        std::thread::spawn(move || crate::http::raw(address, head.as_bytes()).starts_with("HTTP/1.1 200"))
    };
    let begin = Instant::now();
    let (mut high, mut low) = (Vec::new(), Vec::new());
    // 36 and 72 a second.
    for i in 0..360u32 {
        let list = if i % 3 == 0 { &mut high } else { &mut low };
        list.push(ask(if i % 3 == 0 { "/high" } else { "/low" }));
        std::thread::sleep((begin + Duration::from_millis(9) * i).saturating_duration_since(Instant::now()));
    }
    let served = |list: Vec<std::thread::JoinHandle<bool>>| {
        let all = list.len() as f64;
        list.into_iter().map(|one| f64::from(u8::from(one.join().unwrap()))).sum::<f64>() / all
    };
    let (high, low) = (served(high), served(low));
    assert!(high > 0.9 && low < 0.5, "high {high:.2}, low {low:.2}");
}
