//! Drills: cells over veth, an open-loop client, faults by a timeline, and bars. One file each in this directory.
//!
//! `DRILL=part,part` runs those whose names contain one of these, `DRILLS=directory` all of them and keeps a file of figures for each, and
//! `PEERS=haproxy,nginx,envoy` lets others take the place of sailover after it; then `REPORT=directory` gets a page and charts.

mod front;
mod judge;
mod report;
mod scene;
/// Sessions of a cell or a client that vanishes without a word.
mod sessions;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use self::front::Front;
use self::scene::{Drill, Event, Fault, Through, Whom};
use crate::support::attack::Attack;
use crate::support::backend::{Backend, Mode};
use crate::support::can_make_namespaces;
use crate::support::crowd::{Crowd, Returns};
use crate::support::load::{Load, Manner, Samples};
use crate::support::long::{Long, Stay};
use crate::support::netns::{Delay, Rig};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn drills() -> Vec<(String, Drill)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drills");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let read = |path: &PathBuf| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let drill: Drill = serde_yaml::from_str(&std::fs::read_to_string(path).unwrap())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        drill.check().unwrap_or_else(|error| panic!("{name}: {error}"));
        (name, drill)
    };
    files.iter().map(read).collect()
}

#[test]
fn drills_over_veth() {
    if !can_make_namespaces() {
        assert!(std::env::var_os("CI").is_none(), "in CI a drill that cannot run is a failure");
        eprintln!("skipped: drills need root, ip and nft");
        return;
    }
    let all_drills = drills();
    let only = std::env::var("DRILL").ok();
    let results = std::env::var_os("DRILLS").map(PathBuf::from);
    let peers = front::Kind::peers(&std::env::var("PEERS").unwrap_or_default());
    // All of them take half an hour: `make drills`.
    let every = results.is_some() || only.is_some();
    let wanted = |(name, drill): &&(String, Drill)| match &only {
        Some(only) => only.split(',').any(|part| name.contains(part)),
        None => every || drill.quick,
    };
    let chosen: Vec<&(String, Drill)> = all_drills.iter().filter(wanted).collect();
    let mut missed = Vec::new();
    println!("{}", judge::HEADING);
    for (at, (name, drill)) in chosen.iter().enumerate() {
        for kind in std::iter::once(front::Kind::Sailover).chain(peers.iter().copied()) {
            let outcome = run(name, drill, kind);
            println!("{}  [{}/{}]", outcome.line(), at + 1, chosen.len());
            if let Some(directory) = &results {
                outcome.keep(directory);
            }
            if kind == front::Kind::Sailover {
                missed.extend(outcome.missed.iter().map(|bar| format!("{name}: {bar}")));
            }
        }
    }
    println!("{} drills run of {} files", chosen.len(), all_drills.len());
    if let (Some(results), Some(page)) = (&results, std::env::var_os("REPORT")) {
        report::write(results, Path::new(&page), &all_drills);
    }
    assert!(!chosen.is_empty() && (only.is_some() || !every || chosen.len() == all_drills.len()));
    assert!(missed.is_empty(), "bars missed:\n{}", missed.join("\n"));
}

/// What was seen of one drill, before it is judged.
struct Seen {
    samples: Samples,
    /// When sailover had taken the faulty backend out, in seconds after the fault.
    out: Option<f64>,
    /// Handshakes that the faulty cell swallowed, without those of probes, from 300 ms after the fault to its end.
    tried: f64,
    /// Ids of the POST requests that backends executed.
    executed: Vec<String>,
    /// Requests that backends received.
    received: usize,
    /// When backends died of poison, in seconds.
    deaths: Vec<f64>,
    /// The front's private memory in bytes, calm and at its most; and its processor time in seconds.
    memory: [u64; 2],
    processor: f64,
    /// Hostile connections open at the end of the attack.
    attackers: usize,
    /// What became of sessions.
    returns: Returns,
    /// What became of requests that take as long as the drill, and which of them each backend had.
    stays: Vec<Stay>,
    stayed_at: Vec<Vec<String>>,
    /// Transitions to suspect and to down, and its log, of sailover.
    entered: Option<[f64; 2]>,
    log: String,
}

/// Cells, what is in front of them, and what is done to both.
struct Stage {
    rig: Rig,
    delays: Vec<Delay>,
    backends: Vec<Backend>,
    addresses: Vec<SocketAddr>,
    front: Front,
    attack: Option<Attack>,
    base: Mode,
}

fn run(name: &str, drill: &Drill, kind: front::Kind) -> judge::Outcome {
    let cells = drill.cells();
    let rig = Rig::new(cells);
    let delays: Vec<Delay> =
        (1..=drill.away_ms.len()).map(|i| rig.delay(i, Duration::from_secs_f64(drill.away_ms[i - 1] / 2e3))).collect();
    let net = if delays.is_empty() { 99 } else { 98 };
    let addresses: Vec<SocketAddr> = (1..=cells).map(|cell| format!("10.{net}.{cell}.2:80").parse().unwrap()).collect();
    let backends: Vec<Backend> =
        (0..cells).map(|i| Backend::start_in(Some(rig.cell(i + 1)), addresses[i], NAMES[i])).collect();
    let base = drill.work.map_or(Mode::Serve, |work| Mode::Work(work.at_once, work.ms));
    backends.iter().for_each(|backend| backend.set(base));
    let named: Vec<(String, SocketAddr)> = NAMES.map(str::to_owned).into_iter().zip(addresses.clone()).collect();
    let front = Front::start(kind, &rig.edge(), drill, &named);
    let mut stage = Stage { rig, delays, backends, addresses, front, attack: None, base };
    let seen = stage.play(drill);
    if let Some(directory) = std::env::var_os("DRILLS").filter(|_| !seen.log.is_empty()) {
        std::fs::write(Path::new(&directory).join(format!("{name}.log")), &seen.log).unwrap();
    }
    judge::judge(name, drill, kind, seen)
}

/// One thing done at its time.
enum Step<'a> {
    Begin(&'a Event),
    End(&'a Event),
    /// Part of the way of a `warm_from` event, from 0 to 1.
    Warm(&'a Event, f64),
    CountTried,
}

impl Stage {
    fn play(&mut self, drill: &Drill) -> Seen {
        let mut steps = timeline(drill);
        let (fault_at, heal_at) = (drill.fault_at(), drill.heal_at());
        if drill.bars.attempted.is_some() {
            steps.extend([(fault_at + 0.3, Step::CountTried), (heal_at - 0.001, Step::CountTried)]);
        }
        steps.sort_by(|a, b| a.0.total_cmp(&b.0));

        let http = drill.is_http();
        let default = |value: u32| if http { value } else { 0 };
        let calm = self.front.memory();
        let processor = self.front.processor();
        let begin = Instant::now();
        let load = Load::start_with(
            Some(self.rig.edge()),
            front::ADDRESS.parse().unwrap(),
            drill.load.rate,
            Duration::from_secs_f64(drill.load.seconds),
            Manner {
                kept: drill.through == Through::HttpKept,
                slow_one_in: drill.load.slow_one_in.unwrap_or(default(drill.load.rate as u32)),
                post_one_in: drill.load.post_one_in.unwrap_or(default(20)),
                poison_one_in: drill.load.poison_one_in,
                patience: Duration::from_secs_f64(drill.load.patience_s),
                tries: drill.load.tries,
                path: "",
            },
        );
        let target = front::ADDRESS.parse().unwrap();
        // They stand when the first fault begins.
        let within = Duration::from_secs_f64(fault_at * 0.8);
        let crowd =
            (drill.load.sessions > 0).then(|| Crowd::start(self.rig.edge(), target, drill.load.sessions, within));
        let long = drill
            .has_a_fit_cell()
            .then(|| Long::start(self.rig.edge(), target, Duration::from_secs_f64(drill.load.seconds)));
        let until = |at: f64| {
            std::thread::sleep((begin + Duration::from_secs_f64(at)).saturating_duration_since(Instant::now()))
        };
        let (mut tried, mut most, mut attackers) = (Vec::new(), calm, 0);
        let stop = Arc::new(AtomicBool::new(false));
        let out = std::thread::scope(|scope| {
            let watched = drill.bars.out_within.and(self.front.sailover().map(|proxy| (proxy, self.addresses[0])));
            // Whoever watches must not disturb: a look every 20 ms.
            let watch = watched.map(|(proxy, a)| {
                let stop = stop.clone();
                scope.spawn(move || {
                    until(fault_at);
                    while !stop.load(Relaxed) {
                        if proxy.health(&a.to_string()) != "up" {
                            return Some(begin.elapsed().as_secs_f64() - fault_at);
                        }
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    None
                })
            });
            for (at, step) in &steps {
                until(*at);
                match step {
                    Step::Begin(event) => {
                        begin_fault(&self.rig, &self.delays, &self.backends, &self.front, event, drill)
                            .into_iter()
                            .for_each(|attack| self.attack = Some(attack))
                    }
                    Step::End(event) => {
                        most = most.max(self.front.memory());
                        if let Some(attack) = self.attack.take() {
                            attackers = attack.held();
                        }
                        end_fault(&self.rig, &self.delays, &self.backends, &self.front, self.base, event, drill);
                    }
                    Step::Warm(event, part) => {
                        let (Some(work), Fault::WarmFrom(from)) = (drill.work, event.fault) else { continue };
                        let able = f64::from(work.at_once) * (from + (1.0 - from) * part);
                        whom(event, &self.backends)
                            .for_each(|(_, b)| b.set(Mode::Work(able.round().max(1.0) as u8, work.ms)));
                    }
                    Step::CountTried => tried.push(self.tried()),
                }
            }
            stop.store(true, Relaxed);
            watch.and_then(|watch| watch.join().expect("the watch ends"))
        });
        let samples = load.finish();
        let stays = long.map(Long::finish).unwrap_or_default();
        let returns = crowd.map(|crowd| crowd.returns()).unwrap_or_default();
        let entered = self.front.sailover().map(|proxy| {
            ["suspect", "down"].map(|to| proxy.metric("sailover_transitions_total", &[&format!("to=\"{to}\"")]))
        });
        let log = self.front.sailover().map(|proxy| proxy.log()).unwrap_or_default();
        let since = |at: &Instant| at.saturating_duration_since(begin).as_secs_f64();
        Seen {
            samples,
            out,
            tried: if let [first, last] = tried[..] { (last - first).max(0.0) } else { 0.0 },
            executed: self.backends.iter().flat_map(|backend| backend.posts.lock().unwrap().clone()).collect(),
            received: self.backends.iter().map(|backend| backend.received.load(Relaxed)).sum(),
            deaths: self
                .backends
                .iter()
                .flat_map(|b| b.deaths.lock().unwrap().iter().map(since).collect::<Vec<_>>())
                .collect(),
            memory: [calm, most.max(self.front.memory())],
            attackers,
            returns,
            stays,
            stayed_at: self.backends.iter().map(|backend| backend.stays.lock().unwrap().clone()).collect(),
            processor: self.front.processor() - processor,
            entered,
            log,
        }
    }

    /// Handshakes on the wire that the first cell has swallowed, without those of sailover's probes.
    fn tried(&self) -> f64 {
        let of_a = format!("backend=\"{}\"", self.addresses[0]);
        let probes =
            self.front.sailover().map(|proxy| proxy.metric("sailover_probes_total", &[of_a.as_str(), "failed"]));
        self.rig.swallowed(1) - probes.unwrap_or(0.0)
    }
}

fn timeline(drill: &Drill) -> Vec<(f64, Step<'_>)> {
    let mut steps = Vec::new();
    for event in &drill.timeline {
        let Some(pulse) = event.pulse else {
            steps.push((event.from, Step::Begin(event)));
            steps.push((event.to, Step::End(event)));
            if let Fault::WarmFrom(_) = event.fault {
                let length = event.to - event.from;
                steps.extend(
                    (1..)
                        .map(f64::from)
                        .map(|i| i * 0.5)
                        .take_while(|at| *at < length)
                        .map(|at| (event.from + at, Step::Warm(event, at / length))),
                );
            }
            continue;
        };
        let mut at = event.from;
        while at < event.to {
            steps.push((at, Step::Begin(event)));
            steps.push((at + pulse, Step::End(event)));
            at += 2.0 * pulse;
        }
    }
    steps
}

/// The cells that an event is about, by their numbers from 1.
fn whom<'a>(event: &Event, backends: &'a [Backend]) -> impl Iterator<Item = (usize, &'a Backend)> + use<'a> {
    let wanted = event.whom;
    let is_meant = move |i: usize| match wanted {
        Whom::A => i == 1,
        Whom::B => i == 2,
        Whom::All => true,
        Whom::Front => false,
    };
    (1..).zip(backends).filter(move |(i, _)| is_meant(*i))
}

fn begin_fault(
    rig: &Rig,
    delays: &[Delay],
    backends: &[Backend],
    front: &Front,
    event: &Event,
    drill: &Drill,
) -> Option<Attack> {
    match event.fault {
        Fault::Pause => front.signal(rustix::process::Signal::STOP),
        Fault::Attack { kind, count } => {
            return Some(Attack::start(rig.edge(), front::ADDRESS.parse().unwrap(), kind, count));
        }
        _ => {}
    }
    for (i, backend) in whom(event, backends) {
        match event.fault {
            // A listener that closes resets whoever is between its handshake and its first byte, which over TCP nobody can
            // save: the network refuses in its place. Over HTTP that is a part of the drill.
            Fault::Refuse if drill.through == Through::Tcp => rig.refuse(i),
            Fault::Refuse => backend.set(Mode::Refuse),
            Fault::Crash => backend.crash(),
            Fault::Reset => backend.set(Mode::Reset),
            Fault::ResetLate => backend.set(Mode::ResetLate),
            Fault::Mute => backend.set(Mode::Mute),
            Fault::Stall => {
                let work = drill.work.expect("checked");
                backend.set(Mode::Stall(work.at_once, work.ms));
            }
            Fault::SlowMs(ms) => backend.set(Mode::Slow(ms)),
            Fault::FailPercent(percent) => backend.set(Mode::Fail(percent)),
            Fault::StopPercent(percent) => backend.set(Mode::Stop(percent)),
            Fault::CutPercent(percent) => backend.set(Mode::Cut(percent)),
            Fault::HangPercent(percent) => backend.set(Mode::Hang(percent)),
            Fault::FailVerbs { post, get } => backend.set(Mode::FailVerbs(post, get)),
            Fault::DataVersion(version) => backend.set(Mode::Data(version, true)),
            Fault::UnhealthyPercent(percent) => backend.set(Mode::Unhealthy(percent)),
            Fault::Swallow => rig.swallow(i),
            Fault::Unreachable => rig.refuse_by_icmp(i),
            Fault::LosePercent(percent) => rig.lose(i, percent),
            Fault::BreakOneFlowIn(many) => rig.break_flows(i, many),
            Fault::AwayMs(ms) => delays[i - 1].set(Duration::from_secs_f64(ms / 2e3)),
            Fault::WarmFrom(_) | Fault::Pause | Fault::Attack { .. } => {}
        }
    }
    None
}

fn end_fault(
    rig: &Rig,
    delays: &[Delay],
    backends: &[Backend],
    front: &Front,
    base: Mode,
    event: &Event,
    drill: &Drill,
) {
    if event.fault == Fault::Pause {
        front.signal(rustix::process::Signal::CONT);
    }
    for (i, backend) in whom(event, backends) {
        match event.fault {
            Fault::Swallow | Fault::Unreachable | Fault::LosePercent(_) | Fault::BreakOneFlowIn(_) => rig.heal(i),
            Fault::AwayMs(_) => delays[i - 1].set(Duration::from_secs_f64(drill.away_ms[i - 1] / 2e3)),
            Fault::Refuse if drill.through == Through::Tcp => rig.heal(i),
            _ => backend.set(base),
        }
    }
}
