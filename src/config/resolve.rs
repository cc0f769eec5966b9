//! From the file model to the resolved one: defaults, references and limits that span several keys.
//!
//! It never fails: it adds every problem to the list and fills the gap with something harmless. The caller
//! throws the result away when the list is not empty.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::file::{File, FileBackendTls, FileCell, FileListener, FilePool, FileProbe, FileProbeKind, FileTls};
use super::*;
use crate::tls::{self, Part};

/// Default of `admin.socket`.
const ADMIN_SOCKET: &str = "/run/sailover/admin.sock";

/// The authorities that Debian and most others trust.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

pub(super) fn resolve(
    file: File,
    sources: &mut Sources,
    problems: &mut Vec<Problem>,
    ended: &mut Vec<(u128, Problem)>,
) -> Config {
    let known_cells =
        file.cells.as_ref().map(|cells| cells.iter().map(|(name, _)| name.clone()).collect::<HashSet<_>>());
    // What is missing in one file is told of by its reader; what is missing in all of them, here.
    if problems.is_empty() {
        for (key, there) in [("pools", !file.pools.is_empty()), ("listeners", !file.listeners.is_empty())] {
            if !there {
                problems.push(sources.problem(0, "include", format!("no file of the configuration has `{key}`")));
            }
        }
    }

    let mut cells: Vec<CellFacts> = Vec::new();
    let mut facts_in: HashMap<String, usize> = HashMap::new();
    for (name, facts) in file.cells.unwrap_or_default() {
        let path = format!("cells.{name}");
        if let Some(first) = facts_in.insert(name.clone(), facts.part) {
            let place = sources.place(first, &path, facts.part);
            problems.push(sources.problem(facts.part, &path, format!("this cell stands at {place} already")));
        }
        cells.push(CellFacts { name, cloud: facts.cloud, region: facts.region });
    }

    let mut pools = Vec::new();
    let mut pools_in: HashMap<String, usize> = HashMap::new();
    for (name, mut pool) in file.pools {
        let source = pool.part;
        let path = format!("pools.{name}");
        if let Some(first) = pools_in.insert(name.clone(), source) {
            let place = sources.place(first, &path, source);
            problems.push(sources.problem(source, &path, format!("a pool of this name stands at {place} already")));
        }
        let kind = pool.probe.as_mut().and_then(|probe| probe.kind.take());
        let kind = kind.and_then(|kind| match resolve_kind(kind, source, sources) {
            Ok(kind) => Some(kind),
            Err((key, message)) => {
                problems.push(sources.problem(source, &format!("{path}.probe.tls.{key}"), message));
                None
            }
        });
        let tls = pool.tls.take();
        let tls =
            tls.and_then(|tls| resolve_backend_tls(tls, &format!("{path}.tls"), source, sources, problems, ended));
        let mut say = |path: &str, message: String| problems.push(sources.problem(source, path, message));
        pools.push(resolve_pool(name, pool, kind, tls, known_cells.as_ref(), &mut say));
    }

    let mut listeners = Vec::new();
    let mut binds: HashMap<SocketAddr, (usize, String)> = HashMap::new();
    let mut names: HashMap<String, (usize, String)> = HashMap::new();
    for mut listener in file.listeners {
        let (source, path) = (listener.part, listener.path.clone());
        let tls =
            listener.tls.take().map(|tls| resolve_tls(tls, &format!("{path}.tls"), source, sources, problems, ended));
        let mut say = |path: &str, message: String| problems.push(sources.problem(source, path, message));
        let named = listener.name.is_some();
        for (path, address) in &listener.bind {
            if let Some((of, first)) = binds.insert(*address, (source, path.clone())) {
                let place = sources.place(of, &first, source);
                say(path, format!("{address} is already bound by {place}; each address belongs to one listener"));
            }
        }
        let mut listener = resolve_listener(&path, listener, &pools, &mut say);
        listener.tls = tls;
        // A name that is the address has been told of with the address.
        if let Some((of, first)) = names.insert(listener.name.clone(), (source, path.clone())).filter(|_| named) {
            let place = sources.place(of, &first, source);
            say(&path, format!("the name {:?} is already taken by {place}", listener.name));
        }
        listeners.push(listener);
    }
    if let Some(http) = file.admin.http
        && let Some((of, first)) = binds.get(&http).filter(|_| http.port() != 0)
    {
        let place = sources.place(*of, first, 0);
        let message = format!("{http} is already bound by {place}; each address belongs to one listener");
        problems.push(sources.problem(0, "admin.http", message));
    }

    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Config {
        workers: file.workers.map_or(cores, |n| n as usize),
        cells,
        pools,
        listeners,
        admin: Admin {
            socket_given: file.admin.socket.is_some(),
            socket: file.admin.socket.unwrap_or_else(|| ADMIN_SOCKET.to_owned()).into(),
            http: file.admin.http,
            hosts: file.admin.hosts.unwrap_or_default(),
        },
        log: Log {
            level: file.log.level.unwrap_or(Level::Info),
            format: file.log.format.unwrap_or(Format::Json),
            access: file.log.access.unwrap_or(Access::Errors),
        },
        shutdown: Shutdown {
            announce: file.shutdown.announce.unwrap_or(Duration::from_secs(5)),
            drain: file.shutdown.drain.unwrap_or(Duration::from_secs(30)),
        },
    }
}

/// Reads what a probe names; the error has the key it belongs to.
fn resolve_kind(
    kind: FileProbeKind,
    source: usize,
    sources: &mut Sources,
) -> Result<ProbeKind, (&'static str, String)> {
    let (server_name, ca) = match kind {
        FileProbeKind::Whole(kind) => return Ok(kind),
        FileProbeKind::Tls { server_name, verify: false, .. } => {
            return Ok(ProbeKind::Tls { server_name, verify: None });
        }
        FileProbeKind::Tls { server_name, ca, .. } => (server_name, ca),
    };
    let key = if ca.is_some() { "ca" } else { "verify" };
    let file = ca.unwrap_or_else(|| AUTHORITIES.to_owned());
    let pem = sources.read_pem(source, &file).map_err(|message| (key, message))?;
    let certificates = CertificateDer::pem_slice_iter(&pem.bytes).collect::<Result<Vec<_>, _>>();
    match certificates {
        Ok(list) if !list.is_empty() => Ok(ProbeKind::Tls { server_name, verify: Some(pem) }),
        Ok(_) => Err((key, format!("{} holds no certificate in PEM form", pem.file))),
        Err(error) => Err((key, format!("{} is no PEM file of certificates: {error}", pem.file))),
    }
}

/// Reads and judges what the TLS towards backends names.
fn resolve_backend_tls(
    tls: FileBackendTls,
    path: &str,
    source: usize,
    sources: &mut Sources,
    problems: &mut Vec<Problem>,
    ended: &mut Vec<(u128, Problem)>,
) -> Option<BackendTls> {
    let mut read = |key: &str, name: &str| match sources.read_pem(source, name) {
        Ok(pem) => Some(pem),
        Err(message) => {
            problems.push(sources.problem(source, &format!("{path}.{key}"), message));
            None
        }
    };
    let (key, file) = match &tls.ca {
        Some(file) => ("ca", file.as_str()),
        None => ("verify", AUTHORITIES),
    };
    // Without judging there is nothing to judge by.
    let ca = if tls.verify { read(key, file) } else { Some(Pem { file: String::new(), digest: 0, bytes: [].into() }) };
    let identity =
        tls.identity.map(|(certificate, key)| Some((read("certificate", &certificate)?, read("key", &key)?)));
    let ca = ca?;
    if tls.verify && !tls::has_authority(&ca.bytes) {
        let message = format!("{} holds no certificate that can be used, in PEM form", ca.file);
        problems.push(sources.problem(source, &format!("{path}.{key}"), message));
    }
    let identity = match identity {
        None => None,
        Some(None) => return None,
        Some(Some((certificate, key))) => {
            match tls::identity(&certificate.bytes, &key.bytes) {
                Ok(identity) => {
                    if let Some(message) = not_valid_now(&certificate.file, identity.valid) {
                        let problem = sources.problem(source, &format!("{path}.certificate"), message);
                        ended.push((certificate.digest, problem));
                    }
                }
                Err((part, message)) => {
                    let (name, file) = match part {
                        Part::Certificate => ("certificate", &certificate.file),
                        Part::Key => ("key", &key.file),
                    };
                    problems.push(sources.problem(source, &format!("{path}.{name}"), format!("{file} {message}")));
                }
            }
            Some(Pair { certificate, key })
        }
    };
    Some(BackendTls { server_name: tls.server_name?, verify: tls.verify, ca, identity })
}

/// What is to be said of a certificate that is valid between two times, in seconds since 1970, and not now.
fn not_valid_now(file: &str, (begins, ends): (i64, i64)) -> Option<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    let day = |at: i64| {
        let at = UNIX_EPOCH + Duration::from_secs(at.clamp(0, tls::LAST_SECOND - 1) as u64);
        humantime::format_rfc3339_seconds(at).to_string()
    };
    (!(begins..ends).contains(&now)).then(|| format!("{file} is valid from {} to {} only", day(begins), day(ends)))
}

/// Reads and judges what the TLS of a listener names.
fn resolve_tls(
    tls: FileTls,
    path: &str,
    source: usize,
    sources: &mut Sources,
    problems: &mut Vec<Problem>,
    ended: &mut Vec<(u128, Problem)>,
) -> ListenerTls {
    let mut certificates = Vec::new();
    for (at, certificate, key) in tls.certificates {
        let mut read = |key: &str, name: &str| match sources.read_pem(source, name) {
            Ok(pem) => Some(pem),
            Err(message) => {
                problems.push(sources.problem(source, &format!("{at}.{key}"), message));
                None
            }
        };
        let (Some(certificate), Some(key)) = (read("certificate", &certificate), read("key", &key)) else { continue };
        match tls::identity(&certificate.bytes, &key.bytes) {
            Ok(identity) => {
                if let Some(message) = not_valid_now(&certificate.file, identity.valid) {
                    ended.push((certificate.digest, sources.problem(source, &format!("{at}.certificate"), message)));
                }
                certificates.push(Pair { certificate, key });
            }
            Err((Part::Certificate, message)) => {
                let message = format!("{} {message}", certificate.file);
                problems.push(sources.problem(source, &format!("{at}.certificate"), message));
            }
            Err((Part::Key, message)) => {
                problems.push(sources.problem(source, &format!("{at}.key"), format!("{} {message}", key.file)));
            }
        }
    }
    let client = tls.client_ca.and_then(|ca| match sources.read_pem(source, &ca) {
        Ok(pem) if tls::has_authority(&pem.bytes) => {
            Some(ClientCertificates { ca: pem, require: tls.require, header: tls.client_header.clone() })
        }
        Ok(pem) => {
            let message = format!("{} holds no certificate that can be used, in PEM form", pem.file);
            problems.push(sources.problem(source, &format!("{path}.client.ca"), message));
            None
        }
        Err(message) => {
            problems.push(sources.problem(source, &format!("{path}.client.ca"), message));
            None
        }
    });
    ListenerTls { certificates, only_1_3: tls.only_1_3, client }
}

fn resolve_pool(
    name: String,
    mut pool: FilePool,
    kind: Option<ProbeKind>,
    tls: Option<BackendTls>,
    known_cells: Option<&HashSet<String>>,
    say: &mut impl FnMut(&str, String),
) -> Pool {
    let path = format!("pools.{name}");
    let cells = resolve_cells(&path, std::mem::take(&mut pool.cells), known_cells, say);
    let probe = resolve_probe(&path, &mut pool, kind, tls.as_ref(), &cells, say);
    let hold = Hold {
        first: pool.hold_first.unwrap_or(Duration::from_secs(1)),
        longest: pool.hold_longest.unwrap_or(Duration::from_secs(60).max(pool.hold_first.unwrap_or_default())),
    };
    if hold.longest < hold.first {
        say(
            &format!("{path}.hold.longest"),
            format!("{} is shorter than `first`, {}", human(hold.longest), human(hold.first)),
        );
    }
    let source = pool.source.take().unwrap_or_default();
    check_sources(&path, &source, &cells, say);
    Pool {
        name,
        cells,
        balance: pool.balance.unwrap_or(Balance::TwoChoices),
        affinity: pool.affinity.unwrap_or(Affinity::None),
        probe,
        connect: Connect {
            timeout: pool.connect_timeout.unwrap_or(Duration::from_secs(3)),
            attempts: pool.attempts.unwrap_or(5) as u32,
            race: pool.race.unwrap_or(true),
            source,
        },
        http: pool.http.unwrap_or(HttpVersion::Auto),
        tls,
        timeouts: Timeouts {
            request: pool.request.unwrap_or(Duration::from_secs(30)),
            idle: pool.idle.unwrap_or(Duration::from_secs(3_600)),
            half_close: pool.half_close.unwrap_or(Duration::from_secs(30)),
            unacked: pool.unacked.unwrap_or(Duration::from_secs(15)),
            first_byte: pool.first_byte_time.unwrap_or(Duration::from_secs(10)),
        },
        send_proxy: pool.send_proxy,
        on_down: pool.on_down.unwrap_or(OnDown::Stuck),
        when_all_down: pool.when_all_down.unwrap_or(WhenAllDown::TryAll),
        hold,
        ramp: pool.ramp.unwrap_or(Duration::from_secs(10)),
        max_connections: pool.max_connections.map(|n| n as u32),
        queue: Queue {
            length: pool.queue.unwrap_or(200) as u32,
            timeout: pool.queue_timeout.unwrap_or(Duration::from_secs(1)),
        },
        first_byte: pool.first_byte.unwrap_or(FirstByte::Learn),
        replay: pool.replay,
        failback: pool.failback.unwrap_or(Failback::Auto),
        rebalance: pool.rebalance,
        probe_removal: pool.probe_removal.unwrap_or(Duration::from_secs(10)),
        data_version: pool.data_version,
    }
}

fn resolve_cells(
    path: &str,
    file_cells: Vec<(String, FileCell)>,
    known_cells: Option<&HashSet<String>>,
    say: &mut impl FnMut(&str, String),
) -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut names: HashMap<String, String> = HashMap::new();
    let mut addresses: HashMap<SocketAddr, String> = HashMap::new();
    for (cell_name, cell) in file_cells {
        let cell_path = format!("{path}.cells.{cell_name}");
        if known_cells.is_some_and(|known| !known.contains(&cell_name)) {
            say(
                &cell_path,
                format!(
                    "the cell {cell_name:?} does not stand under `cells` at the top of the file; add it there or correct the name"
                ),
            );
        }
        let mut backends = Vec::new();
        for (backend_path, backend) in cell.backends {
            if let Some(first) = addresses.insert(backend.address, backend_path.clone()) {
                say(&backend_path, format!("{} stands in this pool a second time (first at {first})", backend.address));
            }
            let name = backend.name.unwrap_or_else(|| backend.address.to_string());
            if let Some(first) = names.insert(name.clone(), backend_path.clone()) {
                say(
                    &backend_path,
                    format!("the name {name:?} is already taken at {first}; names are unique in a pool"),
                );
            }
            backends.push(Backend {
                name,
                address: backend.address,
                weight: backend.weight.unwrap_or(1) as u32,
                max_connections: backend.max_connections.map(|n| n as u32),
            });
        }
        cells.push(Cell {
            name: cell_name,
            weight: cell.weight.unwrap_or(1) as u32,
            tier: cell.tier.unwrap_or(0) as u8,
            max_connections: cell.max_connections.map(|n| n as u32),
            capacity: cell.capacity,
            backends,
        });
    }
    cells
}

/// The probe of a pool, and what of the pool it needs.
fn resolve_probe(
    path: &str,
    pool: &mut FilePool,
    kind: Option<ProbeKind>,
    tls: Option<&BackendTls>,
    cells: &[Cell],
    say: &mut impl FnMut(&str, String),
) -> Option<Probe> {
    let probe = match pool.probe.take() {
        None => Some(FileProbe::default()),
        Some(probe) if probe.off => None,
        Some(probe) => Some(probe),
    };
    let probe = probe.map(|probe| {
        let interval = probe.interval.unwrap_or(Duration::from_secs(1));
        let timeout = probe.timeout.unwrap_or(Duration::from_millis(800).min(interval.mul_f64(0.8)));
        if timeout > interval {
            say(
                &format!("{path}.probe.timeout"),
                format!(
                    "{} is longer than the interval of {}; a probe ends before the next begins",
                    human(timeout),
                    human(interval)
                ),
            );
        }
        // Another port is another service, which expects neither a header nor TLS.
        let mut backends = cells.iter().flat_map(|cell| &cell.backends);
        let own_port = probe.port.is_none_or(|port| backends.all(|backend| u64::from(backend.address.port()) == port));
        Probe {
            kind: kind.unwrap_or(ProbeKind::Tcp),
            interval,
            timeout,
            fall: probe.fall.unwrap_or(2) as u32,
            rise: probe.rise.unwrap_or(2) as u32,
            port: probe.port.map(|port| port as u16),
            send_proxy: pool.send_proxy.filter(|_| own_port),
            tls: tls.cloned().filter(|_| own_port),
            version: pool.http.filter(|_| own_port).unwrap_or(HttpVersion::Auto),
            data_header: pool.data_version.as_ref().map(|wanted| wanted.header.clone()),
        }
    });
    let reads_headers = probe.as_ref().is_some_and(|probe| matches!(probe.kind, ProbeKind::Http { .. }));
    if pool.data_version.is_some() && !reads_headers {
        let reason = "only a probe of kind http can read it; add `probe: { http: { path: /healthz } }` to the pool";
        say(&format!("{path}.data_version"), reason.into());
    }
    probe
}

/// Each backend can be dialled from one of the addresses, where any are named.
fn check_sources(path: &str, source: &[IpAddr], cells: &[Cell], say: &mut impl FnMut(&str, String)) {
    let lacks = |backend: &&Backend| !source.iter().any(|ip| ip.is_ipv4() == backend.address.is_ipv4());
    let backends = cells.iter().flat_map(|cell| &cell.backends);
    for backend in backends.filter(|_| !source.is_empty()).filter(lacks) {
        let family = if backend.address.is_ipv4() { "IPv4" } else { "IPv6" };
        let reason = format!("no {family} address to dial {} from; add one", backend.address);
        say(&format!("{path}.connect.source"), reason);
    }
}

fn resolve_listener(
    path: &str,
    listener: FileListener,
    pools: &[Pool],
    say: &mut impl FnMut(&str, String),
) -> Listener {
    let bind = listener.bind.into_iter().map(|(_, address)| address).collect::<Vec<_>>();
    let mut known = |path: &str, pool: &str| {
        // Without any pool the mistake lies elsewhere, and has been told of.
        if pool.is_empty() || pools.is_empty() || pools.iter().any(|known| known.name == pool) {
            return;
        }
        let names = pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>();
        let nearest = names.iter().map(|name| (strsim::damerau_levenshtein(pool, name), *name)).min();
        let hint = match nearest {
            Some((edits, name)) if edits <= 2 => format!("did you mean {name:?}?"),
            _ if names.len() > 8 => format!("the file has {} pools, such as {}", names.len(), names[0]),
            _ => format!("expected {}", names.join(" | ")),
        };
        say(path, format!("there is no pool {pool:?}; {hint}"));
    };
    let face = match (listener.sni, listener.http) {
        (_, Some(http)) => {
            for (path, route) in http.paths.iter().zip(&http.http.routes) {
                route.action.pool().iter().for_each(|pool| known(&format!("{path}.pool"), pool));
            }
            let mut seen = HashMap::new();
            for (path, route) in http.paths.iter().zip(&http.http.routes) {
                let asks = (&route.host, &route.path, &route.methods, &route.headers);
                if let Some(first) = seen.insert(asks, path) {
                    say(path, format!("takes the same requests as {first}; one of them would get none"));
                }
            }
            Face::Http(http.http)
        }
        (Some(sni), None) => {
            sni.routes.iter().for_each(|(path, _, pool)| known(path, pool));
            sni.default.iter().for_each(|pool| known(&format!("{path}.sni.default"), pool));
            if sni.routes.is_empty() && sni.default.is_none() {
                say(
                    &format!("{path}.sni"),
                    "has neither routes nor a default; it would refuse every client".to_owned(),
                );
            }
            let routes = sni.routes.into_iter().map(|(_, name, pool)| (name, pool)).collect();
            Face::Sni { routes, default: sni.default }
        }
        (None, None) => {
            let pool = listener.tcp.unwrap_or_default();
            known(&format!("{path}.tcp"), &pool);
            Face::Tcp(pool)
        }
    };
    Listener {
        name: listener.name.unwrap_or_else(|| bind.first().map(ToString::to_string).unwrap_or_default()),
        bind,
        face,
        proxy_from: listener.proxy_from.unwrap_or_default(),
        handshake: listener.handshake.unwrap_or(Duration::from_secs(10)),
        tls: None,
        header: listener.header.unwrap_or(Duration::from_secs(10)),
        keepalive: listener.keepalive.unwrap_or(Duration::from_secs(60)),
        allow: listener.allow.unwrap_or_default(),
        deny: listener.deny.unwrap_or_default(),
        max_connections: listener.max_connections.map(|n| n as u32),
        wait: listener.wait.unwrap_or(Duration::from_secs(1)),
        per_client: PerClient {
            connections: listener.client_connections.map(|n| n as u32),
            rate: listener.client_rate,
            prefix: (listener.client_prefix.0.unwrap_or(32) as u8, listener.client_prefix.1.unwrap_or(64) as u8),
        },
        idle: listener.idle,
    }
}
