//! What the workers of one process share besides the table: the process's own limits and its own troubles.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use arc_swap::ArcSwap;

use crate::limits::Gauge;
use crate::log::AccessLog;
use crate::metrics::{Counter, Histogram, LAG_BOUNDS};
use crate::table::Table;

/// Descriptors kept for files, sockets of control, and connections to the admin interfaces.
const RESERVE: u64 = 128;
/// Most pipes of `splice`, each with two descriptors.
pub const MOST_PIPES: u32 = 192;
/// Descriptors of one connection: the client's and the backend's.
const PER_CONNECTION: u64 = 2;

/// The process as its workers see it.
#[derive(Debug)]
pub struct Host {
    /// The live table: the one place where routing changes.
    pub live: Arc<ArcSwap<Table>>,
    /// Connections of all listeners.
    pub connections: Arc<Gauge>,
    /// Most of them; follows from the limit of open files.
    pub max_connections: AtomicU32,
    /// Attempts beyond the first of each client: races, and losers that are still watched.
    pub extra_attempts: Arc<Gauge>,
    /// Most of them.
    pub max_extra: AtomicU32,
    /// Most idle connections that HTTP keeps to backends.
    pub max_idle: AtomicU32,
    /// Errors of our own, by errno.
    pub local_errors: LocalErrors,
    /// Accepting paused because descriptors or memory ran out, or at a cap.
    pub accept_paused: [Counter; 2],
    /// One line per connection.
    pub access: AccessLog,
    /// Bytes that went through `splice`.
    pub spliced: Counter,
    /// Bulk directions that had to use the buffer for want of a pipe.
    pub splice_refused: Counter,
    /// Connections and probers that ended by a panic: bugs of ours.
    pub panics: Counter,
    /// How late timers of the workers and of control ran.
    pub lag: Histogram,
    /// How late probes began.
    pub probe_late: Histogram,
    /// Whether the listeners are going to close.
    pub stopping: AtomicBool,
    /// Per worker: the last beat in milliseconds, share of the last second spent busy (in 1/1000), worst lag of it (in us), connections.
    pub beats: Vec<[AtomicU64; 4]>,
}

impl Host {
    /// A process of `workers` workers that serves `table`.
    pub fn new(table: Arc<Table>, workers: usize, access: AccessLog) -> Host {
        Host {
            live: Arc::new(ArcSwap::new(table)),
            connections: Arc::default(),
            max_connections: AtomicU32::new(1),
            extra_attempts: Arc::default(),
            max_extra: AtomicU32::new(1),
            max_idle: AtomicU32::new(0),
            local_errors: LocalErrors::default(),
            accept_paused: Default::default(),
            access,
            spliced: Counter::default(),
            splice_refused: Counter::default(),
            panics: Counter::default(),
            lag: Histogram::new(&LAG_BOUNDS),
            probe_late: Histogram::new(&LAG_BOUNDS),
            stopping: AtomicBool::new(false),
            beats: (0..workers).map(|_| Default::default()).collect(),
        }
    }

    /// Sets the limits of a table: see [`descriptor_limits`].
    pub fn set_limits(&self, limits: DescriptorLimits) {
        self.max_connections.store(limits.connections, Relaxed);
        self.max_extra.store(limits.extra_attempts, Relaxed);
        self.max_idle.store(limits.idle, Relaxed);
    }

    /// How many idle connections to backends one worker keeps, at least one. The engine keeps those of either HTTP apart.
    pub fn idle_kept(&self) -> usize {
        (self.max_idle.load(Relaxed) as usize / self.beats.len().max(1) / 2).max(1)
    }
}

/// What the limit of open files leaves for connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorLimits {
    /// Most connections.
    pub connections: u32,
    /// Most attempts beyond each client's first.
    pub extra_attempts: u32,
    /// Most idle connections that HTTP keeps to backends; 0 without an `http` listener.
    pub idle: u32,
}

/// Divides `open_files` descriptors: a reserve, the listening sockets, one descriptor per prober, the pipes, a
/// twentieth for extra attempts, with HTTP a twentieth for idle connections to backends, and the rest for connections.
pub fn descriptor_limits(open_files: u64, listening: usize, probers: usize, http: bool) -> DescriptorLimits {
    let extra = (open_files / 20).clamp(8, 8_192);
    let idle = if http { extra } else { 0 };
    let taken = RESERVE + listening as u64 + probers as u64 + 2 * u64::from(MOST_PIPES) + extra + idle;
    let connections = open_files.saturating_sub(taken) / PER_CONNECTION;
    DescriptorLimits {
        connections: connections.clamp(1, u64::from(u32::MAX)) as u32,
        extra_attempts: extra as u32,
        idle: idle as u32,
    }
}

/// Errors that say something about this machine and nothing about a backend.
const LOCAL: [(i32, &str); 8] = [
    (libc::EADDRNOTAVAIL, "EADDRNOTAVAIL"),
    (libc::EMFILE, "EMFILE"),
    (libc::ENFILE, "ENFILE"),
    (libc::ENOBUFS, "ENOBUFS"),
    (libc::ENOMEM, "ENOMEM"),
    (libc::EACCES, "EACCES"),
    (libc::EPERM, "EPERM"),
    (libc::ENETUNREACH, "ENETUNREACH"),
];

/// Counters of errors of our own.
#[derive(Debug, Default)]
pub struct LocalErrors([Counter; LOCAL.len()]);

impl LocalErrors {
    /// Counts `error` if it is one of our own, and says whether it was.
    pub fn count(&self, error: &io::Error) -> bool {
        let place = LOCAL.iter().position(|(errno, _)| error.raw_os_error() == Some(*errno));
        if let Some(place) = place {
            self.0[place].add(1);
        }
        place.is_some()
    }

    /// All errors by name, with their counts.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        LOCAL.iter().zip(&self.0).map(|((_, name), counter)| (*name, counter.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_divided_without_remainder_or_overdraft() {
        let limits = descriptor_limits(20_000, 4, 100, false);
        let used = 128 + 4 + 100 + 384 + u64::from(limits.extra_attempts) + 2 * u64::from(limits.connections);
        assert!((19_998..=20_000).contains(&used), "{limits:?} use {used}");
        let http = descriptor_limits(20_000, 4, 100, true);
        assert_eq!(http.connections, limits.connections - http.idle / 2, "idle connections have descriptors too");
        assert_eq!(descriptor_limits(256, 4, 100, true).connections, 1);
    }
}
