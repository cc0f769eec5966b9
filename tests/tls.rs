use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, ProtocolVersion, RootCertStore};
use sailover::sniff::{ProxyVersion, proxy_header};

use crate::support::backend::{Backend, Mode};
use crate::support::eventually;
use crate::support::proxy::{Directory, Proxy};

/// An authority, and where it puts its files.
pub struct Authority {
    pub issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Authority {
    pub fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = parameters.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(parameters, key), pem }
    }

    /// Certificate and key for these names, which end after so many days.
    pub fn issue(&self, names: &[&str], days: i64) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut parameters =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        let day = Duration::from_secs(24 * 3_600);
        let now = std::time::SystemTime::now();
        let end = if days < 0 { now - day * days.unsigned_abs() as u32 } else { now + day * days as u32 + day / 2 };
        parameters.not_before = (now - day * 100).into();
        parameters.not_after = end.into();
        (parameters.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// Writes a pair as NAME.pem and NAME.key, by rename, and gives its entry for a configuration.
    pub fn write(&self, directory: &Path, name: &str, names: &[&str], days: i64) -> String {
        let (certificate, key) = self.issue(names, days);
        for (end, text) in [("pem", certificate), ("key", key)] {
            let new = directory.join(format!("{name}.{end}.new"));
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, directory.join(format!("{name}.{end}"))).unwrap();
        }
        let path = directory.join(name).display().to_string();
        format!("{{ certificate: {path}.pem, key: {path}.key }}")
    }

    fn client(&self, change: impl FnOnce(&mut ClientConfig)) -> Arc<ClientConfig> {
        self.client_of(&[&rustls::version::TLS13, &rustls::version::TLS12], None, change)
    }

    pub fn client_of(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
        identity: Option<(String, String)>,
        change: impl FnOnce(&mut ClientConfig),
    ) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        change(&mut config);
        Arc::new(config)
    }
}

pub type Tls = rustls::StreamOwned<ClientConnection, TcpStream>;

pub fn connect(config: &Arc<ClientConfig>, proxy: &Proxy, name: &str) -> std::io::Result<Tls> {
    connect_after(config, proxy, name, b"")
}

/// A finished handshake; `first` goes before it.
fn connect_after(config: &Arc<ClientConfig>, proxy: &Proxy, name: &str, first: &[u8]) -> std::io::Result<Tls> {
    let mut socket = TcpStream::connect(proxy.address_cached())?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.write_all(first)?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut connection = ClientConnection::new(config.clone(), name).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut socket)?;
    }
    Ok(Tls::new(connection, socket))
}

/// Sends, finishes its half by the book, and reads to the end, which must be by the book too.
fn exchange(mut stream: Tls, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    // In pieces, because the backend sends back while it reads: whoever only wrote would wait for it, and it for him.
    let mut part = vec![0; 64 << 10];
    let mut sent = 0;
    for piece in bytes.chunks(32 << 10) {
        stream.write_all(piece)?;
        sent += piece.len();
        while answer.len() + (128 << 10) < sent {
            let n = stream.read(&mut part)?;
            answer.extend_from_slice(&part[..n]);
        }
    }
    stream.conn.send_close_notify();
    stream.flush()?;
    stream.sock.shutdown(std::net::Shutdown::Write)?;
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn start(backend: &Backend, tls: &str, more: &str) -> Proxy {
    Proxy::start(&yaml(backend, tls, more))
}

fn yaml(backend: &Backend, tls: &str, more: &str) -> String {
    format!(
        "pools: {{ p: {{ cells: {{ c: [ {} ] }} }} }}\n\
         listeners: [ {{ name: l, bind: 127.0.0.1:0, tcp: p, tls: {{ {tls} }}, {more} }} ]\n",
        backend.address
    )
}

fn echo() -> Backend {
    let backend = Backend::start("e");
    backend.set(Mode::Echo);
    backend
}

#[test]
fn tls_ends_here_and_each_name_has_its_certificate() {
    let (directory, authority, backend) = (Directory::new(), Authority::new(), echo());
    let pairs = [
        authority.write(&directory.0, "first", &["first.example"], 30),
        authority.write(&directory.0, "shop", &["shop.example", "www.shop.example"], 20),
        authority.write(&directory.0, "wild", &["*.pay.example"], 10),
    ];
    let proxy = start(&backend, &format!("certificates: [ {} ]", pairs.join(", ")), "");
    let config = authority.client(|_| {});
    for (name, right) in [
        ("first.example", true),
        ("shop.example", true),
        ("WWW.shop.example", true),
        ("a.pay.example", true),
        ("a.b.pay.example", false),
        ("other.example", false),
    ] {
        let connected = connect(&config, &proxy, name);
        assert_eq!(connected.is_ok(), right, "{name}: {connected:?}");
        if let Ok(stream) = connected {
            assert_eq!(stream.conn.protocol_version(), Some(ProtocolVersion::TLSv1_3));
            let group = stream.conn.negotiated_key_exchange_group().unwrap();
            assert!(format!("{:?}", group.name()).contains("MLKEM"), "post-quantum: {group:?}");
            assert_eq!(exchange(stream, b"hello").unwrap(), b"hello");
        }
    }
    for size in [0, 1, 65_537, 8 << 20] {
        let bytes: Vec<u8> = (0..size).map(|i: u32| (i % 251) as u8).collect();
        assert!(exchange(connect(&config, &proxy, "shop.example").unwrap(), &bytes).unwrap() == bytes, "{size} bytes");
    }
    eventually("the ends are counted", Duration::from_secs(5), || {
        let ended = proxy.metric("sailover_connections_total", &["end=\"client_closed\""]);
        (ended == 8.0).then_some(())
    });
    let status = proxy.status();
    let shown = &status["listeners"][0]["certificates"];
    assert_eq!((&shown[0]["days"], &shown[2]["names"][0]), (&30.into(), &"*.pay.example".into()));
    assert!(proxy.metric("sailover_certificate_expiry_timestamp_seconds", &["name=\"shop.example\""]) > 1.7e9);
    // A client that only goes away, and one that never was a client of TLS.
    drop(connect(&config, &proxy, "shop.example").unwrap());
    let mut plain = TcpStream::connect(proxy.address_cached()).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _ = plain.read_to_end(&mut Vec::new());
    eventually("the failure is counted", Duration::from_secs(5), || {
        (proxy.metric("sailover_connections_total", &["end=\"tls_failed\""]) == 3.0).then_some(())
    });
}

#[test]
fn bad_pairs_are_told_apart_and_leave_the_old_one_serving() {
    let (directory, authority, backend) = (Directory::new(), Authority::new(), echo());
    let good = authority.write(&directory.0, "good", &["shop.example"], 30);
    let proxy = start(&backend, &format!("certificates: [ {good} ]"), "");
    let config = authority.client(|_| {});
    let other = authority.write(&directory.0, "other", &["shop.example"], 30);
    let mixed = good.replace("good.key", "other.key");
    let ended = authority.write(&directory.0, "ended", &["shop.example"], -3);
    std::fs::write(directory.0.join("empty.pem"), "").unwrap();
    let empty = other.replace("other.pem", "empty.pem");
    let missing = other.replace("other.key", "missing.key");
    for (pair, said) in [
        (mixed, "listeners[0].tls.certificates[0].key: "),
        (ended.clone(), "is valid from "),
        (empty, "holds no certificate in PEM form"),
        (missing, "missing.key cannot be opened"),
    ] {
        let at = proxy.address_cached();
        proxy.write(&yaml(&backend, &format!("certificates: [ {pair} ]"), ""));
        let output = proxy.command(&["reload"]);
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{pair}: {shown}");
        assert!(shown.contains(said) && shown.contains("sailover.yaml:2:"), "{pair}: {shown}");
        assert_eq!(at, proxy.address(0));
        assert_eq!(exchange(connect(&config, &proxy, "shop.example").unwrap(), b"x").unwrap(), b"x");
    }
    // At the start there is nothing better, and a door that some clients refuse is better than none.
    let proxy = start(&backend, &format!("certificates: [ {ended} ]"), "");
    proxy.wait_log("is valid from ");
    assert!(connect(&config, &proxy, "shop.example").is_err());
    // And no other change must wait for it.
    proxy.write(&yaml(&backend, &format!("certificates: [ {ended} ]"), "deny: [ 192.0.2.1 ]"));
    let output = proxy.command(&["reload"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn certificates_are_replaced_under_load_and_tickets_go_on() {
    replaced("tcp: p", 30, 100, Duration::ZERO);
    replaced(HTTP, 10, 50, Duration::ZERO);
}

/// The long form; see `make show`.
#[test]
#[ignore = "takes its time"]
fn ten_thousand_handshakes_while_the_certificate_is_replaced_every_second() {
    replaced("tcp: p", 40, 10_000, Duration::from_secs(1));
    replaced(HTTP, 40, 10_000, Duration::from_secs(1));
}

const HTTP: &str = "http: { routes: [ { pool: p } ] }";

/// Whether one exchange through this face goes as it should.
fn served(face: &str, mut stream: Tls) -> std::io::Result<bool> {
    if face != HTTP {
        return Ok(exchange(stream, b"ping")? == b"ping");
    }
    stream.write_all(b"GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer.starts_with(b"HTTP/1.1 200") && answer.ends_with(b"\r\ne"))
}

/// Replaces the certificate so often, at this distance, while three clients shake hands.
fn replaced(face: &str, times: i64, at_least: usize, every: Duration) {
    let (directory, authority, backend) = (Directory::new(), Authority::new(), echo());
    if face == HTTP {
        backend.set(Mode::Serve);
    }
    let pair = authority.write(&directory.0, "c", &["shop.example"], 1);
    let proxy = Proxy::start(&yaml(&backend, &format!("certificates: [ {pair} ]"), "").replace("tcp: p", face));
    let config = authority.client(|_| {});
    let days = |proxy: &Proxy| proxy.status()["listeners"][0]["certificates"][0]["days"].as_u64().unwrap();
    let resumed = |stream: &Tls| stream.conn.handshake_kind() == Some(HandshakeKind::Resumed);
    let first = connect(&config, &proxy, "shop.example").unwrap();
    assert!(!resumed(&first));
    assert!(served(face, first).unwrap());
    let stop = std::sync::atomic::AtomicBool::new(false);
    let begun = std::sync::atomic::AtomicUsize::new(0);
    let (handshakes, failed) = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3)
            .map(|_| {
                let (proxy, stop, begun) = (&proxy, &stop, &begun);
                let full = authority.client(|config| config.resumption = rustls::client::Resumption::disabled());
                scope.spawn(move || {
                    let (mut all, mut failed) = (0, 0);
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        all += 1;
                        begun.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let done = connect(&full, proxy, "shop.example").and_then(|stream| served(face, stream));
                        failed += usize::from(!done.unwrap_or(false));
                    }
                    (all, failed)
                })
            })
            .collect();
        for n in 2..2 + times {
            std::thread::sleep(every);
            authority.write(&directory.0, "c", &["shop.example"], n);
            let output = proxy.command(&["reload"]);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(days(&proxy), n as u64);
            // However slow the machine is, clients come under each certificate.
            let wanted = at_least * (n as usize - 1) / times as usize;
            eventually("clients come", Duration::from_secs(60), || {
                (begun.load(std::sync::atomic::Ordering::Relaxed) > wanted).then_some(())
            });
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().unwrap()).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    });
    println!("{face}: {handshakes} handshakes while the certificate was replaced {times} times: {failed} failed");
    assert_eq!(failed, 0);
    assert!(handshakes > at_least, "{handshakes}");
    // The ticket of the first generation is good in the last, on whichever worker.
    for _ in 0..8 {
        let stream = connect(&config, &proxy, "shop.example").unwrap();
        assert!(resumed(&stream));
        assert!(served(face, stream).unwrap());
    }
}

#[test]
fn versions_and_certificates_of_clients_are_asked_for() {
    let (directory, authority, backend) = (Directory::new(), Authority::new(), echo());
    let pair = authority.write(&directory.0, "c", &["shop.example"], 30);
    let ca = directory.0.join("ca.pem");
    std::fs::write(&ca, &authority.pem).unwrap();
    let served = |tls: &str, config: &Arc<ClientConfig>| {
        let proxy = start(&backend, &format!("certificates: [ {pair} ], {tls}"), "");
        connect(config, &proxy, "shop.example").and_then(|stream| exchange(stream, b"x")).is_ok_and(|x| x == b"x")
    };
    let old = authority.client_of(&[&rustls::version::TLS12], None, |_| {});
    assert!(served("min_version: 1.2", &old));
    assert!(!served("min_version: \"1.3\"", &old));
    let plain = authority.client(|_| {});
    assert!(served("min_version: 1.3", &plain));

    let client = |ca: &Path, require: &str| format!("client: {{ ca: {}, require: {require} }}", ca.display());
    let ours = authority.client_of(&[&rustls::version::TLS13], Some(authority.issue(&["client"], 5)), |_| {});
    let foreign = Authority::new().issue(&["client"], 5);
    let foreign = authority.client_of(&[&rustls::version::TLS13], Some(foreign), |_| {});
    for (require, of_ours, of_none, of_foreign) in [("true", true, false, false), ("false", true, true, false)] {
        let tls = client(&ca, require);
        assert_eq!(
            (served(&tls, &ours), served(&tls, &plain), served(&tls, &foreign)),
            (of_ours, of_none, of_foreign),
            "{require}"
        );
    }
}

/// A ticket spares its bearer the question for a certificate, so it opens no door that asks for more.
#[test]
fn a_ticket_of_one_listener_or_of_before_does_not_stand_for_a_certificate() {
    let (directory, authority, backend) = (Directory::new(), Authority::new(), echo());
    let pair = authority.write(&directory.0, "c", &["shop.example"], 30);
    std::fs::write(directory.0.join("ca.pem"), &authority.pem).unwrap();
    let client = format!(", client: {{ ca: {}/ca.pem }}", directory.0.display());
    let listener = |name: &str, ip: &str, client: &str| {
        format!("  - {{ name: {name}, bind: {ip}:0, tcp: p, tls: {{ certificates: [ {pair} ]{client} }} }}\n")
    };
    let pools = format!("pools: {{ p: {{ cells: {{ c: [ {} ] }} }} }}\nlisteners:\n", backend.address);
    let proxy =
        Proxy::start(&(pools.clone() + &listener("open", "127.0.0.1", "") + &listener("closed", "127.0.0.2", &client)));
    let config = authority.client(|_| {});
    let at = |ip: &str| -> std::net::SocketAddr {
        let status = proxy.status();
        let listeners = status["listeners"].as_array().unwrap().clone();
        let found = listeners.iter().find(|l| l["address"].as_str().unwrap().starts_with(ip)).unwrap();
        found["address"].as_str().unwrap().parse().unwrap()
    };
    let served = |ip: &str| {
        let mut socket = TcpStream::connect(at(ip)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let name = ServerName::try_from("shop.example").unwrap();
        let mut connection = ClientConnection::new(config.clone(), name).unwrap();
        while connection.is_handshaking() {
            if connection.complete_io(&mut socket).is_err() {
                return false;
            }
        }
        exchange(Tls::new(connection, socket), b"x").is_ok_and(|answer| answer == b"x")
    };
    assert!(served("127.0.0.1:") && served("127.0.0.1:"), "the door without a lock, and its ticket");
    assert!(!served("127.0.0.2:"), "the ticket of another door");
    assert!(served("127.0.0.1:"));
    // The same door, once it asks.
    proxy.write(&(pools + &listener("open", "127.0.0.1", &client) + &listener("closed", "127.0.0.2", &client)));
    assert!(proxy.command(&["reload"]).status.success());
    assert!(!served("127.0.0.1:"), "the ticket of before");
}

#[test]
fn a_handshake_has_a_deadline_and_may_follow_a_proxy_header() {
    let (directory, authority, backend) = (Directory::new(), Authority::new(), echo());
    let pair = authority.write(&directory.0, "c", &["shop.example"], 30);
    let tls = format!("certificates: [ {pair} ]");
    let proxy = start(&backend, &tls, "timeouts: { handshake: 300ms }");
    let mut silent = TcpStream::connect(proxy.address_cached()).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    silent.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    assert!(!matches!(silent.read(&mut [0; 1]), Ok(n) if n > 0));
    // The count follows the close by a moment.
    eventually("the end is counted", Duration::from_secs(5), || {
        (proxy.metric("sailover_connections_total", &["end=\"handshake_timeout\""]) == 1.0).then_some(())
    });

    let proxy = Proxy::start(&format!(
        "{}log: {{ access: stdout }}\n",
        yaml(&backend, &tls, "proxy_protocol: { accept_from: [ 127.0.0.1 ] }")
    ));
    let config = authority.client(|_| {});
    let named = |port: u16| Some((format!("192.0.2.7:{port}").parse().unwrap(), "198.51.100.1:443".parse().unwrap()));
    for (port, version) in [(1_001, ProxyVersion::V1), (1_002, ProxyVersion::V2)] {
        let header = proxy_header(version, named(port), &[]);
        let stream = connect_after(&config, &proxy, "shop.example", &header).unwrap();
        assert_eq!(exchange(stream, b"hello").unwrap(), b"hello");
        proxy.wait_log(&format!("\"client\":\"192.0.2.7:{port}\""));
    }
    assert!(connect(&config, &proxy, "shop.example").is_err());
}

#[test]
fn whoever_holds_a_connection_and_does_nothing_costs_little_memory() {
    let (directory, authority, backend) = (Directory::new(), Authority::new(), echo());
    let pair = authority.write(&directory.0, "c", &["shop.example"], 30);
    let config = authority.client(|_| {});
    for face in ["tcp: p", "http: { routes: [ { pool: p } ] }"] {
        for finished in [false, true] {
            let yaml =
                yaml(&backend, &format!("certificates: [ {pair} ]"), "timeouts: { handshake: 60s, header: 60s }");
            let proxy = Proxy::start(&yaml.replace("tcp: p", face));
            proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
            let (mut begun, mut open) = (Vec::new(), Vec::new());
            let mut more = |count: usize| {
                for _ in 0..count {
                    if finished {
                        open.push(connect(&config, &proxy, "shop.example").unwrap());
                    } else {
                        let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
                        stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).unwrap();
                        begun.push(stream);
                    }
                }
                let open = (begun.len() + open.len()) as f64;
                eventually("all are accepted", Duration::from_secs(10), || {
                    (proxy.metric("sailover_connections", &[]) >= open).then_some(())
                });
            };
            more(100);
            let before = proxy.memory();
            more(500);
            let each = proxy.memory().saturating_sub(before) / 500;
            println!("{face}, handshake finished: {finished}: {each} bytes for each of 500 more");
            assert!(each <= 48 << 10, "{face}, handshake finished: {finished}: {each} bytes");
        }
    }
}
