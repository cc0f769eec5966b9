//! The resolved configuration: what the program needs, with nothing optional left in it.
//!
//! [`load`] is the one way to get it. It reads a file and those that it includes (`sources`), each in two passes (`file`),
//! resolves them together (`resolve`), and reports every problem at once, each with line and path. Nothing here needs the network to be judged.

pub mod file;
pub mod http;
mod resolve;
pub mod scan;
pub mod sources;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};
use xxhash_rust::xxh3::Xxh3;

pub use file::DEFAULT_MAX_BYTES;
use file::Part;
pub use scan::Problem;
use sources::Sources;

use crate::sniff::ProxyVersion;

/// A whole configuration. Equal files resolve to equal values.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// Worker threads; changes take effect at the next start.
    pub workers: usize,
    /// What is known about cells, for people and reports.
    pub cells: Vec<CellFacts>,
    /// Pools in the order of the file.
    pub pools: Vec<Pool>,
    /// Listeners in the order of the file.
    pub listeners: Vec<Listener>,
    /// Interfaces for operators.
    pub admin: Admin,
    /// Log.
    pub log: Log,
    /// How the process stops.
    pub shutdown: Shutdown,
}

/// Facts about a cell that change nothing in routing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellFacts {
    /// The cell's name in pools.
    pub name: String,
    /// Owner of the failure domain.
    pub cloud: Option<String>,
    /// Place of the failure domain.
    pub region: Option<String>,
}

/// The same thing served from several cells, and the policy for choosing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pool {
    /// Unique name.
    pub name: String,
    /// At least one.
    pub cells: Vec<Cell>,
    /// Choice inside the cell.
    pub balance: Balance,
    /// What pins a client to a cell and a backend.
    pub affinity: Affinity,
    /// The active check; `None` when it is off.
    pub probe: Option<Probe>,
    /// Dialling.
    pub connect: Connect,
    /// The HTTP of its backends, for `http` listeners.
    pub http: HttpVersion,
    /// TLS towards its backends; `None`: none.
    pub tls: Option<BackendTls>,
    /// Bounds on a running session.
    pub timeouts: Timeouts,
    /// Header that tells a backend who its client is.
    pub send_proxy: Option<ProxyVersion>,
    /// What happens to the sessions of a backend that goes down.
    pub on_down: OnDown,
    /// What new clients get when no backend is fit.
    pub when_all_down: WhenAllDown,
    /// How long a backend that went down stays out.
    pub hold: Hold,
    /// Time in which a returning backend's share grows to its full size.
    #[serde(serialize_with = "as_text")]
    pub ramp: Duration,
    /// Most connections at once; `None`: half of the process's (all of them for an only pool).
    pub max_connections: Option<u32>,
    /// Clients that wait for a place when all backends are full.
    pub queue: Queue,
    /// Whether the backends owe a first byte.
    pub first_byte: FirstByte,
    /// What of a session's beginning is kept to be sent again; `None`: nothing.
    pub replay: Option<Replay>,
    /// How a cell that failed comes back.
    pub failback: Failback,
    /// How many sessions of cells with more than their share are ended so that their clients connect anew; `None`: none.
    pub rebalance: Option<Rate>,
    /// Time between two cells that probes alone take out.
    #[serde(serialize_with = "as_text")]
    pub probe_removal: Duration,
    /// How old the data of its backends may be; `None`: nobody asks.
    pub data_version: Option<DataVersion>,
}

/// How old the data of a pool's backends may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataVersion {
    /// Name of the header that says it, in lower case.
    pub header: String,
    /// The oldest version that will do.
    pub at_least: u64,
}

/// Clients that wait for a place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Queue {
    /// Most at once.
    pub length: u32,
    /// For each.
    #[serde(serialize_with = "as_text")]
    pub timeout: Duration,
}

/// Whether the backends of sessions owe a first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstByte {
    /// What sessions have shown until now says it.
    Learn,
    /// An answer to the client's first bytes.
    Expect,
    /// No.
    Ignore,
}

/// What of a session's beginning is kept to be sent again to another backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Replay {
    /// Most bytes.
    pub up_to: u32,
    /// Whether only TLS handshakes are.
    pub only_tls: bool,
}

/// How a cell that failed gets new clients again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failback {
    /// By its ramp, when its hold is over.
    Auto,
    /// The same, when it has been well for its longest hold.
    Hold,
    /// When an operator says so.
    Manual,
}

/// This many events in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In a minute, at least 1.
    pub per_minute: u32,
}

impl Rate {
    /// Parses `N/s` or `N/m`.
    pub fn parse(text: &str) -> Option<Rate> {
        let (number, unit) = text.split_once('/')?;
        let times = match unit {
            "s" => 60,
            "m" => 1,
            _ => return None,
        };
        let number: u32 = if number.starts_with('+') { return None } else { number.parse().ok()? };
        let per_minute = number.checked_mul(times)?;
        (per_minute > 0).then_some(Rate { per_minute })
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.per_minute.is_multiple_of(60) {
            true => serializer.collect_str(&format_args!("{}/s", self.per_minute / 60)),
            false => serializer.collect_str(&format_args!("{}/m", self.per_minute)),
        }
    }
}

/// One cell's part of a pool.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Name, the same in every pool that the cell serves.
    pub name: String,
    /// Share against the other cells of its tier, 1 to 1000.
    pub weight: u32,
    /// 0 is used first.
    pub tier: u8,
    /// Most connections at once; `None`: no bound of its own.
    pub max_connections: Option<u32>,
    /// New clients (HTTP: requests) that it can take; `None`: what it shows it can.
    pub capacity: Option<Rate>,
    /// At least one.
    pub backends: Vec<Backend>,
}

/// One address in one cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Backend {
    /// Unique in its pool; the address unless the file says otherwise.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Share against the other backends of its cell, 1 to 1000.
    pub weight: u32,
    /// Most connections at once; `None`: no bound of its own.
    pub max_connections: Option<u32>,
}

/// How the backend inside a cell is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The less loaded of two drawn at random (Mitzenmacher 2001).
    TwoChoices,
    /// Smooth weighted turns.
    RoundRobin,
    /// The fewest connections for its weight.
    LeastConnections,
}

/// What pins a client to a cell and the backend in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Affinity {
    /// Nothing.
    None,
    /// The client's address.
    ClientIp,
    /// The server name that the client asks for; on listeners that read it.
    Sni,
    /// The value of a header, whose name is in lower case; on `http` listeners.
    Header(String),
    /// A cookie of ours that names the cell and the backend; on `http` listeners.
    Cookie(http::Cookie),
}

/// The HTTP that a pool's backends speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HttpVersion {
    /// Under TLS what ALPN says; HTTP/1.1 otherwise.
    Auto,
    /// HTTP/1.1.
    One,
    /// HTTP/2, without TLS from the first byte on.
    Two,
}

/// An active check of every backend of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Probe {
    /// What is asked.
    pub kind: ProbeKind,
    /// Time from one probe to the next; jittered by a tenth, shorter while a backend is in doubt.
    #[serde(serialize_with = "as_text")]
    pub interval: Duration,
    /// Time for the whole probe.
    #[serde(serialize_with = "as_text")]
    pub timeout: Duration,
    /// Failures in a row before `down`.
    pub fall: u32,
    /// Successes in a row before a backend that was down returns.
    pub rise: u32,
    /// Port when it is not the backend's own.
    pub port: Option<u16>,
    /// Header that the pool's connections begin with.
    pub send_proxy: Option<ProxyVersion>,
    /// TLS that the pool's connections are under.
    pub tls: Option<BackendTls>,
    /// The HTTP that the pool's backends speak.
    pub version: HttpVersion,
    /// Header that says which version a backend's data have.
    pub data_header: Option<String>,
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeKind {
    /// A handshake.
    Tcp,
    /// One HTTP/1.1 request.
    Http {
        /// GET, HEAD or OPTIONS.
        method: String,
        /// Request target.
        path: String,
        /// Host header; `None`: the address.
        host: Option<String>,
        /// Accepted status ranges, both ends included.
        status: Vec<(u16, u16)>,
        /// Text that must stand in the first 64 KiB of the body.
        body: Option<String>,
        /// Whether the body must have the digest that its header names.
        digest: bool,
    },
    /// A call of the gRPC health service, `grpc.health.v1.Health/Check`.
    Grpc {
        /// Whose health is asked for; empty: the server's as a whole.
        service: String,
    },
    /// A TLS handshake.
    Tls {
        /// Server name to ask for; `None`: the address, which is not sent.
        server_name: Option<String>,
        /// The authorities that its certificate must come from; `None`: any certificate will do.
        verify: Option<Pem>,
    },
    /// Bytes sent, and bytes that must come back within the first 64 KiB.
    Exchange {
        /// Sent first; may be empty.
        send: String,
        /// Must stand in the answer.
        expect: String,
    },
}

/// The content of a PEM file, as it was when the configuration was read.
#[derive(Clone)]
pub struct Pem {
    /// The file.
    pub file: String,
    /// Digest of what it held (XXH3, 128 bits).
    pub digest: u128,
    /// What it held.
    pub bytes: Arc<[u8]>,
}

/// Some hold keys, which belong into no log.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)
    }
}

/// The digest stands for the content: thousands of backends may share one long list.
impl PartialEq for Pem {
    fn eq(&self, other: &Pem) -> bool {
        self.digest == other.digest && self.file == other.file
    }
}

impl Eq for Pem {}

impl Hash for Pem {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.file.hash(state);
        self.digest.hash(state);
    }
}

impl Serialize for Pem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.file)
    }
}

/// TLS towards backends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct BackendTls {
    /// The name that is asked for, and that the certificate must have.
    pub server_name: String,
    /// Whether the certificate is judged at all.
    pub verify: bool,
    /// Authorities that it must come from.
    pub ca: Pem,
    /// What we show if we are asked.
    pub identity: Option<Pair>,
}

/// Dialling of one client.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Connect {
    /// The client's whole time.
    #[serde(serialize_with = "as_text")]
    pub timeout: Duration,
    /// Most attempts.
    pub attempts: u32,
    /// Whether silence starts a second attempt before the first has failed.
    pub race: bool,
    /// Local addresses to dial from; empty: the kernel's choice.
    pub source: Vec<IpAddr>,
}

/// Bounds on a running session.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Timeouts {
    /// From a whole HTTP request to the head of its answer.
    #[serde(serialize_with = "as_text")]
    pub request: Duration,
    /// Without a byte either way.
    #[serde(serialize_with = "as_text")]
    pub idle: Duration,
    /// Without a byte after one side has finished sending.
    #[serde(serialize_with = "as_text")]
    pub half_close: Duration,
    /// With bytes sent that the peer's kernel does not acknowledge.
    #[serde(serialize_with = "as_text")]
    pub unacked: Duration,
    /// However slow a backend was until now, its silence counts after this.
    #[serde(serialize_with = "as_text")]
    pub first_byte: Duration,
}

/// What happens to the sessions of a backend that goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDown {
    /// Those that show it themselves (bytes sent and not acknowledged) are reset.
    Stuck,
    /// All are reset, at a bounded pace.
    Reset,
    /// All may finish within `shutdown.drain`.
    Drain,
    /// Nothing.
    Keep,
}

/// What new clients get when no backend is fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenAllDown {
    /// Every backend is tried, the least recently failed first.
    TryAll,
    /// A reset.
    Refuse,
}

/// How long a backend that went down stays out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Hold {
    /// After the first failure.
    #[serde(serialize_with = "as_text")]
    pub first: Duration,
    /// However often it fails.
    #[serde(serialize_with = "as_text")]
    pub longest: Duration,
}

/// An address we accept on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Listener {
    /// Name in logs and metrics; the first address unless the file says otherwise.
    pub name: String,
    /// At least one address.
    pub bind: Vec<SocketAddr>,
    /// Where its connections go.
    #[serde(flatten)]
    pub face: Face,
    /// Who must send a PROXY header first; empty: nobody may.
    pub proxy_from: Vec<Network>,
    /// For a PROXY header, a ClientHello, and a handshake.
    #[serde(serialize_with = "as_text")]
    pub handshake: Duration,
    /// Ends TLS here; `None`: what comes is passed on as it is.
    pub tls: Option<ListenerTls>,
    /// Clients that may connect; empty: everybody.
    pub allow: Vec<Network>,
    /// Clients that may not; wins over `allow`.
    pub deny: Vec<Network>,
    /// Most connections at once; `None`: the process's bound.
    pub max_connections: Option<u32>,
    /// How long a new connection waits at the cap before it is reset.
    #[serde(serialize_with = "as_text")]
    pub wait: Duration,
    /// Bounds on what comes from one network of clients.
    pub per_client: PerClient,
    /// For the whole head of an HTTP request.
    #[serde(serialize_with = "as_text")]
    pub header: Duration,
    /// Between two HTTP requests of a connection.
    #[serde(serialize_with = "as_text")]
    pub keepalive: Duration,
    /// Without a byte either way, where that is shorter than the pool's; `None`: the pool's.
    #[serde(serialize_with = "as_optional_text")]
    pub idle: Option<Duration>,
}

/// Bounds on what comes from one network of clients.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PerClient {
    /// Most connections at once.
    pub connections: Option<u32>,
    /// New connections (HTTP: requests).
    pub rate: Option<Rate>,
    /// Bits of an IPv4 address, and of an IPv6 one, that make a client.
    pub prefix: (u8, u8),
}

/// TLS that ends at a listener.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ListenerTls {
    /// At least one; the first is for names that no other has.
    pub certificates: Vec<Pair>,
    /// Whether TLS 1.2 is refused.
    pub only_1_3: bool,
    /// Certificates of clients; `None`: they are not asked for.
    pub client: Option<ClientCertificates>,
}

/// A chain of certificates and its key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs)]
pub struct Pair {
    pub certificate: Pem,
    pub key: Pem,
}

/// What is asked of clients.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClientCertificates {
    /// Authorities that a certificate must come from.
    pub ca: Pem,
    /// Whether a client without one is refused.
    pub require: bool,
    /// Header that tells backends its subject, in lower case; `None`: they are not told.
    pub header: Option<String>,
}

/// How a listener finds the pool of a connection, by the names of pools.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Face {
    /// All go to one.
    Tcp(String),
    /// By the server name of the ClientHello.
    Sni {
        /// Names in lower case, exact or `*.suffix`, and their pools.
        routes: Vec<(String, String)>,
        /// For other names and none; `None`: they are refused.
        default: Option<String>,
    },
    /// By what each HTTP request says.
    Http(http::Http),
}

impl Face {
    /// All pools that it names.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Face::Tcp(pool) => vec![pool],
            Face::Http(http) => http.routes.iter().filter_map(|route| route.action.pool()).collect(),
            Face::Sni { routes, default } => {
                routes.iter().map(|(_, pool)| pool).chain(default).map(String::as_str).collect()
            }
        }
    }
}

/// Interfaces for operators.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Admin {
    /// Unix socket with full control.
    pub socket: PathBuf,
    /// Whether the file names the socket: then failing to open it is an error.
    #[serde(skip)]
    pub socket_given: bool,
    /// Read-only HTTP; `None`: off.
    pub http: Option<SocketAddr>,
    /// Names by which the read-only HTTP may be asked, besides addresses and localhost.
    pub hosts: Vec<String>,
}

/// Log.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Log {
    /// Least severe level that is written.
    pub level: Level,
    /// Form of a line.
    pub format: Format,
    /// Which connections get a line, and where.
    pub access: Access,
}

/// Severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Format {
    Json,
    Text,
}

/// Which connections get a line in the access log, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// None.
    Off,
    /// On standard output: those that failed or took more than one attempt.
    Errors,
    /// On standard output: all.
    Stdout,
    /// In a file, reopened on USR1: all.
    File(String),
}

/// How the process stops.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Shutdown {
    /// `/readyz` fails for this long before the listeners close.
    #[serde(serialize_with = "as_text")]
    pub announce: Duration,
    /// Running sessions may finish for this long.
    #[serde(serialize_with = "as_text")]
    pub drain: Duration,
}

/// A network of addresses, such as 10.0.0.0/8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    base: IpAddr,
    bits: u8,
}

impl Network {
    /// Parses `ADDRESS` or `ADDRESS/BITS`; `None` when it is neither or has host bits set.
    pub fn parse(text: &str) -> Option<Network> {
        let (base, bits) = match text.split_once('/') {
            Some((base, bits)) if !bits.starts_with('+') => {
                (base.parse::<IpAddr>().ok()?, Some(bits.parse::<u8>().ok()?))
            }
            Some(_) => return None,
            None => (text.parse::<IpAddr>().ok()?, None),
        };
        let most = if base.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(most);
        let network = Network { base, bits };
        (bits <= most && network.mask(base) == base).then_some(network)
    }

    /// Whether `address` lies in this network. IPv4 and IPv6 never match each other.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.base.is_ipv4() == address.is_ipv4() && self.mask(address) == self.base
    }

    fn mask(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(v4) => {
                IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0)).into())
            }
            IpAddr::V6(v6) => {
                IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0)).into())
            }
        }
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.bits)
    }
}

/// A configuration that was read, with what identifies it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Hash of the bytes of all its files (XXH3, hexadecimal), to tell two configurations apart.
    pub hash: String,
    /// Keys that are right but change nothing where they stand.
    pub warnings: Vec<Problem>,
    /// Certificates that have ended: mistakes, but where there is nothing better to serve.
    /// Each with the digest of its file.
    pub ended: Vec<(u128, Problem)>,
    /// Every file that was read, the main one first.
    pub files: Vec<PathBuf>,
    /// Every directory in which files were looked for.
    pub directories: Vec<PathBuf>,
}

/// Why a file is no configuration.
#[derive(Debug)]
pub struct Refused {
    /// The file.
    pub file: PathBuf,
    /// Everything wrong with it, in the order of the lines.
    pub problems: Vec<Problem>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&problem.with_file(&self.file))?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}

/// Reads and judges one file, and those that it includes, of at most `max_bytes` bytes together.
///
/// # Errors
/// Every problem of all files at once. Waits for the disk.
pub fn load(path: &Path, max_bytes: usize) -> Result<Loaded, Refused> {
    let refused = |problems| Refused { file: path.to_owned(), problems };
    let bytes = sources::read(path, max_bytes).map_err(|message| {
        let message = format!(" {message}");
        refused(vec![Problem { line: 0, column: 0, path: String::new(), message, file: None }])
    })?;
    judge(&bytes, max_bytes, Some(path)).map_err(refused)
}

/// Judges the bytes of a file, which can include none because it stands nowhere.
///
/// # Errors
/// Every problem at once, in the order of the lines.
pub fn parse(bytes: &[u8], max_bytes: usize) -> Result<Loaded, Vec<Problem>> {
    judge(bytes, max_bytes, None)
}

fn judge(bytes: &[u8], max_bytes: usize, path: Option<&Path>) -> Result<Loaded, Vec<Problem>> {
    let (mut file, index, mut problems) = file::parse(bytes, max_bytes, Part::Main);
    let mut hash = Xxh3::new();
    hash.update(bytes);
    let mut sources = Sources::new(path, index);
    let mut left = max_bytes.saturating_sub(bytes.len());
    for (place, pattern) in std::mem::take(&mut file.include) {
        let found = match sources.expand(&pattern) {
            Ok(found) => found,
            Err(message) => {
                problems.push(sources.problem(0, &place, message));
                continue;
            }
        };
        for name in found {
            if sources.contains(&name) {
                continue;
            }
            if !sources.has_room() {
                problems.push(sources.problem(0, &place, "the configuration has too many files"));
                break;
            }
            match sources::read(&name, left) {
                Ok(bytes) => {
                    let (part, index, mut found) = file::parse(&bytes, left, Part::Included);
                    left = left.saturating_sub(bytes.len());
                    hash.update(&bytes);
                    let name: Arc<Path> = name.into();
                    found.iter_mut().for_each(|problem| problem.file = Some(name.clone()));
                    problems.extend(found);
                    let source = sources.add(name, index);
                    file.absorb(part, source);
                }
                Err(message) => {
                    problems.push(sources.problem(0, &place, format!("{} {message}", name.display())));
                }
            }
        }
    }
    let warnings =
        file.warnings.iter().map(|(source, path, reason)| sources.problem(*source, path, reason.clone())).collect();
    let mut ended = Vec::new();
    let config = resolve::resolve(file, &mut sources, &mut problems, &mut ended);
    if problems.is_empty() {
        sources.digests().for_each(|digest| hash.update(&digest.to_le_bytes()));
        let hash = format!("{:016x}", hash.digest());
        return Ok(Loaded { config, hash, warnings, ended, files: sources.files(), directories: sources.listed() });
    }
    problems.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    problems.dedup();
    Err(problems)
}

/// A duration as the file writes it.
pub fn human(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

fn as_optional_text<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => as_text(duration, serializer),
        None => serializer.serialize_none(),
    }
}

fn as_text<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*duration))
}
