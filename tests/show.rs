//! What takes too long for every test run: `make show`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sailover::sys;

use crate::support::backend::{Backend, Mode};
use crate::support::eventually;
use crate::support::load::{Load, Manner, Samples};
use crate::support::netns::Rig;
use crate::support::proxy::Proxy;
use crate::tcp::yaml;

fn at(begin: Instant, seconds: f64) {
    let until = begin + Duration::from_secs_f64(seconds);
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        std::thread::park_timeout(left);
    }
}

/// `count` reloads that change something while `rate` connections a second come over veth.
fn reloads(count: u32, rate: f64, seconds: f64) {
    let rig = Rig::new(2);
    let _backends: Vec<Backend> = (1..=2)
        .map(|i| Backend::start_in(Some(rig.cell(i)), format!("10.99.{i}.2:80").parse().unwrap(), "x"))
        .collect();
    let file = |i: u32| {
        let extra = if i.is_multiple_of(2) { "" } else { ", '10.99.1.9:80'" };
        format!(
            "pools: {{ p: {{ cells: {{ a: {{ weight: {}, backends: [ '10.99.1.2:80'{extra} ] }}, b: [ '10.99.2.2:80' ] }} }} }}\nlisteners: [ {{ bind: 10.99.1.1:8080, tcp: p }} ]",
            1 + i % 5
        )
    };
    let proxy = Proxy::start_in(Some(rig.edge()), &file(0));
    (1..=2).for_each(|i| proxy.wait_health(&format!("10.99.{i}.2:80"), "up", Duration::from_secs(5)));
    let since = |proxy: &Proxy| {
        let pools = proxy.status()["pools"].clone();
        [0, 1].map(|cell| pools[0]["cells"][cell]["backends"][0]["since"].as_str().unwrap()[..19].to_owned())
    };
    let before = since(&proxy);
    let begin = Instant::now();
    let load = Load::start(Some(rig.edge()), "10.99.1.1:8080".parse().unwrap(), rate, Duration::from_secs_f64(seconds));
    at(begin, seconds / 10.0);
    let mut memory = 0;
    for i in 1..=count {
        // What the first reloads take for good, such as the memory of helper threads, is no growth.
        if i == count / 4 {
            memory = proxy.memory();
        }
        proxy.write(&file(i));
        proxy.signal(Signal::HUP);
        at(begin, seconds * (0.1 + 0.85 * f64::from(i) / f64::from(count)));
    }
    let samples = load.finish();
    let growth = proxy.memory() as f64 / memory as f64;
    let generation = proxy.status()["generation"].as_u64().unwrap();
    println!(
        "{generation} generations at {rate} connections/s: {} failed of {}, p99 {:.1} ms, memory x {growth:.2}",
        samples.failed(),
        samples.0.len(),
        samples.quantile(0.99).as_secs_f64() * 1e3
    );
    assert_eq!(samples.failed(), 0, "{:?}", samples.errors());
    assert_eq!(since(&proxy), before, "health was reset");
    assert!(generation > u64::from(count) * 9 / 10);
    assert!(growth < 1.5, "memory grew {growth:.2} times");
}

#[test]
fn reloads_under_load_cost_nothing() {
    if crate::support::can_make_namespaces() {
        reloads(60, 300.0, 6.0);
    } else {
        assert!(std::env::var_os("CI").is_none());
    }
}

#[test]
#[ignore = "takes 90 seconds"]
fn a_thousand_reloads_at_a_thousand_connections_a_second() {
    reloads(1_000, 1_000.0, 90.0);
}

#[test]
#[ignore = "takes a minute"]
fn sessions_do_not_keep_tables_alive() {
    let echo = Backend::start("e");
    echo.set(Mode::Echo);
    let file = |i: u32| {
        let list: Vec<String> = (0..5_000)
            .map(|n| {
                format!(
                    "{{ address: '127.{}.{}.{}:9', weight: {} }}",
                    10 + n / 62_500,
                    n / 250 % 250,
                    n % 250 + 1,
                    1 + (i + n) % 7
                )
            })
            .collect();
        format!(
            "pools:\n  p: {{ cells: {{ a: [ '{}' ] }} }}\n  q: {{ probe: off, cells: {{ a: [ {} ] }} }}\nlisteners: [ {{ bind: '127.0.0.1:0', tcp: p }}, {{ bind: '127.0.0.2:0', tcp: q }} ]",
            echo.address,
            list.join(", ")
        )
    };
    let run = |reload: bool| {
        let proxy = Proxy::start(&file(0));
        proxy.wait_health(&echo.address.to_string(), "up", Duration::from_secs(5));
        let address = proxy.address(0);
        let warm = |from: u32, to: u32| {
            for i in from..to {
                proxy.write(&file(i));
                assert!(proxy.command(&["reload"]).status.success());
            }
        };
        // Two generations exist at once during a reload; their memory is the allocator's from then on.
        warm(1, 6);
        let mut open = Vec::new();
        for i in 0..500 {
            if reload {
                warm(6 + i, 7 + i);
            }
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0; 1]).unwrap();
            open.push(stream);
        }
        proxy.memory()
    };
    let (without, with) = (run(false), run(true));
    println!("500 connections: {} KB without reloads, {} KB with one before each", without >> 10, with >> 10);
    assert!(with as f64 <= without as f64 * 1.1, "{without} {with}");
}

#[test]
#[ignore = "measures processor time"]
fn five_thousand_probes_a_second_cost_little_more_than_their_handshakes() {
    let listener = Backend::start_in(None, "0.0.0.0:0".parse().unwrap(), "x");
    let port = listener.address.port();
    let addresses: Vec<SocketAddr> = (0..5_000u32)
        .map(|n| format!("127.{}.{}.{}:{port}", 20 + n / 62_500, n / 250 % 250, n % 250 + 1).parse().unwrap())
        .collect();
    let list: Vec<String> = addresses.iter().map(|address| format!("'{address}'")).collect();
    let proxy = Proxy::start(&format!(
        "pools:\n  p: {{ cells: {{ a: [ {} ] }} }}\nlisteners: [ {{ bind: '127.0.0.1:0', tcp: p }} ]",
        list.join(", ")
    ));
    let control = || {
        let stat = std::fs::read_to_string(format!("/proc/{0}/task/{0}/stat", proxy.pid())).unwrap();
        let fields: Vec<u64> =
            stat.rsplit(')').next().unwrap().split_whitespace().filter_map(|f| f.parse().ok()).collect();
        // The state letter does not parse, so utime and stime stand at 10 and 11.
        (fields[10] + fields[11]) as f64 / 100.0
    };
    let probes = || proxy.metric("sailover_probes_total", &[]);
    at(Instant::now(), 3.0);
    let (mut ratios, seconds) = (Vec::new(), 5.0);
    for _ in 0..3 {
        let load = Load::start(None, proxy.address(0), 1_000.0, Duration::from_secs_f64(seconds));
        let (cpu, count, begin) = (control(), probes(), Instant::now());
        at(begin, seconds);
        let spent = control() - cpu;
        let made = probes() - count;
        assert_eq!(load.finish().failed(), 0);
        let bare = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    let before = sys::thread_cpu();
                    runtime.block_on(async {
                        // The same handshakes a second, open loop, closed by a reset.
                        let begin = tokio::time::Instant::now();
                        for (i, address) in addresses.iter().cycle().take(made as usize).enumerate() {
                            if i % 5 == 0 {
                                tokio::time::sleep_until(begin + Duration::from_micros(i as u64 * 200)).await;
                            }
                            let address = *address;
                            tokio::spawn(async move {
                                if let Ok(stream) = tokio::net::TcpStream::connect(address).await {
                                    let _ = stream.set_zero_linger();
                                }
                            });
                        }
                    });
                    (sys::thread_cpu() - before).as_secs_f64()
                })
                .join()
                .unwrap()
        });
        println!(
            "{made} probes: {:.0} us each; a bare loop {:.0} us each; ratio {:.2}",
            spent / made * 1e6,
            bare / made * 1e6,
            spent / bare
        );
        assert!(made >= 4_500.0 * seconds, "{made} probes");
        ratios.push(spent / bare);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "late probes: {}",
        proxy.metric("sailover_probe_late_seconds_bucket", &["le=\"0.25\""])
            / proxy.metric("sailover_probe_late_seconds_count", &[])
    );
    assert!(ratios[1] <= 1.5, "{ratios:?}");
}

#[test]
#[ignore = "measures latencies"]
fn a_silent_pool_changes_nothing_for_another() {
    let rig = Rig::new(2);
    let _good = Backend::start_in(Some(rig.cell(1)), "10.99.1.2:80".parse().unwrap(), "x");
    let _gone = Backend::start_in(Some(rig.cell(2)), "10.99.2.2:80".parse().unwrap(), "x");
    let proxy = Proxy::start_in(
        Some(rig.edge()),
        "pools:\n  good: { cells: { a: [ '10.99.1.2:80' ] } }\n  gone: { cells: { b: [ '10.99.2.2:80', '10.99.2.3:80' ] } }\nlisteners: [ { bind: 10.99.1.1:8080, tcp: good }, { bind: 10.99.1.1:8081, tcp: gone } ]",
    );
    proxy.wait_health("10.99.1.2:80", "up", Duration::from_secs(5));
    rig.swallow(2);
    let load = |port: u16, rate: f64, seconds: u64| {
        Load::start(Some(rig.edge()), format!("10.99.1.1:{port}").parse().unwrap(), rate, Duration::from_secs(seconds))
    };
    let mut ratios = Vec::new();
    for _ in 0..5 {
        let calm = load(8080, 300.0, 5).finish();
        let bad = load(8081, 300.0, 7);
        at(Instant::now(), 1.0);
        let beside = load(8080, 300.0, 5).finish();
        let bad: Samples = bad.finish();
        assert_eq!((calm.failed(), beside.failed()), (0, 0));
        assert_eq!(bad.failed(), bad.0.len());
        let p99 = |samples: &Samples| samples.quantile(0.99).as_secs_f64() * 1e3;
        println!("p99 alone {:.2} ms, beside a pool whose backends are all silent {:.2} ms", p99(&calm), p99(&beside));
        ratios.push(p99(&beside) / p99(&calm));
    }
    ratios.sort_by(f64::total_cmp);
    println!("ratio of p99: median {:.2}, worst {:.2}", ratios[2], ratios[4]);
    assert!(ratios[2] <= 1.1, "{ratios:?}");
}

#[test]
#[ignore = "measures latencies, four minutes"]
fn a_sick_cell_changes_nothing_for_another_pool_of_its_listener() {
    let rig = Rig::new(3);
    let address = |i: usize| format!("10.99.{i}.2:80");
    let start = |i: usize| Backend::start_in(Some(rig.cell(i)), address(i).parse().unwrap(), "x");
    let (sick, _other, _beside) = (start(1), start(2), start(3));
    let quick =
        "hold: { first: 100ms, longest: 100ms, between_probe_removals: 0s }, ramp: 0s, probe: { interval: 200ms }";
    let proxy = Proxy::start_in(
        Some(rig.edge()),
        &format!(
            "pools:\n  sick: {{ cells: {{ a: [ '{}' ], b: [ '{}' ] }}, {quick} }}\n  beside: {{ cells: {{ c: [ '{}' ] }} }}\n\
             listeners: [ {{ bind: '10.99.1.1:8080', http: {{ routes: [ {{ path: /beside, pool: beside }}, {{ pool: sick }} ] }} }} ]",
            address(1),
            address(2),
            address(3)
        ),
    );
    (1..=3).for_each(|i| proxy.wait_health(&address(i), "up", Duration::from_secs(5)));
    let load = |path: &'static str, seconds: u64| {
        let manner = Manner { kept: true, path, ..Manner::default() };
        let target = "10.99.1.1:8080".parse().unwrap();
        Load::start_with(Some(rig.edge()), target, 300.0, Duration::from_secs(seconds), manner)
    };
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", proxy.pid())).unwrap().count();
    // What both pools' clients see in four seconds, and what the process holds near their end.
    let look = || {
        let (ill, beside) = (load("", 4), load("beside", 4));
        at(Instant::now(), 3.5);
        let held = (proxy.memory() as f64, descriptors() as f64);
        drop(ill.finish());
        let beside = beside.finish();
        assert_eq!(beside.failed(), 0);
        (beside.quantile(0.99).as_secs_f64() * 1e3, held)
    };
    look();
    let faults = [("mute", Mode::Mute), ("slow", Mode::Slow(400)), ("errors", Mode::Fail(60)), ("reset", Mode::Reset)];
    let mut missed = Vec::new();
    for (name, mode) in faults.map(|(name, mode)| (name, Some(mode))).into_iter().chain([("swallow", None)]) {
        let (mut times, mut memory, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..5 {
            let (calm, held) = look();
            match mode {
                Some(mode) => sick.set(mode),
                None => rig.swallow(1),
            }
            let (fault, held_then) = look();
            sick.set(Mode::Serve);
            rig.heal(1);
            // Only clients can tell that it answers again.
            eventually("it is back", Duration::from_secs(30), || {
                drop(load("", 1).finish());
                (proxy.health(&address(1)) == "up").then_some(())
            });
            times.push(fault / calm);
            memory.push(held_then.0 / held.0);
            files.push(held_then.1 / held.1);
        }
        let figures = [times, memory, files].map(|mut ratios: Vec<f64>| {
            ratios.sort_by(f64::total_cmp);
            (ratios[2], ratios[4])
        });
        println!(
            "{name}: ratios (median, worst) of p99 {:.2?}, memory {:.2?}, descriptors {:.2?}",
            figures[0], figures[1], figures[2]
        );
        let over = figures[0].0 > 1.1 || figures[1].0 > 1.2 || figures[2].0 > 1.2;
        missed.extend(over.then_some(name));
    }
    assert!(missed.is_empty(), "{missed:?}");
}

#[test]
#[ignore = "takes ten minutes"]
fn idle_connections_cost_no_more_after_ten_minutes_of_churn() {
    let backend = Backend::start("e");
    backend.set(Mode::Echo);
    let proxy = Proxy::start(&yaml(&[backend.address], "", ""));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    let idle = || {
        let before = proxy.memory();
        let mut open: Vec<TcpStream> =
            (0..4_000).map(|_| TcpStream::connect(proxy.address_cached()).unwrap()).collect();
        for stream in &mut open {
            stream.write_all(b"hello").unwrap();
            stream.read_exact(&mut [0; 5]).unwrap();
        }
        let held = proxy.memory();
        drop(open);
        eventually("they are gone", Duration::from_secs(10), || {
            (proxy.metric("sailover_connections", &[]) == 0.0).then_some(())
        });
        (held.saturating_sub(before) / 4_000, held)
    };
    let (each, held) = idle();
    backend.set(Mode::Serve);
    let churn = Load::start(None, proxy.address(0), 1_000.0, Duration::from_secs(600)).finish();
    assert_eq!(churn.failed(), 0);
    backend.set(Mode::Echo);
    let (each_after, held_after) = idle();
    println!(
        "4,000 idle connections: {each} bytes each, after ten minutes of churn {each_after}; in all {} KB, then {} KB",
        held >> 10,
        held_after >> 10
    );
    assert!(each <= 4_096 && held_after <= held + 4_000 * 512, "{held} {held_after}");
}
