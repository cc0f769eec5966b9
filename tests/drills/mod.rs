//! Drills: two cells over veth, an open-loop client, a fault, and bars. One file each in this directory.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::support::backend::{Backend, Mode};
use crate::support::load::{Load, Manner, Sample};
use crate::support::netns::{self, Delay, Rig};
use crate::support::proxy::Proxy;
use crate::support::{can_make_namespaces, eventually};

/// One drill as its file tells it; times in seconds from the start of the load.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Drill {
    /// What a reader must know.
    about: String,
    /// Whether it is run with every test.
    #[serde(default)]
    quick: bool,
    fault: Fault,
    probe: Probe,
    /// Through which face, and how the client asks.
    #[serde(default)]
    through: Through,
    #[serde(default)]
    pool: String,
    rate: f64,
    fault_at: f64,
    heal_at: f64,
    end_at: f64,
    /// Round-trip times of the cells in milliseconds; empty: two cells over bare veth. The fault is the first's.
    #[serde(default)]
    away_ms: Vec<f64>,
    bars: Bars,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Fault {
    /// The first cell's delay trebles.
    Treble,
    /// All delays become 80 ms.
    Jump,
    Refuse,
    Swallow,
    Reset,
    ResetLate,
    Flap,
    Pause,
    Mute,
    /// Answers take 400 ms longer.
    Slow,
    /// The network adds 400 ms each way and back.
    Far,
    /// One packet in ten is lost.
    Lossy,
    /// One flow in eight is dead.
    DeadFlows,
    /// Every cell is too slow alike.
    AllSlow,
    /// The probes of all cells fail; what clients ask is answered.
    ProbesRed,
    /// Every packet to and from every cell is dropped.
    Uplink,
    FailAll,
    FailHalf,
    FailThird,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Through {
    /// A `tcp` listener; a new connection for each request.
    #[default]
    Tcp,
    /// An `http` listener; a new connection for each request.
    Http,
    /// An `http` listener; connections that are kept.
    HttpKept,
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
    /// Seconds from the fault until the faulty backend has left `up`.
    out_within: Option<f64>,
    /// Of the requests from the fault to its end.
    p99_ms: Option<f64>,
    /// Of the requests from the fault to its end, beyond the calm p99 of the slowest cell.
    p99_above_calm_ms: Option<f64>,
    /// Share of new connections attempted at the faulty cell from 300 ms after the fault on.
    attempted: Option<f64>,
    /// Bounds on the healed cell's share in the second before `end_at`.
    share: Option<[f64; 2]>,
    /// Most times that the faulty backend enters `down`.
    downs: Option<f64>,
    /// Most transitions of any backend to suspect or down.
    transitions: Option<f64>,
    /// From one and a half seconds after the fault to its end: the faulty cell's greatest share, and how many times the
    /// calm p99 the p99 may be.
    share_in_fault: Option<f64>,
    times_calm: Option<f64>,
    /// Requests that fail from this many milliseconds after the healing on.
    failed_after_heal: Option<[usize; 2]>,
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
    // All of them take ten minutes: `make drills`.
    let all = std::env::var_os("DRILLS").is_some() || only.is_some();
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
        if !all && !drill.quick {
            continue;
        }
        missed.extend(run(&name, &drill).into_iter().map(|bar| format!("{name}: {bar}")));
        ran += 1;
    }
    println!("{ran} drills run of {} files", files.len());
    assert!(ran > 0 && (only.is_some() || !all || ran == files.len()));
    assert!(missed.is_empty(), "bars missed:\n{}", missed.join("\n"));
}

fn run(name: &str, drill: &Drill) -> Vec<String> {
    assert!(!drill.about.is_empty());
    let cells = drill.away_ms.len().max(2);
    let rig = Rig::new(cells);
    let delays: Vec<Delay> =
        (1..=drill.away_ms.len()).map(|i| rig.delay(i, Duration::from_secs_f64(drill.away_ms[i - 1] / 2e3))).collect();
    let net = if delays.is_empty() { 99 } else { 98 };
    let address = |cell: usize| -> SocketAddr { format!("10.{net}.{cell}.2:80").parse().unwrap() };
    let names = ["a", "b", "c"];
    let backends: Vec<Backend> =
        (1..=cells).map(|i| Backend::start_in(Some(rig.cell(i)), address(i), names[i - 1])).collect();
    let a = &backends[0];
    let probe = match drill.probe {
        Probe::Tcp => "",
        Probe::Http => "probe: { http: { path: /healthz }, interval: 1s, fall: 2, rise: 2 }",
    };
    let list: String = (1..=cells).map(|i| format!("      {}: [ '{}' ]\n", names[i - 1], address(i))).collect();
    let face = match drill.through {
        Through::Tcp => "tcp: shop",
        Through::Http | Through::HttpKept => "http: { routes: [ { pool: shop } ] }",
    };
    let yaml = format!(
        "pools:\n  shop:\n    cells:\n{list}    {probe}\n    {}\nlisteners: [ {{ bind: 10.99.1.1:8080, {face} }} ]",
        drill.pool
    );
    let proxy = Proxy::start_in(Some(rig.edge()), &yaml);
    (1..=cells).for_each(|i| proxy.wait_health(&address(i).to_string(), "up", Duration::from_secs(5)));

    let begin = Instant::now();
    // Through HTTP one request a second takes three seconds, and is never to be cut while its cell is fit.
    let http = drill.through != Through::Tcp;
    let slow_one_in = if http { drill.rate as u32 } else { 0 };
    let load = Load::start_with(
        Some(rig.edge()),
        "10.99.1.1:8080".parse().unwrap(),
        drill.rate,
        Duration::from_secs_f64(drill.end_at),
        Manner {
            kept: drill.through == Through::HttpKept,
            slow_one_in,
            post_one_in: if http { 20 } else { 0 },
            ..Manner::default()
        },
    );
    let until =
        |at: f64| std::thread::sleep((begin + Duration::from_secs_f64(at)).saturating_duration_since(Instant::now()));
    until(drill.fault_at);
    match drill.fault {
        Fault::Refuse => a.set(Mode::Refuse),
        Fault::Reset => a.set(Mode::Reset),
        Fault::Mute => a.set(Mode::Mute),
        Fault::Slow => a.set(Mode::Slow(400)),
        Fault::AllSlow => backends.iter().for_each(|backend| backend.set(Mode::Slow(100))),
        Fault::Far => delays[0].set(Duration::from_secs_f64(drill.away_ms[0] / 2e3 + 0.2)),
        Fault::Lossy => rig.lose(1, 10),
        Fault::DeadFlows => rig.break_flows(1),
        Fault::ProbesRed => backends.iter().for_each(|backend| backend.set(Mode::Unhealthy)),
        Fault::Uplink => (1..=cells).for_each(|i| rig.swallow(i)),
        Fault::FailAll => a.set(Mode::Fail(100)),
        Fault::FailHalf => a.set(Mode::Fail(50)),
        Fault::FailThird => a.set(Mode::Fail(33)),
        Fault::ResetLate => a.set(Mode::ResetLate),
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
        Fault::Treble => delays[0].set(Duration::from_secs_f64(drill.away_ms[0] * 1.5e-3)),
        Fault::Jump => delays.iter().for_each(|delay| delay.set(Duration::from_millis(40))),
        Fault::Pause => {
            proxy.signal(rustix::process::Signal::STOP);
            until(drill.fault_at + 0.2);
            proxy.signal(rustix::process::Signal::CONT);
        }
    }
    let out = drill.bars.out_within.map(|within| {
        let gone = || proxy.health(&address(1).to_string()) != "up";
        eventually("the faulty cell is out", Duration::from_secs(5), || gone().then_some(()));
        (begin.elapsed().as_secs_f64() - drill.fault_at, within)
    });
    // On the wire: handshakes that the cell swallowed, without those of probes.
    let of_a = format!("backend=\"{}\"", address(1));
    let tried = |proxy: &Proxy| rig.swallowed(1) - proxy.metric("sailover_probes_total", &[of_a.as_str(), "failed"]);
    until(drill.fault_at + 0.3);
    let tried_at_300 = if drill.bars.attempted.is_some() { tried(&proxy) } else { 0.0 };
    until(drill.heal_at);
    let tried_at_end = if drill.bars.attempted.is_some() { tried(&proxy) } else { 0.0 };
    backends.iter().for_each(|backend| backend.set(Mode::Serve));
    (1..=cells).for_each(|i| rig.heal(i));
    for (delay, away) in delays.iter().zip(&drill.away_ms) {
        delay.set(Duration::from_secs_f64(away / 2e3));
    }
    let (of_slow, samples) = load.finish().apart();
    let (posts, samples) = samples.posts_apart();

    let during = samples.between(drill.fault_at, drill.heal_at);
    let offered = drill.rate * (drill.heal_at - drill.fault_at - 0.3);
    let attempted = (tried_at_end - tried_at_300).max(0.0) / offered;
    let entered = |to: &str| proxy.metric("sailover_transitions_total", &[&format!("to=\"{to}\"")]);
    let (suspects, downs) = (entered("suspect"), entered("down"));
    // Over a long way many requests are under way when their cell vanishes. They have been sent; nobody can save them.
    let failed = match delays.is_empty() {
        true => samples.failed(),
        false => {
            let under_way = samples.between(drill.fault_at - 1.0, drill.fault_at + 0.05).failed();
            println!("{name}: {under_way} of the requests under way at the fault were lost");
            samples.failed() - under_way
        }
    };
    let slow = samples.over(Duration::from_millis(250));
    let p99 = during.quantile(0.99).as_secs_f64() * 1e3;
    let shares: Vec<f64> = (drill.heal_at as u32..drill.end_at as u32)
        .map(|second| samples.between(f64::from(second), f64::from(second) + 1.0).share("a"))
        .collect();
    let last = samples.between(drill.end_at - 2.0, drill.end_at).share("a");
    println!(
        "{name:<22}{failed:>7}{slow:>7}{p99:>8.1}{:>9.0}{:>9.2}{suspects:>10}{downs:>7}  {:.1}% | {}",
        samples.quantile(1.0).as_secs_f64() * 1e3,
        attempted * 100.0,
        samples.between(drill.fault_at + 1.5, drill.heal_at).share("a") * 100.0,
        shares.iter().map(|share| format!("{:.0}", share * 100.0)).collect::<Vec<_>>().join(" "),
    );

    let bars = &drill.bars;
    let mut missed = Vec::new();
    // A slow request on a fit cell takes its three seconds and no more; one of the faulty cell's may be moved, once.
    let cut = |sample: &&Sample| {
        let at = sample.at.as_secs_f64();
        let touched = at > drill.fault_at - 3.2 && at < drill.fault_at + 1.0 || at > drill.heal_at - 0.2;
        let most = if touched { 6.6 } else { 3.4 };
        sample.result.is_err() || !(2.99..most).contains(&sample.latency.as_secs_f64())
    };
    let cut = of_slow.0.iter().filter(cut).map(|sample| format!("{sample:?}")).collect::<Vec<_>>();
    if !cut.is_empty() {
        missed.push(format!("slow requests were cut: {}", cut.join(", ")));
    }
    // A POST is executed once at most, and answered with a status, whatever it is.
    let mut ids: Vec<String> = backends.iter().flat_map(|backend| backend.posts.lock().unwrap().clone()).collect();
    let executed = ids.len();
    ids.sort();
    ids.dedup();
    if ids.len() != executed {
        missed.push(format!("{} POSTs were executed twice", executed - ids.len()));
    }
    let unanswered = |sample: &&Sample| sample.result.as_ref().is_err_and(|error| !error.starts_with("HTTP/1.1 50"));
    let unanswered = posts.0.iter().filter(unanswered).count();
    if unanswered > 0 {
        missed.push(format!("{unanswered} of {} POSTs had no answer: {:?}", posts.0.len(), posts.errors()));
    }
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
    if let Some(above) = bars.p99_above_calm_ms {
        let calm = samples.between(1.0, drill.fault_at).quantile(0.99).as_secs_f64() * 1e3;
        bar(p99 <= calm + above, format!("p99 {p99:.1} ms, calm {calm:.1}, at most {above} above it"));
    }
    if let Some((took, within)) = out {
        bar(took <= within, format!("the faulty cell was out after {took:.2} s, at most {within}"));
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
    let settled = samples.between(drill.fault_at + 1.5, drill.heal_at);
    if let Some(most) = bars.share_in_fault {
        let share = settled.share("a");
        bar(share <= most, format!("share of the faulty cell {share:.3}, at most {most}"));
    }
    if let Some(most) = bars.times_calm {
        let calm = samples.between(1.0, drill.fault_at).quantile(0.99).as_secs_f64() * 1e3;
        let p99 = settled.quantile(0.99).as_secs_f64() * 1e3;
        bar(p99 <= calm * most, format!("p99 {p99:.1} ms once settled, calm {calm:.1} ms, at most {most} times that"));
    }
    if let Some([after, most]) = bars.failed_after_heal {
        let late = samples.between(drill.heal_at + after as f64 / 1e3, drill.end_at).failed();
        bar(late <= most, format!("{late} failed later than {after} ms after the healing, at most {most}"));
    }
    if let Some(most) = bars.downs {
        bar(downs <= most, format!("down entered {downs} times, at most {most}"));
    }
    if let Some(most) = bars.transitions {
        bar(suspects + downs <= most, format!("{suspects} suspect and {downs} down, at most {most}"));
    }
    if let Some(directory) = std::env::var_os("DRILLS") {
        let result = serde_json::json!({
            "drill": name,
            "about": drill.about,
            "front": "sailover",
            "rate": drill.rate,
            "times": { "fault": drill.fault_at, "heal": drill.heal_at, "end": drill.end_at },
            "requests": samples.0.len(),
            "failed": failed,
            "over_250_ms": slow,
            "p99_ms": { "calm": samples.between(1.0, drill.fault_at).quantile(0.99).as_secs_f64() * 1e3, "fault": p99 },
            "worst_ms": samples.quantile(1.0).as_secs_f64() * 1e3,
            "out_after_s": out.map(|(took, _)| took),
            "share_of_faulty_once_settled": samples.between(drill.fault_at + 1.5, drill.heal_at).share("a"),
            "share_by_second_after_healing": shares,
            "posts": posts.0.len(),
            "entered": { "suspect": suspects, "down": downs },
            "errors": samples.errors(),
            "missed": missed,
        });
        std::fs::create_dir_all(&directory).unwrap();
        let path = Path::new(&directory).join(format!("{name}.json"));
        std::fs::write(path, serde_json::to_vec_pretty(&result).unwrap()).unwrap();
    }
    if !missed.is_empty() {
        for line in proxy.log().lines().filter(|line| line.contains("transition")).take(20) {
            println!("    {line}");
        }
    }
    missed
}

/// Sessions of a cell or a client that vanishes without a word.
#[test]
fn sessions_over_veth() {
    if !can_make_namespaces() {
        assert!(std::env::var_os("CI").is_none(), "in CI a drill that cannot run is a failure");
        return;
    }
    let rig = Rig::new(2);
    let backends: Vec<Backend> = (1..=2)
        .map(|i| Backend::start_in(Some(rig.cell(i)), format!("10.99.{i}.2:80").parse().unwrap(), "x"))
        .collect();
    backends.iter().for_each(|backend| backend.set(Mode::Echo));
    let two = "a: [ '10.99.1.2:80' ], b: [ '10.99.2.2:80' ]";
    let proxy = |cells: &str, pool: &str| {
        let proxy = Proxy::start_in(
            Some(rig.edge()),
            &format!(
                "pools: {{ p: {{ cells: {{ {cells} }}, {pool} }} }}\nlisteners: [ {{ bind: 10.99.2.1:8080, tcp: p }} ]"
            ),
        );
        proxy.wait_health("10.99.1.2:80", "up", Duration::from_secs(5));
        proxy
    };
    let on_a = |proxy: &Proxy| {
        let status = proxy.status();
        status["pools"][0]["cells"][0]["backends"][0]["in_flight"].as_u64().unwrap()
    };
    let open = |namespace: String| {
        let connect = move || {
            netns::enter(&namespace);
            let mut stream = TcpStream::connect("10.99.2.1:8080").unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0; 1]).unwrap();
            stream
        };
        std::thread::spawn(connect).join().unwrap()
    };
    let on_first = |proxy: &Proxy, namespace: &str| {
        eventually("a session on the first cell", Duration::from_secs(5), || {
            let stream = open(namespace.to_owned());
            (on_a(proxy) == 1).then_some(stream)
        })
    };

    // A busy session whose cell vanished ends soon after the verdict; on probes alone the session shows it itself.
    let busy = proxy(two, "on_down: stuck");
    let mut session = on_first(&busy, &rig.edge());
    rig.swallow(1);
    session.write_all(b"lost").unwrap();
    busy.wait_health("10.99.1.2:80", "down", Duration::from_secs(10));
    let verdict = Instant::now();
    assert!(session.read(&mut [0; 1]).is_err());
    println!("a busy session of a vanished cell ended {:.1} s after the verdict", verdict.elapsed().as_secs_f64());
    assert!(verdict.elapsed() < Duration::from_secs(6));
    rig.heal(1);
    drop(busy);

    // One that only receives is found out by keepalive, whatever `on_down` says.
    let idle = proxy(two, "on_down: keep");
    let mut session = on_first(&idle, &rig.edge());
    let settled = Instant::now();
    eventually("keepalive is set", Duration::from_secs(3), || {
        (settled.elapsed() > Duration::from_millis(1_500)).then_some(())
    });
    rig.swallow(1);
    let vanished = Instant::now();
    assert!(session.read(&mut [0; 1]).is_err());
    println!("a session that only receives ended {:.1} s after its cell vanished", vanished.elapsed().as_secs_f64());
    assert!(vanished.elapsed() < Duration::from_secs(16));
    rig.heal(1);
    drop(idle);

    // A client that vanishes while much is sent to it ends after `unacked`.
    backends.iter().for_each(|backend| backend.set(Mode::Pour));
    let mut times = Vec::new();
    for unacked in ["1s", "6s"] {
        let pouring = proxy("a: [ '10.99.1.2:80' ]", &format!("timeouts: {{ unacked: {unacked} }}"));
        let namespace = rig.cell(2);
        let client = std::thread::spawn(move || {
            netns::enter(&namespace);
            let mut stream = TcpStream::connect("10.99.2.1:8080").unwrap();
            stream.read_exact(&mut [0; 65_536]).unwrap();
            let draining = stream.try_clone().unwrap();
            std::thread::spawn(move || {
                let mut draining = draining;
                draining.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                let mut buffer = vec![0; 1 << 20];
                while matches!(draining.read(&mut buffer), Ok(n) if n > 0) {}
            });
            stream
        });
        let stream = client.join().unwrap();
        rig.swallow(2);
        let vanished = Instant::now();
        eventually("it has ended", Duration::from_secs(15), || {
            (pouring.metric("sailover_connections_total", &["end=\"client_stuck\""]) == 1.0).then_some(())
        });
        times.push(vanished.elapsed().as_secs_f64());
        drop(stream);
        rig.heal(2);
    }
    println!("a vanished client ended after {times:.1?} s with unacked 1 s and 6 s");
    assert!(times[0] + 3.0 < times[1], "{times:?}");
}
