//! One data-plane thread: a single-threaded runtime with its listening sockets, its sessions and its beat. A
//! connection lives and dies on one worker.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::clock;
use crate::first_byte;
use crate::host::Host;
use crate::http;
use crate::listen::{self, Stop};
use crate::session;
use crate::sys;

/// Time between two looks at what is doomed; ten of them are one beat.
const TICK: Duration = Duration::from_millis(100);
const TICKS_PER_BEAT: u32 = 10;

/// What control tells a worker.
pub enum Command {
    /// Accept on this socket.
    Listen {
        /// The address as configured.
        bind: SocketAddr,
        /// The worker's own socket for it.
        socket: StdListener,
        /// Turns true when the address is to be given up.
        stop: Stop,
    },
    /// Tell of running sessions, or mark them for their end.
    Sessions {
        /// Which.
        filter: Arc<session::Filter>,
        /// Whether they are to end.
        kick: bool,
        /// Most that are told of.
        most: usize,
        /// Takes the answer of each worker.
        reply: UnboundedSender<Sessions>,
    },
    /// End all sessions: the program stops.
    EndAll,
}

/// A worker's answer about its sessions.
#[derive(Debug, Default)]
pub struct Sessions {
    /// Some of those that were meant, oldest first.
    pub rows: Vec<session::Row>,
    /// All that were meant.
    pub count: usize,
}

/// Control's end of one worker.
pub struct Worker {
    commands: UnboundedSender<Command>,
}

impl Worker {
    /// Starts worker number `number`, which tells `ended` when it ends.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be made.
    pub fn start(number: usize, host: Arc<Host>, ended: UnboundedSender<usize>) -> io::Result<Worker> {
        let (commands, receiver) = unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // It ends only when our end is dropped, or by a bug.
        std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            let _tell = TellEnd(number, ended);
            runtime.block_on(run(number, host, receiver));
        })?;
        Ok(Worker { commands })
    }

    /// Tells it something; a worker that has ended hears nothing, and its end is noticed elsewhere.
    pub fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}

/// Tells control that a worker has ended, by a panic too.
struct TellEnd(usize, UnboundedSender<usize>);

impl Drop for TellEnd {
    fn drop(&mut self) {
        let _ = self.1.send(self.0);
    }
}

/// Resets of doomed sessions in the present tick, of all workers: the number of the tick and their count.
static RESETS: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];

async fn run(number: usize, host: Arc<Host>, mut commands: UnboundedReceiver<Command>) {
    let mut next = Instant::now() + TICK;
    let (mut ticks, mut worst_lag) = (0, Duration::ZERO);
    let (mut cpu, mut wall) = (sys::thread_cpu(), Instant::now());
    let mut accepting = JoinSet::new();
    // If it ended by a panic no request would have its time any more.
    accepting.spawn(http::wait::watch());
    accepting.spawn(first_byte::watch());
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                None => return,
                Some(Command::Sessions { filter, kick, most, reply }) => {
                    let _ = reply.send(sessions(number, &filter, kick, most));
                }
                Some(Command::EndAll) => {
                    session::end_all();
                    http::stream::end_all();
                }
                Some(Command::Listen { bind, socket, stop }) => match TcpListener::from_std(socket) {
                    Ok(socket) => drop(accepting.spawn(listen::accept(socket, bind, host.clone(), stop))),
                    Err(error) => tracing::error!(%bind, %error, "cannot accept on this address"),
                },
            },
            // An accept loop ends when its address is given up. By a panic none of these must: then the process ends.
            Some(Err(_)) = accepting.join_next() => return,
            () = sleep_until(next) => {
                let lag = next.elapsed();
                host.lag.record(lag);
                worst_lag = worst_lag.max(lag);
                next = (next + TICK).max(Instant::now());
                ticks += 1;
                if session::any_doomed() {
                    session::reset_doomed(resets_left());
                }
                if ticks % TICKS_PER_BEAT == 0 {
                    let table = host.live.load();
                    session::inspect(&table, clock::now());
                    session::rebalance(&table, clock::now());
                    http::upstream::break_stuck(clock::now());
                    http::stream::break_stuck(clock::now());
                    let (cpu_now, wall_now) = (sys::thread_cpu(), Instant::now());
                    let busy = (cpu_now - cpu).as_secs_f64() / (wall_now - wall).as_secs_f64().max(1e-6);
                    (cpu, wall) = (cpu_now, wall_now);
                    let beat = &host.beats[number];
                    beat[0].store(clock::now().0 / 1_000, Relaxed);
                    beat[1].store((busy * 1_000.0) as u64, Relaxed);
                    beat[2].store(std::mem::take(&mut worst_lag).as_micros() as u64, Relaxed);
                    beat[3].store((session::count() + http::stream::count()) as u64, Relaxed);
                }
            }
        }
    }
}

fn sessions(number: usize, filter: &session::Filter, kick: bool, most: usize) -> Sessions {
    if kick {
        return Sessions { rows: Vec::new(), count: session::kick(filter, number) };
    }
    let (rows, count) = session::list(filter, number, most, clock::now());
    Sessions { rows, count }
}

/// How many sessions may still be reset in this tick, over all workers; they are taken.
fn resets_left() -> usize {
    let tick = (clock::now().0 / TICK.as_micros() as u64) as usize;
    if RESETS[0].swap(tick, Relaxed) != tick {
        RESETS[1].store(0, Relaxed);
    }
    let share = session::RESETS_PER_TICK / 2;
    let taken = RESETS[1].fetch_add(share, Relaxed);
    session::RESETS_PER_TICK.saturating_sub(taken).min(share)
}
