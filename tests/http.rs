//! The `http` face: bodies of every kind in both versions, what is refused, what is told to backends, and what becomes of
//! requests whose backend fails.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use xxhash_rust::xxh3::xxh3_64;

use crate::support::eventually;
use crate::support::proxy::Proxy;

pub type Body = BoxBody<Bytes, Infallible>;

/// Which HTTP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Version {
    One,
    Two,
}

/// A backend by a library: it tells what it got in headers of its answer, and sends the body back.
pub struct Origin {
    pub address: SocketAddr,
    /// Requests that it began to serve: method, path, and the value of `x-id`.
    pub seen: Arc<Mutex<Vec<(String, String, String)>>>,
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Origin {
    pub fn start(version: Version) -> Origin {
        let seen: Arc<Mutex<Vec<(String, String, String)>>> = Arc::default();
        let (tell, told) = std::sync::mpsc::channel();
        let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
        let list = seen.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                loop {
                    let stream = tokio::select! {
                        accepted = listener.accept() => accepted.unwrap().0,
                        _ = &mut stopped => return,
                    };
                    stream.set_nodelay(true).unwrap();
                    let list = list.clone();
                    tokio::spawn(async move {
                        let service = service_fn(move |request| answer(request, list.clone()));
                        let io = TokioIo::new(stream);
                        let _ = match version {
                            Version::One => {
                                hyper::server::conn::http1::Builder::new().serve_connection(io, service).await
                            }
                            Version::Two => {
                                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                                    .serve_connection(io, service)
                                    .await
                            }
                        };
                    });
                }
            });
        });
        Origin { address: told.recv().unwrap(), seen, _stop: stop }
    }
}

async fn answer(
    request: Request<Incoming>,
    seen: Arc<Mutex<Vec<(String, String, String)>>>,
) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned();
    seen.lock().unwrap().push((head.method.to_string(), head.uri.path().to_owned(), text("x-id")));
    let mut told = String::new();
    for (name, value) in &head.headers {
        told.push_str(&format!("{name}: {}|", value.to_str().unwrap_or("?")));
    }
    let collected = body.collect().await;
    let Ok(collected) = collected else { return Ok(Response::new(empty())) };
    let trailer = collected.trailers().and_then(|trailers| trailers.get("x-sum")).cloned();
    let bytes = collected.to_bytes();
    let framed_by_length = text("x-answer") == "length";
    let pause = head.headers.contains_key("x-pause");
    let answer = Response::builder()
        .header("x-method", head.method.as_str())
        .header("x-path", head.uri.path_and_query().map_or("", |path| path.as_str()))
        .header("x-told", told)
        .header("x-length", bytes.len())
        .header("x-hash", xxh3_64(&bytes))
        .header("x-trailer", trailer.clone().unwrap_or(HeaderValue::from_static("none")));
    let answer = if framed_by_length { answer.header("content-length", bytes.len()) } else { answer };
    let trailers = !framed_by_length;
    if head.method == Method::HEAD {
        return Ok(answer.body(empty()).unwrap());
    }
    Ok(answer.body(stream(bytes, pause, trailers)).unwrap())
}

pub fn empty() -> Body {
    http_body_util::Empty::new().boxed()
}

/// A body in pieces; with pauses of 300 ms in its middle and before its trailers.
fn stream(bytes: Bytes, pause: bool, trailers: bool) -> Body {
    let (send, receive) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(4);
    tokio::spawn(async move {
        let half = bytes.len() / 2;
        let mut rest = bytes;
        let mut first = rest.split_to(half);
        for part in [&mut first, &mut rest] {
            while !part.is_empty() {
                let piece = part.split_to(part.len().min(50_000));
                if send.send(Ok(Frame::data(piece))).await.is_err() {
                    return;
                }
            }
            if pause {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        }
        if trailers {
            let mut map = HeaderMap::new();
            map.insert("x-sum", HeaderValue::from_static("7"));
            let _ = send.send(Ok(Frame::trailers(map))).await;
        }
    });
    StreamBody::new(tokio_stream_of(receive)).boxed()
}

fn tokio_stream_of<T: Send + 'static>(
    receive: tokio::sync::mpsc::Receiver<T>,
) -> impl futures_core::Stream<Item = T> + Send + Sync {
    struct Of<T>(tokio::sync::mpsc::Receiver<T>);
    impl<T> futures_core::Stream for Of<T> {
        type Item = T;
        fn poll_next(
            mut self: std::pin::Pin<&mut Self>,
            context: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<T>> {
            self.0.poll_recv(context)
        }
    }
    Of(receive)
}

/// One request over a connection of its own.
pub async fn ask(
    address: SocketAddr,
    version: Version,
    request: Request<Body>,
) -> Result<(http::response::Parts, Bytes, Option<HeaderMap>), String> {
    let stream = tokio::net::TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).unwrap();
    let io = TokioIo::new(stream);
    let failed = |error: hyper::Error| format!("{error:?}");
    match version {
        Version::One => {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.map_err(failed)?;
            tokio::spawn(connection);
            let response = sender.send_request(request).await.map_err(failed)?;
            collect(response).await.inspect(|_| drop(sender))
        }
        Version::Two => {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.map_err(failed)?;
            tokio::spawn(connection);
            let response = sender.send_request(request).await.map_err(failed)?;
            collect(response).await.inspect(|_| drop(sender))
        }
    }
}

async fn collect(response: Response<Incoming>) -> Result<(http::response::Parts, Bytes, Option<HeaderMap>), String> {
    let (head, body) = response.into_parts();
    let collected = body.collect().await.map_err(|error| format!("{error:?}"))?;
    let trailers = collected.trailers().cloned();
    Ok((head, collected.to_bytes(), trailers))
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A proxy with an `http` listener; `routes` and `pools` as in its file.
pub fn proxy(pools: &str, http: &str, rest: &str) -> Proxy {
    Proxy::start(&format!(
        "pools:\n{pools}\nlisteners: [ {{ name: web, bind: 127.0.0.1:0, http: {{ {http} }} }} ]\nlog: {{ access: stdout }}\n{rest}"
    ))
}

pub fn pool(name: &str, backends: &[SocketAddr], more: &str) -> String {
    let cells: Vec<String> = backends.iter().enumerate().map(|(i, at)| format!("c{i}: [ '{at}' ]")).collect();
    format!("  {name}: {{ cells: {{ {} }}, {more} }}\n", cells.join(", "))
}

#[test]
fn bodies_pass_whole_in_both_versions_on_either_side() {
    let (one, two) = (Origin::start(Version::One), Origin::start(Version::Two));
    let pools = pool("one", &[one.address], "") + &pool("two", &[two.address], "http: { version: 2 }");
    let proxy = proxy(&pools, "h2c: true, routes: [ { path: /1, pool: one }, { path: /2, pool: two } ]", "");
    let address = proxy.address(0);
    for backend in [one.address, two.address] {
        proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
    }
    runtime().block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for client in [Version::One, Version::Two] {
            for backend in ["/1", "/2"] {
                for size in [0usize, 1, 64 * 1024 + 1, 8 << 20] {
                    for by_length in [true, false] {
                        for pause in [false, true] {
                            tasks.spawn(async move {
                                let what = format!("{client:?} {backend} {size} length {by_length} pause {pause}");
                                let bytes = Bytes::from((0..size).map(|i| (i * 7 % 251) as u8).collect::<Vec<_>>());
                                let mut request = Request::post(format!("http://x.example{backend}/a?b=c"));
                                if client == Version::One {
                                    request = Request::post(format!("{backend}/a?b=c")).header("host", "x.example");
                                }
                                if by_length {
                                    request = request.header("content-length", size).header("x-answer", "length");
                                }
                                if pause {
                                    request = request.header("x-pause", "1");
                                }
                                let request = request.body(stream(bytes.clone(), pause, !by_length)).unwrap();
                                let (head, body, _) = ask(address, client, request)
                                    .await
                                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                                assert_eq!(head.status, 200, "{what}");
                                assert_eq!(head.headers["x-length"], size.to_string(), "{what}");
                                assert_eq!(head.headers["x-hash"], xxh3_64(&bytes).to_string(), "{what}");
                                assert_eq!(head.headers["x-path"], format!("{backend}/a?b=c"), "{what}");
                                assert_eq!(xxh3_64(&body), xxh3_64(&bytes), "{what}: {} bytes came", body.len());
                            });
                        }
                    }
                }
            }
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    });
}

/// One exchange in raw bytes; everything until the end of the connection, however it ends.
pub fn raw(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let in_time = !end.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    assert!(in_time, "the connection stays open after {answer:?}");
    answer
}

#[test]
fn what_could_be_read_in_two_ways_is_refused_and_reaches_no_backend() {
    let origin = Origin::start(Version::One);
    let proxy = proxy(&pool("p", &[origin.address], ""), "routes: [ { pool: p } ]", "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let address = proxy.address(0);
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: a\u{1}b\r\n\r\n", 400),
        ("GET / HTTP/1.1\nHost: a\n\n", 400),
        ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /../b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http://A/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /{a} HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 405),
        ("TRACE / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 405),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade, close\r\nUpgrade: tls\r\n\r\n", 501),
        ("GET / HTTP/1.1\r\nHost: a\r\nExpect: more\r\nConnection: close\r\n\r\n", 417),
        ("GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
        // The second of two requests in one piece is judged as strictly as the first.
        ("GET /x HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    ] {
        let answer = raw(address, request.as_bytes());
        let last = answer.rmatches("HTTP/1.1 ").count();
        let wanted = format!("HTTP/1.1 {status}");
        assert!(answer.contains(&wanted) && last >= 1, "{request:?}: {answer}");
        let own = answer.split("HTTP/1.1 ").last().unwrap();
        assert!(!own.contains("127.0.0.1"), "an internal address: {answer}");
        assert!(!answer.to_ascii_lowercase().contains("pingora"), "the engine's own answer: {answer}");
    }
    let big = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(70_000));
    assert!(raw(address, big.as_bytes()).starts_with("HTTP/1.1 431"));
    let seen = origin.seen.lock().unwrap().clone();
    assert!(seen.iter().all(|(_, path, _)| path == "/x"), "{seen:?}");
}

#[test]
fn odd_chunks_are_refused() {
    let origin = Origin::start(Version::One);
    let proxy = proxy(&pool("p", &[origin.address], ""), "routes: [ { pool: p } ]", "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in ["5\nhello\r\n0\r\n\r\n", "zz\r\n", "5\r\nhello0\r\n\r\n", "5 ; x\r\nhello\r\n"] {
        let answer = raw(proxy.address(0), format!("{head}{body}").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 400"), "{body:?}: {answer}");
    }
}

/// Headers that the origin got, as one text.
pub fn told(answer: &str) -> String {
    answer.lines().find_map(|line| line.strip_prefix("x-told: ")).unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn routes_and_headers_do_what_their_keys_say() {
    let (a, b) = (Origin::start(Version::One), Origin::start(Version::One));
    let pools = pool("a", &[a.address], "") + &pool("b", &[b.address], "");
    let routes = r#"routes: [
        { host: api.example, path: /v1, pool: b, strip_prefix: true, add: { x-added: "yes" }, remove: [ x-secret ],
          response: { add: { x-stamp: "1" }, remove: [ x-hash ] } },
        { host: api.example, path: /v1, method: [ DELETE, PUT ], respond: { status: 403, body: "no", type: text/html } },
        { host: api.example, headers: { x-beta: "1" }, pool: a },
        { host: "*.old.example", redirect: { scheme: https, host: new.example, status: 301 } },
        { host: moved.example, path: /q, redirect: { path: /new } },
        { host: moved.example, path: /r, redirect: { path: "/new?c" } },
        { path: /robots.txt, respond: { body: "User-agent: *" } },
        { host: shop.example, pool: a },
    ], errors: { 404: { body: "<h1>gone</h1>", type: text/html } }"#;
    let proxy = proxy(&pools, routes, "");
    for backend in [a.address, b.address] {
        proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
    }
    let get = |host: &str, target: &str, more: &str| {
        raw(
            proxy.address(0),
            format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n{more}Connection: close\r\n\r\n").as_bytes(),
        )
    };
    let answer = get("API.example:80", "/v1/users?x=1", "x-secret: 1\r\nX-Forwarded-For: 6.6.6.6\r\n");
    assert!(
        answer.contains("x-path: /users?x=1") && answer.contains("x-stamp: 1") && !answer.contains("x-hash"),
        "{answer}"
    );
    let headers = told(&answer);
    assert!(
        headers.contains("x-added: yes|") && !headers.contains("x-secret") && !headers.contains("6.6.6.6"),
        "{headers}"
    );
    assert!(headers.contains("x-forwarded-for: 127.0.0.1|") && headers.contains("x-forwarded-host: API.example:80|"));
    assert!(
        headers.contains("x-forwarded-proto: http|") && headers.contains("forwarded: for=127.0.0.1;proto=http;host=")
    );
    assert!(headers.contains("x-request-id: "), "{headers}");
    assert!(get("api.example", "/v1", "").contains("x-path: /"));
    assert!(get("api.example", "/%76%31/./a", "").contains("x-path: /a"), "the compared form is the forwarded one");
    assert!(get("api.example", "/other", "x-beta: 1\r\n").starts_with("HTTP/1.1 200"));
    let lost = get("api.example", "/other", "");
    assert!(lost.starts_with("HTTP/1.1 404") && lost.ends_with("<h1>gone</h1>"), "{lost}");
    assert!(get("unknown.example", "/", "").starts_with("HTTP/1.1 404"), "a route without a host serves every host");
    assert!(get("unknown.example", "/robots.txt", "").ends_with("User-agent: *"));
    let moved = get("x.old.example", "/a?b", "");
    assert!(moved.starts_with("HTTP/1.1 301") && moved.contains("https://new.example/a?b"), "{moved}");
    for (target, wanted) in [("/q?a=b", "/new?a=b"), ("/q/x", "/new"), ("/r?a=b", "/new?c")] {
        let moved = get("moved.example", target, "");
        assert!(moved.contains(&format!("http://moved.example{wanted}\r\n")), "{target}: {moved}");
    }
    let denied = raw(
        proxy.address(0),
        b"PUT /v1/x HTTP/1.1\r\nHost: api.example\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    );
    assert!(denied.starts_with("HTTP/1.1 403") && denied.contains("text/html") && denied.ends_with("no"), "{denied}");
    proxy.wait_log("\"path\":\"/v1/users?x=1\"");
}

#[test]
fn a_trusted_peers_own_words_are_kept() {
    let origin = Origin::start(Version::One);
    let http = "routes: [ { pool: p } ], forwarded: { send: x_forwarded, trust: [ 127.0.0.0/8 ] }";
    let proxy = proxy(&pool("p", &[origin.address], ""), http, "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let request = "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Request-Id: mine\r\nConnection: close\r\n\r\n";
    let headers = told(&raw(proxy.address(0), request.as_bytes()));
    assert!(headers.contains("x-forwarded-for: 6.6.6.6, 127.0.0.1|"), "{headers}");
    assert!(headers.contains("x-forwarded-proto: https|") && headers.contains("x-request-id: mine|"), "{headers}");
    assert!(!headers.contains("|forwarded:"), "{headers}");
}

#[test]
fn what_a_trusted_peer_says_of_tls_is_believed_for_our_own_answers_too() {
    let origin = Origin::start(Version::One);
    for (trust, scheme) in [("127.0.0.0/8", "https"), ("10.0.0.0/8", "http")] {
        let http = format!(
            "routes: [ {{ path: /old, redirect: {{ path: /new }} }}, {{ pool: p }} ], forwarded: {{ trust: [ {trust} ] }}"
        );
        let proxy =
            proxy(&pool("p", &[origin.address], "probe: off, affinity: { by: { cookie: { name: at } } }"), &http, "");
        let get = |path: &str| {
            let head = format!(
                "GET {path} HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: https, http\r\nConnection: close\r\n\r\n"
            );
            raw(proxy.address(0), head.as_bytes())
        };
        let (moved, answer) = (get("/old"), get("/"));
        assert!(moved.contains(&format!("{scheme}://a/new\r\n")), "{trust}: {moved}");
        assert_eq!(answer.contains("; Secure"), scheme == "https", "{trust}: {answer}");
    }
}

#[test]
fn pipelined_requests_are_answered_in_order_over_one_connection() {
    let origin = Origin::start(Version::One);
    let proxy = proxy(&pool("p", &[origin.address], ""), "routes: [ { pool: p } ]", "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let one = |i: u32, close: &str| format!("POST /{i} HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n{close}\r\nabc");
    let all = one(1, "") + &one(2, "") + &one(3, "Connection: close\r\n");
    let answer = raw(proxy.address(0), all.as_bytes());
    let places: Vec<_> = (1..=3).map(|i| answer.find(&format!("x-path: /{i}"))).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{answer}");
}

#[test]
fn a_websocket_is_carried_both_ways_and_head_and_100_continue_work() {
    // A backend by hand: says 101 and sends back what comes.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read(&mut buffer[..1]) {
                        Ok(1) => head.push(buffer[0]),
                        _ => return,
                    }
                }
                let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
                if !head.contains("upgrade: websocket") {
                    return;
                }
                stream
                    .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
                    .unwrap();
                while let Ok(n) = stream.read(&mut buffer) {
                    if n == 0 || stream.write_all(&buffer[..n]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let origin = Origin::start(Version::One);
    let pools = pool("ws", &[address], "") + &pool("p", &[origin.address], "");
    let proxy = proxy(&pools, "routes: [ { path: /ws, pool: ws }, { pool: p } ]", "");
    proxy.wait_health(&address.to_string(), "up", Duration::from_secs(5));
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    // The first frame comes with the request: it waits for the 101.
    stream
        .write_all(
            b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
        )
        .unwrap();
    let mut answer = vec![0; 4096];
    let n = stream.read(&mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer[..n]).starts_with("HTTP/1.1 101"));
    for part in [&b"\x81\x05hello"[..], &[7; 3000]] {
        stream.write_all(part).unwrap();
        let mut back = vec![0; part.len()];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, part);
    }

    let head = raw(proxy.address(0), b"HEAD /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
        .write_all(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n",
        )
        .unwrap();
    let n = stream.read(&mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer[..n]).starts_with("HTTP/1.1 100"));
    stream.write_all(b"hello").unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("HTTP/1.1 200") && rest.contains("x-length: 5"), "{rest}");
}

#[test]
fn slow_heads_and_idle_connections_end_in_their_time() {
    let origin = Origin::start(Version::One);
    let yaml = format!(
        "pools:\n{}\nlisteners: [ {{ bind: 127.0.0.1:0, http: {{ routes: [ {{ pool: p }} ] }}, timeouts: {{ header: 300ms, keepalive: 3s }} }} ]",
        pool("p", &[origin.address], "")
    );
    let proxy = Proxy::start(&yaml);
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let begin = Instant::now();
    let answer = raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost:");
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let of_head = begin.elapsed();
    let begin = Instant::now();
    let answer = raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.matches("HTTP/1.1").count() == 1, "{answer}");
    assert!(begin.elapsed() > of_head, "between requests there is more time: {of_head:?} and {:?}", begin.elapsed());
}

#[test]
fn a_request_has_its_time_and_no_more() {
    // Accepts and says nothing.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let pools = pool("p", &[listener.local_addr().unwrap()], "timeouts: { request: 500ms }, probe: off");
    let proxy = proxy(&pools, "routes: [ { path: /long, pool: p, timeout: 1500ms }, { pool: p } ]", "");
    let mut times = Vec::new();
    for path in ["/", "/long"] {
        let begin = Instant::now();
        let request = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx");
        let answer = raw(proxy.address(0), request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
        times.push(begin.elapsed());
    }
    assert!(times[0] >= Duration::from_millis(500) && times[1] >= Duration::from_millis(1_500), "{times:?}");
    assert!(times[0] < times[1], "{times:?}");
}

#[test]
fn a_cookie_and_a_header_keep_a_client_in_its_place() {
    let origins = [Origin::start(Version::One), Origin::start(Version::One), Origin::start(Version::One)];
    let at: Vec<SocketAddr> = origins.iter().map(|origin| origin.address).collect();
    let pools = pool("c", &at, "affinity: { by: { cookie: { name: place, max_age: 1h } } }")
        + &pool("h", &at, "affinity: { by: { header: X-User } }");
    let proxy = proxy(&pools, "routes: [ { path: /c, pool: c }, { path: /h, pool: h } ]", "");
    for backend in &at {
        proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
    }
    let ask = |path: &str, header: &str| {
        raw(proxy.address(0), format!("GET {path} HTTP/1.1\r\nHost: a\r\n{header}Connection: close\r\n\r\n").as_bytes())
    };
    let served = |path: &str| {
        origins.iter().map(|o| o.seen.lock().unwrap().iter().filter(|(_, p, _)| p == path).count()).collect::<Vec<_>>()
    };
    let first = ask("/c", "");
    let cookie = first
        .lines()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("set-cookie: ").map(|_| line[12..].to_owned()));
    let cookie = cookie.unwrap_or_else(|| panic!("{first}"));
    assert!(
        cookie.starts_with("place=c") && cookie.contains("; Max-Age=3600") && cookie.contains("; HttpOnly"),
        "{cookie}"
    );
    let pair = cookie.split(';').next().unwrap();
    let before = served("/c");
    for _ in 0..20 {
        let again = ask("/c", &format!("Cookie: a=b; {pair}\r\n"));
        assert!(again.starts_with("HTTP/1.1 200") && !again.contains("set-cookie"), "{again}");
    }
    let after = served("/c");
    assert_eq!(after.iter().zip(&before).filter(|(a, b)| a != b).count(), 1, "{before:?} {after:?}");
    (0..20).for_each(|_| drop(ask("/h", "X-User: ann\r\n")));
    assert_eq!(served("/h").iter().filter(|count| **count > 0).count(), 1, "{:?}", served("/h"));
    (0..40).for_each(|i| drop(ask("/h", &format!("X-User: u{i}\r\n"))));
    assert!(served("/h").iter().all(|count| *count > 0), "{:?}", served("/h"));
    // A place that is nobody's is drawn anew.
    let lost = ask("/c", "Cookie: place=mars.00000000\r\n");
    assert!(lost.starts_with("HTTP/1.1 200") && lost.to_ascii_lowercase().contains("set-cookie: place=c"), "{lost}");
}

#[test]
fn the_attributes_of_the_cookie_are_as_configured() {
    let origin = Origin::start(Version::One);
    let cookie = |attributes: &str| {
        let affinity = format!("affinity: {{ by: {{ cookie: {{ name: k{attributes} }} }} }}");
        let proxy = proxy(&pool("p", &[origin.address], &affinity), "routes: [ { pool: p } ]", "");
        proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
        let answer = raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let line = answer.lines().find(|line| line.to_ascii_lowercase().starts_with("set-cookie: "));
        line.unwrap_or_else(|| panic!("{answer}")).split_once("; ").unwrap().1.to_owned()
    };
    assert_eq!(cookie(""), "Path=/; HttpOnly; SameSite=Lax");
    let all = ", path: /a, domain: shop.example, max_age: 90s, secure: true, http_only: false, same_site: strict";
    assert_eq!(cookie(all), "Path=/a; Domain=shop.example; Max-Age=90; Secure; SameSite=Strict");
    assert_eq!(cookie(", same_site: off"), "Path=/; HttpOnly");
}

#[test]
fn h2c_is_served_where_it_is_allowed() {
    let origin = Origin::start(Version::One);
    for allowed in [true, false] {
        let routes = format!("h2c: {allowed}, routes: [ {{ pool: p }} ]");
        let proxy = proxy(&pool("p", &[origin.address], ""), &routes, "");
        proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
        let request = Request::get("http://a.example/").body(empty()).unwrap();
        let answer = runtime().block_on(ask(proxy.address(0), Version::Two, request));
        assert_eq!(answer.is_ok(), allowed, "{:?}", answer.map(|(head, ..)| head));
    }
}

/// A backend by hand, a thread for each connection.
pub fn by_hand(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Reads one request with a length; its head, or nothing at the end.
pub fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0; 1];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return None,
        }
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    Some(head)
}

#[test]
fn the_low_give_way_to_the_high() {
    let held = by_hand(|mut stream| {
        while let Some(head) = read_request(&mut stream) {
            if head.starts_with("get /hold") {
                // Until its client leaves.
                let _ = stream.read(&mut [0; 1]);
                return;
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let routes =
        "routes: [ { path: /low, pool: p, priority: low }, { path: /high, pool: p, priority: high }, { pool: p } ]";
    let proxy = proxy(&pool("p", &[held], "probe: off, limits: { max_connections: 10 }"), routes, "");
    let ask = |path: &str| {
        let text =
            raw(proxy.address(0), format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes());
        text.get(9..12).unwrap_or("none").to_owned()
    };
    let mut holding = Vec::new();
    let mut hold = |count: usize| {
        for _ in 0..count {
            let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
            stream.write_all(b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            holding.push(stream);
        }
        let wanted = holding.len() as u64;
        eventually("they are held", Duration::from_secs(5), || {
            (proxy.status()["pools"][0]["connections"]["now"] == wanted).then_some(())
        });
    };
    hold(6);
    assert_eq!([ask("/low"), ask("/"), ask("/high")], ["200", "200", "200"]);
    hold(1);
    assert_eq!([ask("/low"), ask("/"), ask("/high")], ["503", "200", "200"]);
    hold(2);
    assert_eq!([ask("/low"), ask("/"), ask("/high")], ["503", "503", "200"]);
}

#[test]
fn a_post_is_sent_twice_only_with_its_key() {
    // Executes whatever it gets, and ends without a word.
    let dying = by_hand(|mut stream| drop(read_request(&mut stream)));
    let origin = Origin::start(Version::One);
    let routes = "routes: [ { pool: p, idempotency_key: Idempotency-Key } ]";
    let mut seen = Vec::new();
    for header in ["", "Idempotency-Key: 1\r\n"] {
        let pools = format!(
            "  p: {{ cells: {{ a: [ '{dying}' ], b: {{ tier: 1, backends: [ '{}' ] }} }}, probe: off }}\n",
            origin.address
        );
        let proxy = proxy(&pools, routes, "");
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n{header}Connection: close\r\n\r\nx");
        seen.push(raw(proxy.address(0), request.as_bytes()).get(9..12).unwrap_or("none").to_owned());
    }
    assert_eq!(seen, ["502", "200"]);
}

#[test]
fn posts_that_are_executed_and_then_reset_are_never_sent_twice() {
    let executed: Arc<Mutex<Vec<String>>> = Arc::default();
    let list = executed.clone();
    // Answers the first request of a connection, and executes the second without an answer.
    let backend = move |mut stream: TcpStream| {
        for turn in 0.. {
            let Some(head) = read_request(&mut stream) else { return };
            let id = head.lines().find_map(|line| line.strip_prefix("x-id: ")).unwrap_or_default().to_owned();
            list.lock().unwrap().push(id);
            if turn == 1 {
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                return;
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    };
    let backends = [by_hand(backend.clone()), by_hand(backend)];
    let proxy = proxy(&pool("p", &backends, "probe: off"), "routes: [ { pool: p } ]", "");
    let mut statuses = std::collections::BTreeMap::new();
    let mut stream: Option<TcpStream> = None;
    for i in 0..1_000 {
        let mut client = stream.take().unwrap_or_else(|| {
            let stream = TcpStream::connect(proxy.address(0)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream
        });
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\nX-Id: {i}\r\nContent-Length: 3\r\n\r\nabc");
        client.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let mut part = [0; 2048];
        let whole = |answer: &[u8]| {
            let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
            let (head, body) = text.split_once("\r\n\r\n")?;
            let length: usize = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())?;
            (body.len() >= length).then(|| (head[9..12].to_owned(), head.contains("connection: close")))
        };
        let (status, close) = loop {
            if let Some(done) = whole(&answer) {
                break done;
            }
            let n = client.read(&mut part).unwrap_or_else(|error| panic!("request {i}: {error}"));
            assert!(n > 0, "request {i} had no answer: {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&part[..n]);
        };
        *statuses.entry(status).or_insert(0) += 1;
        if !close {
            stream = Some(client);
        }
    }
    let mut ids = executed.lock().unwrap().clone();
    let all = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(all, ids.len(), "some were executed twice");
    assert!(statuses.keys().all(|status| ["200", "502", "503"].contains(&status.as_str())), "{statuses:?}");
    assert!(statuses.get("200") > Some(&300) && statuses.contains_key("502"), "both kinds were met: {statuses:?}");
}

#[test]
fn connections_to_backends_are_used_again_and_a_reload_keeps_them() {
    let origin = Origin::start(Version::One);
    let proxy = proxy(&pool("p", &[origin.address], ""), "routes: [ { pool: p } ]", "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let connects = || proxy.metric("sailover_attempts_total", &["result=\"ok\""]);
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut ask = |path: &str| {
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\nx-answer: length\r\n\r\n").as_bytes()).unwrap();
        let mut buffer = [0; 8192];
        let n = stream.read(&mut buffer).unwrap();
        assert!(buffer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&buffer[..n]));
    };
    (0..10).for_each(|_| ask("/"));
    assert_eq!(connects(), 1.0);
    assert!(proxy.command(&["reload"]).status.success());
    (0..10).for_each(|_| ask("/"));
    assert_eq!(connects(), 1.0, "the engine outlives the table");
    eventually("the requests are counted", Duration::from_secs(5), || {
        (proxy.metric("sailover_requests_total", &["class=\"2xx\""]) >= 20.0).then_some(())
    });
}

/// Echoes under the name of a WebSocket.
fn echo_socket() -> SocketAddr {
    by_hand(|mut stream| {
        let Some(head) = read_request(&mut stream) else { return };
        assert!(head.contains("upgrade: websocket"));
        let _ =
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..read]).is_err() {
                return;
            }
        }
    })
}

#[test]
fn reloads_cut_no_stream_and_fail_no_request() {
    reloaded(25);
}

#[test]
#[ignore = "takes minutes; `make show` runs it"]
fn five_hundred_reloads_cut_no_stream_and_fail_no_request() {
    reloaded(500);
}

fn reloaded(times: usize) {
    let (one, two, socket) = (Origin::start(Version::One), Origin::start(Version::Two), echo_socket());
    let yaml = |turn: usize| {
        let pools = pool("one", &[one.address], "")
            + &pool("two", &[two.address], "http: { version: 2 }")
            + &pool("ws", &[socket], "probe: off");
        let extra = format!("{{ path: /turn{turn}, respond: {{ body: '{turn}' }} }}");
        format!(
            "pools:\n{pools}\nlisteners: [ {{ bind: 127.0.0.1:0, http: {{ h2c: true, routes: [ {extra}, {{ path: /1, pool: one }}, {{ path: /2, pool: two }}, {{ path: /ws, pool: ws }} ] }} }} ]"
        )
    };
    let proxy = Proxy::start(&yaml(0));
    for backend in [one.address, two.address] {
        proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
    }
    let address = proxy.address(0);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = |stop: &std::sync::atomic::AtomicBool| stop.load(std::sync::atomic::Ordering::Relaxed);
    let mut threads = Vec::new();
    for _ in 0..4 {
        let stop = stop.clone();
        threads.push(std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream
                .write_all(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
                .unwrap();
            let mut head = Vec::new();
            let mut byte = [0; 1];
            while !head.ends_with(b"\r\n\r\n") {
                stream.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            let mut turns = 0u64;
            while !stopped(&stop) {
                stream.write_all(&turns.to_be_bytes()).unwrap();
                let mut back = [0; 8];
                stream.read_exact(&mut back).expect("the stream goes on");
                assert_eq!(back, turns.to_be_bytes());
                turns += 1;
            }
            turns
        }));
    }
    let load = stop.clone();
    threads.push(std::thread::spawn(move || {
        runtime().block_on(async move {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let (sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
            let driver = tokio::spawn(connection);
            let mut tasks = tokio::task::JoinSet::new();
            for i in 0..4 {
                let (mut sender, load) = (sender.clone(), load.clone());
                tasks.spawn(async move {
                    let mut turns = 0u64;
                    while !stopped(&load) {
                        let request = Request::get(format!("http://a/{}/x", 1 + i % 2)).body(empty()).unwrap();
                        let answer = sender.send_request(request).await.expect("an answer over the one connection");
                        assert_eq!(collect(answer).await.unwrap().0.status, 200);
                        turns += 1;
                    }
                    turns
                });
            }
            let mut all = 0;
            while let Some(turns) = tasks.join_next().await {
                all += turns.unwrap();
            }
            assert!(!driver.is_finished(), "one connection carried them all");
            all
        })
    }));
    for turn in 1..=times {
        proxy.write(&yaml(turn));
        assert!(proxy.command(&["reload"]).status.success());
        let answer =
            raw(address, format!("GET /turn{turn} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes());
        assert!(answer.ends_with(&format!("\r\n\r\n{turn}")), "the new route is there at once: {answer}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let turns: Vec<u64> = threads.into_iter().map(|thread| thread.join().expect("nothing was cut")).collect();
    assert!(turns.iter().all(|turns| *turns > times as u64), "{turns:?}");
}

#[test]
fn a_stop_says_goodbye_to_idle_and_busy_connections_of_both_versions() {
    let held = by_hand(|mut stream| {
        while let Some(head) = read_request(&mut stream) {
            if head.starts_with("get /slow") {
                std::thread::sleep(Duration::from_millis(2_500));
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let rest = "shutdown: { announce: 0s, drain: 20s }";
    let proxy = proxy(&pool("p", &[held], "probe: off"), "h2c: true, routes: [ { pool: p } ]", rest);
    let address = proxy.address(0);
    let mut idle = TcpStream::connect(address).unwrap();
    idle.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    idle.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut answer = [0; 1024];
    assert!(idle.read(&mut answer).unwrap() > 0);
    let busy = std::thread::spawn(move || raw(address, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"));
    runtime().block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(connection);
        let slow = sender.send_request(Request::get("http://a/slow").body(empty()).unwrap());
        tokio::pin!(slow);
        assert!(tokio::time::timeout(Duration::from_millis(200), &mut slow).await.is_err(), "it is under way");
        proxy.signal(rustix::process::Signal::TERM);
        let answer = slow.await.expect("what was under way is answered");
        assert_eq!(collect(answer).await.unwrap().1, "ok");
        driver.await.unwrap().expect("and then the connection ends by the book");
    });
    assert_eq!(idle.read(&mut answer).unwrap(), 0, "an idle connection is closed");
    let busy = busy.join().unwrap();
    assert!(busy.starts_with("HTTP/1.1 200") && busy.to_ascii_lowercase().contains("connection: close"), "{busy}");
}

#[test]
fn a_burst_of_denials_is_told_of_and_nothing_else() {
    let denying = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let switch = denying.clone();
    let backend = by_hand(move |mut stream| {
        while read_request(&mut stream).is_some() {
            let status = if switch.load(std::sync::atomic::Ordering::Relaxed) { "403 No" } else { "200 OK" };
            let _ = stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes());
        }
    });
    let proxy = proxy(&pool("p", &[backend], ""), "routes: [ { pool: p } ]", "");
    proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
    let ask = || raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    (0..100).for_each(|_| assert!(ask().starts_with("HTTP/1.1 200")));
    assert_eq!(proxy.metric("sailover_denial_bursts_total", &[]), 0.0);
    denying.store(true, std::sync::atomic::Ordering::Relaxed);
    (0..20).for_each(|_| assert!(ask().starts_with("HTTP/1.1 403")));
    assert!(proxy.metric("sailover_denial_bursts_total", &[]) >= 1.0);
    proxy.wait_log("a burst of 401, 403 or 429");
    assert_eq!(proxy.health(&backend.to_string()), "up");
}
