//! The YAML file, in two passes over the same bytes; with `scan` the only user of YAML crates.
//!
//! 1. [`scan`] walks parser events without building anything. It bounds size, depth and node count, refuses
//!    what a reader of the file could misread (anchors, aliases, tags, merge keys, duplicate keys), and leaves an
//!    [`Index`] from path to position.
//! 2. `serde_yaml` turns the bytes into values, and the readers below walk them into the file model. They
//!    collect every problem and never stop at the first.
//!
//! The model mirrors the file: what was not written is `None`. Defaults and references are `resolve`'s business.

mod http;
mod listener;
mod probe;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_yaml::{Mapping, Value};

pub use self::http::FileHttp;
use super::Network;
use super::scan::{Index, MAX_PROBLEMS, Problem, join, scan};
use crate::sniff::ProxyVersion;

/// Largest accepted file in bytes, unless the command line says otherwise.
pub const DEFAULT_MAX_BYTES: usize = 1 << 20;

/// What the file says; every field that was not written is `None` or empty.
#[derive(Debug, Default)]
#[allow(missing_docs)] // The names are the file's own; configs/reference.yaml is their manual.
pub struct File {
    pub workers: Option<u64>,
    pub cells: Option<Vec<(String, FileCellFacts)>>,
    pub pools: Vec<(String, FilePool)>,
    pub listeners: Vec<FileListener>,
    pub admin: FileAdmin,
    pub log: FileLog,
    pub shutdown: FileShutdown,
    /// Patterns of further files, each with its path.
    pub include: Vec<(String, String)>,
    /// Keys that are right but change nothing where they stand: file, path and reason.
    pub warnings: Vec<(usize, String, String)>,
}

/// What a file is to its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The file that the program is started with.
    Main,
    /// One that the main file includes; it holds cells, pools and listeners and nothing else.
    Included,
}

impl File {
    /// Takes in what an included file says; `source` is that file's number.
    pub fn absorb(&mut self, mut part: File, source: usize) {
        part.pools.iter_mut().for_each(|(_, pool)| pool.part = source);
        part.listeners.iter_mut().for_each(|listener| listener.part = source);
        self.pools.append(&mut part.pools);
        self.listeners.append(&mut part.listeners);
        if let Some(mut cells) = part.cells {
            cells.iter_mut().for_each(|(_, facts)| facts.part = source);
            self.cells.get_or_insert_default().append(&mut cells);
        }
        self.warnings.extend(part.warnings.into_iter().map(|(_, path, reason)| (source, path, reason)));
    }
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileCellFacts {
    /// Number of the file it stands in; 0 is the main one.
    pub part: usize,
    pub cloud: Option<String>,
    pub region: Option<String>,
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FilePool {
    /// Number of the file it stands in; 0 is the main one.
    pub part: usize,
    pub cells: Vec<(String, FileCell)>,
    pub balance: Option<super::Balance>,
    pub affinity: Option<super::Affinity>,
    pub probe: Option<FileProbe>,
    pub connect_timeout: Option<Duration>,
    pub attempts: Option<u64>,
    pub race: Option<bool>,
    pub source: Option<Vec<IpAddr>>,
    pub idle: Option<Duration>,
    pub half_close: Option<Duration>,
    pub unacked: Option<Duration>,
    pub on_down: Option<super::OnDown>,
    pub when_all_down: Option<super::WhenAllDown>,
    pub hold_first: Option<Duration>,
    pub hold_longest: Option<Duration>,
    pub ramp: Option<Duration>,
    pub max_connections: Option<u64>,
    pub queue: Option<u64>,
    pub queue_timeout: Option<Duration>,
    pub first_byte: Option<super::FirstByte>,
    pub first_byte_time: Option<Duration>,
    pub replay: Option<super::Replay>,
    pub failback: Option<super::Failback>,
    pub rebalance: Option<super::Rate>,
    pub probe_removal: Option<Duration>,
    pub send_proxy: Option<ProxyVersion>,
    pub http: Option<super::HttpVersion>,
    pub tls: Option<FileBackendTls>,
    pub request: Option<Duration>,
    pub data_version: Option<super::DataVersion>,
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileCell {
    pub weight: Option<u64>,
    pub tier: Option<u64>,
    pub max_connections: Option<u64>,
    pub capacity: Option<super::Rate>,
    /// Each with its path, because a cell may be a list or a map.
    pub backends: Vec<(String, FileBackend)>,
}

#[derive(Debug)]
#[allow(missing_docs)]
pub struct FileBackend {
    pub address: SocketAddr,
    pub name: Option<String>,
    pub weight: Option<u64>,
    pub max_connections: Option<u64>,
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileProbe {
    pub kind: Option<FileProbeKind>,
    pub off: bool,
    pub interval: Option<Duration>,
    pub timeout: Option<Duration>,
    pub fall: Option<u64>,
    pub rise: Option<u64>,
    pub port: Option<u64>,
}

/// TLS that ends at a listener; what it names has still to be read.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileTls {
    /// Each with its path: certificate and key.
    pub certificates: Vec<(String, String, String)>,
    pub only_1_3: bool,
    pub client_ca: Option<String>,
    pub require: bool,
    pub client_header: Option<String>,
}

/// TLS towards backends; what it names has still to be read.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileBackendTls {
    pub server_name: Option<String>,
    pub verify: bool,
    pub ca: Option<String>,
    /// Certificate and key.
    pub identity: Option<(String, String)>,
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileSni {
    /// Each with its path: name in lower case, pool.
    pub routes: Vec<(String, String, String)>,
    pub default: Option<String>,
}

/// A kind of probe; what a TLS probe names has still to be read.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum FileProbeKind {
    Whole(super::ProbeKind),
    Tls { server_name: Option<String>, verify: bool, ca: Option<String> },
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileListener {
    /// Number of the file it stands in; 0 is the main one.
    pub part: usize,
    /// Its path there.
    pub path: String,
    pub name: Option<String>,
    pub bind: Vec<(String, SocketAddr)>,
    pub tcp: Option<String>,
    pub sni: Option<FileSni>,
    pub http: Option<FileHttp>,
    pub tls: Option<FileTls>,
    pub proxy_from: Option<Vec<Network>>,
    pub handshake: Option<Duration>,
    pub header: Option<Duration>,
    pub keepalive: Option<Duration>,
    pub allow: Option<Vec<Network>>,
    pub deny: Option<Vec<Network>>,
    pub max_connections: Option<u64>,
    pub wait: Option<Duration>,
    pub client_connections: Option<u64>,
    pub client_rate: Option<super::Rate>,
    pub client_prefix: (Option<u64>, Option<u64>),
    pub idle: Option<Duration>,
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileAdmin {
    pub socket: Option<String>,
    pub http: Option<SocketAddr>,
    pub hosts: Option<Vec<String>>,
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileLog {
    pub level: Option<super::Level>,
    pub format: Option<super::Format>,
    pub access: Option<super::Access>,
}

#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileShutdown {
    pub announce: Option<Duration>,
    pub drain: Option<Duration>,
}

/// Both passes: bytes to the file model, its index, and every problem of the file's shape.
pub fn parse(bytes: &[u8], max_bytes: usize, part: Part) -> (File, Index, Vec<Problem>) {
    let whole = |message: String| Problem { line: 1, column: 1, path: String::new(), message, file: None };
    if bytes.len() > max_bytes {
        let message =
            format!("the file is too long; at most {max_bytes} bytes are read (--max-config-bytes raises that)");
        return (File::default(), Index::default(), vec![whole(message)]);
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|b| **b == b'\n').count();
            let message = "the file is not UTF-8 text from here on".to_owned();
            let problem = Problem { line, column: 1, path: String::new(), message, file: None };
            return (File::default(), Index::default(), vec![problem]);
        }
    };
    let (index, problems) = scan(text);
    if !problems.is_empty() {
        return (File::default(), index, problems);
    }
    let value: Value = match serde_yaml::from_str(text) {
        Ok(value) => value,
        Err(error) => {
            let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
            let problem = Problem { line, column, path: String::new(), message: error.to_string(), file: None };
            return (File::default(), index, vec![problem]);
        }
    };
    let mut reader = Reader { index: &index, problems: Vec::new(), warnings: Vec::new() };
    let mut file = reader.file(&value, part);
    file.warnings = reader.warnings.drain(..).map(|(path, reason)| (0, path, reason)).collect();
    let problems = reader.problems;
    (file, index, problems)
}

/// A value and where it stands.
struct Node<'v> {
    value: &'v Value,
    path: String,
}

/// A map whose keys have all been judged.
struct Fields<'v> {
    map: &'v Mapping,
    path: String,
    /// Known keys that an unknown one was taken for: their absence has been told of.
    misspelt: Vec<String>,
}

impl<'v> Fields<'v> {
    fn get(&self, key: &str) -> Option<Node<'v>> {
        self.map.get(key).map(|value| Node { value, path: join(&self.path, key) })
    }
}

/// Second pass: values to the file model, all problems by path.
struct Reader<'a> {
    index: &'a Index,
    problems: Vec<Problem>,
    warnings: Vec<(String, String)>,
}

impl Reader<'_> {
    fn file(&mut self, value: &Value, part: Part) -> File {
        let mut file = File::default();
        let root = Node { value, path: String::new() };
        let known = ["version", "cells", "pools", "listeners", "include", "workers", "admin", "log", "shutdown"];
        let known = if part == Part::Main { &known[..] } else { &known[..4] };
        let Some(fields) = self.fields(&root, known) else { return file };
        if let Some(node) = fields.get("include") {
            let items = if node.value.is_sequence() { self.list(&node) } else { vec![node] };
            for item in items {
                match self.text(&item) {
                    Some(pattern) if !pattern.is_empty() => file.include.push((item.path.clone(), pattern)),
                    Some(_) => drop(self.refuse::<()>(&item, "a file name or a pattern such as conf.d/*.yaml")),
                    None => {}
                }
            }
        }
        // What is not here may stand in another file; `resolve` looks at the whole.
        let whole = part == Part::Main && fields.get("include").is_none();
        if let Some(node) = fields.get("version") {
            self.number(&node, 1, 1);
        }
        file.workers = fields.get("workers").and_then(|node| self.number(&node, 1, 1_024));
        if let Some(node) = fields.get("cells") {
            file.cells = Some(self.entries(&node, Self::cell_facts));
        }
        match fields.get("pools") {
            Some(node) => file.pools = self.entries(&node, Self::pool),
            None if whole => self.missing(&fields, "pools", "name at least one pool with its cells"),
            None => {}
        }
        match fields.get("listeners") {
            Some(node) => {
                for item in self.list(&node) {
                    let listener = self.listener(&item);
                    file.listeners.push(listener);
                }
                if file.listeners.is_empty() {
                    self.error(
                        &node.path,
                        "no listener; write at least one, such as `- { bind: 0.0.0.0:443, tcp: POOL }`",
                    );
                }
            }
            None if whole => {
                self.missing(&fields, "listeners", "write at least one, such as `- { bind: 0.0.0.0:443, tcp: POOL }`")
            }
            None => {}
        }
        if whole {
            self.warn_of_idle_http(&file);
            self.warn_of_idle_sessions(&file);
        }
        if let Some(node) = fields.get("admin") {
            file.admin = self.admin(&node);
        }
        if let Some(node) = fields.get("log") {
            file.log = self.log(&node);
        }
        if let Some(node) = fields.get("shutdown") {
            file.shutdown = self.shutdown(&node);
        }
        file
    }

    /// Keys that are right, and change nothing because no listener speaks HTTP.
    fn warn_of_idle_http(&mut self, file: &File) {
        if file.listeners.iter().any(|listener| listener.http.is_some()) {
            return;
        }
        for (name, pool) in &file.pools {
            use super::Affinity::{Cookie, Header};
            let by_http = matches!(pool.affinity, Some(Header(_) | Cookie(_)));
            let keys =
                [("timeouts.request", pool.request.is_some()), ("http", pool.http.is_some()), ("affinity", by_http)];
            for (key, _) in keys.into_iter().filter(|(_, given)| *given) {
                let reason = "has no effect, because no listener is an http listener";
                self.warnings.push((format!("pools.{name}.{key}"), reason.into()));
            }
        }
    }

    /// Keys of sessions in pools that have only requests, and a pace where no session may be moved.
    fn warn_of_idle_sessions(&mut self, file: &File) {
        use super::Affinity::{Cookie, Header, Sni};
        let has_sessions = |pool: &String| {
            file.listeners.iter().any(|listener| {
                let of_sni =
                    listener.sni.iter().flat_map(|sni| sni.routes.iter().map(|(_, _, pool)| pool).chain(&sni.default));
                listener.tcp.iter().chain(of_sni).any(|name| name == pool)
            })
        };
        for (name, pool) in &file.pools {
            let keys = [("rebalance", pool.rebalance.is_some()), ("replay", pool.replay.is_some())];
            if !has_sessions(name) {
                for (key, _) in keys.into_iter().filter(|(_, given)| *given) {
                    let reason = "has no effect, because no tcp or sni listener leads to this pool";
                    self.warnings.push((format!("pools.{name}.{key}"), reason.into()));
                }
            } else if pool.rebalance.is_some() && matches!(pool.affinity, Some(Sni | Header(_) | Cookie(_))) {
                let reason = "has no effect with this affinity, which is not by the client's address";
                self.warnings.push((format!("pools.{name}.rebalance"), reason.into()));
            }
        }
    }

    fn cell_facts(&mut self, node: &Node<'_>) -> FileCellFacts {
        let mut facts = FileCellFacts::default();
        if let Some(fields) = self.fields(node, &["cloud", "region"]) {
            facts.cloud = fields.get("cloud").and_then(|node| self.text(&node));
            facts.region = fields.get("region").and_then(|node| self.text(&node));
        }
        facts
    }

    fn pool(&mut self, node: &Node<'_>) -> FilePool {
        let mut pool = FilePool::default();
        let known = [
            "cells",
            "balance",
            "affinity",
            "probe",
            "connect",
            "timeouts",
            "on_down",
            "when_all_down",
            "hold",
            "ramp",
            "limits",
            "send_proxy",
            "http",
            "tls",
            "first_byte",
            "replay",
            "failback",
            "rebalance",
            "data_version",
        ];
        let Some(fields) = self.fields(node, &known) else { return pool };
        match fields.get("cells") {
            Some(node) => pool.cells = self.entries(&node, Self::cell),
            None => self.missing(&fields, "cells", "a pool is served by at least one cell"),
        }
        pool.balance = fields.get("balance").and_then(|node| {
            use super::Balance::*;
            self.word(
                &node,
                &[("two_choices", TwoChoices), ("round_robin", RoundRobin), ("least_connections", LeastConnections)],
            )
        });
        pool.affinity = fields.get("affinity").and_then(|node| self.affinity(&node));
        pool.probe = fields.get("probe").map(|node| self.probe(&node));
        if let Some(node) = fields.get("connect")
            && let Some(fields) = self.fields(&node, &["timeout", "attempts", "race", "source"])
        {
            pool.connect_timeout = self.duration_at(&fields, "timeout", 1, 60_000);
            pool.attempts = fields.get("attempts").and_then(|node| self.number(&node, 1, 32));
            pool.race = fields.get("race").and_then(|node| self.word(&node, &[("auto", true), ("off", false)]));
            pool.source = fields.get("source").map(|node| {
                let mut sources = Vec::new();
                for item in self.list(&node) {
                    let found = self.text(&item).and_then(|text| match text.parse::<IpAddr>() {
                        Ok(address) => Some(address),
                        Err(_) => self.refuse(&item, "a local IP address, such as 192.0.2.10"),
                    });
                    sources.extend(found);
                }
                sources
            });
        }
        if let Some(node) = fields.get("timeouts")
            && let Some(fields) = self.fields(&node, &["request", "idle", "half_close", "unacked", "first_byte"])
        {
            pool.request = self.duration_at(&fields, "request", 10, DAY);
            pool.idle = self.duration_at(&fields, "idle", 10, 30 * DAY);
            pool.half_close = self.duration_at(&fields, "half_close", 10, DAY);
            pool.unacked = self.duration_at(&fields, "unacked", 1_000, DAY);
            pool.first_byte_time = self.duration_at(&fields, "first_byte", 50, DAY);
        }
        pool.on_down = fields.get("on_down").and_then(|node| {
            use super::OnDown::*;
            self.word(&node, &[("stuck", Stuck), ("reset", Reset), ("drain", Drain), ("keep", Keep)])
        });
        pool.when_all_down = fields.get("when_all_down").and_then(|node| {
            use super::WhenAllDown::*;
            self.word(&node, &[("try_all", TryAll), ("refuse", Refuse)])
        });
        if let Some(node) = fields.get("hold")
            && let Some(fields) = self.fields(&node, &["first", "longest", "between_probe_removals"])
        {
            pool.probe_removal = self.duration_at(&fields, "between_probe_removals", 0, DAY);
            pool.hold_first = self.duration_at(&fields, "first", 10, DAY);
            pool.hold_longest = self.duration_at(&fields, "longest", 10, DAY);
        }
        pool.send_proxy = fields
            .get("send_proxy")
            .and_then(|node| self.word(&node, &[("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)]));
        if let Some(node) = fields.get("http")
            && let Some(fields) = self.fields(&node, &["version"])
        {
            pool.http = fields.get("version").and_then(|node| self.http_version(&node));
        }
        pool.tls = fields.get("tls").map(|node| self.backend_tls(&node));
        pool.first_byte = fields.get("first_byte").and_then(|node| {
            use super::FirstByte::*;
            self.word(&node, &[("learn", Learn), ("expect", Expect), ("ignore", Ignore)])
        });
        pool.replay = fields.get("replay").and_then(|node| self.replay(&node));
        pool.failback = fields.get("failback").and_then(|node| {
            use super::Failback::*;
            self.word(&node, &[("auto", Auto), ("hold", Hold), ("manual", Manual)])
        });
        pool.rebalance = fields.get("rebalance").and_then(|node| self.rate(&node));
        pool.data_version = fields.get("data_version").and_then(|node| self.data_version(&node));
        pool.ramp = self.duration_at(&fields, "ramp", 0, DAY);
        if let Some(node) = fields.get("limits")
            && let Some(fields) = self.fields(&node, &["max_connections", "queue", "queue_timeout"])
        {
            pool.queue = fields.get("queue").and_then(|node| self.number(&node, 0, MAX_QUEUE));
            pool.queue_timeout = self.duration_at(&fields, "queue_timeout", 1, 60_000);
            pool.max_connections =
                fields.get("max_connections").and_then(|node| self.number(&node, 1, MAX_CONNECTIONS));
        }
        pool
    }

    fn replay(&mut self, node: &Node<'_>) -> Option<super::Replay> {
        let fields = self.fields(node, &["up_to", "for"])?;
        let up_to = match fields.get("up_to") {
            Some(node) => self.size(&node, 1, 65_536)? as u32,
            None => 16 << 10,
        };
        let Some(what) = fields.get("for") else {
            self.missing(&fields, "for", "tls is safe; any is for protocols whose first bytes may be sent twice");
            return None;
        };
        let only_tls = self.word(&what, &[("tls", true), ("any", false)])?;
        Some(super::Replay { up_to, only_tls })
    }

    fn affinity(&mut self, node: &Node<'_>) -> Option<super::Affinity> {
        let fields = self.fields(node, &["by"])?;
        let Some(node) = fields.get("by") else {
            self.missing(&fields, "by", "expected none, client_ip, sni, { header: NAME } or { cookie: NAME }");
            return None;
        };
        use super::Affinity;
        if node.value.is_mapping() {
            let fields = self.fields(&node, &["header", "cookie"])?;
            return match (fields.get("header"), fields.get("cookie")) {
                (Some(node), None) => self.affinity_header(&node).map(Affinity::Header),
                (None, Some(node)) => self.affinity_cookie(&node).map(Affinity::Cookie),
                _ => self.refuse(&node, "one of { header: NAME } and { cookie: NAME }"),
            };
        }
        self.word(&node, &[("none", Affinity::None), ("client_ip", Affinity::ClientIp), ("sni", Affinity::Sni)])
    }

    fn host(&mut self, node: &Node<'_>) -> Option<String> {
        let text = self.text(node)?;
        if !text.is_empty() && text.bytes().all(|b| (0x21..0x7f).contains(&b)) && text.len() <= 255 {
            Some(text)
        } else {
            self.refuse(node, "a host name without spaces, at most 255 bytes")
        }
    }

    fn cell(&mut self, node: &Node<'_>) -> FileCell {
        let mut cell = FileCell::default();
        if node.value.is_sequence() {
            cell.backends = self.backends(node);
            return cell;
        }
        let Some(fields) = self.fields(node, &["weight", "tier", "max_connections", "capacity", "backends"]) else {
            return cell;
        };
        cell.max_connections = fields.get("max_connections").and_then(|node| self.number(&node, 1, MAX_CONNECTIONS));
        cell.capacity = fields.get("capacity").and_then(|node| self.rate(&node));
        cell.weight = fields.get("weight").and_then(|node| self.number(&node, 1, MAX_WEIGHT));
        cell.tier = fields.get("tier").and_then(|node| self.number(&node, 0, 15));
        match fields.get("backends") {
            Some(node) => cell.backends = self.backends(&node),
            None => self.missing(&fields, "backends", "expected a list of addresses"),
        }
        cell
    }

    fn backends(&mut self, node: &Node<'_>) -> Vec<(String, FileBackend)> {
        let mut backends = Vec::new();
        let items = self.list(node);
        if items.is_empty() && node.value.is_sequence() {
            self.error(&node.path, "the list is empty; a cell has at least one backend");
        }
        for item in items {
            let path = item.path.clone();
            backends.extend(self.backend(&item).map(|backend| (path, backend)));
        }
        backends
    }

    fn backend(&mut self, node: &Node<'_>) -> Option<FileBackend> {
        if !node.value.is_mapping() {
            let address = self.address(node, false)?;
            return Some(FileBackend { address, name: None, weight: None, max_connections: None });
        }
        let fields = self.fields(node, &["address", "name", "weight", "max_connections"])?;
        let name = fields.get("name").and_then(|node| self.name(&node));
        let weight = fields.get("weight").and_then(|node| self.number(&node, 1, MAX_WEIGHT));
        let max_connections = fields.get("max_connections").and_then(|node| self.number(&node, 1, MAX_CONNECTIONS));
        let Some(address) = fields.get("address") else {
            self.missing(&fields, "address", "expected IP:PORT");
            return None;
        };
        let address = self.address(&address, false)?;
        Some(FileBackend { address, name, weight, max_connections })
    }

    fn admin(&mut self, node: &Node<'_>) -> FileAdmin {
        let mut admin = FileAdmin::default();
        let Some(fields) = self.fields(node, &["socket", "http", "hosts"]) else { return admin };
        admin.socket = fields.get("socket").and_then(|node| {
            let text = self.text(&node)?;
            // sockaddr_un holds 108 bytes with the closing zero.
            if text.starts_with('/') && text.len() <= 107 {
                Some(text)
            } else {
                self.refuse(&node, "an absolute path of at most 107 bytes")
            }
        });
        admin.http = fields.get("http").and_then(|node| self.address(&node, true));
        admin.hosts = fields.get("hosts").map(|node| {
            let items = self.list(&node);
            let host = |reader: &mut Self, item: &Node<'_>| match reader.host(item)? {
                host if host.contains(':') => reader.refuse(item, "a name without a port"),
                host => Some(host),
            };
            items.iter().filter_map(|item| host(self, item)).collect()
        });
        admin
    }

    fn log(&mut self, node: &Node<'_>) -> FileLog {
        let mut log = FileLog::default();
        let Some(fields) = self.fields(node, &["level", "format", "access"]) else { return log };
        log.level = fields.get("level").and_then(|node| {
            use super::Level::*;
            self.word(&node, &[("error", Error), ("warn", Warn), ("info", Info), ("debug", Debug), ("trace", Trace)])
        });
        log.format = fields
            .get("format")
            .and_then(|node| self.word(&node, &[("json", super::Format::Json), ("text", super::Format::Text)]));
        log.access = fields.get("access").and_then(|node| {
            use super::Access::*;
            match node.value {
                Value::String(text) if text.starts_with('/') && text.len() < 4_096 => Some(File(text.clone())),
                _ => self
                    .word(&node, &[("off", Off), ("errors", Errors), ("stdout", Stdout), ("an absolute /path", Off)]),
            }
        });
        log
    }

    fn shutdown(&mut self, node: &Node<'_>) -> FileShutdown {
        let mut shutdown = FileShutdown::default();
        let Some(fields) = self.fields(node, &["announce", "drain"]) else { return shutdown };
        shutdown.announce = self.duration_at(&fields, "announce", 0, DAY);
        shutdown.drain = self.duration_at(&fields, "drain", 0, DAY);
        shutdown
    }

    // ---- values ----

    fn error(&mut self, path: &str, message: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(self.index.problem(path, message));
        }
    }

    /// Reports a key that must be there and is not.
    fn missing(&mut self, fields: &Fields<'_>, key: &str, what: &str) {
        if !fields.misspelt.iter().any(|misspelt| misspelt == key) {
            self.error(&fields.path, format!("`{key}` is missing; {what}"));
        }
    }

    /// Reports what was found and what is allowed.
    fn refuse<T>(&mut self, node: &Node<'_>, wanted: &str) -> Option<T> {
        let message = format!("found {}; expected {wanted}", describe(node.value));
        self.error(&node.path, message);
        None
    }

    /// The map at `node`, after every unknown key has been reported.
    fn fields<'v>(&mut self, node: &Node<'v>, known: &[&str]) -> Option<Fields<'v>> {
        let Value::Mapping(map) = node.value else {
            let wanted =
                if known.is_empty() { "a map, here {}".to_owned() } else { format!("a map with {}", listed(known)) };
            return self.refuse(node, &wanted);
        };
        let mut misspelt = Vec::new();
        for key in map.keys() {
            let Some(key) = key.as_str() else {
                self.error(&node.path, format!("the key {} is not text; expected {}", describe(key), listed(known)));
                continue;
            };
            if known.contains(&key) {
                continue;
            }
            let path = join(&node.path, key);
            let message = match nearest(key, known) {
                None if node.path.is_empty() && MAIN_ONLY.contains(&key) => {
                    format!("`{key}` belongs into the main file, not into an included one")
                }
                Some(similar) => {
                    misspelt.push(similar.to_owned());
                    format!("unknown key `{key}`; did you mean `{similar}`?")
                }
                None if known.is_empty() => format!("unknown key `{key}`; expected an empty map, {{}}"),
                None => format!("unknown key `{key}`; expected {}", listed(known)),
            };
            self.error(&path, message);
        }
        Some(Fields { map, path: node.path.clone(), misspelt })
    }

    /// A map of names to things, in the order of the file.
    fn entries<'v, T>(&mut self, node: &Node<'v>, read: impl Fn(&mut Self, &Node<'v>) -> T) -> Vec<(String, T)> {
        let mut entries = Vec::new();
        let Value::Mapping(map) = node.value else {
            self.refuse::<()>(node, "a map from name to content");
            return entries;
        };
        if map.is_empty() {
            self.error(&node.path, "the map is empty; write at least one entry");
        }
        for (key, value) in map {
            let name = match key {
                Value::String(name) => name.clone(),
                Value::Number(number) => number.to_string(),
                _ => {
                    self.error(&node.path, format!("the name {} is not text", describe(key)));
                    continue;
                }
            };
            let path = join(&node.path, &name);
            if !is_name(&name) {
                self.error(&path, format!("found the name {name:?}; expected {NAME}"));
            }
            let node = Node { value, path };
            entries.push((name, read(self, &node)));
        }
        entries
    }

    fn list<'v>(&mut self, node: &Node<'v>) -> Vec<Node<'v>> {
        let Value::Sequence(items) = node.value else {
            self.refuse::<()>(node, "a list");
            return Vec::new();
        };
        items.iter().enumerate().map(|(i, value)| Node { value, path: format!("{}[{i}]", node.path) }).collect()
    }

    fn text(&mut self, node: &Node<'_>) -> Option<String> {
        match node.value {
            Value::String(text) => Some(text.clone()),
            _ => self.refuse(node, "text"),
        }
    }

    fn name(&mut self, node: &Node<'_>) -> Option<String> {
        match node.value {
            Value::String(text) if is_name(text) => Some(text.clone()),
            Value::Number(number) if is_name(&number.to_string()) => Some(number.to_string()),
            _ => self.refuse(node, NAME),
        }
    }

    fn number(&mut self, node: &Node<'_>, low: u64, high: u64) -> Option<u64> {
        match node.value {
            Value::Number(number) if number.as_u64().is_some_and(|n| (low..=high).contains(&n)) => number.as_u64(),
            _ if low == high => self.refuse(node, &format!("{low}")),
            _ => self.refuse(node, &format!("a whole number from {low} to {high}")),
        }
    }

    fn rate(&mut self, node: &Node<'_>) -> Option<super::Rate> {
        let rate = match node.value {
            Value::String(text) => super::Rate::parse(text),
            _ => None,
        };
        rate.or_else(|| self.refuse(node, "a rate such as 100/s or 30/m, at least 1"))
    }

    /// A number of bytes with its unit.
    fn size(&mut self, node: &Node<'_>, low: u64, high: u64) -> Option<u64> {
        let bytes = match node.value {
            Value::String(text) => {
                let (number, unit) = match text.strip_suffix("KiB") {
                    Some(number) => (number, 1_024),
                    None => (text.strip_suffix('B').unwrap_or(""), 1),
                };
                number.trim_end().parse::<u64>().ok().and_then(|number| number.checked_mul(unit))
            }
            _ => None,
        };
        let wanted = format!("a size with its unit, such as 512B or 16KiB, from {low}B to {}KiB", high / 1_024);
        bytes.filter(|bytes| (low..=high).contains(bytes)).or_else(|| self.refuse(node, &wanted))
    }

    fn duration_at(&mut self, fields: &Fields<'_>, key: &str, low: u64, high: u64) -> Option<Duration> {
        let node = fields.get(key)?;
        let (low, high) = (Duration::from_millis(low), Duration::from_millis(high));
        let within =
            format!("a duration with its unit, such as 800ms, 30s or 1h, from {low:?} to {}", super::human(high));
        let text = match node.value {
            Value::String(text) => text,
            _ => return self.refuse(&node, &within),
        };
        match humantime::parse_duration(text) {
            Ok(duration) if (low..=high).contains(&duration) => Some(duration),
            _ => self.refuse(&node, &within),
        }
    }

    fn flag(&mut self, node: &Node<'_>) -> Option<bool> {
        match node.value {
            Value::Bool(flag) => Some(*flag),
            _ => self.refuse(node, "true or false"),
        }
    }

    fn word<T: Clone>(&mut self, node: &Node<'_>, words: &[(&str, T)]) -> Option<T> {
        let text = match node.value {
            Value::String(text) => text.as_str(),
            Value::Bool(false) => "false",
            _ => "",
        };
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(value.clone());
        }
        let names = words.iter().map(|(word, _)| *word).collect::<Vec<_>>();
        let suggestion = nearest(text, &names).map(|word| format!("; did you mean {word}?")).unwrap_or_default();
        let wanted = format!("{}{suggestion}", names.join(" | "));
        self.refuse(node, &wanted)
    }

    fn address(&mut self, node: &Node<'_>, listening: bool) -> Option<SocketAddr> {
        let wanted = "IP:PORT, such as 192.0.2.10:443 or [2001:db8::1]:443";
        let Value::String(text) = node.value else { return self.refuse(node, wanted) };
        match text.parse::<SocketAddr>() {
            Ok(address) if !listening && address.port() == 0 => self.refuse(node, "a port from 1 to 65535"),
            Ok(address) if !listening && (address.ip().is_unspecified() || address.ip().is_multicast()) => {
                self.refuse(node, "the address of one host")
            }
            Ok(address) => Some(address),
            Err(_) => {
                let host = text.rsplit_once(':').map_or(text.as_str(), |(host, _)| host);
                let named = !host.is_empty()
                    && host.chars().any(|c| c.is_ascii_alphabetic())
                    && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
                if named {
                    self.error(
                        &node.path,
                        format!(
                            "found the name {host:?}: names as addresses are not in this version; expected {wanted}"
                        ),
                    );
                    return None;
                }
                self.refuse(node, wanted)
            }
        }
    }
}

/// Keys of the main file that an included one does not have.
const MAIN_ONLY: [&str; 5] = ["include", "workers", "admin", "log", "shutdown"];
const DAY: u64 = 24 * 3_600 * 1_000;
const MAX_WEIGHT: u64 = 1_000;
const MAX_CONNECTIONS: u64 = 10_000_000;
const MAX_QUEUE: u64 = 100_000;
const NAME: &str = "a name of 1 to 64 letters, digits, '-', '_' or '.', beginning with a letter or digit";

fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// The key that was probably meant: at most two edits away, or one for short words.
fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let best = known.iter().map(|word| (strsim::damerau_levenshtein(key, word), *word)).min()?;
    let allowed = if key.len() <= 4 { 1 } else { 2.max(key.len() / 4) };
    (best.0 <= allowed && key.len() <= 64 && !key.is_empty()).then_some(best.1)
}

fn listed(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => one.to_string(),
        [init @ .., last] => format!("{} or {last}", init.join(", ")),
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(number) => format!("{number}"),
        Value::String(text) if text.chars().count() > 60 => {
            format!("{:?}...", text.chars().take(60).collect::<String>())
        }
        Value::String(text) => format!("{text:?}"),
        Value::Sequence(_) => "a list".into(),
        Value::Mapping(_) => "a map".into(),
        Value::Tagged(_) => "a tagged value".into(),
    }
}
