//! Races in paused time against a scripted network: what a client gets, and what is recorded.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tokio::time::Instant;

use super::*;
use crate::backend::{Counters, PoolShared};
use crate::log::AccessLog;
use crate::pool::{Member, NewCell};
use crate::table::Table;

/// What a backend does with an attempt.
#[derive(Clone, Copy, Debug)]
enum Script {
    ConnectAfter(u64),
    RefuseAfter(u64),
    Silent,
    /// connect(2) itself fails.
    Errno(i32),
}

struct Scripted(Mutex<HashMap<u16, Script>>);

struct ScriptedOpening {
    end: Option<Pin<Box<Sleep>>>,
    at: Option<Instant>,
    script: Script,
}

impl Network for Scripted {
    type Opening = ScriptedOpening;
    fn open(&self, backend: &Backend, _: &Policy, _: &mut Rng) -> io::Result<ScriptedOpening> {
        let script = self.0.lock().expect("no panic")[&backend.address.port()];
        let after = match script {
            Script::ConnectAfter(ms) | Script::RefuseAfter(ms) => Some(Instant::now() + Duration::from_millis(ms)),
            Script::Silent => None,
            Script::Errno(errno) => return Err(io::Error::from_raw_os_error(errno)),
        };
        Ok(ScriptedOpening { end: after.map(|at| Box::pin(tokio::time::sleep_until(at))), at: after, script })
    }
}

impl Opening for ScriptedOpening {
    type Connection = ();
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<((), Duration)>> {
        let Some(end) = &mut self.end else { return Poll::Pending };
        std::task::ready!(end.as_mut().poll(context));
        Poll::Ready(match self.script {
            Script::ConnectAfter(ms) => Ok(((), Duration::from_millis(ms))),
            _ => Err(io::Error::from_raw_os_error(libc::ECONNREFUSED)),
        })
    }
    fn discard((): ()) {}
    fn answered(&self) -> bool {
        self.at.is_some_and(|at| at <= Instant::now())
    }
}

struct Patient(AtomicBool);

impl Client for Patient {
    fn gone(&self) -> bool {
        self.0.load(Relaxed)
    }
}

struct Rig {
    network: Scripted,
    host: Host,
    pool: Arc<Pool>,
    client: Patient,
}

impl Rig {
    /// One backend in each cell, all up, all with a learned handshake of a millisecond.
    fn new(scripts: &[Script]) -> Rig {
        let policy = Arc::new(Policy::default());
        let shared = Arc::new(PoolShared::new("p", Arc::default()));
        let now = clock::now();
        let mut members = Vec::new();
        let mut cells = Vec::new();
        for i in 0..scripts.len() {
            cells.push(cell(i));
            let address = format!("127.0.0.1:{}", i + 1).parse().expect("an address");
            let name = format!("b{i}");
            let backend =
                Backend::new(shared.clone(), &name, address, Arc::new(Counters::default()), &policy.health, now);
            backend.success(&policy.health, Source::Probe, Depth::Connect, now, now);
            (0..20).for_each(|_| backend.handshake.record(Duration::from_millis(1)));
            members.push(Member { backend: Arc::new(backend), cell: i, weight: 1, max_connections: u32::MAX });
        }
        let pool = Arc::new(Pool::new(shared, policy, cells, members));
        let config = crate::config::parse(
            b"pools: { p: { cells: { a: [ 127.0.0.1:1 ] } } }\nlisteners: [ { bind: 127.0.0.1:0, tcp: p } ]",
            1 << 20,
        )
        .expect("a good file");
        let table = Table {
            generation: 1,
            pools: vec![pool.clone()],
            listeners: HashMap::new(),
            config: Arc::new(config.config),
            hash: String::new(),
            tickets: HashMap::new(),
            uplink: Arc::default(),
        };
        let host = Host::new(Arc::new(table), 1, AccessLog::off());
        host.max_extra.store(100, Relaxed);
        let ports = scripts.iter().enumerate().map(|(i, script)| (i as u16 + 1, *script)).collect();
        Rig { network: Scripted(Mutex::new(ports)), host, pool, client: Patient(AtomicBool::new(false)) }
    }

    /// The same backends under another policy, each with this many connections at most.
    fn with(mut self, policy: Policy, max_connections: u32) -> Rig {
        let members = self.pool.members.iter().map(|m| Member {
            backend: m.backend.clone(),
            cell: m.cell,
            weight: 1,
            max_connections,
        });
        let (members, cells) = (members.collect::<Vec<_>>(), (0..self.pool.members.len()).map(cell).collect());
        self.pool = Arc::new(Pool::new(self.pool.shared.clone(), Arc::new(policy), cells, members));
        self
    }

    async fn dial(&self, story: &mut Story) -> Result<usize, DialError> {
        let timer = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let mut rng = Rng::with_seed(1);
        let order = Order {
            host: &self.host,
            pool: &self.pool,
            pin: None,
            first: None,
            tried: Vec::new(),
            begin: clock::now(),
        };
        let dialled = dial(&self.network, order, &self.client, timer, &mut rng, story).await;
        dialled.map(|dialled| dialled.member)
    }

    /// Attempts of a member by outcome, and whether a failure stands against it.
    fn record(&self, member: usize) -> ([u64; 5], bool) {
        let backend = &self.pool.members[member].backend;
        let counts = Outcome::ALL.map(|outcome| backend.counters.attempts[outcome as usize].get());
        (counts, backend.health().open_run().is_some())
    }
}

const OK: [u64; 5] = [1, 0, 0, 0, 0];
const REFUSED: [u64; 5] = [0, 1, 0, 0, 0];
const SILENT: [u64; 5] = [0, 0, 1, 0, 0];
const LOST: [u64; 5] = [0, 0, 0, 1, 0];
const LOCAL: [u64; 5] = [0, 0, 0, 0, 1];
const NONE: [u64; 5] = [0; 5];

/// Long enough for every loser to be judged.
async fn settle() {
    tokio::time::sleep(Duration::from_secs(2)).await;
}

#[tokio::test(start_paused = true)]
async fn a_refusal_goes_to_the_next_at_once_and_costs_no_budget() {
    let rig = Rig::new(&[Script::RefuseAfter(1), Script::ConnectAfter(1)]);
    let begin = Instant::now();
    let mut story = Story::default();
    assert_eq!(rig.dial(&mut story).await, Ok(1));
    assert!(begin.elapsed() < Duration::from_millis(10));
    assert_eq!((story.attempts, story.raced, story.failures.len()), (2, false, 1));
    assert_eq!((rig.record(0), rig.record(1)), ((REFUSED, true), (OK, false)));
    assert_eq!(rig.pool.shared.races.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn silence_starts_a_race_and_is_judged_only_at_its_own_time() {
    let rig = Rig::new(&[Script::Silent, Script::ConnectAfter(1)]);
    let begin = Instant::now();
    let mut story = Story::default();
    assert_eq!(rig.dial(&mut story).await, Ok(1));
    assert!((20..30).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    assert!(story.raced);
    assert_eq!(rig.record(0), (NONE, false), "losing says nothing");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(rig.record(0), (NONE, false), "not yet its own time");
    settle().await;
    assert_eq!(rig.record(0), (SILENT, true));
    assert_eq!(rig.pool.members[0].backend.in_flight.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_first_attempt_that_wins_late_is_a_sample_and_the_race_lost_nothing() {
    let rig = Rig::new(&[Script::ConnectAfter(60), Script::ConnectAfter(120)]);
    let mut story = Story::default();
    assert_eq!(rig.dial(&mut story).await, Ok(0));
    assert!(story.raced);
    settle().await;
    assert_eq!((rig.record(0), rig.record(1)), ((OK, false), (LOST, false)));
    let learned = rig.pool.members[0].backend.handshake.learned().expect("learned");
    assert!(learned.1 >= Duration::from_millis(50), "the late handshake was learned: {learned:?}");
}

#[tokio::test(start_paused = true)]
async fn a_loser_that_connects_in_its_time_is_a_sample() {
    let rig = Rig::new(&[Script::ConnectAfter(90), Script::ConnectAfter(1)]);
    assert_eq!(rig.dial(&mut Story::default()).await, Ok(1));
    settle().await;
    assert_eq!((rig.record(0), rig.record(1)), ((LOST, false), (OK, false)));
}

#[tokio::test(start_paused = true)]
async fn a_first_that_is_refused_after_the_race_began_is_evidence() {
    let rig = Rig::new(&[Script::RefuseAfter(50), Script::ConnectAfter(100)]);
    assert_eq!(rig.dial(&mut Story::default()).await, Ok(1));
    settle().await;
    assert_eq!((rig.record(0), rig.record(1)), ((REFUSED, true), (OK, false)));
}

#[tokio::test(start_paused = true)]
async fn two_silent_backends_are_both_evidence_and_the_client_ends_with_its_time() {
    let rig = Rig::new(&[Script::Silent, Script::Silent]);
    let begin = Instant::now();
    let mut story = Story::default();
    assert_eq!(rig.dial(&mut story).await, Err(DialError::Unreachable));
    assert!((3_000..3_050).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    assert_eq!(story.failures.len(), 2);
    assert_eq!((rig.record(0), rig.record(1)), ((SILENT, true), (SILENT, true)));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_in_between_records_nothing() {
    let rig = Rig::new(&[Script::Silent, Script::Silent]);
    rig.client.0.store(true, Relaxed);
    assert_eq!(rig.dial(&mut Story::default()).await, Err(DialError::ClientGone));
    settle().await;
    assert!(!rig.record(0).1 && !rig.record(1).1);
}

#[tokio::test(start_paused = true)]
async fn errors_of_our_own_are_no_evidence_and_the_next_backend_is_tried() {
    for errno in [libc::EADDRNOTAVAIL, libc::EMFILE, libc::ENOBUFS, libc::EACCES, libc::EPERM, libc::ENETUNREACH] {
        let rig = Rig::new(&[Script::Errno(errno), Script::ConnectAfter(1)]);
        assert_eq!(rig.dial(&mut Story::default()).await, Ok(1));
        assert_eq!(rig.record(0), (LOCAL, false), "{errno}");
        assert_eq!(rig.host.local_errors.all().map(|(_, n)| n).sum::<u64>(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn without_budget_there_is_no_race_but_the_attempt_stays_open() {
    let rig = Rig::new(&[Script::ConnectAfter(400), Script::ConnectAfter(1)]);
    let now = clock::now();
    while rig.pool.shared.budget.extra(now) {}
    let begin = Instant::now();
    let mut story = Story::default();
    assert_eq!(rig.dial(&mut story).await, Ok(0));
    assert!((400..420).contains(&begin.elapsed().as_millis()) && !story.raced, "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_race_for_which_the_others_had_no_room_begins_when_they_have() {
    let rig = Rig::new(&[Script::Silent, Script::ConnectAfter(1)]).with(Policy::default(), 1);
    let place = rig.pool.members[1].backend.in_flight.take(1).expect("a place");
    let free = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        drop(place);
    };
    let begin = Instant::now();
    let mut story = Story::default();
    let (result, ()) = tokio::join!(rig.dial(&mut story), free);
    assert_eq!(result, Ok(1));
    assert!(begin.elapsed() < Duration::from_millis(400), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn beside_a_silent_one_a_backend_that_refused_is_tried_again() {
    let rig = Rig::new(&[Script::RefuseAfter(1), Script::Silent]);
    let back = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        rig.network.0.lock().expect("no panic").insert(1, Script::ConnectAfter(1));
    };
    let begin = Instant::now();
    let mut story = Story::default();
    let (result, ()) = tokio::join!(rig.dial(&mut story), back);
    assert_eq!(result, Ok(0));
    assert!(begin.elapsed() < Duration::from_millis(600), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn with_race_off_a_slow_backend_is_waited_for() {
    let policy = Policy { race: false, ..Policy::default() };
    let rig = Rig::new(&[Script::ConnectAfter(500), Script::ConnectAfter(1)]).with(policy, 9);
    let mut story = Story::default();
    assert_eq!(rig.dial(&mut story).await, Ok(0));
    assert_eq!(story.attempts, 1);
}

#[tokio::test(start_paused = true)]
async fn a_lone_backend_that_comes_back_within_the_clients_time_serves_it() {
    let rig = Rig::new(&[Script::RefuseAfter(0)]);
    let network = &rig.network;
    let back = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        network.0.lock().expect("no panic").insert(1, Script::ConnectAfter(1));
    };
    let mut story = Story::default();
    let (result, ()) = tokio::join!(rig.dial(&mut story), back);
    assert_eq!(result, Ok(0));
    assert_eq!(story.attempts, 3);
}

#[tokio::test(start_paused = true)]
async fn a_timer_that_runs_late_proves_no_silence() {
    let rig = Rig::new(&[Script::Silent]);
    let backend = &rig.pool.members[0].backend;
    let opening = rig.network.open(backend, &rig.pool.policy, &mut Rng::new()).expect("begins");
    judge(&rig.pool.policy, backend, &opening, clock::now(), true, clock::now());
    assert!(!rig.record(0).1);
    judge(&rig.pool.policy, backend, &opening, clock::now(), false, clock::now());
    assert!(rig.record(0).1);
}

/// Tiers put the cells into a fixed order.
fn cell(i: usize) -> NewCell {
    NewCell {
        name: Arc::from(format!("c{i}")),
        tier: i as u8,
        weight: 1,
        count: 1,
        max_connections: u32::MAX,
        capacity: None,
        shared: Arc::default(),
    }
}
