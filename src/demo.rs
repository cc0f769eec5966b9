//! The product in half a minute: two toy cells, the proxy and a client on loopback, in one process and without rights.
//!
//! The proxy is the whole program, started from a configuration file in a temporary directory. Cell `a` is taken away
//! twice, by refusal and by silence, and brought back. Every figure is what the client saw on its own sockets; beside it
//! a second client goes straight to the cells in turn, and shows what a plain round robin would have lost.

mod chart;

use std::cell::RefCell;
use std::io::{self, IsTerminal, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use hyper::Method;
use serde_json::Value;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::LocalSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use crate::admin;
use crate::server;
use crate::sys;
use chart::Chart;

/// What a toy cell takes for an answer.
const WORK: Duration = Duration::from_millis(1);
/// A client gives up after this long.
const PATIENCE: Duration = Duration::from_secs(2);
/// The proxy and its cells must be ready within this time.
const START: Duration = Duration::from_secs(10);
/// After a fault, trouble is over when nobody felt anything for this long.
const CALM: Duration = Duration::from_millis(500);
const BACKLOG: u32 = 1_024;

/// How the show goes.
#[derive(Clone, Copy, Debug)]
pub struct Show {
    /// Its length.
    pub length: Duration,
    /// New clients a second.
    pub rate: u64,
    /// Whether the proxy may give a client another cell.
    pub failover: bool,
}

/// What cell `a` does from some moment on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Serve,
    Refuse,
    Silent,
}

/// The acts, each with its beginning in thirtieths of the show.
const ACTS: [(u32, Mode); 5] =
    [(0, Mode::Serve), (5, Mode::Refuse), (10, Mode::Serve), (17, Mode::Silent), (23, Mode::Serve)];

impl Mode {
    fn said(self) -> &'static str {
        match self {
            Mode::Serve => "a serves",
            Mode::Refuse => "a refuses",
            Mode::Silent => "a is silent",
        }
    }
}

/// One request, as its client saw it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Since the beginning of the show.
    began: Duration,
    took: Duration,
    /// Who answered; `None`: nobody did.
    cell: Option<u8>,
}

/// What both clients saw.
#[derive(Debug, Default)]
struct Ledger {
    entries: Vec<Entry>,
    /// Requests of the client that goes straight to the cells in turn: all, and those that failed.
    direct: (usize, usize),
}

/// Plays the show on the terminal. Exit code 0, or 1 when it could not be played or a request failed although the
/// proxy was there to prevent it.
pub fn run(show: Show) -> ExitCode {
    let played = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("runtime: {error}"))
        .and_then(|runtime| LocalSet::new().block_on(&runtime, play(show)));
    match played {
        Ok(failed) if failed > 0 && show.failover => ExitCode::from(1),
        Ok(_) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("sailover demo: {text}");
            ExitCode::from(1)
        }
    }
}

async fn play(show: Show) -> Result<usize, String> {
    let cells = [Toy::start('a').await?, Toy::start('b').await?];
    let addresses = [cells[0].address, cells[1].address];
    let mut stage = Stage::set(show, addresses)?;
    let ways = stage.ready(addresses.len()).await?;

    let ledger = Rc::new(RefCell::new(Ledger::default()));
    let begin = Instant::now();
    let client = tokio::task::spawn_local(call(show, begin, ways, addresses, ledger.clone()));
    let director = async {
        for (at, mode) in ACTS {
            sleep_until(begin + show.length * at / 30).await;
            let _ = cells[0].mode.send(mode);
        }
        sleep_until(begin + show.length).await;
    };
    let mut chart = Chart::new(show.length, io::stdout().is_terminal());
    let drawing = async {
        let mut ticks = interval(chart.period());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            print(&chart.draw(show, begin.elapsed().min(show.length), &ledger.borrow().entries));
        }
    };
    let ended = tokio::select! {
        () = director => None,
        () = drawing => None,
        // An interrupt stops the proxy too, which knows the signals.
        ended = &mut stage.ended => Some(ended.unwrap_or_else(|_| Err("the proxy's thread ended".into()))),
    };
    client.abort();
    if let Some(Err(text)) = ended {
        print(&chart.close());
        return Err(text);
    }
    let played = begin.elapsed().min(show.length);
    if played < show.length {
        // What an interrupt cut off failed nobody's expectations.
        let end = played.saturating_sub(CALM);
        ledger.borrow_mut().entries.retain(|entry| entry.cell.is_some() && entry.began < end);
        print(&chart.close());
        print(&summary(show, played, &ledger.borrow()));
        return Ok(0);
    }
    // Those who are still waiting may wait their time out.
    sleep(PATIENCE.min(played)).await;
    let ledger = ledger.borrow();
    print(&chart.draw(show, played, &ledger.entries));
    print(&chart.close());
    print(&summary(show, played, &ledger));
    drop(stage);
    Ok(ledger.entries.iter().filter(|entry| entry.cell.is_none()).count())
}

/// Writes to standard output; a reader that has gone away is no error.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

// ---- the client ----

/// Starts clients at the rate of the show until it is dropped.
async fn call(show: Show, begin: Instant, ways: Vec<SocketAddr>, cells: [SocketAddr; 2], ledger: Rc<RefCell<Ledger>>) {
    let mut ticks = interval(Duration::from_secs(1) / show.rate as u32);
    let mut number = 0;
    loop {
        ticks.tick().await;
        if begin.elapsed() >= show.length {
            return;
        }
        let way = ways[number % ways.len()];
        let of_way = ledger.clone();
        tokio::task::spawn_local(async move {
            let began = begin.elapsed();
            let cell = request(way).await;
            of_way.borrow_mut().entries.push(Entry { began, took: begin.elapsed() - began, cell });
        });
        let direct = cells[number % cells.len()];
        let of_direct = ledger.clone();
        tokio::task::spawn_local(async move {
            let failed = request(direct).await.is_none();
            let mut ledger = of_direct.borrow_mut();
            ledger.direct.0 += 1;
            ledger.direct.1 += usize::from(failed);
        });
        number += 1;
    }
}

/// One request on a connection of its own: who answered.
async fn request(address: SocketAddr) -> Option<u8> {
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"?\n").await?;
        let mut answer = [0; 2];
        stream.read_exact(&mut answer).await?;
        io::Result::Ok(answer[0])
    };
    timeout(PATIENCE, asking).await.ok()?.ok()
}

// ---- the cells ----

/// A toy cell; dropping its mode ends it.
struct Toy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
}

impl Toy {
    async fn start(name: char) -> Result<Toy, String> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = bind(any).map_err(|error| format!("cell {name} cannot listen on loopback: {error}"))?;
        let address = listener.local_addr().map_err(|error| format!("cell {name}: {error}"))?;
        let (mode, orders) = watch::channel(Mode::Serve);
        tokio::task::spawn_local(serve(name, address, listener, orders));
        Ok(Toy { address, mode })
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn serve(name: char, address: SocketAddr, listener: TcpListener, mut orders: watch::Receiver<Mode>) {
    let mut listener = Some(listener);
    loop {
        let mode = *orders.borrow_and_update();
        match mode {
            Mode::Serve if listener.is_none() => {
                listener = bind(address).ok();
                if listener.is_none() {
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            }
            Mode::Serve => {}
            Mode::Refuse | Mode::Silent => {
                // Whoever is connected is served; from then on the kernel answers nobody.
                let silent = match &listener {
                    Some(listener) => hush(name, address, listener).await.ok(),
                    None => None,
                };
                if mode == Mode::Refuse {
                    listener = None;
                }
                if orders.changed().await.is_err() {
                    return;
                }
                if let Some(listener) = &listener {
                    let _ = SockRef::from(listener).listen(BACKLOG as i32);
                }
                drop(silent);
                continue;
            }
        }
        let Some(open) = &listener else { continue };
        tokio::select! {
            accepted = open.accept() => match accepted {
                Ok((stream, _)) => drop(tokio::task::spawn_local(answer(name, stream))),
                Err(_) => sleep(Duration::from_millis(10)).await,
            },
            changed = orders.changed() => if changed.is_err() { return },
        }
    }
}

/// Makes the kernel swallow every further handshake, as it does when the queue of a listening socket is full: the
/// queue is cut to its shortest, and one connection of our own fills it. Nobody else may be in it, or a client would
/// be connected and never served; so it is looked at, and done again if somebody is.
async fn hush(name: char, address: SocketAddr, listener: &TcpListener) -> io::Result<TcpStream> {
    loop {
        while let Ok(accepted) = timeout(Duration::ZERO, listener.accept()).await {
            tokio::task::spawn_local(answer(name, accepted?.0));
        }
        let filler = timeout(Duration::from_millis(100), TcpStream::connect(address)).await??;
        SockRef::from(listener).listen(0)?;
        // For a listening socket this is the length of its queue.
        if sys::tcp_info(listener.as_fd())?.unacked == 1 {
            return Ok(filler);
        }
        SockRef::from(listener).listen(BACKLOG as i32)?;
    }
}

async fn answer(name: char, mut stream: TcpStream) {
    let answering = async {
        let mut question = [0; 2];
        stream.read_exact(&mut question).await?;
        sleep(WORK).await;
        stream.write_all(&[name as u8, b'\n']).await?;
        stream.shutdown().await
    };
    // Who does not ask gets no answer; the connection filling the queue is one of them.
    let _ = timeout(PATIENCE, answering).await;
}

// ---- the proxy ----

/// The proxy in this process, with its files; they are removed with it.
struct Stage {
    directory: PathBuf,
    ended: oneshot::Receiver<Result<(), String>>,
}

impl Stage {
    fn set(show: Show, cells: [SocketAddr; 2]) -> Result<Stage, String> {
        // A name that nobody can have taken, for this user alone.
        let directory = std::env::temp_dir().join(format!("sailover-demo-{:016x}", fastrand::u64(..)));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(|error| format!("{}: {error}", directory.display()))?;
        let file = directory.join("sailover.yaml");
        let (tell, ended) = oneshot::channel();
        let stage = Stage { directory, ended };
        std::fs::write(&file, configuration(show, cells, &stage.socket()))
            .map_err(|error| format!("{}: {error}", file.display()))?;
        std::thread::Builder::new()
            .name("proxy".into())
            .spawn(move || {
                let ended = server::run(file, crate::config::DEFAULT_MAX_BYTES);
                let _ = tell.send(ended.map_err(|fatal| format!("the proxy ended: {fatal:?}")));
            })
            .map_err(|error| format!("thread: {error}"))?;
        Ok(stage)
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("admin.sock")
    }

    /// Waits until every cell is up, and gives the addresses at which the proxy listens.
    async fn ready(&mut self, cells: usize) -> Result<Vec<SocketAddr>, String> {
        let deadline = Instant::now() + START;
        loop {
            if let Ok(ended) = self.ended.try_recv() {
                return Err(ended.err().unwrap_or_else(|| "the proxy was stopped before it was ready".into()));
            }
            let answer = admin::ask(&self.socket(), Method::GET, "/status", Vec::new()).await;
            let status: Value =
                answer.ok().and_then(|(_, body)| serde_json::from_slice(&body).ok()).unwrap_or_default();
            let pools = status["pools"].as_array().into_iter().flatten();
            let of_pools = pools.flat_map(|pool| pool["cells"].as_array().into_iter().flatten());
            let up = of_pools.filter(|cell| cell["backends"][0]["health"] == "up").count();
            if up == cells {
                let listeners = status["listeners"].as_array().into_iter().flatten();
                return Ok(listeners.filter_map(|listener| listener["address"].as_str()?.parse().ok()).collect());
            }
            if Instant::now() > deadline {
                return Err("the proxy did not become ready in ten seconds".into());
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// One pool of two cells, as a user would write it, but that a show of half a minute cannot wait ten seconds for a
/// return; without failover a pool for each cell.
fn configuration(show: Show, [a, b]: [SocketAddr; 2], socket: &Path) -> String {
    let times = "probe: { interval: 500ms }, hold: { first: 500ms }, ramp: 3s";
    let routing = if show.failover {
        format!(
            "pools:\n  demo: {{ cells: {{ a: [ {a} ], b: [ {b} ] }}, {times} }}\n\
             listeners: [ {{ bind: 127.0.0.1:0, tcp: demo }} ]\n"
        )
    } else {
        let times = format!("{times}, connect: {{ attempts: 1, race: off }}");
        format!(
            "pools:\n  a: {{ cells: {{ a: [ {a} ] }}, {times} }}\n  b: {{ cells: {{ b: [ {b} ] }}, {times} }}\n\
             listeners:\n  - {{ name: a, bind: 127.0.0.1:0, tcp: a }}\n  - {{ name: b, bind: 127.0.0.2:0, tcp: b }}\n"
        )
    };
    format!(
        "{routing}log: {{ level: error, access: off }}\nadmin: {{ socket: '{}' }}\n\
         shutdown: {{ announce: 0s, drain: 0s }}\n",
        socket.display()
    )
}

// ---- the end ----

fn summary(show: Show, played: Duration, ledger: &Ledger) -> String {
    let entries = &ledger.entries;
    let failed = |entries: &[&Entry]| entries.iter().filter(|entry| entry.cell.is_none()).count();
    let slowest = |entries: &[&Entry]| entries.iter().map(|entry| entry.took).max().unwrap_or_default();
    let all: Vec<&Entry> = entries.iter().collect();
    let calm = calm(show, entries);
    let mut out = format!(
        "\n{:.0} s, {} requests: {} failed, the slowest took {} (in calm 99 of 100 took at most {})\n",
        played.as_secs_f64(),
        all.len(),
        failed(&all),
        ms(slowest(&all)),
        ms(calm),
    );
    for (i, (at, mode)) in ACTS.iter().enumerate().filter(|(_, (_, mode))| *mode != Mode::Serve) {
        let from = show.length * *at / 30;
        let to = ACTS.get(i + 1).map_or(show.length, |(at, _)| show.length * *at / 30).min(played);
        if from >= to {
            continue;
        }
        let within: Vec<&Entry> = entries.iter().filter(|entry| (from..to).contains(&entry.began)).collect();
        let (detected, felt) = trouble(&within, from, calm);
        let noticed = if felt == 0 {
            "no client felt it".to_owned()
        } else {
            format!("{felt} clients felt it, the last {} after it began", ms(detected))
        };
        out += &format!(
            "{:<12} for {:.0} s: {} failed, slowest {}; {noticed}\n",
            mode.said(),
            (to - from).as_secs_f64(),
            failed(&within),
            ms(slowest(&within)),
        );
    }
    let (direct, lost) = ledger.direct;
    out += &if show.failover {
        format!(
            "a plain round robin lost {lost} of the same {direct} requests (measured beside it, straight to the cells)\n"
        )
    } else {
        "there was no failover: each client was bound to one cell\n".to_owned()
    };
    out
}

/// The 99th percentile of the time before the first fault; a client that took clearly longer felt something.
fn calm(show: Show, entries: &[Entry]) -> Duration {
    let before = show.length * ACTS[1].0 / 30;
    let mut times: Vec<Duration> =
        entries.iter().filter(|e| e.began < before && e.cell.is_some()).map(|e| e.took).collect();
    times.sort_unstable();
    times.get(times.len() * 99 / 100).copied().unwrap_or(Duration::from_millis(5))
}

/// How long after `from` the last client of the first trouble began, and how many felt it: failed, or took ten
/// milliseconds longer than in calm. What comes after a calm half second is not the fault's doing.
fn trouble(within: &[&Entry], from: Duration, calm: Duration) -> (Duration, usize) {
    let bar = calm + Duration::from_millis(10);
    let mut touched: Vec<Duration> =
        within.iter().filter(|entry| entry.cell.is_none() || entry.took > bar).map(|entry| entry.began).collect();
    touched.sort_unstable();
    let (mut last, mut felt) = (from, 0);
    for began in touched {
        if began > last + CALM {
            break;
        }
        last = began;
        felt += 1;
    }
    (last - from, felt)
}

fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    if ms < 100.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(began: u64, took: u64, cell: Option<u8>) -> Entry {
        Entry { began: Duration::from_millis(began), took: Duration::from_millis(took), cell }
    }

    #[test]
    fn trouble_ends_with_the_first_calm_half_second() {
        let entries = [
            entry(1_000, 2, Some(b'a')),
            entry(1_010, 30, Some(b'b')),
            entry(1_150, 2_000, None),
            entry(1_400, 2, Some(b'b')),
            // A hiccup of the machine, much later.
            entry(3_000, 40, Some(b'b')),
        ];
        let within: Vec<&Entry> = entries.iter().collect();
        let calm = Duration::from_millis(3);
        assert_eq!(trouble(&within, Duration::from_millis(1_000), calm), (Duration::from_millis(150), 2));
        assert_eq!(trouble(&within[3..4], Duration::from_millis(1_000), calm), (Duration::ZERO, 0));
    }
}
