//! TLS at its edges: ends without a word, certificates that end, handshakes that fail for a client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{HandshakeKind, ServerConfig, ServerConnection, StreamOwned};

use crate::http::by_hand;
use crate::support::backend::{Backend, get};
use crate::support::eventually;
use crate::support::proxy::{Directory, Proxy};
use crate::tls::{Authority, Tls, connect};

const LONG: usize = 1_000_000;

type Server = StreamOwned<ServerConnection, TcpStream>;

fn server((certificate, key): (String, String)) -> Arc<ServerConfig> {
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_no_client_auth().with_single_cert(chain, key).unwrap())
}

fn under_tls(config: &Arc<ServerConfig>, stream: TcpStream) -> Option<Server> {
    let mut stream = Server::new(ServerConnection::new(config.clone()).unwrap(), stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).ok()?;
    }
    Some(stream)
}

/// Answers one request of HTTP/1.1 with `body`.
fn answer(stream: &mut (impl Read + Write), body: &str) {
    let mut request = [0; 2_048];
    let mut came = 0;
    while !request[..came].ends_with(b"\r\n\r\n") {
        match stream.read(&mut request[came..]) {
            Ok(n) if n > 0 => came += n,
            _ => return,
        }
    }
    let length = body.len();
    let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    let _ = stream.flush();
}

fn authority(directory: &Directory) -> Authority {
    let authority = Authority::new();
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    authority
}

#[test]
fn what_came_before_an_end_without_a_word_is_passed_on() {
    let directory = Directory::new();
    let authority = authority(&directory);
    let config = server(authority.issue(&["shop.internal"], 30));
    let long = by_hand(move |stream| {
        let Some(mut stream) = under_tls(&config, stream) else { return };
        let mut asked = [0; 1];
        if stream.read_exact(&mut asked).is_ok() {
            stream.write_all(&vec![b'x'; LONG]).unwrap();
            stream.flush().unwrap();
            let _ = stream.sock.shutdown(std::net::Shutdown::Write);
            let _ = stream.sock.read(&mut asked);
        }
    });
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ '{long}' ] }}, tls: {{ server_name: shop.internal, ca: {}/ca.pem }} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]",
        directory.0.display()
    ));
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.write_all(b"?").unwrap();
    let (mut all, mut part) = (0, vec![0; 8 << 10]);
    loop {
        match client.read(&mut part) {
            Ok(0) => break,
            Ok(n) => all += n,
            Err(error) => panic!("{error} after {all} bytes"),
        }
        // It reads slowly, so that the end comes long before all of it is read.
        std::thread::park_timeout(Duration::from_millis(1));
    }
    assert_eq!(all, LONG);
    drop(client);
    eventually("it ends as any other", Duration::from_secs(5), || {
        (proxy.metric("sailover_connections_total", &["end=\"backend_closed\""]) == 1.0).then_some(())
    });

    // The other way round: a client that says all it has, and closes.
    let (tell, told) = std::sync::mpsc::channel();
    let sink = by_hand(move |mut stream| {
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all).is_ok();
        if !all.is_empty() {
            let _ = tell.send((all.len(), ended));
        }
    });
    let pair = authority.write(&directory.0, "edge", &["edge.example"], 30);
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ '{sink}' ] }} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, tcp: p, tls: {{ certificates: [ {pair} ] }} }} ]"
    ));
    let client = authority.client_of(&[&rustls::version::TLS13], None, |_| {});
    let mut stream: Tls = connect(&client, &proxy, "edge.example").unwrap();
    stream.write_all(&vec![b'x'; LONG]).unwrap();
    stream.flush().unwrap();
    stream.sock.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok((LONG, true)));
}

/// Shows one certificate, and another once it is told to.
#[derive(Debug)]
struct Changes([Arc<CertifiedKey>; 2], Arc<AtomicBool>);

impl ResolvesServerCert for Changes {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0[usize::from(self.1.load(Relaxed))].clone())
    }
}

#[test]
fn a_probe_judges_the_certificate_each_time() {
    let directory = Directory::new();
    let authority = authority(&directory);
    let changed = Arc::new(AtomicBool::new(false));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certified = |(certificate, key): (String, String)| {
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        Arc::new(CertifiedKey::from_der(chain, key, &provider).unwrap())
    };
    let pairs = [authority.issue(&["shop.internal"], 30), authority.issue(&["other.internal"], 30)].map(certified);
    let resolver = Arc::new(Changes(pairs, changed.clone()));
    // The same configuration all the time, and with it the same keys of its tickets.
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
    config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
    let config = Arc::new(config);
    let resumed = Arc::new(AtomicU32::new(0));
    let backend = by_hand({
        let resumed = resumed.clone();
        move |stream| {
            let Some(mut stream) = under_tls(&config, stream) else { return };
            resumed.fetch_add(u32::from(stream.conn.handshake_kind() == Some(HandshakeKind::Resumed)), Relaxed);
            answer(&mut stream, "ready");
        }
    });
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ '{backend}' ] }}, probe: {{ interval: 100ms, http: {{ body: ready }} }}, \
         tls: {{ server_name: shop.internal, ca: {}/ca.pem }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]",
        directory.0.display()
    ));
    proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
    let probes = || proxy.metric("sailover_probes_total", &["result=\"ok\""]);
    eventually("it is probed some more", Duration::from_secs(5), || (probes() > 3.0).then_some(()));
    assert_eq!(resumed.load(Relaxed), 0, "each is a whole handshake");
    changed.store(true, Relaxed);
    proxy.wait_health(&backend.to_string(), "down", Duration::from_secs(5));
    assert_eq!(proxy.backend(&backend.to_string())["cause"]["kind"], "wrong name");
}

#[test]
fn a_ticket_opens_nothing_once_its_certificate_has_ended() {
    let directory = Directory::new();
    let authority = authority(&directory);
    let pair = authority.write(&directory.0, "edge", &["edge.example"], 30);
    let at = directory.0.display();
    let backend = Backend::start("a");
    for face in ["tcp: p", "http: { routes: [ { pool: p } ] }"] {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: [ '{}' ] }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, {face}, \
             tls: {{ certificates: [ {pair} ], client: {{ ca: {at}/ca.pem, require: true }} }} }} ]",
            backend.address
        ));
        proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec!["client".to_owned()]).unwrap();
        // Whole seconds are all that a certificate knows.
        let end = SystemTime::now() + Duration::from_secs(5);
        parameters.not_after = end.into();
        let identity = (parameters.signed_by(&key, &authority.issuer).unwrap().pem(), key.serialize_pem());
        let client = authority.client_of(&[&rustls::version::TLS13], Some(identity), |_| {});
        let ask = || {
            let mut stream = connect(&client, &proxy, "edge.example").ok()?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            let resumed = stream.conn.handshake_kind() == Some(HandshakeKind::Resumed);
            answer.starts_with(b"HTTP/1.1 200").then_some(resumed)
        };
        assert_eq!(ask(), Some(false), "{face}");
        assert_eq!(ask(), Some(true), "{face}");
        eventually("nobody gets in", Duration::from_secs(12), || ask().is_none().then_some(()));
        assert!(SystemTime::now() + Duration::from_secs(1) >= end, "{face}: and not before its end");
        assert_eq!(ask(), None, "{face}");
    }
}

/// Backends that know whom they serve close after a PROXY header that names somebody else.
#[test]
fn handshakes_that_fail_for_one_client_move_no_backend() {
    let directory = Directory::new();
    let authority = authority(&directory);
    let config = server(authority.issue(&["shop.internal"], 30));
    let backends: Vec<SocketAddr> = (0..2)
        .map(|_| {
            let config = config.clone();
            by_hand(move |stream| {
                let mut line = String::new();
                let mut reader = BufReader::with_capacity(1, stream.try_clone().unwrap());
                if reader.read_line(&mut line).is_err() || line.contains(" 127.0.1.66 ") {
                    return;
                }
                if let Some(mut stream) = under_tls(&config, stream) {
                    answer(&mut stream, "fine");
                }
            })
        })
        .collect();
    for face in ["tcp: p", "http: { routes: [ { pool: p } ] }"] {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: [ '{}' ], b: [ '{}' ] }}, send_proxy: v1, probe: off, \
             tls: {{ server_name: shop.internal, ca: {}/ca.pem }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, {face} }} ]",
            backends[0],
            backends[1],
            directory.0.display()
        ));
        let begin = Instant::now();
        let mut refused = 0;
        while begin.elapsed() < Duration::from_secs(3) {
            assert!(get(proxy.address(0)).unwrap().contains("fine"), "{face}");
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from(([127, 0, 1, 66], 0)).into()).unwrap();
            socket.connect(&proxy.address_cached().into()).unwrap();
            let mut stream: TcpStream = socket.into();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            refused += u32::from(!answer.starts_with(b"HTTP/1.1 200"));
        }
        assert!(refused > 5, "{face}: {refused}");
        for to in ["suspect", "down"] {
            let moved = proxy.metric("sailover_transitions_total", &[&format!("to=\"{to}\"")]);
            assert_eq!(moved, 0.0, "{face}: {to}\n{}", proxy.log());
        }
    }
}

/// They take long, but not longer than they ever did: nobody is blamed, and little is tried twice.
#[test]
fn handshakes_that_are_slow_by_nature_are_learned() {
    let directory = Directory::new();
    let authority = authority(&directory);
    let config = server(authority.issue(&["shop.internal"], 30));
    let shaken = Arc::new(AtomicU32::new(0));
    let backends: Vec<SocketAddr> = (0..2)
        .map(|_| {
            let (config, shaken) = (config.clone(), shaken.clone());
            by_hand(move |stream| {
                // Not for the probe, which says nothing.
                if stream.peek(&mut [0; 1]).is_ok_and(|n| n > 0) {
                    shaken.fetch_add(1, Relaxed);
                    std::thread::sleep(Duration::from_millis(600));
                    if let Some(mut stream) = under_tls(&config, stream) {
                        answer(&mut stream, "fine");
                    }
                }
            })
        })
        .collect();
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ '{}' ], b: [ '{}' ] }}, tls: {{ server_name: shop.internal, ca: {}/ca.pem }} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]",
        backends[0],
        backends[1],
        directory.0.display()
    ));
    backends.iter().for_each(|backend| proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5)));
    let address = proxy.address(0);
    let round = || {
        let clients: Vec<_> = (0..16).map(|_| std::thread::spawn(move || get(address))).collect();
        clients.into_iter().for_each(|client| assert!(client.join().unwrap().unwrap().contains("fine")));
    };
    (0..4).for_each(|_| round());
    shaken.store(0, Relaxed);
    (0..2).for_each(|_| round());
    let (shaken, down) = (shaken.load(Relaxed), proxy.metric("sailover_transitions_total", &["to=\"down\""]));
    assert!(shaken <= 40 && down == 0.0, "{shaken} handshakes for 32 clients, {down} times down\n{}", proxy.log());
}

#[test]
fn an_end_in_a_handshake_is_no_refusal_of_the_connection() {
    // Reads the hello and closes.
    let closes = by_hand(|mut stream| drop(stream.read(&mut [0; 4_096])));
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ '{closes}' ] }}, tls: {{ server_name: x.example, verify: false }} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, tcp: p }} ]"
    ));
    proxy.wait_health(&closes.to_string(), "up", Duration::from_secs(5));
    eventually("it is down", Duration::from_secs(10), || {
        let _ = get(proxy.address(0));
        (proxy.health(&closes.to_string()) == "down").then_some(())
    });
    let cause = &proxy.backend(&closes.to_string())["cause"];
    assert_eq!((&cause["kind"], &cause["depth"]), (&"handshake failed".into(), &"first byte".into()));
}

#[test]
fn beginnings_beyond_their_half_wait_for_a_place() {
    let directory = Directory::new();
    let authority = authority(&directory);
    let pair = authority.write(&directory.0, "edge", &["edge.example"], 30);
    let backend = Backend::start("a");
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ '{}' ] }} }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, tcp: p, \
         tls: {{ certificates: [ {pair} ] }}, limits: {{ max_connections: 16, wait: 5s }} }} ]",
        backend.address
    ));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    // Eight begin and say nothing; three come after them, and get the places of those who leave.
    let mut held: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(proxy.address_cached()).unwrap()).collect();
    eventually("they are there", Duration::from_secs(5), || {
        (proxy.metric("sailover_connections", &[]) == 8.0).then_some(())
    });
    let client = authority.client_of(&[&rustls::version::TLS13], None, |_| {});
    std::thread::scope(|scope| {
        let come: Vec<_> =
            (0..3).map(|_| scope.spawn(|| connect(&client, &proxy, "edge.example").map(drop).is_ok())).collect();
        eventually("all are there", Duration::from_secs(5), || {
            (proxy.metric("sailover_connections", &[]) == 11.0).then_some(())
        });
        held.truncate(4);
        assert!(come.into_iter().all(|one| one.join().unwrap()));
    });
    assert_eq!(proxy.metric("sailover_connections_total", &["end=\"cap\""]), 0.0);
}
