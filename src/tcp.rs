//! One TCP connection, from its acceptance to its close.
//!
//! 1. The caller holds its permits of the process and the listener, and gives it a listener of one table.
//! 2. Where the listener must know more, the client's first bytes are read (`hello`); they lead to a pool.
//! 3. It takes one of its pool's connections, or is reset.
//! 4. `dial` connects it to a backend. From here on it keeps the backend and the policy, not the table.
//! 5. `relay` moves bytes; the first answer, or its absence, is evidence.
//! 6. It is counted, and gets its line in the access log.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use fastrand::Rng;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, timeout, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::Backend;
use crate::blame;
use crate::clock::{self, Time};
use crate::config::{Affinity, Replay};
use crate::dial::{self, Client, DialError, Dialled, Failure, Network, Opening, Order, Story};
use crate::first_byte::Owed;
use crate::hello::{self, Greeting};
use crate::host::Host;
use crate::limits::Permit;
use crate::listen::Admission;
use crate::log::{AccessRecord, Served};
use crate::poison::KILLS_WITHIN;
use crate::pool::{self, Policy, Pool, Want};
use crate::relay::{self, Bounds, Carried, Kept, Notice};
use crate::session;
use crate::sniff;
use crate::speaks_first::Owes;
use crate::sys;
use crate::table::{End, Face, Listener, ListenerShared};
use crate::tls::{Stream, Upstream};

/// A first byte is expected within this many learned 99th percentiles, within the bounds below.
const FIRST_BYTE_FACTOR: u32 = 4;
const FIRST_BYTE_FLOOR: Duration = Duration::from_millis(100);
/// Time for asking whether a backend still accepts connections: this, or two round trips where that is longer.
const DEAD_WITHIN: Duration = Duration::from_millis(50);
/// Connections beyond the half that beginners may have, as a part of all, below which one more of them waits.
const BEGINNERS_BEYOND: u32 = 32;
const BEGINNERS_LEAST: u32 = 8;
/// Whether a place is free is asked this often by whoever waits for one.
const LOOK: Duration = Duration::from_millis(20);
/// The priority of sessions in a queue.
const NORMAL: usize = 1;
/// The first byte of an answer is waited for this long where nothing was learned.
const FIRST_BYTE_COLD: Duration = Duration::from_secs(1);

thread_local! {
    static RNG: RefCell<Rng> = RefCell::new(Rng::new());
}

/// A source of randomness for one client, out of the thread's own.
pub fn fork_rng() -> Rng {
    RNG.with(|rng| rng.borrow_mut().fork())
}

/// Serves one accepted connection to its end.
pub async fn serve(client: TcpStream, peer: SocketAddr, listener: Arc<Listener>, host: Arc<Host>, permits: Admission) {
    let _permits = permits;
    let began = clock::now();
    let shared = listener.shared.clone();
    // Boxed with little cost, so that the whole of a session stays within the allocator's smaller size.
    let mut record = Box::new(AccessRecord::new(listener.name.clone(), peer));

    let (mut client, pool, mut greeting, early) = parts(choose(client, &listener, &host, &mut record).await);
    let (Some(pool), None) = (pool, early) else {
        return finish(&shared, &host, *record, early.unwrap_or(End::NoRoute), client, began);
    };
    let Some(stream) = &mut client else { return };
    let _of_client = greeting.as_mut().and_then(|greeting| greeting.of_client.take());
    let Some(_place) = place(&pool, stream).await else {
        pool.shared.refused_full.add(1);
        return finish(&shared, &host, *record, End::Full, client, began);
    };
    let idle = listener.idle(&pool);
    drop(listener);
    let end = connect_and_relay(stream, greeting, pool, idle, &host, &mut record, began).await;
    finish(&shared, &host, *record, end, client, began);
}

/// What became of a beginning, piece by piece: a match would keep room for the whole beside them for as long as the session.
#[allow(clippy::type_complexity)] // One call site.
fn parts(
    begun: Result<Chosen, (End, Option<TcpStream>)>,
) -> (Option<Stream>, Option<Arc<Pool>>, Option<Box<Greeting>>, Option<End>) {
    match begun {
        Ok(Chosen { client, pool, greeting }) => (Some(client), Some(pool), greeting, None),
        Err((end, client)) => (client.map(Stream::Plain), None, None, Some(end)),
    }
}

/// Counts a connection that has ended, and closes what is left of it.
fn finish(shared: &ListenerShared, host: &Host, record: AccessRecord, end: End, client: Option<Stream>, began: Time) {
    shared.ends[end as usize].add(1);
    shared.bytes[0].add(record.bytes_in);
    shared.bytes[1].add(record.bytes_out);
    let in_peace = [End::ClientClosed, End::BackendClosed, End::Idle, End::HalfClosed, End::NoRoute];
    if let Some(client) = client.filter(|_| record.cut || !in_peace.contains(&end)) {
        reset(client.socket());
    }
    host.access.write(record, end, clock::now().since(began));
}

/// One of the pool's connections, at once or in the pool's queue.
async fn place(pool: &Pool, client: &Stream) -> Option<Permit> {
    let ask = || pool.shared.connections.take(pool.policy.max_connections);
    let (queue, gone) = (pool.policy.queue, || Waiting(client.socket(), None).gone());
    pool.shared.queue.take_within_bound(NORMAL, queue.length, queue.timeout, gone, ask).await
}

/// A connection that has found its pool.
struct Chosen {
    client: Stream,
    pool: Arc<Pool>,
    /// What was learned on the way; boxed and mostly absent, because every session keeps the room.
    greeting: Option<Box<Greeting>>,
}

/// What has to come before a connection can be served, whatever its face: a PROXY header, a ClientHello, a handshake. A
/// connection that ends before gives back what is left of it.
///
/// # Errors
/// How it ended.
pub async fn begin(
    client: TcpStream,
    listener: &Listener,
    host: &Host,
    record: &mut AccessRecord,
) -> Result<(Stream, Greeting), (End, Option<TcpStream>)> {
    if listener.tls.is_none() && listener.proxy_from.is_empty() && !matches!(listener.face, Face::Sni(_)) {
        let greeting = Greeting::unread(record.client);
        return Ok((Stream::Plain(client), greeting));
    }
    let Some(_beginning) = beginning(listener, host).await else { return Err((End::Cap, Some(client))) };
    greet(client, listener, record).await
}

/// A permit for a connection that has not finished its PROXY header, ClientHello or handshake, and may never. At most half of the
/// connections have one, so that clients that stay silent cannot fill the listener. Whoever finds none waits for one as at any bound,
/// unless many more connections are open.
async fn beginning(listener: &Listener, host: &Host) -> Option<Permit> {
    let most = host.max_connections.load(Relaxed).min(listener.max_connections);
    let (places, half) = (&listener.shared.beginnings, (most / 2).max(1));
    let deadline = Instant::now() + listener.wait;
    loop {
        let freed = std::pin::pin!(places.freed());
        if let Some(place) = places.take(half) {
            return Some(place);
        }
        let now = Instant::now();
        if listener.shared.connections.used() > half + (most / BEGINNERS_BEYOND).max(BEGINNERS_LEAST) || now >= deadline
        {
            return None;
        }
        // A place that becomes free between the look and the wait is told to nobody.
        let _ = timeout_at(deadline.min(now + LOOK), freed).await;
    }
}

/// The pool of a connection, after what the client says first where the listener has to know it, and after the handshake
/// where TLS ends here. A connection that ends before gives back what is left of it.
async fn choose(
    client: TcpStream,
    listener: &Listener,
    host: &Host,
    record: &mut AccessRecord,
) -> Result<Chosen, (End, Option<TcpStream>)> {
    if let (Face::Tcp(pool), true, None) = (&listener.face, listener.proxy_from.is_empty(), &listener.tls) {
        record.pool = Some(pool.name.clone());
        return Ok(Chosen { client: Stream::Plain(client), pool: pool.clone(), greeting: None });
    }
    // Boxed, because every session keeps the room that its beginning took.
    let (client, greeting) = Box::pin(begin(client, listener, host, record)).await?;
    let pool = match &listener.face {
        Face::Tcp(pool) => Some(pool),
        Face::Sni(routes) => routes.pool(greeting.name.as_deref()),
        Face::Http(_) => None,
    };
    let Some(pool) = pool else {
        hello::name_is_unknown(client.socket()).await;
        return Err((End::NoRoute, None));
    };
    record.pool = Some(pool.name.clone());
    Ok(Chosen { client, pool: pool.clone(), greeting: Some(Box::new(greeting)) })
}

async fn greet(
    client: TcpStream,
    listener: &Listener,
    record: &mut AccessRecord,
) -> Result<(Stream, Greeting), (End, Option<TcpStream>)> {
    let deadline = Instant::now() + listener.handshake;
    let mut greeting = match hello::read(&client, &mut record.client, listener, deadline).await {
        Ok(greeting) => greeting,
        Err((end, why)) => {
            record.reason = why.map(Into::into);
            return Err((end, Some(client)));
        }
    };
    let client = match &listener.tls {
        None => Stream::Plain(client),
        Some(tls) => {
            let accepted = timeout_at(deadline, TlsAcceptor::from(tls.server.clone()).accept(client)).await;
            let stream = accepted.map_err(|_| (End::Handshake, None))?.map_err(|error| {
                tracing::debug!(listener = &*listener.name, client = %greeting.client, %error, "TLS handshake failed");
                record.reason = Some(error.to_string().into());
                match error.kind() {
                    io::ErrorKind::UnexpectedEof => (End::ClientGone, None),
                    io::ErrorKind::ConnectionReset => (End::ClientReset, None),
                    _ => (End::Tls, None),
                }
            })?;
            greeting.name = stream.get_ref().1.server_name().map(str::to_ascii_lowercase);
            let stream = Stream::Tls(Box::new(stream.into()));
            // A ticket stands for a certificate no longer than the certificate itself is good.
            if stream.has_outlived_its_certificate() {
                record.reason = Some("its certificate has expired since its ticket was issued".into());
                return Err((End::Tls, None));
            }
            stream
        }
    };
    record.server_name = greeting.name.as_deref().map(Into::into);
    Ok((client, greeting))
}

/// What goes to the backend before anything the client says from now on, and how much of it is ours.
fn first_bytes(
    policy: &Policy,
    greeting: Option<&Greeting>,
    client: &TcpStream,
    header_only: bool,
) -> (Vec<u8>, usize) {
    let Some(version) = policy.send_proxy else {
        let bytes = greeting.filter(|_| !header_only).map(|greeting| greeting.bytes.clone());
        return (bytes.unwrap_or_default(), 0);
    };
    // A socket that cannot tell its own addresses is about to end anyway; then the header names nobody.
    let unread = client.peer_addr().ok().map(Greeting::unread);
    let Some(greeting) = greeting.or(unread.as_ref()) else { return (sniff::proxy_header(version, None, &[]), 0) };
    let destination = greeting.destination.or_else(|| client.local_addr().ok());
    let addresses = destination.map(|destination| (greeting.client, destination));
    let mut first = sniff::proxy_header(version, addresses, &greeting.tlvs);
    let ours = first.len();
    if !header_only {
        first.extend_from_slice(&greeting.bytes);
    }
    (first, ours)
}

/// What is kept of a session so that it can be carried to another backend: until the first byte of an answer.
struct Again {
    pool: Arc<Pool>,
    /// The member that it was with.
    member: usize,
    /// How it began; its bytes are all that the client has said.
    greeting: Box<Greeting>,
}

/// A session that goes on, and what its bytes are known by where the backend may have died of them.
type Onward = Box<(Again, Option<u64>)>;

async fn connect_and_relay(
    client: &mut Stream,
    greeting: Option<Box<Greeting>>,
    pool: Arc<Pool>,
    idle: Duration,
    host: &Host,
    record: &mut AccessRecord,
    began: Time,
) -> End {
    let mut timer = std::pin::pin!(tokio::time::sleep(pool.policy.connect_timeout));
    pool.shared.budget.client(began);
    let (end, again) = with_one(client, greeting, pool, None, idle, host, record, began, timer.as_mut()).await;
    let Some(onward) = again else { return end };
    // Boxed, because hardly any session comes here, and every session keeps the room.
    Box::pin(async move {
        let (Again { pool, member, greeting }, suspect) = *onward;
        if let Some(suspect) = suspect
            && has_killed(suspect, &pool.members[member].backend).await
        {
            return End::Poison;
        }
        pool.shared.replays.add(1);
        with_one(client, Some(greeting), pool, Some(member), idle, host, record, began, timer).await.0
    })
    .await
}

/// The session with one backend, from dialling on; not again with the member `before`. What comes back besides its end is a
/// session that another backend may still answer.
#[allow(clippy::too_many_arguments)] // Two calls, side by side; a struct would only name them another time.
async fn with_one(
    client: &mut Stream,
    mut greeting: Option<Box<Greeting>>,
    pool: Arc<Pool>,
    before: Option<usize>,
    idle: Duration,
    host: &Host,
    record: &mut AccessRecord,
    began: Time,
    mut timer: Pin<&mut Sleep>,
) -> (End, Option<Onward>) {
    let under_tls = pool.policy.tls.is_some();
    // Boxed, because it needs room that no session needs afterwards.
    let connecting = connect_to_one(client, greeting.as_deref(), &pool, before, host, record, began, timer.as_mut());
    let dialled = match Box::pin(connecting).await {
        Ok(dialled) => dialled,
        Err(end) => return (end, None),
    };
    let Dialled { connection: mut server, member: number, permit: _permit, began: attempt_began, connected, handshake } =
        dialled;
    let member = &pool.members[number];
    let cell = &pool.cells[member.cell];
    record.served = Some(Served { cell: cell.name.clone(), backend: member.backend.name.clone(), handshake });
    let (backend, of_cell, policy) = (member.backend.clone(), cell.shared.clone(), pool.policy.clone());

    let first = match under_tls {
        true => (greeting.as_mut().map(|greeting| std::mem::take(&mut greeting.bytes)).unwrap_or_default(), 0),
        false => first_bytes(&policy, greeting.as_deref(), client.socket(), false),
    };
    let mut carried = Carried::default();
    if let Some(replay) = policy.replay {
        let bytes = first.0[first.1..].to_vec();
        carried.kept = Some(Box::new(Kept { bytes, most: replay.up_to as usize, shared: pool.shared.clone() }));
    }
    // Only once.
    let movable = policy.replay.is_some() && before.is_none();
    let mut again = movable.then(|| {
        let greeting = greeting.take().unwrap_or_else(|| Box::new(Greeting::unread(record.client)));
        Again { pool: pool.clone(), member: number, greeting }
    });
    drop(pool);
    drop(greeting);

    let session = session::enter(
        record.listener.clone(),
        record.client,
        backend.clone(),
        policy.clone(),
        client.socket().as_raw_fd(),
        server.socket().as_raw_fd(),
        began,
    );
    let bounds = Bounds { idle, half_close: policy.half_close };
    let begin = connected.instant();
    let prefix = blame::prefix(record.client.ip());
    let owes = backend.shared.speaks_first.owes(policy.first_byte);
    let mut owed =
        (owes == Owes::AGreeting).then(|| Owed::begin(&backend, &policy, &session, movable, prefix, connected));
    let end = relay::relay(
        client,
        &mut server,
        first,
        bounds,
        host,
        &session,
        timer,
        begin,
        &mut carried,
        |notice, carried| {
            let asked = carried.spoke.unwrap_or(begin);
            match notice {
                // A pool with `replay` waits for an answer to everything that it can carry elsewhere.
                Notice::Spoke if owes == Owes::AnAnswer || owes == Owes::Nothing && movable => {
                    let since = clock::of(asked);
                    owed = Some(Owed::begin(&backend, &policy, &session, movable, prefix, since));
                }
                Notice::Spoke => {}
                Notice::Answered => {
                    again = None;
                    // A hello is different each time, so there is nothing to be learned from it.
                    if let Some(kept) =
                        carried.kept.as_ref().filter(|_| policy.replay.is_some_and(|replay| !replay.only_tls))
                    {
                        backend.shared.poison.answered(xxh3_64(&kept.bytes), clock::now());
                    }
                    backend.shared.speaks_first.spoke(carried.spoke.is_none());
                    let took = carried.answered.unwrap_or(asked).saturating_duration_since(asked);
                    of_cell.first_byte.record(took);
                    backend.answered(&policy.health, prefix, took, attempt_began, clock::of(asked + took));
                    // Only now: whoever leaves before the answer is known counts as unanswered.
                    owed = None;
                }
                Notice::Unanswered if asked.elapsed() <= first_byte_time(&backend) => {
                    // A PROXY header is said for the client.
                    let spoke = carried.spoke.is_some() || policy.send_proxy.is_some();
                    backend.unanswered(&policy.health, prefix, spoke, attempt_began, clock::now());
                }
                Notice::Unanswered => {}
            }
        },
    )
    .await;
    drop(owed);
    drop(session);
    let unanswered = carried.answered.is_none();
    if unanswered && carried.spoke.is_some_and(|at| backend.silence.heard_at() > clock::of(at)) {
        backend.shared.speaks_first.was_silent(prefix, backend.others_than(prefix, clock::now()));
    }
    record.cut = carried.cut;
    if carried.cut || !matches!(end, End::ClientClosed | End::BackendClosed | End::Idle | End::HalfClosed) {
        reset(server.socket());
    }
    record.bytes_in = carried.up;
    record.bytes_out = carried.down;
    record.first_byte = carried.answered.map(|at| at.saturating_duration_since(carried.spoke.unwrap_or(begin)));
    let again = policy.replay.and_then(|replay| go_on(again, replay, end, carried, &backend, record));
    (end, again)
}

/// Connects a session to one backend, not to the member `before`: at once, or in the pool's queue.
///
/// # Errors
/// How the session ends without one.
#[allow(clippy::too_many_arguments)] // One call site; a struct would only name them a second time.
async fn connect_to_one(
    client: &Stream,
    greeting: Option<&Greeting>,
    pool: &Arc<Pool>,
    before: Option<usize>,
    host: &Host,
    record: &mut AccessRecord,
    began: Time,
    mut timer: Pin<&mut Sleep>,
) -> Result<Dialled<Stream>, End> {
    let peer = record.client;
    // What the client took for its own beginning is no time of a backend's.
    let dialling = if greeting.is_some() { clock::now() } else { began };
    let pin = match &pool.policy.affinity {
        Affinity::None | Affinity::Header(_) | Affinity::Cookie(_) => None,
        Affinity::ClientIp => Some(pool::pin(peer.ip())),
        Affinity::Sni => greeting.and_then(|greeting| greeting.name.as_deref()).map(pool::pin_name),
    };
    let mut story = Story::default();
    let mut rng = fork_rng();
    let peer_socket = client.socket();
    let under_tls = pool.policy.tls.is_some();
    // Under TLS the header about the client comes before the handshake, and the rest within.
    let header = if under_tls { first_bytes(&pool.policy, greeting, peer_socket, true) } else { (Vec::new(), 0) };
    let network = Kernel { tls: true, header: header.0 };
    let tried: Vec<usize> = before.into_iter().collect();
    let told_of = pool.policy.send_proxy.map(|_| blame::prefix(peer.ip()));
    let waiting = Waiting(client.socket(), told_of);
    // Whoever comes later does not overtake those who wait.
    let mut dialled = Err(DialError::Full);
    if before.is_some() || !pool.shared.queue.waits_before(NORMAL) {
        let order = Order { host, pool, pin, first: None, tried: tried.clone(), begin: dialling };
        dialled = dial::dial(&network, order, &waiting, timer.as_mut(), &mut rng, &mut story).await;
    }
    if matches!(dialled, Err(DialError::Full)) && story.attempts == 0 {
        let want = Want { pin, tried: &tried, ..Want::default() };
        let queue = pool.policy.queue;
        let ask = || dial::choose_first(host, pool, &want, clock::now(), &mut rng).ok();
        let gone = || waiting.gone();
        let turn = match before {
            None => pool.shared.queue.take(NORMAL, queue.length, queue.timeout, gone, ask).await,
            Some(_) => pool.shared.queue.take_some(queue.length, queue.timeout, gone, ask).await,
        };
        if turn.is_some() {
            let order = Order { host, pool, pin, first: turn, tried, begin: clock::now() };
            dialled = Box::pin(dial::dial(&network, order, &waiting, timer.as_mut(), &mut rng, &mut story)).await;
        }
    }
    drop(network);
    record.attempts += story.attempts;
    record.raced |= story.raced;
    record.failures.append(&mut story.failures);
    dialled.map_err(|error| ended(pool, error))
}

/// The end of a client that dialling failed for; counted.
pub fn ended(pool: &Pool, error: DialError) -> End {
    match error {
        DialError::Full => {
            pool.shared.refused_full.add(1);
            End::Full
        }
        DialError::Unreachable => {
            pool.shared.refused_unreachable.add(1);
            End::Unreachable
        }
        DialError::ClientGone => End::ClientGone,
    }
}

/// Whether a session that its backend did not answer may be carried to another one, and what with; `again` is `None` where it
/// has been carried once.
fn go_on(
    again: Option<Again>,
    replay: Replay,
    end: End,
    carried: Carried,
    backend: &Arc<Backend>,
    record: &mut AccessRecord,
) -> Option<Onward> {
    let cause = match end {
        End::BackendSilent => "no answer in time",
        End::BackendReset => "reset",
        End::BackendClosed => "closed without an answer",
        _ => return None,
    };
    let kept = carried.kept?.bytes;
    if replay.only_tls && !sniff::is_only_handshake(&kept) {
        return None;
    }
    let now = clock::now();
    let shared = &backend.shared;
    let ended = end != End::BackendSilent;
    // Its own bytes may have been the reason.
    let fingerprint = xxh3_64(&kept);
    if ended && !shared.poison.may_go_on(fingerprint, backend.id, false, now) {
        return None;
    }
    let at_once = ended && carried.spoke.is_some_and(|spoke| spoke.elapsed() < KILLS_WITHIN);
    let suspect = at_once.then_some(fingerprint);
    let another = |again: &Again| again.pool.has_untried(&[again.member], true, |_| true);
    let Some(mut again) = again.filter(|again| another(again) && (!ended || shared.budget.extra(now))) else {
        if let Some(suspect) = suspect.filter(|_| shared.budget.extra(now)) {
            // It goes nowhere else; but its client may come once more.
            let lost = backend.clone();
            tokio::spawn(async move { has_killed(suspect, &lost).await });
        }
        return None;
    };
    record.failures.push(Failure { backend: backend.name.clone(), cause: cause.into() });
    again.greeting.bytes = kept;
    Some(Box::new((again, suspect)))
}

/// Whether what was lost alone with a backend, a moment after it was sent, has ended that backend: it refuses connections
/// now. Then nothing of this fingerprint is sent to anybody for a while.
pub async fn has_killed(fingerprint: u64, lost: &Backend) -> bool {
    let poison = &lost.shared.poison;
    if !poison.alone(fingerprint, lost.id, clock::now()) {
        return false;
    }
    let round_trip = lost.handshake.learned().map_or(Duration::ZERO, |(_, p99)| p99);
    let refused = match timeout(DEAD_WITHIN.max(round_trip * 2), TcpStream::connect(lost.address)).await {
        Ok(Err(error)) => error.kind() == io::ErrorKind::ConnectionRefused,
        Ok(Ok(stream)) => {
            reset(&stream);
            false
        }
        Err(_) => false,
    };
    let now = clock::now();
    refused && poison.alone(fingerprint, lost.id, now) && poison.convict(fingerprint, now)
}

/// How long this backend may take for its first byte before its closing without one is the client's patience.
fn first_byte_time(backend: &Backend) -> Duration {
    match backend.first_byte.learned() {
        Some((_, p99)) => FIRST_BYTE_FLOOR.max(p99 * FIRST_BYTE_FACTOR),
        None => FIRST_BYTE_COLD,
    }
}

/// Makes the coming close a reset: the peer learns at once, and no TIME_WAIT is left behind.
pub fn reset(stream: &TcpStream) {
    // A socket that is gone already needs no reset.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// The accepted connection while a backend is dialled, and the client's prefix where backends are told of it first.
struct Waiting<'a>(&'a TcpStream, Option<u32>);

impl Client for Waiting<'_> {
    fn gone(&self) -> bool {
        sys::tcp_info(self.0.as_fd()).is_ok_and(|info| info.gone())
    }

    fn told_of(&self) -> Option<u32> {
        self.1
    }
}

/// The kernel's TCP, and TLS above it where the pool has it.
pub struct Kernel {
    /// Whether the pool's TLS is ours to begin.
    pub tls: bool,
    /// What goes before a TLS handshake.
    pub header: Vec<u8>,
}

/// A connection whose handshakes are under way. Dropped before they end, it is closed by a reset.
pub struct Connecting {
    state: State,
    rtt: Duration,
    /// TLS to begin, and what goes before it; boxed, because most have none.
    under: Option<Box<(Arc<Upstream>, Vec<u8>)>>,
}

enum State {
    Tcp(TcpStream),
    Tls(Box<tokio_rustls::Connect<TcpStream>>),
    Ended,
}

impl Network for Kernel {
    type Opening = Connecting;

    fn open(&self, backend: &Backend, policy: &Policy, rng: &mut Rng) -> io::Result<Connecting> {
        let socket = connect(backend.address, source(policy, backend.address, rng))?;
        let tls = policy.tls.as_ref().filter(|_| self.tls);
        Ok(Connecting {
            state: State::Tcp(TcpStream::from_std(socket.into())?),
            rtt: Duration::ZERO,
            under: tls.map(|tls| Box::new((tls.clone(), self.header.clone()))),
        })
    }

    fn shakes_hands(&self, policy: &Policy) -> bool {
        self.tls && policy.tls.is_some()
    }
}

/// A non-blocking socket whose connection to `address` has begun.
///
/// # Errors
/// What the system calls say; "in progress" is none.
pub fn connect(address: SocketAddr, source: Option<SocketAddr>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if let Some(source) = source {
        // The port is chosen at connect(2), when the other end is known: one port serves many destinations.
        sys::bind_address_no_port(socket.as_fd())?;
        socket.bind(&source.into())?;
    }
    match socket.connect(&address.into()) {
        Ok(()) => Ok(socket),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// The next of the pool's source addresses that fits the backend's family.
fn source(policy: &Policy, address: SocketAddr, rng: &mut Rng) -> Option<SocketAddr> {
    if policy.source.is_empty() {
        return None;
    }
    let fitting = policy.source.iter().filter(|ip| ip.is_ipv4() == address.is_ipv4());
    let count = fitting.clone().count();
    fitting.copied().nth(rng.usize(..count.max(1))).map(|ip| SocketAddr::new(ip, 0))
}

/// A source address for a probe.
pub fn any_source(policy: &Policy, address: SocketAddr) -> Option<SocketAddr> {
    source(policy, address, &mut Rng::new())
}

impl Opening for Connecting {
    type Connection = Stream;

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<(Stream, Duration)>> {
        let stream = match &mut self.state {
            State::Tcp(stream) => stream,
            State::Tls(shaking) => {
                let done = ready!(Pin::new(shaking).poll(context));
                self.state = State::Ended;
                return Poll::Ready(done.map(|stream| (Stream::Tls(Box::new(stream.into())), self.rtt)));
            }
            State::Ended => return Poll::Pending,
        };
        ready!(stream.poll_write_ready(context))?;
        let info = sys::tcp_info(stream.as_fd())?;
        // One question instead of two: only a socket that is not connected has an error to tell.
        if !info.connected()
            && let Some(error) = stream.take_error()?
        {
            return Poll::Ready(Err(error));
        }
        if info.unanswered() {
            return Poll::Pending;
        }
        self.rtt = info.rtt;
        let State::Tcp(stream) = std::mem::replace(&mut self.state, State::Ended) else { return Poll::Pending };
        let Some(under) = self.under.take() else { return Poll::Ready(Ok((Stream::Plain(stream), info.rtt))) };
        let (tls, header) = *under;
        // Some hundred bytes into the empty buffer of a new connection.
        if !header.is_empty() && stream.try_write(&header)? != header.len() {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        let shaking = TlsConnector::from(tls.client.clone()).connect(tls.server_name.clone(), stream);
        self.state = State::Tls(Box::new(shaking));
        self.poll(context)
    }

    fn discard(connection: Stream) {
        reset(connection.socket());
    }

    fn answered(&self) -> bool {
        match &self.state {
            State::Tcp(stream) => sys::tcp_info(stream.as_fd()).is_ok_and(|info| !info.unanswered()),
            State::Tls(_) | State::Ended => true,
        }
    }

    fn shaking_hands(&self) -> bool {
        matches!(self.state, State::Tls(_))
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        match &self.state {
            State::Tcp(stream) => reset(stream),
            State::Tls(shaking) => shaking.get_ref().into_iter().for_each(reset),
            State::Ended => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, C, D, E, F: Future>(_: impl Fn(A, B, C, D, E) -> F) -> usize {
        size_of::<F>()
    }

    /// The task of a session, with what the runtime adds, fits into 2 KiB; the allocator's next size is a quarter more.
    #[test]
    fn a_session_is_small() {
        let bytes = size(serve);
        assert!(bytes <= 1_936, "{bytes} bytes: with its header it no longer fits into 2 KiB");
    }
}
