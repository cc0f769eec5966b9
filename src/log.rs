//! The log: events of the process through `tracing`, and one line per connection.
//!
//! Both end in a queue of bounded length before a thread that writes. When a sink is slow, blocked or full, lines
//! are dropped and counted; nobody waits.

use std::cell::RefCell;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

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

/// How long the end of the process waits for a sink.
const FLUSH: Duration = Duration::from_millis(200);
/// Bytes that wait for a sink before further lines are dropped.
const QUEUE: usize = 1 << 20;
/// After each writing the writer rests, and lines of that time are written together: waking it for each would cost more
/// than writing it.
const GATHER: Duration = Duration::from_millis(20);

/// Lines dropped because a sink was slow, of all queues.
pub static DROPPED: Counter = Counter::new();

/// A queue in front of one sink.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Waiting>);

#[derive(Debug)]
struct Waiting {
    lines: Mutex<Lines>,
    /// Tells the writer that there is something to do.
    filled: Condvar,
    /// Tells whoever waits for it that everything is written.
    emptied: Condvar,
    reopen: AtomicBool,
}

#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    count: u64,
    /// What the writer has taken is not yet written.
    writing: bool,
    /// Nobody pushes any more.
    ended: bool,
}

enum Sink {
    Stdout,
    File(LogFile),
}

struct LogFile {
    path: String,
    file: Option<std::fs::File>,
    /// Whether it was said that it cannot be written.
    told: bool,
}

impl Queue {
    /// A queue without a writer.
    fn new() -> Queue {
        Queue(Arc::new(Waiting {
            lines: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            reopen: AtomicBool::new(false),
        }))
    }

    /// A queue with its thread, which ends when the queue is closed.
    fn start(sink: Sink) -> Queue {
        let queue = Queue::new();
        let waiting = queue.0.clone();
        // Without a thread lines are dropped and counted like those of a blocked sink.
        let _ = std::thread::Builder::new().name("log".into()).spawn(move || write_lines(sink, &waiting));
        queue
    }

    /// Adds a line, or drops it.
    pub fn push(&self, line: &[u8]) {
        let mut lines = self.0.lock();
        if lines.bytes.len() + line.len() > QUEUE {
            drop(lines);
            DROPPED.add(1);
            return;
        }
        let first = lines.bytes.is_empty();
        lines.bytes.extend_from_slice(line);
        lines.count += 1;
        drop(lines);
        if first {
            self.0.filled.notify_one();
        }
    }

    /// Waits until all is written, or for `most`.
    fn flush(&self, most: Duration) {
        let busy = |lines: &mut Lines| lines.writing || !lines.bytes.is_empty();
        let _ = self.0.emptied.wait_timeout_while(self.0.lock(), most, busy);
    }

    /// Lets the writer end when it has written what there is.
    fn close(&self) {
        self.0.lock().ended = true;
        self.0.filled.notify_one();
    }
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogFile {
    fn new(path: String) -> LogFile {
        LogFile { path, file: None, told: false }
    }

    /// Writes, into the file of that name as it is now when it is to be opened anew; says whether it could. What fails is told of
    /// once, until it works again.
    fn write(&mut self, batch: &[u8], anew: bool) -> bool {
        if anew {
            self.file = None;
        }
        let written = self.try_write(batch);
        if let Err(error) = &written {
            self.file = None;
            if !self.told {
                tracing::warn!(path = self.path, %error, "the access log cannot be written; its lines are lost and counted until it can");
            }
        }
        self.told = written.is_err();
        written.is_ok()
    }

    fn try_write(&mut self, batch: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(OpenOptions::new().append(true).create(true).open(&self.path)?),
        };
        file.write_all(batch)
    }
}

fn write_lines(mut sink: Sink, waiting: &Waiting) {
    if let Sink::File(file) = &mut sink {
        // A path that cannot be written is told of before the first line is lost.
        file.write(&[], false);
    }
    let mut batch = Vec::new();
    loop {
        let idle = |lines: &mut Lines| lines.bytes.is_empty() && !lines.ended;
        let lines = waiting.filled.wait_while(waiting.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if lines.bytes.is_empty() {
            return;
        }
        drop(lines);
        let count = {
            let mut lines = waiting.lock();
            std::mem::swap(&mut lines.bytes, &mut batch);
            lines.writing = true;
            std::mem::take(&mut lines.count)
        };
        if !write_batch(&mut sink, &batch, &waiting.reopen) {
            DROPPED.add(count);
        }
        // A burst must not keep its memory.
        batch.clear();
        batch.shrink_to(1 << 16);
        waiting.lock().writing = false;
        waiting.emptied.notify_all();
        std::thread::sleep(GATHER);
    }
}

fn write_batch(sink: &mut Sink, batch: &[u8], reopen: &AtomicBool) -> bool {
    match sink {
        Sink::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(batch).and_then(|()| out.flush()).is_ok()
        }
        Sink::File(file) => file.write(batch, reopen.swap(false, Relaxed)),
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
        self.queue.push(&self.bytes);
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
        let mut sink = self.access.0.write().unwrap_or_else(PoisonError::into_inner);
        if sink.access != config.access || sink.format != config.format {
            if matches!(sink.access, Access::File(_)) {
                sink.queue.close();
            }
            *sink = AccessSink::new(config, &self.stdout);
        }
    }

    /// The access log.
    pub fn access(&self) -> AccessLog {
        self.access.clone()
    }

    /// Opens files anew before their next line.
    pub fn reopen(&self) {
        let sink = self.access.0.read().unwrap_or_else(PoisonError::into_inner);
        sink.queue.0.reopen.store(true, Relaxed);
    }

    /// What waits a moment, at the end of the process, for the lines that are queued.
    pub fn flusher(&self) -> impl FnOnce() + use<> {
        let (stdout, access) = (self.stdout.clone(), self.access.clone());
        move || {
            stdout.flush(FLUSH);
            access.0.read().unwrap_or_else(PoisonError::into_inner).queue.flush(FLUSH);
        }
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
            Access::File(path) => Queue::start(Sink::File(LogFile::new(path.clone()))),
            _ => stdout.clone(),
        };
        AccessSink { access: config.access.clone(), format: config.format, queue }
    }

    fn wants(&self, record: &AccessRecord, end: End, status: u16) -> bool {
        match self.access {
            Access::Off => false,
            Access::Errors => end.failed() || record.attempts > 1 || status >= 500,
            Access::Stdout | Access::File(_) => true,
        }
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
    /// Of its ClientHello.
    pub server_name: Option<Box<str>>,
    pub pool: Option<Arc<str>>,
    pub served: Option<Served>,
    pub attempts: u32,
    pub raced: bool,
    pub failures: Vec<Failure>,
    /// Why its beginning was not what it should be.
    pub reason: Option<Box<str>>,
    pub first_byte: Option<Duration>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Of an HTTP request.
    pub http: Option<Box<HttpRecord>>,
    /// Bytes were taken from one side that the other did not get; not a key of the line.
    pub cut: bool,
}

/// What an HTTP request adds to the record.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct HttpRecord {
    pub method: String,
    pub host: String,
    pub path: String,
    /// 0: none was sent.
    pub status: u16,
    pub retries: u32,
    pub id: String,
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
    pub fn new(listener: Arc<str>, client: SocketAddr) -> AccessRecord {
        AccessRecord {
            listener,
            client,
            server_name: None,
            pool: None,
            served: None,
            attempts: 0,
            raced: false,
            failures: Vec::new(),
            reason: None,
            first_byte: None,
            bytes_in: 0,
            bytes_out: 0,
            http: None,
            cut: false,
        }
    }
}

impl AccessLog {
    /// A log that writes nothing, for tests.
    pub fn off() -> AccessLog {
        let config = Log { level: Level::Error, format: Format::Json, access: Access::Off };
        AccessLog(Arc::new(RwLock::new(AccessSink::new(&config, &Queue::new()))))
    }

    /// Whether what the record tells of gets a line; a request has a `status`, a connection 0.
    pub fn wants(&self, record: &AccessRecord, end: End, status: u16) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).wants(record, end, status)
    }

    /// Writes the line of a connection that ended, when it is one that gets a line.
    pub fn write(&self, record: AccessRecord, end: End, duration: Duration) {
        // Read locks do not exclude each other; the write lock is held for a moment at a reload.
        let sink = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let status = record.http.as_ref().map_or(0, |http| http.status);
        if sink.wants(&record, end, status) {
            LINE.with_borrow_mut(|text| {
                text.clear();
                line(text, sink.format, &record, end, duration);
                sink.queue.push(text);
            });
        }
    }
}

thread_local! {
    /// The line being written; its memory is used again.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Writes one line. It is put together by hand because it is written for each connection: building a tree of values
/// first costs several times as much.
fn line(text: &mut Vec<u8>, format: Format, record: &AccessRecord, end: End, duration: Duration) {
    let mut fields = Fields { text, json: format == Format::Json, first: true };
    fields.word("time", clock::now().rfc3339());
    fields.word("kind", if record.http.is_some() { "request" } else { "connection" });
    fields.word("listener", &record.listener);
    fields.word("client", record.client);
    if let Some(http) = &record.http {
        fields.said("method", &http.method);
        fields.said("host", &http.host);
        fields.said("path", &http.path);
        fields.bare("status", http.status);
        fields.bare("retries", http.retries);
        fields.said("id", &http.id);
    }
    if let Some(name) = &record.server_name {
        fields.said("server_name", name);
    }
    match &record.pool {
        Some(pool) => fields.word("pool", pool),
        None => fields.bare("pool", "null"),
    }
    match &record.served {
        Some(served) => {
            fields.word("cell", &served.cell);
            fields.word("backend", &served.backend);
        }
        None => {
            fields.bare("cell", "null");
            fields.bare("backend", "null");
        }
    }
    fields.bare("attempts", record.attempts);
    fields.bare("raced", record.raced);
    fields.list("failures", &record.failures);
    fields.time("handshake_ms", record.served.as_ref().map(|served| served.handshake));
    fields.time("first_byte_ms", record.first_byte);
    fields.time("duration_ms", Some(duration));
    fields.bare("bytes_in", record.bytes_in);
    fields.bare("bytes_out", record.bytes_out);
    fields.word("end", end.word());
    if let Some(reason) = &record.reason {
        fields.said("reason", reason);
    }
    fields.text.extend_from_slice(if format == Format::Json { b"}\n" } else { b"\n" });
}

/// The fields of a line in the making. Writing to memory cannot fail, so the results of writing are not looked at.
struct Fields<'a> {
    text: &'a mut Vec<u8>,
    json: bool,
    first: bool,
}

impl Fields<'_> {
    fn key(&mut self, key: &str) {
        let (before, after) = match (self.json, std::mem::take(&mut self.first)) {
            (true, true) => ("{\"", "\":"),
            (true, false) => (",\"", "\":"),
            (false, true) => ("", "="),
            (false, false) => (" ", "="),
        };
        for part in [before, key, after] {
            self.text.extend_from_slice(part.as_bytes());
        }
    }

    /// A value that is a word of ours, a name or an address: none of them holds what JSON would have to escape.
    fn word(&mut self, key: &str, value: impl Display) {
        self.key(key);
        self.text.push(b'"');
        let _ = write!(self.text, "{value}");
        self.text.push(b'"');
    }

    /// What a client said may hold anything.
    fn said(&mut self, key: &str, value: &str) {
        self.key(key);
        let _ = serde_json::to_writer(&mut *self.text, value);
    }

    fn bare(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.text, "{value}");
    }

    /// Milliseconds to three places, without the zeros at their end.
    fn time(&mut self, key: &str, value: Option<Duration>) {
        let Some(time) = value else { return self.bare(key, "null") };
        let micros = (time + Duration::from_nanos(500)).as_micros() as u64;
        self.bare(key, micros / 1_000);
        let rest = [micros / 100 % 10, micros / 10 % 10, micros % 10].map(|digit| b'0' + digit as u8);
        if let Some(last) = rest.iter().rposition(|digit| *digit != b'0') {
            self.text.push(b'.');
            self.text.extend_from_slice(&rest[..=last]);
        }
    }

    fn list(&mut self, key: &str, failures: &[Failure]) {
        self.key(key);
        self.text.push(b'[');
        for (i, failure) in failures.iter().enumerate() {
            if i > 0 {
                self.text.push(b',');
            }
            // What went wrong may be told in the system's words.
            let _ = serde_json::to_writer(&mut *self.text, &format_args!("{}: {}", failure.backend, failure.cause));
        }
        self.text.push(b']');
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test a failed expectation is a failed test.
mod tests {
    use super::*;

    fn record() -> AccessRecord {
        let mut record = AccessRecord::new("l".into(), "[2001:db8::1]:5".parse().unwrap());
        record.pool = Some("p".into());
        let served = Served { cell: "c".into(), backend: "10.0.0.1:1".into(), handshake: Duration::from_micros(1_234) };
        record.served = Some(served);
        record.attempts = 2;
        record.failures = vec![
            Failure { backend: "b".into(), cause: "refused".into() },
            Failure { backend: "d".into(), cause: "si\"lent".into() },
        ];
        record.bytes_out = 7;
        record
    }

    #[test]
    fn a_line_is_json_with_every_field_or_words() {
        let mut text = Vec::new();
        line(&mut text, Format::Json, &record(), End::BackendClosed, Duration::from_millis(3));
        assert_eq!(text.last(), Some(&b'\n'));
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "time",
                "kind",
                "listener",
                "client",
                "pool",
                "cell",
                "backend",
                "attempts",
                "raced",
                "failures",
                "handshake_ms",
                "first_byte_ms",
                "duration_ms",
                "bytes_in",
                "bytes_out",
                "end"
            ]
        );
        assert_eq!(value["client"], "[2001:db8::1]:5");
        assert_eq!(value["failures"], serde_json::json!(["b: refused", "d: si\"lent"]));
        assert_eq!(value["handshake_ms"], 1.234);
        assert_eq!(value["duration_ms"], 3.0);
        assert!(value["first_byte_ms"].is_null());

        text.clear();
        line(&mut text, Format::Text, &record(), End::BackendClosed, Duration::from_millis(3));
        let text = String::from_utf8(text).unwrap();
        assert!(text.starts_with("time=\"2") && text.ends_with(" end=\"backend_closed\"\n"), "{text}");
    }

    #[test]
    fn times_are_rounded_to_microseconds_and_end_in_no_zero() {
        let time = |nanos| {
            let mut text = Vec::new();
            Fields { text: &mut text, json: false, first: true }.time("t", Some(Duration::from_nanos(nanos)));
            String::from_utf8(text).unwrap()
        };
        let cases = [(0, "t=0"), (499, "t=0"), (5_400, "t=0.005"), (4_050_000, "t=4.05"), (1_999_999_600, "t=2000")];
        for (nanos, text) in cases {
            assert_eq!(time(nanos), text);
        }
    }

    #[test]
    fn beyond_its_bound_a_queue_drops_and_counts() {
        let queue = Queue::new();
        let before = DROPPED.get();
        let line = vec![b'x'; 1 << 18];
        (0..6).for_each(|_| queue.push(&line));
        assert_eq!(DROPPED.get() - before, 2);
    }
}
