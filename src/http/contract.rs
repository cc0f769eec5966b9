//! What is assumed of the engine, each in one test: a new version of it is first asked these.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora_core::apps::ServerApp;
use pingora_core::connectors::L4Connect;
use pingora_core::protocols::Digest;
use pingora_core::protocols::l4::socket::SocketAddr as PeerAddr;
use pingora_core::protocols::l4::stream::Stream;
use pingora_core::server::configuration::ServerConf;
use pingora_core::upstreams::peer::{HttpPeer, Tracer, Tracing};
use pingora_core::{Error, ErrorType, Result};
use pingora_http::ResponseHeader;
use pingora_proxy::{ProxyHttp, Session, http_proxy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::sys;

/// How a gateway of these tests behaves, and what it saw.
#[derive(Default)]
struct Seen {
    dials: AtomicU32,
    peers: AtomicU32,
    failures: AtomicU32,
    closed: AtomicU32,
    key: AtomicU64,
    /// The first dial fails, and its connection is given at the second.
    aside: bool,
    /// The connection is shut down as soon as it is there, once.
    cut: bool,
    tls: bool,
    reused: Mutex<Vec<bool>>,
    stash: Mutex<Option<TcpStream>>,
    descriptor: Mutex<Option<RawFd>>,
}

struct Gateway {
    backend: std::net::SocketAddr,
    seen: Arc<Seen>,
}

struct Dial(Arc<Seen>);

impl std::fmt::Debug for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dial")
    }
}

#[derive(Clone)]
struct Watch(Arc<Seen>);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

impl Tracing for Watch {
    fn on_connected(&self) {}
    fn on_disconnected(&self) {
        // The descriptor is still this connection's: whoever cuts by descriptor relies on it.
        let descriptor = self.0.descriptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        assert!(descriptor.is_none_or(|descriptor| std::fs::metadata(format!("/proc/self/fd/{descriptor}")).is_ok()));
        self.0.closed.fetch_add(1, Relaxed);
    }
    fn boxed_clone(&self) -> Box<dyn Tracing> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl L4Connect for Dial {
    async fn connect(&self, address: &PeerAddr) -> Result<Stream> {
        let seen = &self.0;
        let dial = seen.dials.fetch_add(1, Relaxed);
        let stash = seen.stash.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = match (stash, address) {
            (Some(stream), _) => stream,
            (None, PeerAddr::Inet(address)) => TcpStream::connect(address).await.expect("the backend listens"),
            _ => panic!("not an internet address"),
        };
        if seen.aside && dial == 0 {
            *seen.stash.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
            return Err(Error::new_up(ErrorType::ConnectError));
        }
        *seen.descriptor.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.as_raw_fd());
        let mut stream = Stream::from(stream);
        stream.tracer = Some(Tracer(Box::new(Watch(seen.clone()))));
        Ok(stream)
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = ();
    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut ()) -> Result<Box<HttpPeer>> {
        self.seen.peers.fetch_add(1, Relaxed);
        let name = if self.seen.tls { "x.example" } else { "" };
        let mut peer = Box::new(HttpPeer::new(self.backend, self.seen.tls, name.to_owned()));
        peer.group_key = self.seen.key.load(Relaxed);
        peer.options.custom_l4 = Some(Arc::new(Dial(self.seen.clone())));
        peer.options.total_connection_timeout = Some(Duration::from_millis(300));
        Ok(peer)
    }

    fn fail_to_connect(&self, _s: &mut Session, _p: &HttpPeer, _c: &mut (), mut error: Box<Error>) -> Box<Error> {
        error.set_retry(self.seen.failures.fetch_add(1, Relaxed) == 0 && self.seen.aside);
        error
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        reused: bool,
        _peer: &HttpPeer,
        descriptor: RawFd,
        _digest: Option<&Digest>,
        _ctx: &mut (),
    ) -> Result<()> {
        let mut all = self.seen.reused.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(reused);
        if self.seen.cut && all.len() == 1 {
            sys::shut_down(descriptor);
        }
        Ok(())
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        _session: &mut Session,
        mut error: Box<Error>,
        _ctx: &mut (),
        _reused: bool,
    ) -> Box<Error> {
        error.set_retry(self.seen.failures.fetch_add(1, Relaxed) == 0);
        error
    }

    async fn upstream_response_filter(&self, _s: &mut Session, head: &mut ResponseHeader, _c: &mut ()) -> Result<()> {
        head.insert_header("x-seen", "1")
    }
}

/// A backend that answers every request, or, with `silent`, none.
async fn backend(silent: bool) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(read) = stream.read(&mut buffer).await {
                    if read == 0
                        || !silent && stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.is_err()
                    {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A client whose connection the engine serves, on this thread's own runtime.
async fn client(seen: &Arc<Seen>, silent: bool) -> TcpStream {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let conf = ServerConf { threads: 1, ca_file: Some("/dev/null".to_owned()), ..ServerConf::default() };
    let gateway = Gateway { backend: backend(silent).await, seen: seen.clone() };
    let engine = Arc::new(http_proxy(&Arc::new(conf), gateway));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("a client");
        let (_open, stop) = watch::channel(false);
        engine.process_new(Box::new(Stream::from(stream)), &stop).await;
    });
    TcpStream::connect(address).await.expect("the engine listens")
}

async fn ask(client: &mut TcpStream) -> String {
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("a client may write");
    let mut answer = String::new();
    let mut part = [0; 4096];
    while !answer.ends_with("\r\n\r\nok") {
        let read = client.read(&mut part).await.expect("an answer");
        if read == 0 {
            break;
        }
        answer.push_str(&String::from_utf8_lossy(&part[..read]));
    }
    answer
}

#[tokio::test]
async fn the_dialler_is_asked_only_where_no_idle_connection_is_there_and_the_key_parts_them() {
    let seen = Arc::new(Seen::default());
    let mut client = client(&seen, false).await;
    for _ in 0..5 {
        assert!(ask(&mut client).await.starts_with("HTTP/1.1 200"));
    }
    assert_eq!(seen.dials.load(Relaxed), 1);
    assert_eq!(*seen.reused.lock().unwrap_or_else(PoisonError::into_inner), [false, true, true, true, true]);
    seen.key.store(1, Relaxed);
    assert!(ask(&mut client).await.starts_with("HTTP/1.1 200"));
    assert_eq!(seen.dials.load(Relaxed), 2, "another key never gets the old connection");
}

#[tokio::test]
async fn a_connection_laid_aside_is_given_in_the_pass_after_the_failed_one() {
    let seen = Arc::new(Seen { aside: true, ..Seen::default() });
    let mut client = client(&seen, false).await;
    assert!(ask(&mut client).await.starts_with("HTTP/1.1 200"));
    assert_eq!((seen.peers.load(Relaxed), seen.failures.load(Relaxed)), (2, 1));
    assert!(ask(&mut client).await.starts_with("HTTP/1.1 200"));
    assert_eq!(seen.dials.load(Relaxed), 2, "and is kept like any other");
}

#[tokio::test]
async fn a_connection_that_is_shut_down_fails_its_pass_and_the_request_goes_on_in_the_next() {
    let seen = Arc::new(Seen { cut: true, ..Seen::default() });
    let mut client = client(&seen, false).await;
    assert!(ask(&mut client).await.starts_with("HTTP/1.1 200"));
    assert_eq!((seen.peers.load(Relaxed), seen.failures.load(Relaxed), seen.dials.load(Relaxed)), (2, 1, 2));
    assert_eq!(seen.closed.load(Relaxed), 1, "its tracer was told before its descriptor was closed");
}

#[tokio::test]
async fn the_time_to_connect_bounds_a_silent_handshake_in_tls_too() {
    let seen = Arc::new(Seen { tls: true, ..Seen::default() });
    let mut client = client(&seen, true).await;
    let begin = Instant::now();
    let answer = ask(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert_eq!(seen.closed.load(Relaxed), 1, "the tracer of a stream under TLS is told as well");
    assert!(seen.reused.lock().unwrap_or_else(PoisonError::into_inner).is_empty(), "it never counted as connected");
}
