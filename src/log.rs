//! The log: events of the process through `tracing`, and one line per connection.
//!
//! Both end in a queue of bounded length before a thread that writes. When a sink is slow, blocked or full, lines
//! are dropped and counted; nobody waits.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use serde_json::json;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::clock;
use crate::config::{Access, Format, Level, Log};
use crate::dial::Failure;
use crate::metrics::Counter;
use crate::table::End;

/// Lines that wait for a sink before further ones are dropped.
const QUEUE: usize = 8_192;

/// Lines dropped because a sink was slow, of all queues.
pub static DROPPED: Counter = Counter::new();

/// A queue in front of one sink.
#[derive(Clone, Debug)]
pub struct Queue {
    sender: SyncSender<Vec<u8>>,
    reopen: Arc<AtomicBool>,
}

enum Sink {
    Stdout,
    File(String, Option<std::fs::File>),
}

impl Queue {
    /// A queue with its thread, which ends with the last clone of the queue.
    fn start(sink: Sink) -> Queue {
        let (sender, receiver) = sync_channel(QUEUE);
        let reopen = Arc::new(AtomicBool::new(false));
        let again = reopen.clone();
        // Without a thread lines are dropped and counted like those of a blocked sink.
        let _ = std::thread::Builder::new().name("log".into()).spawn(move || write_lines(sink, &receiver, &again));
        Queue { sender, reopen }
    }

    /// Adds a line, or drops it.
    pub fn push(&self, line: Vec<u8>) {
        if self.sender.try_send(line).is_err() {
            DROPPED.add(1);
        }
    }
}

fn write_lines(mut sink: Sink, receiver: &Receiver<Vec<u8>>, reopen: &AtomicBool) {
    while let Ok(mut batch) = receiver.recv() {
        let mut lines = 1;
        while batch.len() < 1 << 16
            && let Ok(line) = receiver.try_recv()
        {
            batch.extend_from_slice(&line);
            lines += 1;
        }
        let written = match &mut sink {
            Sink::Stdout => io::stdout().lock().write_all(&batch),
            Sink::File(path, file) => {
                if reopen.swap(false, Relaxed) || file.is_none() {
                    *file = OpenOptions::new().append(true).create(true).open(&*path).ok();
                }
                match file {
                    Some(file) => file.write_all(&batch),
                    None => Err(io::ErrorKind::NotFound.into()),
                }
            }
        };
        if written.is_err() {
            DROPPED.add(lines);
            if let Sink::File(_, file) = &mut sink {
                *file = None;
            }
        }
    }
}

/// Hands complete events of `tracing` to a queue.
#[derive(Clone)]
struct ToQueue(Queue);

struct Line {
    bytes: Vec<u8>,
    queue: Queue,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.queue.push(std::mem::take(&mut self.bytes));
    }
}

impl<'a> MakeWriter<'a> for ToQueue {
    type Writer = Line;
    fn make_writer(&'a self) -> Line {
        Line { bytes: Vec::with_capacity(256), queue: self.0.clone() }
    }
}

type AnyLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// The process's log; a reload may change its level, its form, and where the access lines go.
pub struct Logger {
    filter: reload::Handle<LevelFilter, layered::Inner>,
    form: reload::Handle<AnyLayer, Registry>,
    stdout: Queue,
    access: AccessLog,
}

/// The type of the subscriber under the filter, which the library wants named.
mod layered {
    use super::{AnyLayer, Registry, reload};
    pub type Inner = tracing_subscriber::layer::Layered<reload::Layer<AnyLayer, Registry>, Registry>;
}

impl Logger {
    /// Sets up the log of the process.
    pub fn start(config: &Log) -> Logger {
        let stdout = Queue::start(Sink::Stdout);
        let (form, form_handle) = reload::Layer::new(form(config.format, &stdout));
        let (filter, filter_handle) = reload::Layer::new(level(config.level));
        // A second start in one process (in tests) keeps the first subscriber.
        let _ = tracing_subscriber::registry().with(form).with(filter).try_init();
        let access = AccessLog(Arc::new(RwLock::new(AccessSink::new(config, &stdout))));
        Logger { filter: filter_handle, form: form_handle, stdout, access }
    }

    /// Takes over another configuration.
    pub fn apply(&self, config: &Log) {
        let _ = self.filter.reload(level(config.level));
        let _ = self.form.reload(form(config.format, &self.stdout));
        let mut sink = self.access.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if sink.access != config.access || sink.format != config.format {
            *sink = AccessSink::new(config, &self.stdout);
        }
    }

    /// The access log.
    pub fn access(&self) -> AccessLog {
        self.access.clone()
    }

    /// Opens files anew before their next line.
    pub fn reopen(&self) {
        let sink = self.access.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        sink.queue.reopen.store(true, Relaxed);
    }
}

fn level(level: Level) -> LevelFilter {
    match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    }
}

fn form(format: Format, queue: &Queue) -> AnyLayer {
    let layer =
        tracing_subscriber::fmt::layer().with_writer(ToQueue(queue.clone())).with_target(false).with_ansi(false);
    match format {
        Format::Json => layer.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
        Format::Text => layer.boxed(),
    }
}

#[derive(Debug)]
struct AccessSink {
    access: Access,
    format: Format,
    queue: Queue,
}

impl AccessSink {
    fn new(config: &Log, stdout: &Queue) -> AccessSink {
        let queue = match &config.access {
            Access::File(path) => Queue::start(Sink::File(path.clone(), None)),
            _ => stdout.clone(),
        };
        AccessSink { access: config.access.clone(), format: config.format, queue }
    }
}

/// Where the lines of connections go.
#[derive(Clone, Debug)]
pub struct AccessLog(Arc<RwLock<AccessSink>>);

/// What is told of one connection.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are the keys of the line.
pub struct AccessRecord {
    pub listener: Arc<str>,
    pub client: SocketAddr,
    pub pool: Arc<str>,
    pub served: Option<Served>,
    pub attempts: u32,
    pub raced: bool,
    pub failures: Vec<Failure>,
    pub first_byte: Option<Duration>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Bytes were taken from one side that the other did not get; not a key of the line.
    pub cut: bool,
}

/// The backend that served a connection.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Served {
    pub cell: Arc<str>,
    pub backend: Arc<str>,
    pub handshake: Duration,
}

impl AccessRecord {
    /// A record of a connection that has just been accepted.
    pub fn new(listener: Arc<str>, client: SocketAddr, pool: Arc<str>) -> AccessRecord {
        AccessRecord {
            listener,
            client,
            pool,
            served: None,
            attempts: 0,
            raced: false,
            failures: Vec::new(),
            first_byte: None,
            bytes_in: 0,
            bytes_out: 0,
            cut: false,
        }
    }
}

impl AccessLog {
    /// A log that writes nothing, for tests.
    pub fn off() -> AccessLog {
        let config = Log { level: Level::Error, format: Format::Json, access: Access::Off };
        let (sender, _) = sync_channel(1);
        let queue = Queue { sender, reopen: Arc::default() };
        AccessLog(Arc::new(RwLock::new(AccessSink::new(&config, &queue))))
    }

    /// Writes the line of a connection that ended, when it is one that gets a line.
    pub fn write(&self, record: AccessRecord, end: End, duration: Duration) {
        // Read locks do not exclude each other; the write lock is held for a moment at a reload.
        let sink = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let wanted = match sink.access {
            Access::Off => false,
            Access::Errors => end.failed() || record.attempts > 1,
            Access::Stdout | Access::File(_) => true,
        };
        if wanted {
            sink.queue.push(line(sink.format, &record, end, duration));
        }
    }
}

fn line(format: Format, record: &AccessRecord, end: End, duration: Duration) -> Vec<u8> {
    let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let failures = record.failures.iter().map(|f| format!("{}: {}", f.backend, f.cause)).collect::<Vec<_>>();
    let value = json!({
        "time": clock::now().rfc3339(),
        "kind": "connection",
        "listener": &*record.listener,
        "client": record.client.to_string(),
        "pool": &*record.pool,
        "cell": record.served.as_ref().map(|served| &*served.cell),
        "backend": record.served.as_ref().map(|served| &*served.backend),
        "attempts": record.attempts,
        "raced": record.raced,
        "failures": failures,
        "handshake_ms": record.served.as_ref().map(|served| ms(served.handshake)),
        "first_byte_ms": record.first_byte.map(ms),
        "duration_ms": ms(duration),
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
        "end": end.word(),
    });
    let mut text = match format {
        Format::Json => value.to_string(),
        Format::Text => {
            let fields = value.as_object().into_iter().flatten();
            fields.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
        }
    };
    text.push('\n');
    text.into_bytes()
}
