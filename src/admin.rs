//! Interfaces for operators: a unix socket with full control, and read-only HTTP.
//!
//! Both speak HTTP/1.1, one request on each connection. A connection has one deadline for everything, and there are
//! never more than a few of them, so a reader that takes its time costs one place and nothing else. Answers are rendered on helper threads.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
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
use crate::listen;
use crate::reload::Report;
use crate::report::{self, Info};
use crate::session::Filter;
use crate::table::Listener;
use crate::worker::Sessions;

/// One connection to an admin interface, from its first byte to its last.
const DEADLINE: Duration = Duration::from_secs(30);
/// Most connections at once to one interface.
const MOST: usize = 32;
/// Renderings at once.
const RENDERINGS: usize = 2;
/// Most sessions that one answer tells of.
const MOST_SESSIONS: usize = 1_000;
/// How long a worker may take to tell of its sessions.
const PATIENCE: Duration = Duration::from_secs(2);
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
    /// Let what failed return.
    Failback(DrainOrder, oneshot::Sender<Result<String, String>>),
    /// Change a cell's weight.
    Weigh(WeightOrder, oneshot::Sender<Result<String, String>>),
    /// Tell of sessions, or end them.
    Sessions {
        /// Which.
        filter: Arc<Filter>,
        /// Whether they are to end.
        kick: bool,
        /// Most that each worker tells of.
        most: usize,
        /// User id of the operator.
        by: Option<u32>,
        /// Takes the answer of each worker.
        reply: mpsc::UnboundedSender<Sessions>,
    },
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

/// A cell and how much of its weight it is to keep.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // The fields are the flags of `sailover weight`.
pub struct WeightOrder {
    pub pool: String,
    pub cell: String,
    pub percent: u32,
    pub reason: Option<String>,
    /// Seconds.
    #[serde(rename = "for")]
    pub seconds: Option<u64>,
    /// User id of the operator, set by the socket and not by the request.
    #[serde(skip)]
    pub by: Option<u32>,
}

/// Which sessions to tell of, or to end.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionsOrder {
    /// Which.
    pub filter: Filter,
    /// Most that are told of.
    pub limit: usize,
}

/// A client whose way is to be explained.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExplainOrder {
    /// The client.
    pub client: IpAddr,
    /// Only at this listener.
    pub listener: Option<String>,
}

/// What a connection may do: read, or give orders as a user of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    ReadOnly,
    Control(Option<u32>),
}

/// An answer; as an error it cuts the way to it short.
type Answer = Result<Response<Full<Bytes>>, Response<Full<Bytes>>>;

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
                        admin.connection(stream, Access::Control(by)).await;
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
                        admin.connection(stream, Access::ReadOnly).await;
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

    /// One connection carries one request: a reader that comes again finds no deadline that ran meanwhile.
    async fn connection(self, stream: impl AsyncRead + AsyncWrite + Unpin, access: Access) {
        let service = service_fn(|request| {
            let admin = self.clone();
            async move { Ok::<_, Infallible>(admin.answer(request, access).await) }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(5))
            .max_buf_size(64 << 10)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        // Whatever the reader does, it is over then.
        let _ = timeout(DEADLINE, serving).await;
    }

    async fn answer(self, request: Request<Incoming>, access: Access) -> Response<Full<Bytes>> {
        if access == Access::ReadOnly {
            if request.method() != Method::GET {
                let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n");
                response.headers_mut().insert(hyper::header::ALLOW, hyper::header::HeaderValue::from_static("GET"));
                return response;
            }
            if let Err(text) = self.judge_host(&request) {
                return plain(StatusCode::MISDIRECTED_REQUEST, &text);
            }
        }
        let path = request.uri().path().to_owned();
        match (request.method().clone(), path.as_str(), access) {
            (Method::GET, "/livez", _) => self.livez(),
            (Method::GET, "/readyz", _) => self.readyz(request.uri().query() == Some("cap=ok")),
            (Method::GET, "/status", _) => {
                let body = self
                    .render(|host, info| serde_json::to_vec_pretty(&report::status(host, info)).unwrap_or_default())
                    .await;
                respond(StatusCode::OK, "application/json", body)
            }
            (Method::GET, "/metrics", _) => {
                let body = self.render(|host, info| report::metrics(host, info).into_bytes()).await;
                respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", body)
            }
            (Method::GET, "/config", Access::Control(_)) => {
                let body = self
                    .render(|host, _| {
                        let table = host.live.load_full();
                        let shown = serde_json::json!({ "generation": table.generation, "hash": table.hash, "config": &*table.config });
                        serde_json::to_vec_pretty(&shown).unwrap_or_default()
                    })
                    .await;
                respond(StatusCode::OK, "application/json", body)
            }
            (Method::POST, _, Access::Control(by)) => match self.obey(request, &path, by).await {
                Ok(response) | Err(response) => response,
            },
            (Method::GET, _, _) => plain(StatusCode::NOT_FOUND, "expected /status, /metrics, /livez or /readyz\n"),
            _ => plain(StatusCode::METHOD_NOT_ALLOWED, "expected GET or POST\n"),
        }
    }

    /// Refuses a request that names a host which is none of ours: a page of somebody else's, whose name was made to
    /// point here, could otherwise read what is served (DNS rebinding). An address is no name, so it needs no proof.
    fn judge_host(&self, request: &Request<Incoming>) -> Result<(), String> {
        let named = request.headers().get(hyper::header::HOST).map(|host| host.to_str().unwrap_or_default());
        let Some(named) = named.or_else(|| request.uri().authority().map(|authority| authority.as_str())) else {
            // Browsers always name one; a simple health check of HTTP/1.0 does not.
            let old = request.version() == hyper::Version::HTTP_10;
            return if old { Ok(()) } else { Err("the request names no host\n".into()) };
        };
        let name = match named.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
            _ => named,
        };
        let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        let config = self.host.live.load().config.clone();
        let ours = |known: &String| known.eq_ignore_ascii_case(name);
        if address.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || config.admin.hosts.iter().any(ours)
        {
            return Ok(());
        }
        Err(format!("the host {name:?} is not served here; name it in admin.hosts if it is yours\n"))
    }

    /// The orders of an operator.
    async fn obey(&self, request: Request<Incoming>, path: &str, by: Option<u32>) -> Answer {
        let force = request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "force=true"));
        match path {
            "/reload" => {
                let (reply, verdict) = oneshot::channel();
                let report = self.order(Order::Reload { force, reply }, verdict).await?;
                let status = if report.ok { StatusCode::OK } else { StatusCode::UNPROCESSABLE_ENTITY };
                Ok(respond(status, "application/json", serde_json::to_vec_pretty(&report).unwrap_or_default()))
            }
            "/drain" | "/undrain" => {
                let order = DrainOrder { by, ..read(request).await? };
                let (reply, verdict) = oneshot::channel();
                let order = if path == "/drain" { Order::Drain(order, reply) } else { Order::Undrain(order, reply) };
                Ok(told(self.order(order, verdict).await?))
            }
            "/failback" => {
                let order = DrainOrder { by, ..read(request).await? };
                let (reply, verdict) = oneshot::channel();
                Ok(told(self.order(Order::Failback(order, reply), verdict).await?))
            }
            "/weight" => {
                let order = WeightOrder { by, ..read(request).await? };
                let (reply, verdict) = oneshot::channel();
                Ok(told(self.order(Order::Weigh(order, reply), verdict).await?))
            }
            "/sessions" | "/kick" => {
                let order: SessionsOrder = read(request).await?;
                let kick = path == "/kick";
                if kick && !order.filter.names_something() {
                    let text = "name what to end: identities of sessions, a backend, a pool or a client\n";
                    return Err(plain(StatusCode::CONFLICT, text));
                }
                let most = order.limit.clamp(1, MOST_SESSIONS);
                let (reply, mut answers) = mpsc::unbounded_channel();
                let filter = Arc::new(order.filter);
                let order = Order::Sessions { filter: filter.clone(), kick, most, by, reply };
                self.orders.send(order).await.map_err(|_| stopping())?;
                let mut found = Sessions::default();
                // The channel ends when the last worker has answered; a part is no answer.
                loop {
                    let part = match timeout(PATIENCE, answers.recv()).await {
                        Ok(Some(part)) => part,
                        Ok(None) => break,
                        Err(_) => {
                            let text = "a worker does not answer; `sailover status` shows which does not beat\n";
                            return Err(plain(StatusCode::SERVICE_UNAVAILABLE, text));
                        }
                    };
                    found.rows.extend(part.rows);
                    found.count += part.count;
                }
                if found.count == 0
                    && let Some(unknown) = report::names_nothing(&self.host.live.load(), &filter)
                {
                    return Err(plain(StatusCode::CONFLICT, &format!("{unknown}\n")));
                }
                let body = self.render(move |host, _| {
                    found.rows.sort_by_key(|row| std::cmp::Reverse(row.age_ms));
                    found.rows.truncate(most);
                    let rows = report::sessions(&host.live.load_full(), &found.rows);
                    let note = report::of_http(&host.live.load(), &filter);
                    let body = serde_json::json!({ "count": found.count, "sessions": rows, "note": note });
                    serde_json::to_vec_pretty(&body).unwrap_or_default()
                });
                Ok(respond(StatusCode::OK, "application/json", body.await))
            }
            "/explain" => {
                let order: ExplainOrder = read(request).await?;
                let body = self.render(move |host, _| {
                    let explained = report::explain(host, order.client, order.listener.as_deref());
                    serde_json::to_vec_pretty(&explained).unwrap_or_default()
                });
                Ok(respond(StatusCode::OK, "application/json", body.await))
            }
            _ => Err(plain(StatusCode::NOT_FOUND, "there is no such order\n")),
        }
    }

    /// Gives control an order and waits for its answer.
    async fn order<T>(&self, order: Order, answer: oneshot::Receiver<T>) -> Result<T, Response<Full<Bytes>>> {
        self.orders.send(order).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
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

    /// Whether new connections are welcome; with `cap_ok` also when they have to wait for a place.
    fn readyz(&self, cap_ok: bool) -> Response<Full<Bytes>> {
        if self.host.stopping.load(Relaxed) {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
        }
        let table = self.host.live.load();
        let at_cap = |listener: &&Arc<Listener>| listener.shared.at_cap.load(Relaxed) > 0;
        if let Some(listener) = table.listeners.values().find(at_cap).filter(|_| !cap_ok) {
            return plain(StatusCode::SERVICE_UNAVAILABLE, &format!("listener {} is at its cap\n", listener.name));
        }
        self.livez()
    }
}

/// The first worker whose beat is stale.
pub fn stale_worker(host: &Host) -> Option<usize> {
    let now = clock::now().0 / 1_000;
    // Time begins with the process: one that has never beaten is stale as soon.
    host.beats.iter().position(|beat| now.saturating_sub(beat[0].load(Relaxed)) > BEAT_STALE.as_millis() as u64)
}

/// Reads the JSON body of an order.
async fn read<T: serde::de::DeserializeOwned>(request: Request<Incoming>) -> Result<T, Response<Full<Bytes>>> {
    let body = Limited::new(request.into_body(), BODY).collect().await;
    let body = body.map_err(|_| plain(StatusCode::BAD_REQUEST, "the body cannot be read or is too large\n"))?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| plain(StatusCode::BAD_REQUEST, &format!("the body is no order: {error}\n")))
}

/// The verdict on an order, in words.
fn told(verdict: Result<String, String>) -> Response<Full<Bytes>> {
    match verdict {
        Ok(text) => plain(StatusCode::OK, &format!("{text}\n")),
        Err(text) => plain(StatusCode::CONFLICT, &format!("{text}\n")),
    }
}

fn stopping() -> Response<Full<Bytes>> {
    plain(StatusCode::SERVICE_UNAVAILABLE, "the process is stopping\n")
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

/// Opens the read-only HTTP address; `shared` says that a socket of our own has its port.
///
/// # Errors
/// A sentence.
pub fn open_http(address: SocketAddr, shared: bool) -> Result<TcpListener, String> {
    let failed = |error: io::Error| format!("admin http {address}: cannot be bound: {error}");
    TcpListener::from_std(listen::bind_one(address, shared).map_err(failed)?).map_err(failed)
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
