//! Drills: two cells over veth, an open-loop client, a fault, and bars. One file each in this directory.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::support::backend::{Backend, Mode};
use crate::support::can_make_namespaces;
use crate::support::load::Load;
use crate::support::netns::Rig;
use crate::support::proxy::Proxy;

/// One drill as its file tells it; times in seconds from the start of the load.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Drill {
    /// What a reader must know.
    about: String,
    fault: Fault,
    probe: Probe,
    #[serde(default)]
    pool: String,
    rate: f64,
    fault_at: f64,
    heal_at: f64,
    end_at: f64,
    bars: Bars,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Fault {
    Refuse,
    Swallow,
    Reset,
    Flap,
    Pause,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Probe {
    Tcp,
    Http,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Bars {
    failed: usize,
    /// Requests slower than 250 ms.
    slow: Option<usize>,
    /// Of the requests from the fault to its end.
    p99_ms: Option<f64>,
    /// Share of new connections attempted at the faulty cell from 300 ms after the fault on.
    attempted: Option<f64>,
    /// Bounds on the healed cell's share in the second before `end_at`.
    share: Option<[f64; 2]>,
    /// Most times that the faulty backend enters `down`.
    downs: Option<f64>,
    /// Most transitions of any backend to suspect or down.
    transitions: Option<f64>,
}

fn files() -> Vec<std::path::PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drills");
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    files
}

#[test]
fn drills_over_veth() {
    if !can_make_namespaces() {
        assert!(std::env::var_os("CI").is_none(), "in CI a drill that cannot run is a failure");
        eprintln!("skipped: drills need root, ip and nft");
        return;
    }
    let files = files();
    let only = std::env::var("DRILL").ok();
    let mut ran = 0;
    let mut missed = Vec::new();
    println!(
        "{:<22}{:>7}{:>7}{:>8}{:>9}{:>9}{:>10}{:>7}  share by second after healing",
        "drill", "failed", "slow", "p99 ms", "worst", "tried %", "suspect", "down"
    );
    for file in &files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let drill: Drill = serde_yaml::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        missed.extend(run(&name, &drill).into_iter().map(|bar| format!("{name}: {bar}")));
        ran += 1;
    }
    println!("{ran} drills run of {} files", files.len());
    assert!(only.is_some() || ran == files.len() && ran > 0);
    assert!(missed.is_empty(), "bars missed:\n{}", missed.join("\n"));
}

fn run(name: &str, drill: &Drill) -> Vec<String> {
    assert!(!drill.about.is_empty());
    let rig = Rig::new(2);
    let address = |cell: usize| -> SocketAddr { format!("10.99.{cell}.2:80").parse().unwrap() };
    let a = Backend::start_in(Some(rig.cell(1)), address(1), "a");
    let _b = Backend::start_in(Some(rig.cell(2)), address(2), "b");
    let probe = match drill.probe {
        Probe::Tcp => "",
        Probe::Http => "probe: { http: { path: /healthz }, interval: 1s, fall: 2, rise: 2 }",
    };
    let yaml = format!(
        "pools:\n  shop:\n    cells:\n      a: [ '{}' ]\n      b: [ '{}' ]\n    {probe}\n    {}\nlisteners: [ {{ bind: 10.99.1.1:8080, tcp: shop }} ]",
        address(1),
        address(2),
        drill.pool
    );
    let proxy = Proxy::start_in(Some(rig.edge()), &yaml);
    proxy.wait_health(&address(1).to_string(), "up", Duration::from_secs(5));
    proxy.wait_health(&address(2).to_string(), "up", Duration::from_secs(5));

    let begin = Instant::now();
    let load = Load::start(
        Some(rig.edge()),
        "10.99.1.1:8080".parse().unwrap(),
        drill.rate,
        Duration::from_secs_f64(drill.end_at),
    );
    let until =
        |at: f64| std::thread::sleep((begin + Duration::from_secs_f64(at)).saturating_duration_since(Instant::now()));
    until(drill.fault_at);
    match drill.fault {
        Fault::Refuse => a.set(Mode::Refuse),
        Fault::Reset => a.set(Mode::Reset),
        Fault::Swallow => rig.swallow(1),
        Fault::Flap => {
            let mut at = drill.fault_at;
            while at < drill.heal_at {
                a.set(Mode::Refuse);
                until(at + 0.7);
                a.set(Mode::Serve);
                until(at + 1.4);
                at += 1.4;
            }
        }
        Fault::Pause => {
            proxy.signal(rustix::process::Signal::STOP);
            until(drill.fault_at + 0.2);
            proxy.signal(rustix::process::Signal::CONT);
        }
    }
    // On the wire: handshakes that the cell swallowed, without those of probes.
    let of_a = format!("backend=\"{}\"", address(1));
    let tried = |proxy: &Proxy| rig.swallowed(1) - proxy.metric("sailover_probes_total", &[of_a.as_str(), "failed"]);
    until(drill.fault_at + 0.3);
    let tried_at_300 = if drill.bars.attempted.is_some() { tried(&proxy) } else { 0.0 };
    until(drill.heal_at);
    let tried_at_end = if drill.bars.attempted.is_some() { tried(&proxy) } else { 0.0 };
    a.set(Mode::Serve);
    rig.heal(1);
    let samples = load.finish();

    let during = samples.between(drill.fault_at, drill.heal_at);
    let offered = drill.rate * (drill.heal_at - drill.fault_at - 0.3);
    let attempted = (tried_at_end - tried_at_300).max(0.0) / offered;
    let entered = |to: &str| proxy.metric("sailover_transitions_total", &[&format!("to=\"{to}\"")]);
    let (suspects, downs) = (entered("suspect"), entered("down"));
    let failed = samples.failed();
    let slow = samples.over(Duration::from_millis(250));
    let p99 = during.quantile(0.99).as_secs_f64() * 1e3;
    let shares: Vec<f64> = (drill.heal_at as u32..drill.end_at as u32)
        .map(|second| samples.between(f64::from(second), f64::from(second) + 1.0).share("a"))
        .collect();
    let last = samples.between(drill.end_at - 2.0, drill.end_at).share("a");
    println!(
        "{name:<22}{failed:>7}{slow:>7}{p99:>8.1}{:>9.0}{:>9.2}{suspects:>10}{downs:>7}  {}",
        samples.quantile(1.0).as_secs_f64() * 1e3,
        attempted * 100.0,
        shares.iter().map(|share| format!("{:.0}", share * 100.0)).collect::<Vec<_>>().join(" "),
    );

    let bars = &drill.bars;
    let mut missed = Vec::new();
    let mut bar = |met: bool, text: String| {
        if !met {
            missed.push(text)
        }
    };
    bar(failed <= bars.failed, format!("{failed} failed, at most {}: {:?}", bars.failed, samples.errors()));
    if let Some(most) = bars.slow {
        bar(slow <= most, format!("{slow} over 250 ms, at most {most}"));
    }
    if let Some(most) = bars.p99_ms {
        bar(p99 <= most, format!("p99 {p99:.1} ms, at most {most}"));
    }
    if let Some(most) = bars.attempted {
        bar(
            attempted < most,
            format!("{:.3} % attempted at the faulty cell, at most {}", attempted * 100.0, most * 100.0),
        );
    }
    if let Some([low, high]) = bars.share {
        bar((low..=high).contains(&last), format!("share of the healed cell {last:.2}, from {low} to {high}"));
    }
    if let Some(most) = bars.downs {
        bar(downs <= most, format!("down entered {downs} times, at most {most}"));
    }
    if let Some(most) = bars.transitions {
        bar(suspects + downs <= most, format!("{suspects} suspect and {downs} down, at most {most}"));
    }
    if !missed.is_empty() {
        for line in proxy.log().lines().filter(|line| line.contains("transition")).take(20) {
            println!("    {line}");
        }
    }
    missed
}
