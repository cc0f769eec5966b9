//! Listening sockets and the accept loop.
//!
//! Control binds an address once, with one `SO_REUSEPORT` socket for each worker, and the sockets live as long as
//! the address stands in the configuration. Each worker runs [`accept`] on its own. The loop never ends but by
//! [`Stop`], and never spins: errors are classified, those of our own back off and are counted.

use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::clock;
use crate::host::Host;
use crate::limits::{ClientPermit, Permit};
use crate::table::{End, Face, Listener, Table};
use crate::{http, tcp};

/// Connections that the kernel keeps for us while we do not accept.
const BACKLOG: i32 = 4_096;
/// Keepalive towards clients.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10)).with_retries(3);
/// Bytes that the kernel takes for a client beyond what is on the way to it. Left to itself it takes megabytes for each that
/// does not read, and a few hundred of those bring all TCP of the machine into memory pressure.
const UNSENT: u32 = 128 * 1024;
/// First and longest pause after an accept that failed by our own fault.
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_LONGEST: Duration = Duration::from_secs(1);
/// At a cap we look for a free place this often, besides being told of it.
const CAP_LOOK: Duration = Duration::from_millis(20);
/// A socket that is to be closed is empty when nothing came for this long.
const QUIET: Duration = Duration::from_millis(50);
/// But it is closed after this long at the latest.
pub const FAREWELL: Duration = Duration::from_secs(2);

/// Binds `address` once for each worker. `shared` says that another of our own sockets covers it.
///
/// # Errors
/// What bind(2) and listen(2) say; "address in use" also when another process of ours has it.
pub fn bind(address: SocketAddr, workers: usize, shared: bool) -> io::Result<Vec<StdListener>> {
    // SO_REUSEPORT would let a second instance in beside the first and take half of its connections. A bind
    // without it fails when anybody has the address, so it is tried first.
    let address = if shared { address } else { try_alone(address)? };
    (0..workers)
        .map(|_| {
            let socket =
                Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
            options(&socket, address)?;
            socket.set_reuse_port(true)?;
            socket.bind(&address.into())?;
            // Accepted sockets inherit these, which saves the calls on each of them.
            socket.set_tcp_nodelay(true)?;
            socket.set_tcp_keepalive(&KEEPALIVE)?;
            socket.set_tcp_notsent_lowat(UNSENT)?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        })
        .collect()
}

/// Binds `address`, which must be one of this machine's, once. `shared` says that another of our own sockets has its port.
///
/// # Errors
/// What bind(2) and listen(2) say.
pub fn bind_one(address: SocketAddr, shared: bool) -> io::Result<StdListener> {
    let open = |address: SocketAddr, shared: bool| {
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(shared)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok::<StdListener, io::Error>(socket.into())
    };
    // As in `bind`: first as nobody may who shares it.
    let address = if shared { address } else { open(address, false)?.local_addr()? };
    open(address, true)
}

/// Binds alone for a moment. Port 0 stands for any free one, and becomes the one that was found.
fn try_alone(address: SocketAddr) -> io::Result<SocketAddr> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
    options(&socket, address)?;
    socket.bind(&address.into())?;
    socket.listen(1)?;
    Ok(socket.local_addr()?.as_socket().unwrap_or(address))
}

fn options(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)
    } else {
        socket.set_freebind_v4(true)
    }
}

/// Whether `address` can be served from here now. A standby listens on an address that another machine still has.
pub fn is_local(address: SocketAddr) -> bool {
    address.ip().is_unspecified() || {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM.cloexec(), Some(Protocol::UDP));
        socket.is_ok_and(|socket| socket.bind(&SocketAddr::new(address.ip(), 0).into()).is_ok())
    }
}

/// Tells the accept loops of one address to end.
pub type Stop = watch::Receiver<bool>;

/// Accepts on one socket until `stop` turns true.
///
/// `bind` is the address as configured, by which each table knows its listener.
pub async fn accept(socket: TcpListener, bind: SocketAddr, host: Arc<Host>, mut stop: Stop) {
    let mut cache = arc_swap::Cache::new(host.live.clone());
    let Some(mut listener) = cache.load().listeners.get(&bind).cloned() else {
        // Bound and given up again before this worker came to it.
        while let Some((client, _)) = accept_now(&socket).await {
            tcp::reset(&client);
        }
        return;
    };
    let mut generation = cache.load().generation;
    let mut pause = PAUSE_FIRST;
    let mut at_cap_since: Option<Instant> = None;
    loop {
        let room = host.connections.used() < host.max_connections.load(Relaxed)
            && listener.shared.connections.used() < listener.max_connections;
        if !room && !*stop.borrow() {
            let process_is_full = host.connections.used() >= host.max_connections.load(Relaxed);
            let of = (!process_is_full).then_some(Arc::as_ptr(&listener.shared) as usize);
            http::stream::make_room(of, clock::now());
            let since = *at_cap_since.get_or_insert_with(|| {
                host.accept_paused[1].add(1);
                Instant::now()
            });
            if wait_at_cap(&socket, &listener, since + listener.wait, &host, &mut stop).await {
                // Those who came since then have their own time to wait.
                at_cap_since = Some(Instant::now());
            }
            refresh(&mut listener, &mut generation, cache.load(), bind);
            continue;
        }
        let accepted = {
            let mut stopped = pin!(stopped(&mut stop));
            poll_fn(|context| match socket.poll_accept(context) {
                Poll::Ready(accepted) => Poll::Ready(Some(accepted)),
                Poll::Pending => {
                    // Nobody waits any more; a place that was free for a moment would not prove that.
                    at_cap_since = None;
                    stopped.as_mut().poll(context).map(|()| None)
                }
            })
            .await
        };
        match accepted {
            None => break,
            Some(Ok((client, peer))) => {
                pause = PAUSE_FIRST;
                refresh(&mut listener, &mut generation, cache.load(), bind);
                admit(client, peer, bind, &listener, &host, &stop);
            }
            Some(Err(error)) if is_peers(&error) => {}
            Some(Err(error)) => {
                if !host.local_errors.count(&error) {
                    tracing::warn!(listener = &*listener.name, %error, "accept failed; trying again");
                }
                host.accept_paused[0].add(1);
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_LONGEST);
            }
        }
    }
    farewell(&socket, bind, &listener, &host, &stop).await;
}

/// Ends when `stop` has turned true, or its sender is gone.
async fn stopped(stop: &mut Stop) {
    let _ = stop.wait_for(|stop| *stop).await.is_ok();
}

/// Takes the listener from a new table; a listener that is gone serves its last connections as it stood.
fn refresh(listener: &mut Arc<Listener>, generation: &mut u64, table: &Table, bind: SocketAddr) {
    if *generation != table.generation {
        *generation = table.generation;
        if let Some(new) = table.listeners.get(&bind) {
            *listener = new.clone();
        }
    }
}

/// What a connection holds for as long as it lives.
#[derive(Debug)]
pub struct Admission {
    /// One of the process's connections, and one of the listener's.
    pub permit: Permit,
    /// One of its network's, where that is bounded and the client known from the start.
    pub of_client: Option<ClientPermit>,
}

/// Gives a connection its permits and its task.
fn admit(
    client: TcpStream,
    peer: SocketAddr,
    bind: SocketAddr,
    listener: &Arc<Listener>,
    host: &Arc<Host>,
    stop: &Stop,
) {
    // Of a peer that speaks for its client the client is judged, when it is known.
    if !listener.expects_header(peer.ip()) && !listener.admits(peer.ip()) {
        listener.shared.ends[End::Denied as usize].add(1);
        tcp::reset(&client);
        return;
    }
    let of_client =
        if listener.expects_header(peer.ip()) { Some(None) } else { listener.count_client(peer.ip(), clock::now()) };
    let Some(of_client) = of_client else {
        listener.shared.ends[End::Limited as usize].add(1);
        tcp::reset(&client);
        return;
    };
    match permits(listener, host) {
        Some(permit) => {
            let permits = Admission { permit, of_client };
            start(client, peer, bind, listener.clone(), host.clone(), permits, stop.clone());
        }
        None => {
            // Another worker took the last place since we looked.
            let (listener, host, stop) = (listener.clone(), host.clone(), stop.clone());
            tokio::spawn(async move {
                let deadline = Instant::now() + listener.wait;
                loop {
                    let freed = pin!(host.connections.freed());
                    let freed_here = pin!(listener.shared.connections.freed());
                    if let Some(permit) = permits(&listener, &host) {
                        let permits = Admission { permit, of_client };
                        return start(client, peer, bind, listener.clone(), host.clone(), permits, stop);
                    }
                    tokio::select! {
                        () = freed => {}
                        () = freed_here => {}
                        // A place freed between our try and our wait is found here.
                        () = sleep(CAP_LOOK) => {}
                        () = sleep_until(deadline) => {
                            listener.shared.ends[End::Cap as usize].add(1);
                            return tcp::reset(&client);
                        }
                    }
                }
            });
        }
    }
}

fn permits(listener: &Listener, host: &Host) -> Option<Permit> {
    let of_listener = listener.shared.connections.take(listener.max_connections)?;
    let of_process = host.connections.take(host.max_connections.load(Relaxed))?;
    Some(of_process.and(Some(of_listener)))
}

fn start(
    client: TcpStream,
    peer: SocketAddr,
    bind: SocketAddr,
    listener: Arc<Listener>,
    host: Arc<Host>,
    permits: Admission,
    stop: Stop,
) {
    if matches!(listener.face, Face::Http(_)) {
        tokio::spawn(async move {
            let _counted = CountPanic(&host);
            http::serve::serve(client, peer, bind, listener, host.clone(), permits, stop).await;
        });
    } else {
        tokio::spawn(async move {
            let _counted = CountPanic(&host);
            tcp::serve(client, peer, listener, host.clone(), permits).await;
        });
    }
}

/// A panic in a connection's task costs that connection; it is counted because it is a bug of ours.
struct CountPanic<'a>(&'a Host);

impl Drop for CountPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panics.add(1);
        }
    }
}

/// Waits for a place. Connections wait in the kernel meanwhile, each until `deadline` at most: what is queued by
/// then is accepted and reset, so that a client learns where it stands. Says whether that has been done.
async fn wait_at_cap(
    socket: &TcpListener,
    listener: &Listener,
    deadline: Instant,
    host: &Host,
    stop: &mut Stop,
) -> bool {
    let _at_cap = AtCap::new(listener);
    tokio::select! {
        () = host.connections.freed() => false,
        () = listener.shared.connections.freed() => false,
        () = stopped(stop) => false,
        () = sleep_until(deadline) => {
            while let Some((client, _)) = accept_now(socket).await {
                listener.shared.ends[End::Cap as usize].add(1);
                tcp::reset(&client);
            }
            true
        }
        // A place freed between our look and our wait is found here.
        () = sleep(CAP_LOOK) => false,
    }
}

/// Marks a listener as being at its cap for as long as it lives.
struct AtCap<'a>(&'a Listener);

impl<'a> AtCap<'a> {
    fn new(listener: &'a Listener) -> AtCap<'a> {
        listener.shared.at_cap.fetch_add(1, Relaxed);
        AtCap(listener)
    }
}

impl Drop for AtCap<'_> {
    fn drop(&mut self) {
        self.0.shared.at_cap.fetch_sub(1, Relaxed);
    }
}

/// A connection that is queued now; `None` when there is none.
async fn accept_now(socket: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    poll_fn(|context| match socket.poll_accept(context) {
        Poll::Ready(Ok(accepted)) => Poll::Ready(Some(accepted)),
        Poll::Ready(Err(_)) | Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Serves what is queued on a socket that is about to be closed: closing it would reset those clients.
async fn farewell(socket: &TcpListener, bind: SocketAddr, listener: &Arc<Listener>, host: &Arc<Host>, stop: &Stop) {
    let deadline = Instant::now() + FAREWELL;
    let mut quiet = 0;
    while quiet < 2 && Instant::now() < deadline {
        quiet += 1;
        while let Some((client, peer)) = accept_now(socket).await {
            quiet = 0;
            admit(client, peer, bind, listener, host, stop);
        }
        if quiet < 2 {
            sleep(QUIET).await;
        }
    }
}

/// Errors of accept(2) that belong to the connection and not to us.
fn is_peers(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
                | libc::ENETDOWN
                | libc::EINTR
                | libc::ECONNRESET
        )
    )
}
