//! An accepted connection of an `http` listener, from acceptance to close.

use std::cell::OnceCell;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use pingora_core::apps::{HttpPersistentSettings, HttpServerApp, HttpServerOptions, ServerApp};
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::default_h2_options;
use pingora_core::server::configuration::ServerConf;
use pingora_proxy::{HttpProxy, http_proxy};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::stream::{Edge, Link, Patience, Place};
use super::{Gateway, PASSES};
use crate::clock;
use crate::hello::Greeting;
use crate::host::Host;
use crate::listen::Admission;
use crate::listen::Stop;
use crate::log::{AccessRecord, HttpRecord};
use crate::table::{End, Face, Listener, ListenerShared};
use crate::tcp;
use crate::tls::Stream;

/// What a client says first that speaks HTTP/2 without being asked (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What a client of HTTP/2 may send of one body, and of all, before its backends have taken it: an upload that a backend does not read
/// stops no other.
const H2_STREAM: u32 = 64 * 1024;
const H2_CONNECTION: u32 = 16 * H2_STREAM;
/// How long a connection that was told to go may take for its last exchanges, at most.
const GOING: Duration = Duration::from_secs(3_600);
/// How long an idle connection still takes a request after that.
const GRACE: Duration = Duration::from_millis(300);

thread_local! {
    static ENGINE: OnceCell<Arc<HttpProxy<Gateway>>> = const { OnceCell::new() };
}

/// What is known of a connection for as long as it lives.
#[derive(Debug)]
pub struct Connection {
    /// What the stream and the engine's callbacks tell each other.
    pub link: Arc<Link>,
    /// Who connected, or on whose behalf.
    pub client: SocketAddr,
    /// The address that the client meant.
    pub destination: Option<SocketAddr>,
    /// What else a PROXY header carried.
    pub tlvs: Vec<u8>,
    /// How it came by TLS, if it did.
    pub tls: Option<Secured>,
    /// The listener's name.
    pub name: Arc<str>,
    /// What survives the listener's table.
    pub shared: Arc<ListenerShared>,
    bind: SocketAddr,
    /// The listener, and the generation of the table it was taken from.
    seen: Mutex<(u64, Option<Arc<Listener>>)>,
}

/// A client's TLS.
#[derive(Debug)]
pub struct Secured {
    /// Subject of the client's certificate, where one was asked for and came.
    pub subject: Option<String>,
}

impl Connection {
    /// The listener as the live table has it; one that is gone serves its last requests as it stood.
    pub fn listener(&self, host: &Host) -> Option<Arc<Listener>> {
        let table = host.live.load();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.0 != table.generation || seen.1.is_none() {
            seen.0 = table.generation;
            if let Some(listener) = table.listeners.get(&self.bind) {
                seen.1 = Some(listener.clone());
            }
        }
        seen.1.clone()
    }

    /// An answer that may last for ever has begun: it must not hold a whole table.
    pub fn forget_listener(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).1 = None;
    }

    /// The client's address, and the one it meant, for a PROXY header.
    pub fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        self.destination.map(|destination| (self.client, destination))
    }

    /// The header that tells a backend of the client's certificate, and what it says; `None` where none is asked for.
    pub fn subject(&self) -> Option<(HeaderName, Option<HeaderValue>)> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let name = seen.1.as_ref()?.tls.as_ref()?.subject_header.clone()?;
        let subject = self.tls.as_ref().and_then(|tls| tls.subject.as_ref());
        Some((name, subject.and_then(|subject| HeaderValue::from_str(subject).ok())))
    }
}

/// The engine of this worker; made with its first connection.
fn engine(host: &Arc<Host>) -> Arc<HttpProxy<Gateway>> {
    ENGINE.with(|engine| {
        let make = || {
            // The engine's own connector takes whatever is the default, and would otherwise choose another.
            let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
            let conf = ServerConf {
                threads: 1,
                max_retries: PASSES,
                upstream_keepalive_pool_size: host.idle_kept(),
                // Each pool brings its own authorities. The engine would panic over a system that has none, so it reads none.
                ca_file: Some("/dev/null".to_owned()),
                ..ServerConf::default()
            };
            let mut engine = http_proxy(&Arc::new(conf), Gateway::new(host.clone()));
            let mut h2 = default_h2_options();
            h2.initial_window_size(H2_STREAM).initial_connection_window_size(H2_CONNECTION);
            engine.h2_options = Some(h2);
            // CONNECT is refused by `direct`, with our page and a line in the log; the engine would do it by itself.
            let mut options = HttpServerOptions::default();
            options.allow_connect_method_proxying = true;
            engine.server_options = Some(options);
            Arc::new(engine)
        };
        engine.get_or_init(make).clone()
    })
}

/// Serves one accepted connection to its end.
pub async fn serve(
    client: TcpStream,
    peer: SocketAddr,
    bind: SocketAddr,
    listener: Arc<Listener>,
    host: Arc<Host>,
    permits: Admission,
    stop: Stop,
) {
    let _permits = permits;
    let began = clock::now();
    let shared = listener.shared.clone();
    let mut record = AccessRecord::new(listener.name.clone(), peer);
    // What a handshake of TLS takes is given back when it is over.
    let end = match Box::pin(tcp::begin(client, &listener, &host, &mut record)).await {
        Ok((stream, mut greeting)) => {
            let _of_client = greeting.of_client.take();
            match first_bytes(stream, greeting, &listener).await {
                Ok(ready) => run(ready, bind, listener, &host, stop, &mut record).await,
                Err(end) => end,
            }
        }
        Err((end, client)) => {
            if let Some(client) = client {
                tcp::reset(&client);
            }
            end
        }
    };
    shared.ends[end as usize].add(1);
    // Requests have their own lines; a connection has one when it came to none of its own accord.
    if end.failed() {
        host.access.write(record, end, clock::now().since(began));
    }
}

/// A connection that is ready for the engine.
struct Ready {
    stream: Stream,
    greeting: Greeting,
    h2: bool,
    place: Place,
}

/// Finds out which HTTP it is.
async fn first_bytes(mut stream: Stream, mut greeting: Greeting, listener: &Listener) -> Result<Box<Ready>, End> {
    let link = Link::default();
    link.listener.store(Arc::as_ptr(&listener.shared) as usize, Relaxed);
    let place = Place::of(Arc::new(link));
    let Face::Http(face) = &listener.face else { return Err(End::NoRoute) };
    let mut h2 = stream.alpn() == Some(b"h2");
    if stream.plain().is_some() && face.h2c {
        // Few listeners ask, and all connections would keep the room.
        Box::pin(preface(&mut stream, &mut greeting.bytes, place.link(), listener.header)).await?;
        h2 = greeting.bytes.starts_with(PREFACE);
    }
    Ok(Box::new(Ready { stream, greeting, h2, place }))
}

/// Reads until it is clear whether HTTP/2 begins.
async fn preface(stream: &mut Stream, bytes: &mut Vec<u8>, link: &Link, header: Duration) -> Result<(), End> {
    let deadline = Instant::now() + header;
    while bytes.len() < PREFACE.len() && PREFACE.starts_with(bytes) {
        let mut part = [0; PREFACE.len()];
        let most = PREFACE.len() - bytes.len();
        let read = tokio::select! {
            read = timeout_at(deadline, stream.read(&mut part[..most])) => read,
            () = link.has_to_make_room() => return Err(End::Idle),
        };
        match read {
            Err(_) => return Err(End::Handshake),
            Ok(Ok(0)) => return Err(End::ClientGone),
            Ok(Ok(read)) => bytes.extend_from_slice(&part[..read]),
            Ok(Err(_)) => return Err(End::ClientReset),
        }
    }
    Ok(())
}

async fn run(
    ready: Box<Ready>,
    bind: SocketAddr,
    listener: Arc<Listener>,
    host: &Arc<Host>,
    mut stop: Stop,
    record: &mut AccessRecord,
) -> End {
    let Ready { stream, greeting, h2, place } = *ready;
    let link = place.link().clone();
    let destination = greeting.destination.or_else(|| stream.socket().local_addr().ok());
    let tls = match &stream {
        Stream::Plain(_) => None,
        Stream::Tls(_) => Some(Secured { subject: stream.subject() }),
    };
    let pages = match &listener.face {
        Face::Http(face) => face.pages.clone(),
        Face::Tcp(_) | Face::Sni(_) => [].into(),
    };
    let patience = Patience { header: listener.header, keepalive: listener.keepalive, idle: listener.http_idle() };
    let connection = Arc::new(Connection {
        link: link.clone(),
        client: greeting.client,
        destination,
        tlvs: greeting.tlvs,
        tls,
        name: listener.name.clone(),
        shared: listener.shared.clone(),
        bind,
        seen: Mutex::new((0, Some(listener))),
    });
    let shared = connection.shared.clone();
    let about: Box<dyn std::any::Any + Send + Sync> = Box::new(connection);
    let edge = match Edge::new(stream, greeting.bytes, h2, place, patience, pages, about) {
        Ok(edge) => edge,
        Err(_) => return End::ClientGone,
    };
    let engine = engine(host);
    if h2 {
        // The engine says goodbye to a client of HTTP/2 when this turns true, and never before.
        let (go, going) = watch::channel(false);
        tokio::select! {
            _ = engine.process_new(Box::new(edge), &going) => {}
            () = Box::pin(send_off(&link, patience.keepalive, &mut stop, &go)) => {}
            // Its exchanges see the connection end, and write their lines.
            () = link.ends() => {}
        }
    } else {
        let told = async {
            let _ = stop.clone().wait_for(|stop| *stop).await.is_ok();
            // A client may be asking at this very moment: it is answered, and told.
            link.say_close();
            sleep(GRACE).await;
            link.close_when_idle();
            sleep(GOING).await;
        };
        tokio::select! {
            () = one_by_one(edge, &engine, &stop) => {}
            () = told => {}
        }
    }
    for (total, bytes) in shared.bytes.iter().zip(&link.bytes) {
        total.add(bytes.load(Relaxed));
    }
    if let Some((refusal, line)) = link.refused() {
        let mut words = line.as_deref().unwrap_or("").split(' ');
        let word = |word: Option<&str>| word.unwrap_or("").chars().take(256).collect::<String>();
        let end = if refusal.status == 408 { End::Handshake } else { End::Malformed };
        shared.requests[usize::from(refusal.status / 100)].add(1);
        shared.request_ends[end as usize].add(1);
        record.http = Some(Box::new(HttpRecord {
            method: word(words.next()),
            host: String::new(),
            path: word(words.next()),
            status: refusal.status,
            retries: 0,
            id: String::new(),
        }));
        tracing::debug!(listener = &*record.listener, client = %record.client, reason = refusal.reason, "refused");
        return end;
    }
    if link.timed_out() || link.makes_room() { End::Idle } else { End::ClientClosed }
}

/// Serves requests of HTTP/1.1 one after the other. The engine has the connection only from a whole head to the end of its
/// answer: between requests, and while a head comes byte by byte, it holds little more than the socket.
async fn one_by_one(edge: Edge, engine: &Arc<HttpProxy<Gateway>>, stop: &Stop) {
    let (mut edge, mut settings) = (Box::new(edge), None::<HttpPersistentSettings>);
    while edge.head().await {
        let mut session = ServerSession::new_http1(edge);
        match settings.take() {
            Some(settings) => settings.apply_to_session(&mut session),
            // Whether, not how long: the time between requests is the edge's business.
            None => session.set_keepalive(if *stop.borrow() { None } else { Some(0) }),
        }
        let Some(kept) = engine.process_new_http(session, stop).await else { return };
        let (stream, next) = kept.consume();
        settings = next;
        match stream.into_any().downcast::<Edge>() {
            Ok(back) => edge = back,
            Err(_) => return,
        }
    }
}

/// Sends a client of HTTP/2 off when its listener is given up, or when it has asked for nothing for long enough; ends
/// when it has had time enough to go.
async fn send_off(link: &Link, keepalive: Duration, stop: &mut Stop, go: &watch::Sender<bool>) {
    let mut idle_since = Instant::now();
    let mut turns = link.turns();
    loop {
        let told = async { stop.wait_for(|stop| *stop).await.is_ok() };
        tokio::select! {
            _ = told => break,
            () = link.has_to_make_room() => break,
            () = sleep_until(idle_since + keepalive) => {
                let now = link.turns();
                if link.active.load(Relaxed) == 0 && now == turns {
                    break;
                }
                turns = now;
                idle_since = Instant::now();
            }
        }
    }
    let _ = go.send(true);
    let going = Instant::now() + GOING;
    // The engine ends when the last exchange has ended and the client has closed; a client that does not is left.
    let mut quiet = 0;
    while Instant::now() < going && quiet < 3 {
        sleep(Duration::from_secs(1)).await;
        quiet = if link.active.load(Relaxed) == 0 { quiet + 1 } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, C, D, E, G, H, F: Future>(_: impl Fn(A, B, C, D, E, G, H) -> F) -> usize {
        size_of::<F>()
    }

    /// Whoever connects and says nothing costs this, and little more.
    #[test]
    fn a_connection_that_waits_is_small() {
        let bytes = size(serve);
        assert!(bytes <= 3_000, "{bytes} bytes");
    }
}
