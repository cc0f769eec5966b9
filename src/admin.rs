//! Interfaces for operators: a unix socket with full control, and read-only HTTP.
//!
//! Both speak HTTP/1.1. Every connection has one deadline for everything, and there are never more than a few of
//! them, so a reader that takes its time costs one place and nothing else. Answers are rendered on helper threads.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::clock;
use crate::host::Host;
use crate::reload::Report;
use crate::report::{self, Info};

/// One connection to an admin interface, from its first byte to its last.
const DEADLINE: Duration = Duration::from_secs(30);
/// Most connections at once to one interface.
const MOST: usize = 32;
/// Renderings at once.
const RENDERINGS: usize = 2;
/// Largest accepted body of a request.
const BODY: usize = 64 << 10;
/// A worker that has not beaten for this long is stuck.
pub const BEAT_STALE: Duration = Duration::from_secs(5);

/// What operators ask of control; each is answered once.
pub enum Order {
    /// Read the file again.
    Reload {
        /// Even when it removes what is in use.
        force: bool,
        /// The verdict.
        reply: oneshot::Sender<Report>,
    },
    /// Take something out.
    Drain(DrainOrder, oneshot::Sender<Result<String, String>>),
    /// Put it back.
    Undrain(DrainOrder, oneshot::Sender<Result<String, String>>),
}

/// What is to be drained or undrained.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // The fields are the flags of `sailover drain`.
pub struct DrainOrder {
    pub cell: String,
    pub pool: Option<String>,
    pub backend: Option<String>,
    pub reason: Option<String>,
    /// Seconds.
    #[serde(rename = "for")]
    pub seconds: Option<u64>,
    #[serde(default)]
    pub force: bool,
    /// User id of the operator, set by the socket and not by the request.
    #[serde(skip)]
    pub by: Option<u32>,
}

/// What the interfaces know and whom they ask.
#[derive(Clone)]
pub struct Admin {
    host: Arc<Host>,
    info: Arc<Mutex<Info>>,
    orders: mpsc::Sender<Order>,
    renderings: Arc<Semaphore>,
}

impl Admin {
    /// An interface to this process.
    pub fn new(host: Arc<Host>, info: Arc<Mutex<Info>>, orders: mpsc::Sender<Order>) -> Admin {
        Admin { host, info, orders, renderings: Arc::new(Semaphore::new(RENDERINGS)) }
    }

    /// Serves the unix socket until the task is dropped.
    pub async fn serve_unix(self, listener: UnixListener) {
        let places = Arc::new(Semaphore::new(MOST));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let by = stream.peer_cred().ok().map(|peer| peer.uid());
                    let admin = self.clone();
                    tokio::spawn(async move {
                        admin.connection(stream, Some(by)).await;
                        drop(place);
                    });
                }
                Err(error) => self.pause(&error).await,
            }
        }
    }

    /// Serves read-only HTTP until the task is dropped.
    pub async fn serve_http(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MOST));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let admin = self.clone();
                    tokio::spawn(async move {
                        admin.connection(stream, None).await;
                        drop(place);
                    });
                }
                Err(error) => self.pause(&error).await,
            }
        }
    }

    async fn pause(&self, error: &io::Error) {
        self.host.local_errors.count(error);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    /// `control` is the operator's user id on the unix socket, and `None` on read-only HTTP.
    async fn connection(self, stream: impl AsyncRead + AsyncWrite + Unpin, control: Option<Option<u32>>) {
        let service = service_fn(|request| {
            let admin = self.clone();
            async move { Ok::<_, Infallible>(admin.answer(request, control).await) }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(5))
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service);
        // Whatever the reader does, it is over then.
        let _ = timeout(DEADLINE, serving).await;
    }

    async fn answer(self, request: Request<Incoming>, control: Option<Option<u32>>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let force = request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "force=true"));
        match (request.method().clone(), path.as_str()) {
            (Method::GET, "/livez") => self.livez(),
            (Method::GET, "/readyz") => self.readyz(),
            (Method::GET, "/status") => {
                let body = self
                    .render(|host, info| serde_json::to_vec_pretty(&report::status(host, info)).unwrap_or_default())
                    .await;
                respond(StatusCode::OK, "application/json", body)
            }
            (Method::GET, "/metrics") => {
                let body = self.render(|host, info| report::metrics(host, info).into_bytes()).await;
                respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", body)
            }
            (Method::GET, "/config") if control.is_some() => {
                let body = self
                    .render(|host, _| {
                        let table = host.live.load_full();
                        let shown = serde_json::json!({ "generation": table.generation, "hash": table.hash, "config": &*table.config });
                        serde_json::to_vec_pretty(&shown).unwrap_or_default()
                    })
                    .await;
                respond(StatusCode::OK, "application/json", body)
            }
            (Method::POST, "/reload") if control.is_some() => {
                let (reply, verdict) = oneshot::channel();
                let sent = self.orders.send(Order::Reload { force, reply }).await.is_ok();
                match verdict.await {
                    Ok(report) if sent => {
                        let status = if report.ok { StatusCode::OK } else { StatusCode::UNPROCESSABLE_ENTITY };
                        respond(status, "application/json", serde_json::to_vec_pretty(&report).unwrap_or_default())
                    }
                    _ => plain(StatusCode::SERVICE_UNAVAILABLE, "the process is stopping\n"),
                }
            }
            (Method::POST, "/drain" | "/undrain") if control.is_some() => {
                let body = match Limited::new(request.into_body(), BODY).collect().await {
                    Ok(body) => body.to_bytes(),
                    Err(_) => return plain(StatusCode::BAD_REQUEST, "the body cannot be read or is too large\n"),
                };
                let mut order: DrainOrder = match serde_json::from_slice(&body) {
                    Ok(order) => order,
                    Err(error) => return plain(StatusCode::BAD_REQUEST, &format!("the body is no order: {error}\n")),
                };
                order.by = control.flatten();
                let (reply, verdict) = oneshot::channel();
                let order = if path == "/drain" { Order::Drain(order, reply) } else { Order::Undrain(order, reply) };
                let sent = self.orders.send(order).await.is_ok();
                match verdict.await {
                    Ok(Ok(text)) if sent => plain(StatusCode::OK, &format!("{text}\n")),
                    Ok(Err(text)) => plain(StatusCode::CONFLICT, &format!("{text}\n")),
                    _ => plain(StatusCode::SERVICE_UNAVAILABLE, "the process is stopping\n"),
                }
            }
            (Method::GET, _) => plain(StatusCode::NOT_FOUND, "expected /status, /metrics, /livez or /readyz\n"),
            _ => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n"),
        }
    }

    /// Renders on a helper thread, at most two at a time.
    async fn render(&self, render: impl FnOnce(&Host, &Info) -> Vec<u8> + Send + 'static) -> Vec<u8> {
        let Ok(place) = self.renderings.clone().acquire_owned().await else { return Vec::new() };
        let (host, info) = (self.host.clone(), self.info.clone());
        let rendered = tokio::task::spawn_blocking(move || {
            let info = info.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let body = render(&host, &info);
            drop(place);
            body
        });
        rendered.await.unwrap_or_default()
    }

    fn livez(&self) -> Response<Full<Bytes>> {
        match stale_worker(&self.host) {
            None => plain(StatusCode::OK, "ok\n"),
            Some(number) => plain(StatusCode::SERVICE_UNAVAILABLE, &format!("worker {number} does not beat\n")),
        }
    }

    fn readyz(&self) -> Response<Full<Bytes>> {
        if self.host.stopping.load(Relaxed) {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
        }
        let table = self.host.live.load();
        if let Some(listener) = table.listeners.values().find(|listener| listener.shared.at_cap.load(Relaxed) > 0) {
            return plain(StatusCode::SERVICE_UNAVAILABLE, &format!("listener {} is at its cap\n", listener.name));
        }
        self.livez()
    }
}

/// The first worker whose beat is stale.
pub fn stale_worker(host: &Host) -> Option<usize> {
    let now = clock::now().0 / 1_000;
    host.beats.iter().position(|beat| {
        let last = beat[0].load(Relaxed);
        last > 0 && now.saturating_sub(last) > BEAT_STALE.as_millis() as u64
    })
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", text.as_bytes().to_vec())
}

fn respond(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

/// Opens the unix socket. One that is left over from a dead process is replaced; one that answers is not.
///
/// # Errors
/// A sentence.
pub fn open_socket(path: &Path) -> Result<std::os::unix::net::UnixListener, String> {
    let fail = |what: &str, error: io::Error| format!("admin socket {}: {what}: {error}", path.display());
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|error| fail("its directory cannot be made", error))?;
    }
    if path.exists() {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(format!("admin socket {}: another process answers on it", path.display())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(|error| fail("the stale socket cannot be removed", error))?;
            }
            Err(error) => return Err(fail("it is in the way", error)),
        }
    }
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(|error| fail("cannot be bound", error))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .map_err(|error| fail("its mode cannot be set", error))?;
    listener.set_nonblocking(true).map_err(|error| fail("cannot be used", error))?;
    Ok(listener)
}

/// Opens the read-only HTTP address.
///
/// # Errors
/// A sentence.
pub fn open_http(address: SocketAddr) -> Result<std::net::TcpListener, String> {
    let listener = std::net::TcpListener::bind(address)
        .map_err(|error| format!("admin http {address}: cannot be bound: {error}"))?;
    listener.set_nonblocking(true).map_err(|error| format!("admin http {address}: cannot be used: {error}"))?;
    Ok(listener)
}

/// Asks a running process: status and body of the answer.
///
/// # Errors
/// A sentence that says what to look at.
pub async fn ask(socket: &Path, method: Method, path: &str, body: Vec<u8>) -> Result<(StatusCode, Vec<u8>), String> {
    let failed = |error: &dyn std::fmt::Display| {
        format!("{}: {error}; is sailover running, and may you use its socket?", socket.display())
    };
    let asking = async {
        let stream = UnixStream::connect(socket).await.map_err(|error| failed(&error))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "localhost")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| failed(&error))?;
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| failed(&error))?;
        Ok((status, body.to_bytes().to_vec()))
    };
    match timeout(DEADLINE, asking).await {
        Ok(answer) => answer,
        Err(_) => Err(failed(&"no answer in time")),
    }
}
