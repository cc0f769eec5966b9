//! Active checks: the network turned into evidence, on the control thread.
//!
//! One prober for each (address, probe), shared by all pools that ask the same; they run side by side, never in
//! turn. A reload keeps every prober whose address and probe stay, and only changes whom it reports to. Probes
//! close with a reset, so that they leave nothing behind. A verdict that came late by our own fault is discarded.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::backend::Backend;
use crate::clock;
use crate::config::{HttpVersion, Pem, Probe, ProbeKind};
use crate::dial;
use crate::health::{Blame, Depth, Evidence, Seen, Source, State};
use crate::host::Host;
use crate::pool::Policy;
use crate::table::Table;
use crate::tls::Stream;
use crate::{sniff, sys, tcp, tls};

/// A verdict later than this is our own fault.
const LATE: Duration = Duration::from_millis(50);
/// Most of an answer that is read.
const ANSWER: usize = 64 << 10;
/// Most of it before its status.
const INTERIM: usize = 8 << 10;
/// While a backend is in doubt it is probed this many times as often, but not more often than this.
const DOUBT_FACTOR: u32 = 4;
const DOUBT_LEAST: Duration = Duration::from_millis(50);

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    address: SocketAddr,
    probe: Probe,
}

/// Whom a prober reports to.
#[derive(Clone)]
struct Target {
    backend: Arc<Backend>,
    policy: Arc<Policy>,
}

struct Prober {
    id: u64,
    tls: Tls,
    targets: Arc<Mutex<Vec<Target>>>,
    wake: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Prober {
    fn start(key: &Key, tls: Tls, host: &Arc<Host>) -> Prober {
        let targets: Arc<Mutex<Vec<Target>>> = Arc::default();
        let wake = Arc::new(Notify::new());
        let task = tokio::spawn(run(key.clone(), tls.clone(), targets.clone(), wake.clone(), host.clone()));
        Prober { id: NEXT_ID.fetch_add(1, Relaxed), tls, targets, wake, task }
    }
}

/// All probers of the process.
#[derive(Default)]
pub struct Probers {
    running: HashMap<Key, Prober>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The probers that a table needs, and whom each reports to.
pub struct Wanted(HashMap<Key, (Tls, Vec<Target>)>);

/// What a prober needs for TLS.
#[derive(Clone, Default)]
struct Tls {
    /// For a probe that is a handshake.
    shake: Option<Arc<ClientConfig>>,
    /// For one that goes on under TLS.
    under: Option<Arc<tls::Upstream>>,
}

/// Finds them; takes time in the order of the number of backends, and some milliseconds for each list of authorities.
///
/// # Errors
/// A sentence for each client that cannot be made.
pub fn wanted(table: &Table) -> Result<Wanted, Vec<String>> {
    let mut wanted: HashMap<Key, (Tls, Vec<Target>)> = HashMap::new();
    let mut clients: HashMap<Option<&Pem>, Arc<ClientConfig>> = HashMap::new();
    for (config, pool) in table.config.pools.iter().zip(&table.pools) {
        let Some(probe) = &config.probe else { continue };
        let shake = match &probe.kind {
            ProbeKind::Tls { verify, .. } => Some(match clients.entry(verify.as_ref()) {
                Entry::Occupied(made) => made.get().clone(),
                Entry::Vacant(new) => {
                    let client = tls::client(verify.as_ref().map(|pem| &*pem.bytes));
                    new.insert(client.map_err(|error| vec![error])?).clone()
                }
            }),
            _ => None,
        };
        let tls = Tls { shake, under: pool.policy.tls.clone().filter(|_| probe.tls.is_some()) };
        for member in &pool.members {
            let mut address = member.backend.address;
            address.set_port(probe.port.unwrap_or(address.port()));
            let target = Target { backend: member.backend.clone(), policy: pool.policy.clone() };
            let of_key = wanted.entry(Key { address, probe: probe.clone() });
            of_key.or_insert_with(|| (tls.clone(), Vec::new())).1.push(target);
        }
    }
    Ok(Wanted(wanted))
}

impl Probers {
    /// Makes the running probers the wanted ones; returns how many were started and stopped.
    pub fn apply(&mut self, Wanted(mut wanted): Wanted, host: &Arc<Host>) -> (usize, usize) {
        let mut stopped = 0;
        self.running.retain(|key, prober| {
            // A prober that goes on may have lost some of its backends.
            let kept = |id: u64| wanted.get(key).is_some_and(|(_, targets)| targets.iter().any(|t| t.backend.id == id));
            for target in prober.targets.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                if kept(target.backend.id) {
                    continue;
                }
                *target.backend.prober.lock().unwrap_or_else(PoisonError::into_inner) = None;
                target.backend.next_probe_ms.store(0, Relaxed);
                target.backend.certificate_expiry.store(0, Relaxed);
            }
            let keep = wanted.contains_key(key);
            if !keep {
                prober.task.abort();
                stopped += 1;
            }
            keep
        });
        let mut started = 0;
        for (key, (tls, targets)) in wanted.drain() {
            let prober = self.running.entry(key).or_insert_with_key(|key| {
                started += 1;
                Prober::start(key, tls, host)
            });
            for target in &targets {
                let mut slot = target.backend.prober.lock().unwrap_or_else(PoisonError::into_inner);
                *slot = Some(prober.wake.clone());
            }
            *prober.targets.lock().unwrap_or_else(PoisonError::into_inner) = targets;
        }
        (started, stopped)
    }

    /// Starts those anew that a bug of ours has ended, which is counted. Without it their backends would keep for ever what their
    /// last probe said.
    pub fn mend(&mut self, host: &Arc<Host>) {
        for (key, prober) in self.running.iter_mut().filter(|(_, prober)| prober.task.is_finished()) {
            tracing::error!(address = %key.address, "a prober ended, which is a bug of sailover; it begins anew");
            host.panics.add(1);
            let (targets, wake) = (prober.targets.clone(), prober.wake.clone());
            prober.task = tokio::spawn(run(key.clone(), prober.tls.clone(), targets, wake, host.clone()));
        }
    }

    /// Identity of the prober of each backend, by the backend's own identity.
    pub fn ids(&self) -> HashMap<u64, u64> {
        let mut ids = HashMap::new();
        for prober in self.running.values() {
            for target in prober.targets.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                ids.insert(target.backend.id, prober.id);
            }
        }
        ids
    }
}

async fn run(key: Key, tls: Tls, targets: Arc<Mutex<Vec<Target>>>, wake: Arc<Notify>, host: Arc<Host>) {
    let snapshot = || targets.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut rng = fastrand::Rng::new();
    loop {
        let due = Instant::now();
        let report_to = snapshot();
        let began = clock::now();
        let source = report_to.first().and_then(|target| tcp::any_source(&target.policy, key.address));
        let mut seen = Progress { reached: Depth::Connect, shaking: false, handshake: None, expiry: None, head: None };
        let deadline = due + key.probe.timeout;
        let result = timeout_at(deadline, ask(&key, &tls, source, &mut seen)).await;
        let Progress { mut reached, shaking, handshake, expiry, head } = seen;
        let now = clock::now();
        let verdict = match result {
            Ok(Ok(())) => Some(None),
            Ok(Err(Failed::AtOnce(error))) if host.local_errors.count(&error) || !dial::is_refusal(&error) => None,
            Ok(Err(Failed::AtOnce(_))) => Some(Some(Seen::Refused)),
            Ok(Err(Failed::Error(error))) if reached == Depth::Connect && error.kind() == io::ErrorKind::TimedOut => {
                Some(Some(Seen::Silent))
            }
            Ok(Err(Failed::Error(error))) if reached == Depth::Connect && !dial::is_reset(&error) => {
                Some(Some(Seen::Refused))
            }
            Ok(Err(Failed::Error(_))) => {
                Some(Some(Seen::Reset(Blame { prefix: 0, others: false, elsewhere: 0.0, tries_elsewhere: 0 })))
            }
            Ok(Err(Failed::Tls(kind))) => Some(Some(Seen::Tls(kind))),
            Ok(Err(Failed::Wrong)) => {
                reached = Depth::Answer;
                Some(Some(Seen::Wrong))
            }
            Ok(Err(Failed::Corrupt)) => {
                reached = Depth::Answer;
                Some(Some(Seen::Corrupt))
            }
            Err(_) if deadline.elapsed() > LATE => None,
            Err(_) if shaking => Some(Some(Seen::Tls("handshake silent"))),
            Err(_) => Some(Some(Seen::Silent)),
        };
        if matches!(verdict, Some(Some(Seen::Reset(_)))) {
            reached = Depth::FirstByte;
        }
        for target in &report_to {
            let (backend, policy) = (&target.backend, &target.policy.health);
            if let Some(expiry) = expiry {
                backend.certificate_expiry.store(expiry, Relaxed);
            }
            match verdict {
                None => {}
                Some(None) => {
                    if let (Some(wanted), Some(head)) = (&target.policy.data_version, &head) {
                        backend.says_version(wanted.read(head), began, now);
                    }
                    if let Some(time) = handshake.filter(|_| key.address == backend.address) {
                        backend.handshake.record(time);
                    }
                    backend.probed(policy, policy.probe_depth.unwrap_or(Depth::Connect), began, now);
                }
                Some(Some(seen)) => {
                    backend.counters.probes[1].add(1);
                    let evidence = Evidence { source: Source::Probe, depth: reached, seen, began };
                    backend.observe(policy, &evidence, now);
                }
            }
        }
        let doubted = |target: &Target| target.backend.view().state != State::Up || target.backend.version.is_old();
        let doubted = report_to.iter().any(doubted);
        let failed = matches!(verdict, Some(Some(_)));
        let interval =
            if doubted || failed { (key.probe.interval / DOUBT_FACTOR).max(DOUBT_LEAST) } else { key.probe.interval };
        let next = (due + interval.mul_f64(0.9 + 0.2 * rng.f64())).max(Instant::now());
        for target in &report_to {
            target.backend.next_probe_ms.store(clock::of(next).0 / 1_000, Relaxed);
        }
        tokio::select! {
            () = sleep_until(next) => host.probe_late.record(next.elapsed()),
            // A doubt has come up: it is asked about at once, but not in a spin.
            () = wake.notified() => sleep_until((due + DOUBT_LEAST).max(Instant::now())).await,
        }
    }
}

enum Failed {
    /// Before any packet had an answer: by this machine, unless it says that the backend refused.
    AtOnce(io::Error),
    Error(io::Error),
    /// Its TLS handshake, in the words of health.
    Tls(&'static str),
    Wrong,
    /// The answer was not the one that its digest belongs to.
    Corrupt,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Error(error)
    }
}

/// How far a probe came, whatever its end.
struct Progress {
    reached: Depth,
    /// Whether a TLS handshake is under way.
    shaking: bool,
    handshake: Option<Duration>,
    /// When the certificate ends that was shown.
    expiry: Option<i64>,
    /// The head of the wanted answer, where it matters.
    head: Option<http::HeaderMap>,
}

/// One probe.
async fn ask(key: &Key, tls: &Tls, source: Option<SocketAddr>, seen: &mut Progress) -> Result<(), Failed> {
    let mut socket = tcp::connect(key.address, source)
        .and_then(|socket| TcpStream::from_std(socket.into()))
        .map_err(Failed::AtOnce)?;
    // Whenever it is dropped from here on, it is closed by a reset.
    tcp::reset(&socket);
    socket.writable().await?;
    if let Some(error) = socket.take_error()? {
        return Err(error.into());
    }
    seen.handshake = sys::tcp_info(socket.as_fd()).ok().map(|info| info.rtt);
    if let Some(version) = key.probe.send_proxy {
        socket.write_all(&sniff::proxy_header(version, None, &[])).await?;
    }
    if let ProbeKind::Tcp = key.probe.kind {
        return Ok(());
    }
    if let ProbeKind::Tls { server_name, .. } = &key.probe.kind {
        // The reader made sure that the name is one.
        let name = server_name.as_deref().and_then(|name| ServerName::try_from(name.to_owned()).ok());
        let name = name.unwrap_or_else(|| ServerName::IpAddress(key.address.ip().into()));
        let Some(config) = &tls.shake else { return Err(Failed::Wrong) };
        return shake(config, name, socket, seen).await.map(drop);
    }
    let two = key.probe.version == HttpVersion::Two || matches!(key.probe.kind, ProbeKind::Grpc { .. });
    let mut stream = match &tls.under {
        None => Stream::Plain(socket),
        Some(tls) => {
            let http = matches!(key.probe.kind, ProbeKind::Http { .. } | ProbeKind::Grpc { .. });
            let config = match (http, two || key.probe.version == HttpVersion::Auto) {
                (false, _) => &tls.probe,
                (true, two) => &tls.http[usize::from(two)],
            };
            Stream::Tls(Box::new(shake(config, tls.server_name.clone(), socket, seen).await?.into()))
        }
    };
    seen.reached = Depth::FirstByte;
    let two = match stream.plain() {
        Some(_) => two,
        None => stream.alpn() == Some(b"h2"),
    };
    match &key.probe.kind {
        ProbeKind::Tcp | ProbeKind::Tls { .. } => Ok(()),
        ProbeKind::Grpc { service } => ask_grpc(stream, key, service).await,
        ProbeKind::Http { method, path, host, status, body, digest }
            if two || *digest || body.is_some() || key.probe.data_header.is_some() =>
        {
            let host = host.clone().unwrap_or_else(|| key.address.to_string());
            let scheme = if key.probe.tls.is_some() { "https" } else { "http" };
            // HTTP/1.1 has the host in a header, HTTP/2 in the target.
            let request = http::Request::builder().method(method.as_str());
            let request = match two {
                true => request.uri(format!("{scheme}://{host}{path}")),
                false => request.uri(path).header("host", host).header("connection", "close"),
            };
            let judges = |head: &http::response::Parts| {
                let found = head.status.as_u16();
                let good = status.iter().any(|(low, high)| (*low..=*high).contains(&found));
                good.then_some(*digest || body.is_some()).ok_or(Failed::Wrong)
            };
            let until = body.as_deref().filter(|_| !*digest).map(str::as_bytes);
            let (head, bytes) = ask_whole(stream, two, request, Bytes::new(), judges, until).await?;
            if body.as_ref().is_some_and(|body| !contains(&bytes, body.as_bytes())) {
                return Err(Failed::Wrong);
            }
            if *digest && !has_its_digest(&head.headers, &bytes) {
                return Err(Failed::Corrupt);
            }
            seen.head = Some(head.headers);
            Ok(())
        }
        ProbeKind::Http { method, path, host, status, .. } => {
            let host = host.clone().unwrap_or_else(|| key.address.to_string());
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: sailover/{}\r\nAccept: */*\r\nConnection: close\r\n\r\n",
                env!("CARGO_PKG_VERSION")
            );
            stream.write_all(request.as_bytes()).await?;
            let mut answer = Vec::new();
            loop {
                match judge_http(&answer, status) {
                    Some(true) => return Ok(()),
                    Some(false) => return Err(Failed::Wrong),
                    None if answer.len() > INTERIM => return Err(Failed::Wrong),
                    None => {}
                }
                if !read_more(&mut stream, &mut answer).await? {
                    // An answer that ends early is wrong; no answer at all is a close before the first byte.
                    return Err(if answer.is_empty() {
                        io::Error::from(io::ErrorKind::UnexpectedEof).into()
                    } else {
                        Failed::Wrong
                    });
                }
            }
        }
        ProbeKind::Exchange { send, expect } => {
            stream.write_all(send.as_bytes()).await?;
            let mut answer = Vec::new();
            let mut before = 0;
            loop {
                if contains(since(&answer, before, expect.as_bytes()), expect.as_bytes()) {
                    return Ok(());
                }
                before = answer.len();
                if !read_more(&mut stream, &mut answer).await? {
                    return Err(if answer.is_empty() {
                        io::Error::from(io::ErrorKind::UnexpectedEof).into()
                    } else {
                        Failed::Wrong
                    });
                }
            }
        }
    }
}

/// A handshake in TLS, and what it shows.
async fn shake(
    config: &Arc<ClientConfig>,
    name: ServerName<'static>,
    socket: TcpStream,
    seen: &mut Progress,
) -> Result<TlsStream<TcpStream>, Failed> {
    (seen.reached, seen.shaking) = (Depth::FirstByte, true);
    let address = socket.peer_addr();
    let shaken = TlsConnector::from(config.clone()).connect(name, socket).await;
    seen.shaking = false;
    match shaken {
        Ok(stream) => {
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            seen.expiry = shown.and_then(tls::expiry);
            Ok(stream)
        }
        Err(error) => match tls::failure(&error) {
            Some(kind) => {
                tracing::debug!(?address, %error, "the TLS probe failed");
                seen.reached = Depth::Answer;
                Err(Failed::Tls(kind))
            }
            None => Err(error.into()),
        },
    }
}

/// One request, and its answer: the head, and where `judges` asks for it the beginning of the body, to its end or `until` it holds
/// these bytes.
async fn ask_whole(
    stream: Stream,
    two: bool,
    request: http::request::Builder,
    body: Bytes,
    judges: impl Fn(&http::response::Parts) -> Result<bool, Failed>,
    until: Option<&[u8]>,
) -> Result<(http::response::Parts, Vec<u8>), Failed> {
    let gone = |error: hyper::Error| match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(error) => Failed::Error(error.kind().into()),
        None if error.is_incomplete_message() => Failed::Error(io::ErrorKind::UnexpectedEof.into()),
        None => Failed::Wrong,
    };
    let request = request.header("user-agent", concat!("sailover/", env!("CARGO_PKG_VERSION")));
    let request = request.body(Full::new(body)).map_err(|_| Failed::Wrong)?;
    // It ends with this probe: a probe that is given up must leave nothing behind.
    let mut driver = JoinSet::new();
    let answer = match two {
        true => {
            let shaken = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
            let (mut sender, connection) = shaken.map_err(gone)?;
            driver.spawn(connection);
            sender.send_request(request).await
        }
        false => {
            let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
            let (mut sender, connection) = shaken.map_err(gone)?;
            driver.spawn(connection);
            sender.send_request(request).await
        }
    };
    let (mut head, mut body) = answer.map_err(gone)?.into_parts();
    let mut bytes = Vec::new();
    if !judges(&head)? {
        return Ok((head, bytes));
    }
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(gone)?;
        let before = bytes.len();
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(data);
        } else if let Ok(trailers) = frame.into_trailers() {
            head.headers.extend(trailers);
        }
        if bytes.len() > ANSWER || until.is_some_and(|part| contains(since(&bytes, before, part), part)) {
            break;
        }
    }
    Ok((head, bytes))
}

/// Whether a body has the SHA-256 digest that its header names (RFC 9530, `Content-Digest: sha-256=:…:`).
fn has_its_digest(headers: &http::HeaderMap, body: &[u8]) -> bool {
    // What is cut off has no digest that could be judged.
    if body.len() > ANSWER {
        return false;
    }
    let wanted = format!("sha-256=:{}:", BASE64_STANDARD.encode(digest::digest(&digest::SHA256, body)));
    let lists = headers.get_all("content-digest").iter().filter_map(|value| value.to_str().ok());
    lists.flat_map(|list| list.split(',')).any(|member| member.trim() == wanted)
}

/// `grpc.health.v1.Health/Check`: good is an answer of status 0 that says `SERVING`.
async fn ask_grpc(stream: Stream, key: &Key, service: &str) -> Result<(), Failed> {
    // A message of one field, number 1, of bytes; before it one byte without compression, and its length.
    let mut message = Vec::new();
    if !service.is_empty() {
        message.extend([0x0a, (service.len() & 0x7f) as u8 | if service.len() > 0x7f { 0x80 } else { 0 }]);
        if service.len() > 0x7f {
            message.push((service.len() >> 7) as u8);
        }
        message.extend_from_slice(service.as_bytes());
    }
    let mut body = vec![0];
    body.extend_from_slice(&(message.len() as u32).to_be_bytes());
    body.extend_from_slice(&message);
    let host = key.probe.tls.as_ref().map_or_else(|| key.address.to_string(), |tls| tls.server_name.clone());
    let scheme = if key.probe.tls.is_some() { "https" } else { "http" };
    let request = http::Request::post(format!("{scheme}://{host}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let (head, bytes) = ask_whole(stream, true, request, Bytes::from(body), |_| Ok(true), None).await?;
    let status = head.headers.get("grpc-status").map(http::HeaderValue::as_bytes);
    // SERVING is 1, in field 1 as a number.
    let serving = bytes.get(5..).is_some_and(|message| message.starts_with(&[0x08, 0x01]));
    if head.status == 200 && status == Some(b"0") && serving { Ok(()) } else { Err(Failed::Wrong) }
}

/// Reads some more of an answer; false at its end or at the most that is read.
async fn read_more(stream: &mut Stream, answer: &mut Vec<u8>) -> io::Result<bool> {
    if answer.len() >= ANSWER {
        return Ok(false);
    }
    let mut buffer = [0; 4_096];
    let n = stream.read(&mut buffer).await?;
    answer.extend_from_slice(&buffer[..n]);
    Ok(n > 0)
}

/// Whether an HTTP answer has a wanted status; `None` while it is too short to tell. Interim answers are skipped.
fn judge_http(answer: &[u8], wanted: &[(u16, u16)]) -> Option<bool> {
    let mut rest = answer;
    loop {
        let line_end = rest.windows(2).position(|pair| pair == b"\r\n");
        let line = &rest[..line_end.unwrap_or(rest.len().min(64))];
        if line_end.is_none() && rest.len() < 64 {
            return None;
        }
        let status = line
            .strip_prefix(b"HTTP/1.")
            .filter(|rest| rest.len() >= 5 && rest[0].is_ascii_digit() && rest[1] == b' ')
            .and_then(|rest| std::str::from_utf8(&rest[2..5]).ok())
            .and_then(|digits| digits.parse::<u16>().ok());
        let Some(status) = status else { return Some(false) };
        if !(100..200).contains(&status) || status == 101 {
            return Some(wanted.iter().any(|(low, high)| (*low..=*high).contains(&status)));
        }
        rest = &rest[rest.windows(4).position(|four| four == b"\r\n\r\n")? + 4..];
    }
}

/// Where in `text` a `part` may stand that was not in its first `before` bytes: what comes byte by byte is searched once.
fn since<'a>(text: &'a [u8], before: usize, part: &[u8]) -> &'a [u8] {
    &text[(before + 1).saturating_sub(part.len()).min(text.len())..]
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    part.is_empty() || text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_prober_that_a_bug_has_ended_begins_anew() {
        let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let file = format!(
            "pools: {{ p: {{ probe: {{ interval: 1h }}, cells: {{ a: [ {} ] }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]",
            port.local_addr().expect("it is bound")
        );
        let config = Arc::new(crate::config::parse(file.as_bytes(), 1 << 20).expect("a good file").config);
        let built = crate::table::build(config, String::new(), None, 1_000, clock::now());
        let table = Arc::new(built.expect("nothing to read").0);
        let host = Arc::new(Host::new(table.clone(), 1, crate::log::AccessLog::off()));
        let mut probers = Probers::default();
        probers.apply(wanted(&table).expect("probers"), &host);
        let ids = probers.ids();
        port.accept().await.expect("its first probe");
        probers.mend(&host);
        assert_eq!(host.panics.get(), 0, "nothing to mend");

        probers.running.values().for_each(|prober| prober.task.abort());
        while !probers.running.values().all(|prober| prober.task.is_finished()) {
            tokio::task::yield_now().await;
        }
        probers.mend(&host);
        port.accept().await.expect("the first probe of the new one");
        assert_eq!((host.panics.get(), probers.ids()), (1, ids));
    }

    #[test]
    fn what_comes_in_pieces_is_found_across_them() {
        let (text, part) = (&b"....needle...."[..], &b"needle"[..]);
        for before in 0..text.len() {
            assert_eq!(contains(since(text, before, part), part), before < 10, "{before}");
        }
        assert!(contains(since(b"", 0, b""), b"") && !contains(since(b"", 0, part), part));
    }

    #[test]
    fn http_answers_are_judged_as_soon_as_they_can_be() {
        let ok = &[(200, 299)][..];
        assert_eq!(judge_http(b"HTTP/1.1 20", ok), None);
        assert_eq!(judge_http(b"HTTP/1.1 204 No Content\r\n", ok), Some(true));
        assert_eq!(judge_http(b"HTTP/1.0 503 Busy\r\n", ok), Some(false));
        assert_eq!(judge_http(b"SSH-2.0-OpenSSH\r\n", ok), Some(false));
        assert_eq!(judge_http(&[b'a'; 70], ok), Some(false));
        assert_eq!(judge_http(b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n", ok), Some(true));
    }
}
