//! One scripted bad backend: a small HTTP server that can misbehave in every way the tests need.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::netns;

/// What `/big` is.
static BIG: [u8; 4 << 20] = [b'x'; 4 << 20];

/// What it does with a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Answers each request with its name.
    Serve,
    /// Does not listen.
    Refuse,
    /// The same, and ends by itself after a second.
    Dead,
    /// Accepts, then resets at once.
    Reset,
    /// Accepts, reads a request, then resets.
    ResetLate,
    /// Accepts, then says nothing.
    Silent,
    /// Answers 503 to so many of a hundred requests for /healthz, and serves the rest.
    Unhealthy(u8),
    /// Sends back what it gets.
    Echo,
    /// Closes when the first bytes are no HTTP request.
    Strict,
    /// Sends bytes without end.
    Pour,
    /// Reads requests, on old connections too, and answers none but those for /healthz.
    Mute,
    /// Says the heads of so many of a hundred answers, and nothing of their bodies.
    Stop(u8),
    /// Ends so many of a hundred answers within their bodies.
    Cut(u8),
    /// Never answers so many of a hundred requests.
    Hang(u8),
    /// Answers 503 to so many of a hundred requests.
    Fail(u8),
    /// Answers 500 to so many of a hundred POST and of a hundred GET requests.
    FailVerbs(u8, u8),
    /// Answers after so many milliseconds.
    Slow(u16),
    /// Holds requests until it is told something else, then works on them as `Work` does.
    Stall(u8, u16),
    /// So many requests at once take so many milliseconds each; the others wait for their turn.
    Work(u8, u16),
    /// Serves, and says of its data which version they are, and a digest that is its answer's or not.
    Data(u32, bool),
}

/// A port that refuses connections, and that nobody else on this machine is given while this lives. Whoever names it may listen
/// there. (An address that was merely free a moment ago may be another test's by now.)
pub struct Port {
    pub address: SocketAddr,
    _socket: socket2::Socket,
}

impl Port {
    /// A free one of loopback.
    pub fn reserve() -> Port {
        Port::at("127.0.0.1:0".parse().unwrap())
    }

    fn at(address: SocketAddr) -> Port {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None).unwrap();
        // Of two bound sockets that both say so, one may listen. The kernel gives a port of its own choice to neither.
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address.into()).expect("the address is free");
        Port { address: socket.local_addr().unwrap().as_socket().unwrap(), _socket: socket }
    }
}

/// A running one; stopped when dropped.
pub struct Backend {
    pub address: SocketAddr,
    state: Arc<Mutex<Mode>>,
    applied: Arc<Mutex<Mode>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Of the POST requests that it executed, what their `X-Id` said.
    pub posts: Arc<Mutex<Vec<String>>>,
    /// How many requests it has received, probes left aside.
    pub received: Arc<AtomicUsize>,
    /// What the `X-Id` of those said that stay.
    pub stays: Arc<Mutex<Vec<String>>>,
    /// When a request for `/poison` ended it.
    pub deaths: Arc<Mutex<Vec<Instant>>>,
    died: Arc<tokio::sync::Notify>,
}

impl Backend {
    /// One that answers with `name`, on loopback.
    pub fn start(name: &str) -> Backend {
        Backend::start_in(None, "127.0.0.1:0".parse().unwrap(), name)
    }

    /// One in a namespace, or in this one.
    pub fn start_in(namespace: Option<String>, address: SocketAddr, name: &str) -> Backend {
        let state = Arc::new(Mutex::new(Mode::Serve));
        let stop = Arc::new(AtomicBool::new(false));
        let applied = Arc::new(Mutex::new(Mode::Serve));
        let (told, tell) = std::sync::mpsc::channel();
        let (posts, stays, received) = (Arc::default(), Arc::default(), Arc::default());
        let (deaths, died) = (Arc::default(), Arc::default());
        let thread = {
            let (state, stop, applied, name) = (state.clone(), stop.clone(), applied.clone(), name.to_owned());
            let records = Records {
                posts: Arc::clone(&posts),
                stays: Arc::clone(&stays),
                deaths: Arc::clone(&deaths),
                received: Arc::clone(&received),
                died: Arc::clone(&died),
            };
            std::thread::spawn(move || {
                if let Some(namespace) = namespace {
                    netns::enter(&namespace);
                }
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(serve(address, name, state, stop, applied, told, records));
            })
        };
        let address = tell.recv().expect("the backend binds");
        Backend { address, state, applied, stop, thread: Some(thread), posts, stays, deaths, received, died }
    }

    /// Resets every connection, and does not listen until it is told something else.
    pub fn crash(&self) {
        self.set(Mode::Refuse);
        self.died.notify_waiters();
    }

    /// Changes what it does with new connections, and waits until it does.
    pub fn set(&self, mode: Mode) {
        *self.state.lock().unwrap() = mode;
        super::eventually("the backend has changed", Duration::from_secs(5), || {
            (*self.applied.lock().unwrap() == mode).then_some(())
        });
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What a backend remembers.
#[derive(Clone)]
struct Records {
    posts: Arc<Mutex<Vec<String>>>,
    stays: Arc<Mutex<Vec<String>>>,
    deaths: Arc<Mutex<Vec<Instant>>>,
    received: Arc<AtomicUsize>,
    died: Arc<tokio::sync::Notify>,
}

async fn serve(
    address: SocketAddr,
    name: String,
    state: Arc<Mutex<Mode>>,
    stop: Arc<AtomicBool>,
    applied: Arc<Mutex<Mode>>,
    told: std::sync::mpsc::Sender<SocketAddr>,
    records: Records,
) {
    let bind = |address: SocketAddr| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        // Five hundred large answers must not be copied into the kernel whole, which would stop a backend for a second.
        socket2::SockRef::from(&socket).set_tcp_notsent_lowat(64 << 10).unwrap();
        socket.bind(address).and_then(|()| socket.listen(4096)).expect("the address is free")
    };
    let port = Port::at(address);
    let address = port.address;
    let mut listener = Some(bind(address));
    told.send(address).unwrap();
    let turns = Arc::new(Turns::default());
    let mut died: Option<Instant> = None;
    let mut tick = tokio::time::interval(Duration::from_millis(2));
    while !stop.load(Relaxed) {
        let mode = *state.lock().unwrap();
        if mode != Mode::Dead {
            died = None;
        } else if died.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(1) {
            *state.lock().unwrap() = Mode::Serve;
            continue;
        }
        match (mode, &listener) {
            (Mode::Refuse | Mode::Dead, Some(_)) => listener = None,
            (Mode::Refuse | Mode::Dead, None) => {}
            (_, None) => listener = Some(bind(address)),
            (_, Some(_)) => {}
        }
        *applied.lock().unwrap() = mode;
        let Some(open) = &listener else {
            tick.tick().await;
            continue;
        };
        tokio::select! {
            accepted_now = open.accept() => {
                let Ok((stream, _)) = accepted_now else { continue };
                let mode = *state.lock().unwrap();
                let name = name.clone();
                if mode == Mode::Reset {
                    let _ = stream.set_zero_linger();
                } else {
                    tokio::spawn(connection(stream, mode, name, state.clone(), records.clone(), turns.clone()));
                }
            }
            _ = tick.tick() => {}
            () = records.died.notified() => {}
        }
    }
}

/// Turns of requests that can be worked on at once.
#[derive(Default)]
struct Turns {
    used: Arc<Mutex<u8>>,
    freed: Arc<tokio::sync::Notify>,
}

struct Turn<'a>(&'a Turns);

impl Turns {
    async fn take(&self, most: u8) -> Turn<'_> {
        loop {
            {
                let mut used = self.used.lock().unwrap();
                if *used < most {
                    *used += 1;
                    return Turn(self);
                }
            }
            self.freed.notified().await;
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.used.lock().unwrap() -= 1;
        self.0.freed.notify_one();
    }
}

async fn connection(
    mut stream: tokio::net::TcpStream,
    mode: Mode,
    name: String,
    state: Arc<Mutex<Mode>>,
    records: Records,
    turns: Arc<Turns>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut request = Vec::new();
    let mut buffer = [0u8; 16 << 10];
    match mode {
        Mode::Silent => {
            // Reads, so that its window stays open, and never answers.
            while matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {}
            // And keeps its own half open for as long as it lives.
            std::future::pending::<()>().await;
        }
        Mode::Echo => {
            while let Ok(n) = stream.read(&mut buffer).await {
                if n == 0 || stream.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
            let _ = stream.shutdown().await;
        }
        Mode::Pour => while stream.write_all(&buffer).await.is_ok() {},
        _ => {
            loop {
                let n = tokio::select! {
                    read = stream.read(&mut buffer) => read.unwrap_or(0),
                    () = records.died.notified() => {
                        let _ = stream.set_zero_linger();
                        return;
                    }
                };
                if n == 0 {
                    return;
                }
                request.extend_from_slice(&buffer[..n]);
                if mode == Mode::ResetLate {
                    let _ = stream.set_zero_linger();
                    return;
                }
                if mode == Mode::Strict && !request.starts_with(b"G") {
                    return;
                }
                while let Some(end) = request.windows(4).position(|w| w == b"\r\n\r\n") {
                    let head = String::from_utf8_lossy(&request[..end]).into_owned();
                    request.drain(..end + 4);
                    // What it does now, and not what it did when the connection began.
                    let now = *state.lock().unwrap();
                    let healthz = head.starts_with("GET /healthz");
                    records.received.fetch_add(usize::from(!healthz), Relaxed);
                    let lower = head.to_ascii_lowercase();
                    let id = lower.lines().find_map(|line| line.strip_prefix("x-id: ")).map(str::to_owned);
                    if ["GET /events", "POST /upload", "GET /socket"].iter().any(|stays| head.starts_with(stays)) {
                        records.stays.lock().unwrap().extend(id);
                        return stay(stream, &lower, request, &name).await;
                    }
                    if head.starts_with("POST ") {
                        records.posts.lock().unwrap().extend(id);
                    }
                    if head.starts_with("GET /poison") || head.starts_with("POST /poison") {
                        records.deaths.lock().unwrap().push(Instant::now());
                        *state.lock().unwrap() = Mode::Dead;
                        records.died.notify_waiters();
                        // A process that ends closes its listener before the world hears of it.
                        tokio::time::sleep(Duration::from_millis(3)).await;
                        let _ = stream.set_zero_linger();
                        return;
                    }
                    let one_of = |percent: u8| !healthz && fastrand::u8(..100) < percent;
                    let failing = match now {
                        Mode::Fail(percent) => one_of(percent),
                        Mode::FailVerbs(post, _) if head.starts_with("POST ") => one_of(post),
                        Mode::FailVerbs(_, get) => one_of(get),
                        Mode::Stop(percent) | Mode::Cut(percent) | Mode::Hang(percent) => one_of(percent),
                        Mode::Unhealthy(percent) => healthz && fastrand::u8(..100) < percent,
                        _ => false,
                    };
                    match now {
                        Mode::Reset | Mode::Refuse | Mode::Dead => {
                            let _ = stream.set_zero_linger();
                            return;
                        }
                        Mode::Mute if !healthz => std::future::pending::<()>().await,
                        Mode::Hang(_) if failing => std::future::pending::<()>().await,
                        Mode::Work(workers, ms) | Mode::Stall(workers, ms) => {
                            while matches!(*state.lock().unwrap(), Mode::Stall(..)) {
                                tokio::time::sleep(Duration::from_millis(5)).await;
                            }
                            let _turn = turns.take(workers).await;
                            tokio::time::sleep(Duration::from_millis(ms.into())).await;
                        }
                        Mode::Slow(ms) if !healthz => tokio::time::sleep(Duration::from_millis(ms.into())).await,
                        _ => {}
                    }
                    if head.starts_with("GET /slow") {
                        tokio::time::sleep(Duration::from_secs(3)).await;
                    }
                    let halves = failing && matches!(now, Mode::Stop(_) | Mode::Cut(_));
                    let status = match (failing, now) {
                        (_, Mode::Stop(_) | Mode::Cut(_)) => "200 OK",
                        (true, Mode::FailVerbs(..)) => "500 Sick",
                        (true, _) => "503 Sick",
                        _ => "200 OK",
                    };
                    let body: &[u8] = if head.starts_with("GET /big") { &BIG } else { name.as_bytes() };
                    let close = head.contains("Connection: close");
                    let connection = if close { "close" } else { "keep-alive" };
                    let about = match now {
                        Mode::Data(version, right) => {
                            let of = digest::digest(&digest::SHA256, if right { body } else { b"something else" });
                            let digest = BASE64_STANDARD.encode(of);
                            format!("X-Data-Version: {version}\r\nContent-Digest: sha-256=:{digest}:\r\n")
                        }
                        _ => "X-Data-Version: 1\r\n".to_owned(),
                    };
                    let answer = format!(
                        "HTTP/1.1 {status}\r\n{about}Content-Length: {}\r\nConnection: {connection}\r\n\r\n",
                        body.len() + usize::from(halves)
                    );
                    if halves {
                        // Of a body of one byte more half is said, or nothing.
                        let said = if now == Mode::Stop(100) { b"" } else { body };
                        let _ = stream.write_all(&[answer.as_bytes(), said].concat()).await;
                        match now {
                            Mode::Cut(_) => return,
                            _ => std::future::pending::<()>().await,
                        }
                    }
                    let whole = [answer.as_bytes(), if body.len() < 4096 { body } else { b"" }].concat();
                    let rest = if body.len() < 4096 { b"" } else { body };
                    if stream.write_all(&whole).await.is_err() || stream.write_all(rest).await.is_err() || close {
                        return;
                    }
                }
            }
        }
    }
}

/// Serves a request that takes long, whatever it does with others, and then no more on this connection.
async fn stay(mut stream: tokio::net::TcpStream, head: &str, mut body: Vec<u8>, name: &str) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = [0u8; 1024];
    if head.starts_with("get /events") {
        let begin = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        let event = "8\r\ndata: x\n\r\n";
        let mut said = stream.write_all([begin, event].concat().as_bytes()).await;
        while said.is_ok() {
            tokio::time::sleep(super::long::EVENT_EVERY).await;
            said = stream.write_all(event.as_bytes()).await;
        }
    } else if head.starts_with("get /socket") {
        let begin = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        let mut said = stream.write_all(begin.as_bytes()).await;
        while said.is_ok() {
            match stream.read(&mut buffer).await {
                Ok(read @ 1..) => said = stream.write_all(&buffer[..read]).await,
                _ => return,
            }
        }
    } else {
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        while body.len() < length.unwrap_or_default() {
            match stream.read(&mut buffer).await {
                Ok(read @ 1..) => body.extend_from_slice(&buffer[..read]),
                _ => return,
            }
        }
        let length = name.len();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{name}");
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

/// One request on a connection of its own; the body of the answer.
pub fn get(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).ok_or_else(|| std::io::Error::other("no answer"))
}

/// Reads until the end, within five seconds.
pub fn read_all(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    Ok(all)
}

/// A connection that may be refused. The reset may come before the handshake is seen to end; every use of the stream fails then.
pub fn may_be_refused(address: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None).unwrap();
    may_be_refused_by(&socket, address);
    socket.into()
}

/// The same from a socket of the caller's.
pub fn may_be_refused_by(socket: &socket2::Socket, address: SocketAddr) {
    if let Err(error) = socket.connect(&address.into()) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{address}: {error}");
    }
}

/// Finishes the sending half.
pub fn finish(stream: &TcpStream) {
    stream.shutdown(Shutdown::Write).unwrap();
}
