//! TLS towards backends, under both faces and in probes.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio_rustls::TlsAcceptor;

use crate::support::backend::get;
use crate::support::eventually;
use crate::support::proxy::{Directory, Proxy};
use crate::tls::Authority;

/// A backend under TLS that answers with its name and with what it knows of the request; ends with its thread's runtime.
struct Secure {
    address: SocketAddr,
    _stop: tokio::sync::oneshot::Sender<()>,
}

#[derive(Clone)]
enum Manner {
    /// Serves with this.
    Serve(Arc<ServerConfig>),
    /// Accepts, and says nothing.
    Silent,
    /// Speaks HTTP without TLS.
    Plain,
}

impl Secure {
    fn start(name: &'static str, manner: Manner) -> Secure {
        let (tell, told) = std::sync::mpsc::channel();
        let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
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
                    let manner = manner.clone();
                    tokio::spawn(async move {
                        match manner {
                            Manner::Silent => std::future::pending::<()>().await,
                            Manner::Plain => {
                                let service = service_fn(move |request| answer(name, "http", request));
                                let _ = hyper::server::conn::http1::Builder::new()
                                    .serve_connection(TokioIo::new(stream), service)
                                    .await;
                            }
                            Manner::Serve(config) => {
                                let Ok(stream) = TlsAcceptor::from(config).accept(stream).await else { return };
                                let two = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                                let version = if two { "h2" } else { "h1" };
                                let service = service_fn(move |request| answer(name, version, request));
                                let io = TokioIo::new(stream);
                                let _ = if two {
                                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                                    server.serve_connection(io, service).await
                                } else {
                                    hyper::server::conn::http1::Builder::new().serve_connection(io, service).await
                                };
                            }
                        }
                    });
                }
            });
        });
        Secure { address: told.recv().unwrap(), _stop: stop }
    }
}

async fn answer(
    name: &str,
    version: &str,
    request: http::Request<hyper::body::Incoming>,
) -> Result<http::Response<Full<bytes::Bytes>>, std::convert::Infallible> {
    let health = request.uri().path() == "/grpc.health.v1.Health/Check";
    if request.uri().path() == "/told" {
        let told = request.headers().iter().map(|(name, value)| format!("{name}: {}|", value.to_str().unwrap_or("?")));
        return Ok(http::Response::new(Full::new(bytes::Bytes::from(told.collect::<String>()))));
    }
    if health {
        use http_body_util::BodyExt;
        let asked = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        if asked.ends_with(b"nobody") {
            return Ok(http::Response::builder().header("grpc-status", "5").body(Full::default()).unwrap());
        }
        let body = bytes::Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]);
        let answer = http::Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
        return Ok(answer.body(Full::new(body)).unwrap());
    }
    Ok(http::Response::new(Full::new(bytes::Bytes::from(format!("{name} {version}")))))
}

/// A server's side with this pair.
fn serving((certificate, key): (String, String), alpn: &[&str], clients: Option<&Authority>) -> Manner {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        }
    };
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Manner::Serve(Arc::new(config))
}

/// A pair by hand, for what [`Authority::issue`] does not make.
fn special(authority: &Authority, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(vec!["shop.internal".to_owned()]).unwrap();
    change(&mut parameters);
    (parameters.signed_by(&key, &authority.issuer).unwrap().pem(), key.serialize_pem())
}

fn cause(proxy: &Proxy, backend: SocketAddr) -> Option<String> {
    let status = proxy.status();
    let pools = status["pools"].as_array()?.clone();
    let backends = pools.iter().flat_map(|pool| pool["cells"].as_array().unwrap().clone());
    let backends = backends.flat_map(|cell| cell["backends"].as_array().unwrap().clone());
    let known = backends.into_iter().find(|known| known["address"] == backend.to_string())?;
    (known["health"] != "up").then(|| known["cause"]["kind"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn ten_kinds_of_bad_certificates_are_refused_by_their_name_and_cost_nobody_an_answer() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let directory = Directory::new();
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    let good = serving(authority.issue(&["shop.internal"], 30), &["http/1.1"], None);
    let day = Duration::from_secs(24 * 3_600);
    let now = std::time::SystemTime::now();
    let self_signed = {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec!["shop.internal".to_owned()]).unwrap();
        (parameters.self_signed(&key).unwrap().pem(), key.serialize_pem())
    };
    let plain = |pair| serving(pair, &["http/1.1"], None);
    let kinds: Vec<(&str, Manner, &[&str])> = vec![
        ("expired", plain(authority.issue(&["shop.internal"], -1)), &["expired"]),
        ("not yet valid", plain(special(&authority, |p| p.not_before = (now + day).into())), &["not yet valid"]),
        ("another name", plain(authority.issue(&["other.internal"], 30)), &["wrong name"]),
        ("a wildcard that does not reach", plain(authority.issue(&["*.shop.internal"], 30)), &["wrong name"]),
        ("no name at all", plain(special(&authority, |p| p.subject_alt_names.clear())), &["wrong name"]),
        ("another authority", plain(stranger.issue(&["shop.internal"], 30)), &["unknown issuer"]),
        ("signed by itself", plain(self_signed), &["unknown issuer", "bad certificate"]),
        (
            "for clients only",
            plain(special(&authority, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth])),
            &["bad certificate"],
        ),
        ("no TLS at all", Manner::Plain, &["handshake failed"]),
        ("silent", Manner::Silent, &["handshake silent"]),
    ];
    for face in ["tcp: shop", "http: { routes: [ { pool: shop } ] }"] {
        for (what, manner, wanted) in &kinds {
            let what = format!("{what}, {face}");
            let (bad, fine) = (Secure::start("bad", manner.clone()), Secure::start("good", good.clone()));
            let proxy = Proxy::start(&format!(
                "pools: {{ shop: {{ cells: {{ a: [ '{}' ], b: [ '{}' ] }}, tls: {{ server_name: shop.internal, ca: {}/ca.pem }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, {face} }} ]",
                bad.address,
                fine.address,
                directory.0.display()
            ));
            for backend in [bad.address, fine.address] {
                proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
            }
            let ask = || {
                let answer = get(proxy.address(0)).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(answer.contains("good"), "{what}: {answer}");
            };
            (0..30).for_each(|_| ask());
            // Silence is judged some time after the race that went round it.
            let seen = eventually(&format!("{what} is doubted"), Duration::from_secs(10), || {
                ask();
                cause(&proxy, bad.address)
            });
            assert!(wanted.contains(&seen.as_str()), "{what}: {seen}, not {wanted:?}");
        }
    }
}

#[test]
fn http_and_tcp_go_under_tls_with_a_certificate_of_ours_and_probes_verify_the_same_way() {
    let authority = Authority::new();
    let directory = Directory::new();
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    authority.write(&directory.0, "own", &["edge.internal"], 30);
    let server = |alpn: &[&str]| serving(authority.issue(&["shop.internal"], 30), alpn, Some(&authority));
    let (one, two) = (Secure::start("one", server(&["http/1.1"])), Secure::start("two", server(&["h2", "http/1.1"])));
    let at = directory.0.display();
    let tls =
        format!("tls: {{ server_name: shop.internal, ca: {at}/ca.pem, certificate: {at}/own.pem, key: {at}/own.key }}");
    for probe in [
        "{ http: { path: /, body: o } }",
        "{ tcp: {} }",
        "{ tls: { server_name: shop.internal, verify: true, ca: CA } }",
    ] {
        // A probe that is a handshake shows no certificate of ours, and TLS 1.3 tells it so too late to matter.
        let probe = probe.replace("CA", &format!("{at}/ca.pem"));
        let proxy = Proxy::start(&format!(
            "pools:\n  one: {{ cells: {{ a: [ '{}' ] }}, {tls}, probe: {probe} }}\n  two: {{ cells: {{ a: [ '{}' ] }}, {tls}, probe: {probe} }}\n\
             listeners:\n  - {{ bind: 127.0.0.1:0, tcp: one }}\n  - {{ bind: 127.0.0.2:0, http: {{ routes: [ {{ pool: two }} ] }} }}\n  - {{ bind: 127.0.0.3:0, http: {{ routes: [ {{ pool: one }} ] }} }}",
            one.address, two.address
        ));
        for backend in [one.address, two.address] {
            proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
        }
        let answers: Vec<String> = (0..3).map(|i| get(proxy.address(i)).unwrap()).collect();
        assert!(
            answers[0].ends_with("one h1") && answers[1].contains("two h2") && answers[2].contains("one h1"),
            "{answers:?}"
        );
    }
    // gRPC's own check, which is HTTP/2 by nature; the expiry of the certificate is known from it.
    let proxy = Proxy::start(&format!(
        "pools: {{ two: {{ cells: {{ a: [ '{}' ] }}, {tls}, probe: {{ grpc: {{ service: shop }} }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, tcp: two }} ]",
        two.address
    ));
    proxy.wait_health(&two.address.to_string(), "up", Duration::from_secs(5));
    assert!(proxy.metric("sailover_certificate_expiry_timestamp_seconds", &[]) > 1e9);
}

/// Where our own has ended every backend refuses us at once.
#[test]
fn the_end_of_our_own_certificate_is_told_before_it_comes_and_refused_after_it() {
    let (authority, directory) = (Authority::new(), Directory::new());
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    authority.write(&directory.0, "own", &["edge.internal"], 5);
    authority.write(&directory.0, "ended", &["edge.internal"], -3);
    let at = directory.0.display();
    let yaml = |own: &str| {
        format!(
            "pools: {{ p: {{ cells: {{ a: [ 127.0.0.1:1 ] }}, probe: off, \
             tls: {{ server_name: a, ca: {at}/ca.pem, certificate: {at}/{own}.pem, key: {at}/{own}.key }} }} }}\n\
             listeners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]"
        )
    };
    let proxy = Proxy::start(&yaml("own"));
    assert_eq!(proxy.status()["pools"][0]["client_certificate"]["days"], 5);
    let labels = ["pool=\"p\",certificate=\"client\""];
    assert!(proxy.metric("sailover_certificate_expiry_timestamp_seconds", &labels) > 1e9);
    let said = String::from_utf8_lossy(&proxy.command(&["status"]).stdout).into_owned();
    assert!(said.contains("the certificate that its backends are shown expires in 5 days"), "{said}");

    proxy.write(&yaml("ended"));
    let refused = proxy.command(&["reload"]);
    assert!(!refused.status.success());
    proxy.wait_log("is valid from ");
    assert_eq!(proxy.status()["pools"][0]["client_certificate"]["days"], 5, "the one that serves goes on");
}

#[test]
fn a_probe_under_tls_sees_the_certificate_that_traffic_would_see() {
    let authority = Authority::new();
    let directory = Directory::new();
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    let bad = Secure::start("bad", serving(authority.issue(&["other.internal"], 30), &[], None));
    let yaml = |verify: &str| {
        format!(
            "pools: {{ p: {{ cells: {{ a: [ '{}' ] }}, probe: {{ http: {{}} }}, tls: {{ server_name: shop.internal, {verify} }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]",
            bad.address
        )
    };
    let judged = yaml(&format!("ca: {}/ca.pem", directory.0.display()));
    let proxy = Proxy::start(&judged);
    proxy.wait_health(&bad.address.to_string(), "down", Duration::from_secs(5));
    assert_eq!(cause(&proxy, bad.address).as_deref(), Some("wrong name"));
    // Whoever does not want to be judged must say so.
    proxy.write(&yaml("verify: false"));
    assert!(proxy.command(&["reload"]).status.success());
    eventually("it is let in", Duration::from_secs(10), || get(proxy.address(0)).is_ok().then_some(()));
}

#[test]
fn a_proxy_header_goes_before_the_handshake() {
    // A backend by hand that wants a header and then a ClientHello.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            use std::io::Read;
            let mut first = vec![0; 64];
            let mut stream = stream.unwrap();
            let n = stream.read(&mut first).unwrap_or(0);
            if n > 0 {
                let mut rest = vec![0; 512];
                let more = if n < 60 { stream.read(&mut rest).unwrap_or(0) } else { 0 };
                let _ = tell.send([&first[..n], &rest[..more]].concat());
            }
        }
    });
    for face in ["tcp: p", "http: { routes: [ { pool: p } ] }"] {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: [ '{address}' ] }}, probe: off, send_proxy: v1, tls: {{ server_name: x.example, verify: false }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, {face} }} ]"
        ));
        let mut client = std::net::TcpStream::connect(proxy.address(0)).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        // The first proxy may have tried again when its client had what it wanted.
        let whole = |got: &Vec<u8>| got.windows(3).any(|three| three == [22, 3, 1]);
        let got = std::iter::from_fn(|| told.recv_timeout(Duration::from_secs(5)).ok()).find(whole);
        let got = got.unwrap_or_else(|| panic!("{face}: no header with a handshake behind it"));
        assert!(got.starts_with(b"PROXY TCP4 127.0.0.1 "), "{face}: {got:?}");
        let end = got.windows(2).position(|two| two == b"\r\n").unwrap() + 2;
        assert_eq!(got.get(end..end + 2), Some(&[22, 3][..]), "{face}: a handshake follows");
    }
}

#[test]
fn a_grpc_probe_asks_for_its_service() {
    let authority = Authority::new();
    let directory = Directory::new();
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    let backend = Secure::start("g", serving(authority.issue(&["shop.internal"], 30), &["h2"], None));
    for (service, health) in [("", "up"), ("shop", "up"), ("nobody", "down")] {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: [ '{}' ] }}, tls: {{ server_name: shop.internal, ca: {}/ca.pem }}, probe: {{ grpc: {{ service: '{service}' }} }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]",
            backend.address,
            directory.0.display()
        ));
        proxy.wait_health(&backend.address.to_string(), health, Duration::from_secs(5));
    }
}

#[test]
fn the_subject_of_a_client_is_told_and_cannot_be_claimed() {
    let authority = Authority::new();
    let directory = Directory::new();
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    let pair = authority.write(&directory.0, "edge", &["edge.example"], 30);
    let plain = Secure::start("p", Manner::Plain);
    let at = directory.0.display();
    let told = |header: &str, identity: Option<(String, String)>| {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: [ '{}' ] }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, http: {{ routes: [ {{ pool: p }} ] }}, tls: {{ certificates: [ {pair} ], client: {{ ca: {at}/ca.pem, require: false{header} }} }} }} ]",
            plain.address
        ));
        proxy.wait_health(&plain.address.to_string(), "up", Duration::from_secs(5));
        let client = authority.client_of(&[&rustls::version::TLS13], identity, |_| {});
        let mut stream = crate::tls::connect(&client, &proxy, "edge.example").unwrap();
        stream.write_all(b"GET /told HTTP/1.1\r\nHost: a\r\nX-Client: CN=liar\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        let _ = std::io::Read::read_to_string(&mut stream, &mut answer);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer
    };
    let known = special(&authority, |p| p.distinguished_name.push(rcgen::DnType::CommonName, "ann"));
    assert!(told(", header: X-Client", Some(known.clone())).contains("x-client: CN=ann|"));
    assert!(!told(", header: X-Client", None).contains("x-client"), "what a client claims is taken out");
    assert!(told("", Some(known)).contains("x-client: CN=liar|"), "without the key it is a header like others");
}
