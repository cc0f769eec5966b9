//! The routing table: everything that was configured, resolved and immutable; one generation of routing.
//!
//! [`build`] makes a new one and takes over whatever the previous one has under the same name: an unchanged pool
//! as it stands, and in a changed one each backend whose name and address stayed. Health is never in it.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::ProducesTickets;
use serde::Serialize;

use http::HeaderName;
use xxhash_rust::xxh3::Xxh3;

use crate::backend::{Backend, Counters, PoolShared};
use crate::clock::{self, Time};
use crate::config::http::{Forwarded, Page};
use crate::config::{self, Config, Failback, Network, ProbeKind};
use crate::health::{self, Depth};
use crate::http::route::Routes;
use crate::limits::{self, ClientPermit, Clients, Gauge};
use crate::metrics::Counter;
use crate::pool::{Cell, Member, NewCell, Policy, Pool};
use crate::tls::{self, Identity, Upstream};
use crate::uplink::Uplink;
use crate::version;

/// One generation.
#[derive(Debug)]
pub struct Table {
    /// Counts the tables that went live in this process, from 1.
    pub generation: u64,
    /// Pools in the order of the file.
    pub pools: Vec<Arc<Pool>>,
    /// What each bound address does.
    pub listeners: HashMap<SocketAddr, Arc<Listener>>,
    /// What it was built from; for control, never for the data plane.
    pub config: Arc<Config>,
    /// Hash of the file.
    pub hash: String,
    /// Makers of tickets; taken over from table to table.
    pub tickets: Tickets,
    /// Which cells show life; taken over from table to table.
    pub uplink: Arc<Uplink>,
}

/// What a listener does with a connection.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// Where its connections go.
    pub face: Face,
    /// Who must send a PROXY header first; empty: nobody may.
    pub proxy_from: Vec<Network>,
    /// For a PROXY header, a ClientHello, and a handshake.
    pub handshake: Duration,
    /// Ends TLS here.
    pub tls: Option<ListenerTls>,
    /// Clients that may connect; empty: everybody.
    pub allow: Vec<Network>,
    /// Clients that may not.
    pub deny: Vec<Network>,
    /// Most connections at once.
    pub max_connections: u32,
    /// How long a new connection waits at the cap.
    pub wait: Duration,
    /// Bounds on what comes from one network of clients.
    pub per_client: config::PerClient,
    /// For the whole head of an HTTP request.
    pub header: Duration,
    /// Between two HTTP requests.
    pub keepalive: Duration,
    idle: Option<Duration>,
    /// What survives it.
    pub shared: Arc<ListenerShared>,
}

/// Who makes the tickets of a listener: one maker for each name and what is asked of its clients. A ticket spares its bearer
/// the question for a certificate, so it must not open a door that asks for more than the one it came from.
pub type Tickets = HashMap<(String, Option<(u128, bool)>), Arc<dyn ProducesTickets>>;

/// TLS of a listener.
#[derive(Debug)]
pub struct ListenerTls {
    /// What its handshakes are made by.
    pub server: Arc<ServerConfig>,
    /// What it serves, the default first.
    pub identities: Vec<Identity>,
    /// Header that tells backends the subject of a client's certificate.
    pub subject_header: Option<HeaderName>,
}

/// How a listener finds the pool of a connection.
#[derive(Debug)]
pub enum Face {
    /// All go to one pool.
    Tcp(Arc<Pool>),
    /// By the server name of the ClientHello, which is passed on as it came.
    Sni(SniRoutes),
    /// By what each HTTP request says.
    Http(Box<Http>),
}

/// What an `http` listener does with a request.
#[derive(Debug)]
pub struct Http {
    /// Its routes.
    pub routes: Routes,
    /// Whether a client on a plain connection may begin with HTTP/2.
    pub h2c: bool,
    /// What backends are told about the client.
    pub forwarded: Forwarded,
    /// Bodies of answers of our own, by status.
    pub pages: Arc<[(u16, Page)]>,
}

/// Server names and their pools. An exact name comes first, then the longest `*.suffix`, then the default.
#[derive(Debug)]
pub struct SniRoutes {
    exact: HashMap<String, Arc<Pool>>,
    /// By what follows `*.`; any number of labels may stand before it.
    suffixes: HashMap<String, Arc<Pool>>,
    default: Option<Arc<Pool>>,
}

impl SniRoutes {
    /// The pool of a name in lower case, or of a client that names none.
    pub fn pool(&self, name: Option<&str>) -> Option<&Arc<Pool>> {
        let named = name.and_then(|name| {
            let suffixes = || name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
            self.exact.get(name).or_else(|| suffixes().find_map(|suffix| self.suffixes.get(suffix)))
        });
        named.or(self.default.as_ref())
    }
}

impl Face {
    /// All pools that it leads to, the first or default one first.
    pub fn pools(&self) -> Vec<&Arc<Pool>> {
        match self {
            Face::Tcp(pool) => vec![pool],
            Face::Http(http) => distinct(http.routes.pools()),
            Face::Sni(routes) => {
                let named = routes.exact.values().chain(routes.suffixes.values());
                distinct(routes.default.iter().chain(named).collect())
            }
        }
    }
}

/// The first pool, then the others by name, each once.
fn distinct(mut pools: Vec<&Arc<Pool>>) -> Vec<&Arc<Pool>> {
    let first = pools.first().map(|pool| pool.name.clone());
    pools.sort_by(|a, b| (Some(&a.name) != first.as_ref(), &a.name).cmp(&(Some(&b.name) != first.as_ref(), &b.name)));
    pools.dedup_by(|a, b| a.name == b.name);
    pools
}

/// How a client's connection ended: who ended it, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum End {
    /// The client finished first, then the backend.
    ClientClosed,
    /// The backend finished first, then the client.
    BackendClosed,
    /// The client reset it.
    ClientReset,
    /// The backend reset it.
    BackendReset,
    /// No byte either way for too long.
    Idle,
    /// One side had finished, the other said nothing for too long.
    HalfClosed,
    /// The client's kernel acknowledged nothing for too long.
    ClientStuck,
    /// The backend's kernel acknowledged nothing for too long.
    BackendStuck,
    /// The backend said nothing from the start, and no other could take its client.
    BackendSilent,
    /// The backend went down.
    BackendDown,
    /// No backend connected in time.
    Unreachable,
    /// The pool, or all its backends, had all the connections they may have.
    Full,
    /// It waited too long at the cap of the listener or the process.
    Cap,
    /// `allow` or `deny`.
    Denied,
    /// Requests like it have ended more than one backend a moment ago.
    Poison,
    /// The client's network has, or asks for, more than it may.
    Limited,
    /// The client went away while a backend was dialled.
    ClientGone,
    /// An operator ended it.
    Kicked,
    /// The program was told to stop, and its time to end by itself was over.
    Stopped,
    /// Its cell has more than its share since another one came back.
    Rebalanced,
    /// Its PROXY header or ClientHello did not come in time.
    Handshake,
    /// Its first bytes are not what the listener asks for.
    Malformed,
    /// No route has the server name that it asked for.
    NoRoute,
    /// Its TLS handshake failed.
    Tls,
    /// A request got its backend's whole answer.
    Answered,
    /// A request got an answer of our own, as its route says.
    Responded,
    /// No answer came in the request's time.
    Timeout,
}

impl End {
    /// All, in the order of the counters.
    pub const ALL: [End; 27] = [
        End::ClientClosed,
        End::BackendClosed,
        End::ClientReset,
        End::BackendReset,
        End::Idle,
        End::HalfClosed,
        End::ClientStuck,
        End::BackendStuck,
        End::BackendSilent,
        End::BackendDown,
        End::Unreachable,
        End::Full,
        End::Cap,
        End::Denied,
        End::Limited,
        End::Poison,
        End::ClientGone,
        End::Kicked,
        End::Stopped,
        End::Rebalanced,
        End::Handshake,
        End::Malformed,
        End::NoRoute,
        End::Tls,
        End::Answered,
        End::Responded,
        End::Timeout,
    ];

    /// The word for logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            End::ClientClosed => "client_closed",
            End::BackendClosed => "backend_closed",
            End::ClientReset => "client_reset",
            End::BackendReset => "backend_reset",
            End::Idle => "idle",
            End::HalfClosed => "half_closed",
            End::ClientStuck => "client_stuck",
            End::BackendStuck => "backend_stuck",
            End::BackendSilent => "backend_silent",
            End::BackendDown => "backend_down",
            End::Unreachable => "unreachable",
            End::Full => "full",
            End::Cap => "cap",
            End::Poison => "poison",
            End::Limited => "client_limit",
            End::Denied => "denied",
            End::ClientGone => "client_gone",
            End::Kicked => "kicked",
            End::Stopped => "stopped",
            End::Rebalanced => "rebalanced",
            End::Handshake => "handshake_timeout",
            End::Malformed => "malformed",
            End::NoRoute => "no_route",
            End::Tls => "tls_failed",
            End::Answered => "answered",
            End::Responded => "responded",
            End::Timeout => "request_timeout",
        }
    }

    /// Whether it is a request, and not a connection, that can end so.
    pub fn of_requests_alone(self) -> bool {
        matches!(self, End::Answered | End::Responded | End::Timeout)
    }

    /// Whether the client did not get what it came for.
    pub fn failed(self) -> bool {
        use End::*;
        !matches!(self, ClientClosed | BackendClosed | ClientReset | Idle | ClientGone | Answered | Responded)
    }
}

/// What survives a listener's table; kept by the listener's name.
#[derive(Debug, Default)]
pub struct ListenerShared {
    /// Connections now.
    pub connections: Arc<Gauge>,
    /// Connections whose first bytes or handshake are awaited.
    pub beginnings: Arc<Gauge>,
    /// Connections by end.
    pub ends: [Counter; End::ALL.len()],
    /// What clients use, by network.
    pub clients: Arc<Clients>,
    /// HTTP requests by end.
    pub request_ends: [Counter; End::ALL.len()],
    /// Bytes from clients, and to clients.
    pub bytes: [Counter; 2],
    /// HTTP requests by the class of their status: none, 1xx to 5xx.
    pub requests: [Counter; 6],
    /// HTTP requests that were sent to a second backend.
    pub retries: Counter,
    /// Accept loops in which new connections wait at a cap.
    pub at_cap: AtomicU32,
}

impl Listener {
    /// Counts a connection of a client, where its network may have one more; `Some(None)`: it need not be counted.
    pub fn count_client(&self, client: IpAddr, now: Time) -> Option<Option<ClientPermit>> {
        let bounds = &self.per_client;
        if bounds.connections.is_none() && bounds.rate.is_none() {
            return Some(None);
        }
        let network = limits::network(client, bounds.prefix);
        // Of HTTP the requests are counted.
        if let Some(rate) = bounds.rate.filter(|_| !matches!(self.face, Face::Http(_)))
            && !self.shared.clients.allows(network, rate, now)
        {
            return None;
        }
        match bounds.connections {
            Some(most) => self.shared.clients.connect(network, most, now),
            None => Some(None),
        }
    }

    /// Longest time without a byte either way: the shorter of its own and the pool's.
    pub fn idle(&self, pool: &Pool) -> Duration {
        self.idle.map_or(pool.policy.idle, |idle| idle.min(pool.policy.idle))
    }

    /// Longest time without a byte either way on an HTTP connection: its own, or an hour, or of its pools the longest. Each request
    /// of HTTP/1 has its own pool's besides; a connection of HTTP/2 carries those of several.
    pub fn http_idle(&self) -> Duration {
        let longest = || self.face.pools().iter().map(|pool| pool.policy.idle).max().unwrap_or_default();
        self.idle.unwrap_or_else(|| longest().max(Duration::from_secs(3_600)))
    }

    /// Whether this peer must send a PROXY header first. Then the client that it names is judged, and not the peer.
    pub fn expects_header(&self, peer: IpAddr) -> bool {
        self.proxy_from.iter().any(|network| network.contains(peer.to_canonical()))
    }

    /// Whether this client may connect.
    pub fn admits(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        !self.deny.iter().any(|network| network.contains(client))
            && (self.allow.is_empty() || self.allow.iter().any(|network| network.contains(client)))
    }
}

/// What a reload changes, in numbers and names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Backends (pool and name) that are new, gone, or have another address, weight, cell or bound.
    pub backends: Counts,
    /// Pools.
    pub pools: Counts,
    /// Bound addresses.
    pub listeners: Counts,
    /// What is gone, in words.
    pub gone: Vec<String>,
    /// Why this needs an explicit word; empty when it does not.
    pub dangers: Vec<String>,
}

/// Numbers of one kind of thing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Counts {
    pub added: usize,
    pub removed: usize,
    pub changed: usize,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "+{} -{} ~{}", self.added, self.removed, self.changed)
    }
}

/// Builds a table. `process_limit` is the most connections that the process may hold.
///
/// Takes time in the order of the number of backends; runs on a helper thread.
///
/// # Errors
/// A sentence for each listener whose TLS cannot be made.
pub fn build(
    config: Arc<Config>,
    hash: String,
    previous: Option<&Table>,
    process_limit: u32,
    now: Time,
) -> Result<(Table, Difference), Vec<String>> {
    let uplink = previous.map_or_else(Arc::default, |table| table.uplink.clone());
    let mut tickets = Tickets::new();
    let mut errors = Vec::new();
    let mut pools = Vec::with_capacity(config.pools.len());
    for wanted in &config.pools {
        let before = previous.and_then(|table| {
            let config = table.config.pools.iter().find(|pool| pool.name == wanted.name)?;
            Some((config, table.pools.iter().find(|pool| *pool.name == *wanted.name)?))
        });
        let known = before.and_then(|(_, pool)| pool.policy.tls.as_ref());
        let tls = match upstream(wanted, known) {
            Ok(tls) => tls,
            Err(error) => {
                errors.push(format!("pool {}: {error}", wanted.name));
                continue;
            }
        };
        let policy = policy(wanted, &config, process_limit, tls);
        let pool = match before {
            Some((config, pool)) if config == wanted && *pool.policy == policy => pool.clone(),
            _ => Arc::new(build_pool(wanted, policy, before.map(|(_, pool)| &**pool), &uplink, now)),
        };
        pools.push(pool);
    }
    let mut listeners = HashMap::new();
    for wanted in &config.listeners {
        let shared = previous
            .and_then(|table| table.listeners.values().find(|listener| *listener.name == *wanted.name))
            .map_or_else(Arc::default, |listener| listener.shared.clone());
        // The reader made sure that the pools exist.
        let Some(face) = face(&wanted.face, &pools) else { continue };
        let listener = Arc::new(Listener {
            name: wanted.name.as_str().into(),
            face,
            proxy_from: wanted.proxy_from.clone(),
            tls: wanted.tls.as_ref().and_then(|tls| {
                match listener_tls(wanted, tls, previous.map(|table| &table.tickets), &mut tickets) {
                    Ok(tls) => Some(tls),
                    Err(error) => {
                        errors.push(format!("listener {}: {error}", wanted.name));
                        None
                    }
                }
            }),
            handshake: wanted.handshake,
            allow: wanted.allow.clone(),
            deny: wanted.deny.clone(),
            max_connections: wanted.max_connections.unwrap_or(u32::MAX),
            wait: wanted.wait,
            per_client: wanted.per_client,
            header: wanted.header,
            keepalive: wanted.keepalive,
            idle: wanted.idle,
            shared,
        });
        listeners.extend(wanted.bind.iter().map(|bind| (*bind, listener.clone())));
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    let difference = previous.map_or_else(Difference::default, |table| difference(&table.config, &config));
    let generation = previous.map_or(1, |table| table.generation + 1);
    Ok((Table { generation, pools, listeners, config, hash, tickets, uplink }, difference))
}

fn listener_tls(
    listener: &config::Listener,
    wanted: &config::ListenerTls,
    before: Option<&Tickets>,
    tickets: &mut Tickets,
) -> Result<ListenerTls, String> {
    let asked = wanted.client.as_ref().map(|client| (client.ca.digest, client.require));
    let key = (listener.name.clone(), asked);
    let maker = match before.and_then(|before| before.get(&key)) {
        Some(maker) => maker.clone(),
        None => tls::tickets()?,
    };
    tickets.insert(key, maker.clone());
    let read = |pair: &config::Pair| {
        let identity = tls::identity(&pair.certificate.bytes, &pair.key.bytes);
        identity.map_err(|(_, error)| format!("{} {error}", pair.certificate.file))
    };
    let identities = wanted.certificates.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let client = wanted.client.as_ref().map(|client| (&*client.ca.bytes, client.require));
    let http = matches!(listener.face, config::Face::Http(_));
    let terms = tls::Terms { only_1_3: wanted.only_1_3, client, tickets: maker, http };
    let header = wanted.client.as_ref().and_then(|client| client.header.as_ref());
    let subject_header = header.and_then(|name| HeaderName::from_bytes(name.as_bytes()).ok());
    Ok(ListenerTls { server: tls::server(&identities, &terms)?, identities, subject_header })
}

fn face(wanted: &config::Face, pools: &[Arc<Pool>]) -> Option<Face> {
    let named = |name: &str| pools.iter().find(|pool| *pool.name == *name).cloned();
    match wanted {
        config::Face::Tcp(pool) => Some(Face::Tcp(named(pool)?)),
        config::Face::Http(http) => Some(Face::Http(Box::new(Http {
            routes: Routes::new(&http.routes, pools)?,
            h2c: http.h2c,
            forwarded: http.forwarded.clone(),
            pages: http.errors.clone().into(),
        }))),
        config::Face::Sni { routes, default } => {
            let mut found = SniRoutes { exact: HashMap::new(), suffixes: HashMap::new(), default: None };
            for (name, pool) in routes {
                let pool = named(pool)?;
                match name.strip_prefix("*.") {
                    Some(suffix) => found.suffixes.insert(suffix.to_owned(), pool),
                    None => found.exact.insert(name.clone(), pool),
                };
            }
            found.default = match default {
                Some(pool) => Some(named(pool)?),
                None => None,
            };
            Some(Face::Sni(found))
        }
    }
}

/// TLS towards the backends of a pool; what did not change is taken over, with the sessions that it may resume.
fn upstream(pool: &config::Pool, known: Option<&Arc<Upstream>>) -> Result<Option<Arc<Upstream>>, String> {
    let Some(wanted) = &pool.tls else { return Ok(None) };
    let mut hasher = Xxh3::new();
    wanted.hash(&mut hasher);
    let digest = hasher.digest();
    if let Some(known) = known.filter(|known| known.digest == digest) {
        return Ok(Some(known.clone()));
    }
    let identity = wanted.identity.as_ref().map(|pair| (pair.certificate.bytes.clone(), pair.key.bytes.clone()));
    Upstream::new(&wanted.server_name, wanted.verify, wanted.ca.bytes.clone(), identity, digest)
        .map(|tls| Some(Arc::new(tls)))
}

fn policy(pool: &config::Pool, config: &Config, process_limit: u32, tls: Option<Arc<Upstream>>) -> Policy {
    let probe_depth = pool.probe.as_ref().map(|probe| match probe.kind {
        ProbeKind::Tcp => Depth::Connect,
        ProbeKind::Http { .. } | ProbeKind::Grpc { .. } | ProbeKind::Exchange { .. } | ProbeKind::Tls { .. } => {
            Depth::Answer
        }
    });
    let port = pool.probe.as_ref().and_then(|probe| probe.port);
    let backends = || pool.cells.iter().flat_map(|cell| &cell.backends);
    let elsewhere = port.is_some_and(|port| backends().any(|backend| backend.address.port() != port));
    let (fall, rise) = pool.probe.as_ref().map_or((2, 2), |probe| (probe.fall, probe.rise));
    let half = if config.pools.len() > 1 { process_limit / 2 } else { process_limit };
    Policy {
        health: health::Policy {
            fall,
            rise,
            // With `hold` every failure counts as much as the last of many.
            hold_first: if pool.failback == Failback::Hold { pool.hold.longest } else { pool.hold.first },
            hold_longest: pool.hold.longest,
            ramp: pool.ramp,
            probe_depth,
            probe_elsewhere: elsewhere,
            between_probe_removals: pool.probe_removal,
            asks_operator: pool.failback == Failback::Manual,
        },
        balance: pool.balance,
        affinity: pool.affinity.clone(),
        connect_timeout: pool.connect.timeout,
        attempts: pool.connect.attempts,
        race: pool.connect.race,
        source: pool.connect.source.clone(),
        send_proxy: pool.send_proxy,
        http: pool.http,
        tls,
        request_timeout: pool.timeouts.request,
        idle: pool.timeouts.idle,
        half_close: pool.timeouts.half_close,
        unacked: pool.timeouts.unacked,
        on_down: pool.on_down,
        rebalance: pool.rebalance,
        drain: config.shutdown.drain,
        when_all_down: pool.when_all_down,
        max_connections: pool.max_connections.unwrap_or(half.max(1)),
        queue: pool.queue,
        first_byte: pool.first_byte,
        first_byte_time: pool.timeouts.first_byte,
        replay: pool.replay,
        data_version: pool.data_version.as_ref().and_then(|wanted| {
            // The reader made sure that the name is one.
            let header = HeaderName::try_from(&wanted.header).ok()?;
            Some(version::Wanted { header, at_least: wanted.at_least })
        }),
    }
}

fn build_pool(wanted: &config::Pool, policy: Policy, before: Option<&Pool>, uplink: &Arc<Uplink>, now: Time) -> Pool {
    let shared =
        before.map_or_else(|| Arc::new(PoolShared::new(&wanted.name, uplink.clone())), |pool| pool.shared.clone());
    // A session keeps its policy: an equal one is taken over, so that memory does not grow with reloads.
    let policy = match before {
        Some(pool) if *pool.policy == policy => pool.policy.clone(),
        _ => Arc::new(policy),
    };
    let known: HashMap<&str, &Arc<Backend>> =
        before.iter().flat_map(|pool| &pool.members).map(|member| (&*member.backend.name, &member.backend)).collect();
    // What is added beside others that carry the cell begins with a small share: where the cell keeps its whole share without it
    // nobody has to help meanwhile. A cell that is all new may begin so where others have most of the only tier.
    let carries = |backend: &config::Backend| {
        known.get(backend.name.as_str()).is_some_and(|old| old.address == backend.address && old.fit())
    };
    let carried = |cell: &config::Cell| {
        let weight = |backend: &config::Backend| if carries(backend) { backend.weight } else { 0 };
        let all: u32 = cell.backends.iter().map(|backend| backend.weight).sum();
        (cell.backends.iter().map(weight).sum::<u32>(), all)
    };
    let enough = |(old, all): (u32, u32)| old * 7 >= all * 5;
    let weight = |some: &dyn Fn(&config::Cell) -> bool| -> u32 {
        wanted.cells.iter().filter(|cell| some(cell)).map(|cell| cell.weight).sum()
    };
    let one_tier = wanted.cells.iter().all(|cell| cell.tier == wanted.cells[0].tier);
    let most_carried = one_tier && weight(&|cell| enough(carried(cell))) * 2 >= weight(&|_| true);
    let mut cells = Vec::new();
    let mut members = Vec::new();
    for cell in &wanted.cells {
        let old = before.and_then(|pool| pool.cells.iter().find(|old| *old.name == *cell.name));
        let kept = old.map_or_else(Arc::default, |old: &Cell| old.shared.clone());
        kept.connections.tells(&shared.queue);
        let count = cell.backends.len();
        let others_carry = enough(carried(cell)) || carried(cell).0 == 0 && most_carried;
        cells.push(NewCell {
            name: cell.name.as_str().into(),
            tier: cell.tier,
            weight: cell.weight,
            count,
            max_connections: cell.max_connections.unwrap_or(u32::MAX),
            capacity: cell.capacity,
            shared: kept,
        });
        for backend in &cell.backends {
            let old = known.get(backend.name.as_str());
            let backend_now = match old {
                Some(old) if old.address == backend.address => Arc::clone(old),
                _ => {
                    let counters = old.map_or_else(|| Arc::new(Counters::default()), |old| old.counters.clone());
                    let new =
                        Backend::new(shared.clone(), &backend.name, backend.address, counters, &policy.health, now);
                    if others_carry {
                        new.comes_late(&policy.health, now);
                    }
                    Arc::new(new)
                }
            };
            members.push(Member {
                backend: backend_now,
                cell: cells.len() - 1,
                weight: backend.weight,
                max_connections: backend.max_connections.unwrap_or(u32::MAX),
            });
        }
    }
    // Plans of the old pool say nothing about the new one's members; it begins with none.
    Pool::new(shared, policy, cells, members)
}

fn difference(before: &Config, after: &Config) -> Difference {
    let mut difference = Difference::default();
    type Key<'a> = (&'a str, &'a str);
    fn backends(config: &Config) -> HashMap<Key<'_>, (&config::Backend, Key<'_>)> {
        let cells = config.pools.iter().flat_map(|pool| pool.cells.iter().map(move |cell| (pool, cell)));
        cells
            .flat_map(|(pool, cell)| {
                cell.backends.iter().map(move |backend| {
                    ((pool.name.as_str(), backend.name.as_str()), (backend, (pool.name.as_str(), cell.name.as_str())))
                })
            })
            .collect()
    }
    fn count<K: std::hash::Hash + Eq, V: PartialEq>(before: &HashMap<K, V>, after: &HashMap<K, V>) -> Counts {
        Counts {
            added: after.keys().filter(|key| !before.contains_key(key)).count(),
            removed: before.keys().filter(|key| !after.contains_key(key)).count(),
            changed: after.iter().filter(|(key, value)| before.get(key).is_some_and(|old| old != *value)).count(),
        }
    }
    let (old, new) = (backends(before), backends(after));
    difference.backends = count(&old, &new);
    let pools = |config: &Config| config.pools.iter().map(|p| (p.name.clone(), p.clone())).collect::<HashMap<_, _>>();
    difference.pools = count(&pools(before), &pools(after));
    let binds = |config: &Config| -> HashMap<SocketAddr, config::Listener> {
        config.listeners.iter().flat_map(|l| l.bind.iter().map(move |bind| (*bind, l.clone()))).collect()
    };
    let (old_binds, new_binds) = (binds(before), binds(after));
    difference.listeners = count(&old_binds, &new_binds);

    let mut gone: Vec<String> = old_binds
        .iter()
        .filter(|(bind, _)| !new_binds.contains_key(*bind))
        .map(|(bind, listener)| format!("listener {} on {bind}", listener.name))
        .collect();
    for pool in &before.pools {
        let used = before.listeners.iter().any(|listener| listener.face.names().contains(&pool.name.as_str()));
        match after.pools.iter().find(|new| new.name == pool.name) {
            None if used => gone.push(format!("pool {}, which is in use", pool.name)),
            None => {}
            Some(new) => {
                let left = pool.cells.iter().filter(|cell| new.cells.iter().any(|c| c.name == cell.name)).count();
                if (pool.cells.len() - left) * 2 > pool.cells.len() {
                    gone.push(format!(
                        "{} of the {} cells of pool {}",
                        pool.cells.len() - left,
                        pool.cells.len(),
                        pool.name
                    ));
                }
            }
        }
    }
    if difference.backends.removed * 2 > old.len() {
        gone.push(format!("{} of all {} backends", difference.backends.removed, old.len()));
    }
    gone.sort();
    difference.dangers = gone;
    difference.gone = old
        .keys()
        .filter(|key| !new.contains_key(*key))
        .map(|(pool, name)| format!("backend {name} of pool {pool}"))
        .collect();
    difference.gone.sort();
    difference
}

/// What a table changes beyond itself in the moment in which it goes live: where backends stand, and how new their data must be.
pub fn take_effect(table: &Table, now: Time) {
    let cells: HashSet<&str> = table.pools.iter().flat_map(|pool| &pool.cells).map(|cell| &*cell.name).collect();
    table.uplink.set_cells(cells.len(), table.pools.iter().map(|pool| pool.members.len()).sum());
    for pool in &table.pools {
        for member in &pool.members {
            member.backend.stands_in(table.uplink.cell(&pool.cells[member.cell].name));
        }
        let mut changed = false;
        for member in &pool.members {
            if member.backend.version.asks(pool.policy.data_version.as_ref(), now) {
                member.backend.probe_now();
                changed = true;
            }
        }
        if changed {
            pool.shared.changed();
        }
    }
}

/// Marks drained backends and weighted cells; the only thing that an operator's orders are to routing.
pub fn apply_orders(
    table: &Table,
    drained: impl Fn(&Pool, &Cell, &Member) -> bool,
    percent: impl Fn(&Pool, &Cell) -> u32,
) {
    for pool in &table.pools {
        let mut changed = false;
        for cell in &pool.cells {
            let now = percent(pool, cell);
            changed |= cell.shared.percent.swap(now, Relaxed) != now;
        }
        for member in &pool.members {
            let now = drained(pool, &pool.cells[member.cell], member);
            let before = member.backend.drained.swap(now, Relaxed);
            changed |= before != now;
            if before && !now && pool.has_other_fit(member.backend.id) {
                member.backend.is_let_in_again(&pool.policy.health, clock::now());
            }
        }
        if changed {
            pool.shared.changed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is refused after its table was built must not have changed how backends are judged.
    #[test]
    fn a_table_that_never_goes_live_changes_nothing() {
        let table = |text: &str, previous: Option<&Table>| {
            let loaded = config::parse(text.as_bytes(), 1_000).expect("a good file");
            build(Arc::new(loaded.config), loaded.hash, previous, 1_000, Time(1)).expect("nothing to read").0
        };
        let listener = "listeners: [ { bind: '127.0.0.1:80', tcp: p } ]";
        let two = format!("pools: {{ p: {{ cells: {{ a: [ '127.0.0.1:1' ], b: [ '127.0.0.1:2' ] }} }} }}\n{listener}");
        let one = format!("pools: {{ p: {{ cells: {{ c: [ '127.0.0.1:1' ] }} }} }}\n{listener}");
        let live = table(&two, None);
        take_effect(&live, Time(1));
        let first = &live.pools[0].members[0].backend;
        let believed = || live.uplink.vouches(first.id, Time(10), Time(20));
        assert!(!believed(), "nobody shows life");
        let refused = table(&one, Some(&live));
        assert!(!believed() && live.uplink.cell_name(2).is_none());
        take_effect(&refused, Time(1));
        assert!(believed(), "one backend has nobody to be compared with");
    }
}
