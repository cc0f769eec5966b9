//! For every key of `configs/reference.yaml` a test that sees two behaviours for two values. `keys/list.rs` says which.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, Mode, Port, get, may_be_refused, read_all};
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::tcp::yaml;

mod list;

fn up(proxy: &Proxy, backend: &Backend) {
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
}

/// A proxy over one cell for each backend, all up.
fn over(backends: &[&Backend], pool: &str, more: &str) -> Proxy {
    let addresses: Vec<SocketAddr> = backends.iter().map(|backend| backend.address).collect();
    let proxy = Proxy::start(&yaml(&addresses, pool, more));
    if !pool.contains("probe: off") {
        backends.iter().for_each(|backend| up(&proxy, backend));
    }
    proxy
}

/// An address whose handshakes nobody answers: the queue of its listener is full.
struct Swallower {
    address: SocketAddr,
    _listener: socket2::Socket,
    _queued: Vec<socket2::Socket>,
}

fn swallower() -> Swallower {
    use socket2::{Domain, Socket, Type};
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let queued = (0..4).map(|_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        let _ = socket.connect(&address.into());
        socket
    });
    let queued = queued.collect();
    Swallower { address, _listener: listener, _queued: queued }
}

fn echo(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0; 1])
}

fn opened(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    echo(&mut stream).unwrap();
    stream
}

#[test]
fn version_is_one() {
    let file = |version: &str| format!("version: {version}\n{}", yaml(&["127.0.0.1:1".parse().unwrap()], "", ""));
    assert!(sailover::config::parse(file("1").as_bytes(), 9_999).is_ok());
    assert!(sailover::config::parse(file("2").as_bytes(), 9_999).is_err());
}

#[test]
fn workers_and_cell_facts_show_in_status() {
    let a = Backend::start("a");
    for (workers, cloud) in [(1, "X"), (3, "Y")] {
        let more = format!("workers: {workers}\ncells: {{ c0: {{ cloud: {cloud}, region: r-{cloud} }} }}");
        let status = over(&[&a], "", &more).status();
        assert_eq!(status["workers"].as_array().unwrap().len(), workers);
        assert_eq!(
            (&status["cells"][0]["cloud"], &status["cells"][0]["region"]),
            (&cloud.into(), &format!("r-{cloud}").into())
        );
    }
    let wrong = yaml(&[a.address], "", "cells: { other: {} }");
    assert!(sailover::config::parse(wrong.as_bytes(), 9_999).is_err(), "when present it is the whole list");
}

#[test]
fn names_show_in_status() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    for (pool, cell, name, listener, backend) in [("p", "c", "n", "l", &a), ("q", "d", "m", "k", &b)] {
        let proxy = Proxy::start(&format!(
            "pools: {{ {pool}: {{ cells: {{ {cell}: [ {{ address: '{}', name: {name} }} ] }} }} }}\nlisteners: [ {{ name: {listener}, bind: '127.0.0.{}:0', tcp: {pool} }} ]",
            backend.address,
            if pool == "p" { 1 } else { 2 }
        ));
        proxy.wait_health(name, "up", Duration::from_secs(5));
        let status = proxy.status();
        assert_eq!(status["pools"][0]["name"], pool);
        assert_eq!(status["pools"][0]["cells"][0]["name"], cell);
        assert_eq!(
            (&status["listeners"][0]["name"], &status["listeners"][0]["pool"]),
            (&listener.into(), &pool.into())
        );
        assert_eq!(get(proxy.address(0)).unwrap(), if pool == "p" { "a" } else { "b" });
        assert_eq!(proxy.address(0).ip().to_string(), if pool == "p" { "127.0.0.1" } else { "127.0.0.2" });
    }
}

#[test]
fn weights_and_tiers_make_shares() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    for (cell, shares) in [("weight: 1", [0.5, 0.5]), ("weight: 3", [0.75, 0.25]), ("tier: 1", [0.0, 1.0])] {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: {{ {cell}, backends: [ '{}' ] }}, b: {{ backends: [ '{}' ] }} }} }} }}\nlisteners: [ {{ bind: '127.0.0.1:0', tcp: p }} ]",
            a.address, b.address
        ));
        up(&proxy, &a);
        up(&proxy, &b);
        let cells = proxy.status()["pools"][0]["cells"].clone();
        assert_eq!([&cells[0]["share"]["now"], &cells[1]["share"]["now"]], [shares[0], shares[1]], "{cell}");
    }
}

fn one_cell(pool: &str, backends: &[String]) -> Proxy {
    Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ {} ] }}, {pool} }} }}\nlisteners: [ {{ bind: '127.0.0.1:0', tcp: p }} ]",
        backends.join(", ")
    ))
}

#[test]
fn backend_weights_count_turns() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    for (weight, expected) in [(1, 20), (3, 30)] {
        let list = [format!("{{ address: '{}', weight: {weight} }}", a.address), format!("'{}'", b.address)];
        let proxy = one_cell("balance: round_robin", &list);
        up(&proxy, &a);
        up(&proxy, &b);
        let of_a = (0..40).filter(|_| get(proxy.address(0)).unwrap() == "a").count();
        assert!(of_a.abs_diff(expected) <= 1, "weight {weight}: {of_a} of 40");
    }
}

/// Opens a connection, keeps it, and tells which backend serves it.
fn kept(address: SocketAddr) -> (TcpStream, char) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = vec![0; 1_024];
    let n = stream.read(&mut answer).unwrap();
    (stream, char::from(answer[n - 1]))
}

#[test]
fn balance_looks_at_connections_or_does_not() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    // Of two that are drawn with chances alike, a is one in three of four.
    for (balance, low, high) in [("round_robin", 50, 50), ("least_connections", 100, 100), ("two_choices", 55, 95)] {
        let proxy =
            one_cell(&format!("balance: {balance}"), &[a.address, b.address].map(|address| format!("'{address}'")));
        up(&proxy, &a);
        up(&proxy, &b);
        // Twenty and more connections stay with b, those of a go; then twenty come, five times.
        let mut held: Vec<(TcpStream, char)> = (0..80).map(|_| kept(proxy.address_cached())).collect();
        held.retain(|(_, name)| *name == 'b');
        assert!(held.len() > 20);
        let in_flight = |backend: usize| {
            proxy.status()["pools"][0]["cells"][0]["backends"][backend]["in_flight"].as_u64().unwrap() as usize
        };
        let mut to_a = 0;
        for _ in 0..5 {
            eventually("the others are gone", Duration::from_secs(5), || {
                (in_flight(0) == 0 && in_flight(1) == held.len()).then_some(())
            });
            let next: Vec<(TcpStream, char)> = (0..20).map(|_| kept(proxy.address_cached())).collect();
            to_a += next.iter().filter(|(_, name)| *name == 'a').count();
        }
        assert!((low..=high).contains(&to_a), "{balance}: {to_a} of 100");
    }
}

#[test]
fn affinity_pins_a_client() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let from = |source: &str, target: SocketAddr| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&format!("{source}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.connect(&target.into()).unwrap();
        let mut stream: TcpStream = socket.into();
        stream.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        String::from_utf8(read_all(&mut stream).unwrap()).unwrap().chars().last().unwrap()
    };
    for (by, pinned) in [("none", false), ("client_ip", true)] {
        let proxy = over(&[&a, &b], &format!("affinity: {{ by: {by} }}"), "");
        let of_one: BTreeSet<char> = (0..20).map(|_| from("127.0.0.9", proxy.address_cached())).collect();
        assert_eq!(of_one.len() == 1, pinned, "{by}: {of_one:?}");
        let of_many: BTreeSet<char> = (1..40).map(|i| from(&format!("127.0.0.{i}"), proxy.address_cached())).collect();
        assert_eq!(of_many.len(), 2);
    }
}

#[test]
fn kinds_of_probe_see_different_things() {
    let a = Backend::start("a");
    a.set(Mode::Unhealthy(100));
    for (probe, health) in [
        ("probe: { tcp: {} }", "up"),
        ("probe: off", "up"),
        ("probe: { http: { path: /healthz }, interval: 100ms }", "down"),
    ] {
        let proxy = Proxy::start(&yaml(&[a.address], probe, ""));
        proxy.wait_health(&a.address.to_string(), health, Duration::from_secs(5));
        let probes = proxy.metric("sailover_probes_total", &[]);
        assert_eq!(probes == 0.0, probe == "probe: off", "{probe}: {probes}");
    }
}

#[test]
fn an_http_probe_asks_what_it_is_told() {
    for (keys, first, host) in [
        ("", "GET / HTTP/1.1", None),
        ("method: HEAD, path: '/h?x=1', host: shop.example", "HEAD /h?x=1 HTTP/1.1", Some("shop.example")),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _proxy = Proxy::start(&yaml(&[address], &format!("probe: {{ http: {{ {keys} }} }}"), ""));
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut head = vec![0; 4_096];
        let n = stream.read(&mut head).unwrap();
        let head = String::from_utf8_lossy(&head[..n]).into_owned();
        assert!(head.starts_with(first), "{head}");
        let host = host.map_or(address.to_string(), str::to_owned);
        assert!(head.contains(&format!("\r\nHost: {host}\r\n")), "{head}");
    }
}

#[test]
fn an_http_probe_wants_its_status_and_its_body() {
    let a = Backend::start("hello world");
    for (keys, health) in
        [("status: 200-299", "up"), ("status: [ 204, 404 ]", "down"), ("body: hello", "up"), ("body: goodbye", "down")]
    {
        let proxy = Proxy::start(&yaml(&[a.address], &format!("probe: {{ http: {{ {keys} }}, interval: 300ms }}"), ""));
        proxy.wait_health(&a.address.to_string(), health, Duration::from_secs(8));
    }
}

#[test]
fn an_http_probe_wants_its_digest_and_its_version() {
    let a = Backend::start("a");
    a.set(Mode::Data(7, false));
    let start = |keys: &str, more: &str| {
        let keys = format!("probe: {{ http: {{ path: /healthz, {keys} }}, interval: 300ms }}\n    {more}");
        Proxy::start(&yaml(&[a.address], &keys, ""))
    };
    for (keys, health) in [("digest: false", "up"), ("digest: true", "down")] {
        start(keys, "").wait_health(&a.address.to_string(), health, Duration::from_secs(8));
    }
    let asks = |header: &str, at_least: u32| {
        let proxy = start("", &format!("data_version: {{ header: {header}, at_least: {at_least} }}"));
        up(&proxy, &a);
        proxy.backend(&a.address.to_string())["data_version"].clone()
    };
    assert_eq!(asks("X-Data-Version", 7), serde_json::json!({ "said": 7, "at_least": 7, "too_old": false }));
    assert_eq!(asks("X-Data-Version", 8), serde_json::json!({ "said": 7, "at_least": 8, "too_old": true }));
    assert_eq!(asks("X-Other", 7), serde_json::json!({ "said": null, "at_least": 7, "too_old": true }));
}

/// A server of TLS that shows a certificate for `shop.internal` with five days to live, and its authority as PEM.
fn tls_server() -> (SocketAddr, String) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = parameters.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(parameters, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(vec!["shop.internal".to_owned()]).unwrap();
    let end = std::time::SystemTime::now() + Duration::from_secs(5 * 24 * 3_600 + 60);
    parameters.not_after = end.into();
    let certificate = parameters.signed_by(&key, &issuer).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
    let config = std::sync::Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let config = config.clone();
            std::thread::spawn(move || {
                let mut connection = rustls::ServerConnection::new(config).unwrap();
                let mut stream = stream;
                while connection.is_handshaking() && connection.complete_io(&mut stream).is_ok() {}
                let _ = stream.read(&mut [0; 1]);
            });
        }
    });
    (address, authority.pem())
}

#[test]
fn a_tls_probe_shakes_hands_and_reads_the_certificate() {
    let (address, ours) = tls_server();
    let (_, foreign) = tls_server();
    let directory = crate::support::proxy::Directory::new();
    let file = |name: &str, pem: &str| {
        std::fs::write(directory.0.join(name), pem).unwrap();
        format!("verify: true, ca: {}", directory.0.join(name).display())
    };
    let (ours, foreign) = (file("ours.pem", &ours), file("foreign.pem", &foreign));
    let plain = Backend::start("plain");
    plain.set(Mode::Strict);
    for (address, keys, health) in [
        (address, String::new(), "up"),
        (address, format!("server_name: shop.internal, {ours}"), "up"),
        (address, format!("server_name: other.internal, {ours}"), "down"),
        (address, ours.clone(), "down"),
        (address, format!("server_name: shop.internal, {foreign}"), "down"),
        (plain.address, String::new(), "down"),
    ] {
        let probe = format!("probe: {{ tls: {{ {keys} }}, interval: 200ms }}");
        let proxy = Proxy::start(&yaml(&[address], &probe, ""));
        proxy.wait_health(&address.to_string(), health, Duration::from_secs(8));
        if health == "up" {
            let days = &proxy.status()["pools"][0]["cells"][0]["backends"][0]["certificate"]["days"];
            assert_eq!(days, 5, "{keys}");
            let expiry = proxy.metric("sailover_certificate_expiry_timestamp_seconds", &[]);
            assert!(expiry > 1.7e9, "{expiry}");
            let shown = String::from_utf8(proxy.command(&["status"]).stdout).unwrap();
            assert!(shown.contains("its certificate expires in 5 days"), "{shown}");
        }
    }
}

#[test]
fn an_included_file_adds_its_pools_and_listeners() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let directory = crate::support::proxy::Directory::new();
    let included = |name: &str, backend: &Backend| {
        let text = format!(
            "pools: {{ {name}: {{ cells: {{ c: [ {} ] }} }} }}\n\
             listeners: [ {{ name: {name}, bind: 127.0.0.1:0, tcp: {name} }} ]\n",
            backend.address
        );
        std::fs::write(directory.0.join(format!("{name}.yaml")), text).unwrap();
    };
    included("one", &a);
    let pattern = format!("include: [ {}/*.yaml ]", directory.0.display());
    let proxy = Proxy::start(&pattern);
    assert_eq!(get(proxy.address(0)).unwrap(), "a");
    // Another file is another generation, although the main file stays.
    included("zwei", &b);
    std::fs::write(directory.0.join("zwei.yaml"), {
        let text = std::fs::read_to_string(directory.0.join("zwei.yaml")).unwrap();
        text.replace("127.0.0.1:0", "127.0.0.2:0")
    })
    .unwrap();
    assert!(proxy.command(&["reload"]).status.success());
    let status = proxy.status();
    let listeners = status["listeners"].as_array().unwrap();
    let of = |name: &str| listeners.iter().find(|listener| listener["name"] == name).unwrap()["address"].clone();
    assert_eq!(get(of("zwei").as_str().unwrap().parse().unwrap()).unwrap(), "b");
    assert_eq!(get(of("one").as_str().unwrap().parse().unwrap()).unwrap(), "a");
}

#[test]
fn an_exchange_sends_and_expects() {
    let a = Backend::start("a");
    a.set(Mode::Echo);
    for (exchange, health) in
        [("send: PING, expect: PING", "up"), ("send: PING, expect: PONG", "down"), ("send: PONG, expect: PONG", "up")]
    {
        let proxy =
            Proxy::start(&yaml(&[a.address], &format!("probe: {{ exchange: {{ {exchange} }}, interval: 300ms }}"), ""));
        proxy.wait_health(&a.address.to_string(), health, Duration::from_secs(8));
    }
}

#[test]
fn interval_sets_the_number_of_probes() {
    let a = Backend::start("a");
    let count = |interval: &str| {
        let proxy = over(&[&a], &format!("probe: {{ interval: {interval} }}"), "");
        let begin = Instant::now();
        eventually("two seconds are over", Duration::from_secs(4), || {
            (begin.elapsed() > Duration::from_secs(2)).then_some(())
        });
        proxy.metric("sailover_probes_total", &[])
    };
    let (slow, fast) = (count("1s"), count("50ms"));
    assert!(slow <= 5.0 && fast > 4.0 * slow, "{slow} {fast}");
}

#[test]
fn a_probe_waits_for_its_timeout() {
    // A server that takes 300 ms for its answer.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                let _ = stream.read(&mut [0; 1_024]);
                std::thread::park_timeout(Duration::from_millis(300));
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            });
        }
    });
    for (timeout, health) in [("100ms", "down"), ("900ms", "up")] {
        let proxy =
            Proxy::start(&yaml(&[address], &format!("probe: {{ http: {{}}, interval: 1s, timeout: {timeout} }}"), ""));
        proxy.wait_health(&address.to_string(), health, Duration::from_secs(8));
    }
}

#[test]
fn fall_and_rise_count_in_a_row() {
    let a = Backend::start("a");
    let counts = |fall: u32, rise: u32| {
        a.set(Mode::Serve);
        let probe = format!(
            "probe: {{ http: {{ path: /healthz }}, interval: 200ms, fall: {fall}, rise: {rise} }}\n    hold: {{ first: 10ms, longest: 10ms }}"
        );
        let proxy = over(&[&a], &probe, "");
        a.set(Mode::Unhealthy(100));
        proxy.wait_health(&a.address.to_string(), "down", Duration::from_secs(20));
        let times = |proxy: &Proxy| {
            let detail = proxy.status()["pools"][0]["cells"][0]["backends"][0]["cause"]["detail"].clone();
            detail.as_str().unwrap().split(' ').next().unwrap().parse::<u32>().unwrap()
        };
        let failed = times(&proxy);
        a.set(Mode::Serve);
        proxy.wait_health(&a.address.to_string(), "returning", Duration::from_secs(20));
        (failed, times(&proxy))
    };
    assert_eq!(counts(1, 1), (1, 1));
    assert_eq!(counts(4, 6), (4, 6));
}

#[test]
fn a_probe_may_go_to_another_port() {
    let (a, health) = (Backend::start("a"), Backend::start("health"));
    for (port, mode, state) in
        [(health.address.port(), Mode::Unhealthy(100), "down"), (a.address.port(), Mode::Unhealthy(100), "up")]
    {
        health.set(mode);
        let probe = format!("probe: {{ http: {{ path: /healthz }}, interval: 200ms, port: {port} }}");
        let proxy = Proxy::start(&yaml(&[a.address], &probe, ""));
        proxy.wait_health(&a.address.to_string(), state, Duration::from_secs(8));
    }
}

#[test]
fn a_client_waits_for_connect_timeout() {
    let silent = swallower();
    for timeout in [300, 1_200] {
        let proxy =
            Proxy::start(&yaml(&[silent.address], &format!("probe: off\n    connect: {{ timeout: {timeout}ms }}"), ""));
        let begin = Instant::now();
        let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
        assert_eq!(read_all(&mut stream).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        let took = begin.elapsed().as_millis();
        assert!((timeout..timeout + 800).contains(&took), "{timeout} {took}");
        eventually("its line is written", Duration::from_secs(5), || {
            let log = proxy.log();
            (log.contains("\"end\":\"unreachable\"") && log.contains(": silent")).then_some(())
        });
    }
}

#[test]
fn attempts_bound_the_tries_of_one_client() {
    let ports: Vec<Port> = (0..6).map(|_| Port::reserve()).collect();
    let dead: Vec<SocketAddr> = ports.iter().map(|port| port.address).collect();
    for attempts in [1, 3] {
        let proxy = Proxy::start(&yaml(&dead, &format!("probe: off\n    connect: {{ attempts: {attempts} }}"), ""));
        let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
        assert!(read_all(&mut stream).is_err());
        let line = eventually("its line is written", Duration::from_secs(5), || {
            proxy.log().lines().find(|line| line.contains("\"end\":\"unreachable\"")).map(str::to_owned)
        });
        assert!(line.contains(&format!("\"attempts\":{attempts},")), "{line}");
        assert_eq!(line.matches(": refused").count(), attempts);
    }
}

#[test]
fn race_goes_round_silence_or_waits() {
    let (silent, a) = (swallower(), Backend::start("a"));
    for (race, served) in [("auto", true), ("off", false)] {
        let yaml = format!(
            "pools: {{ p: {{ probe: off, connect: {{ race: {race}, timeout: 1s }}, cells: {{ dead: [ '{}' ], good: {{ tier: 1, backends: [ '{}' ] }} }} }} }}\nlisteners: [ {{ bind: '127.0.0.1:0', tcp: p }} ]",
            silent.address, a.address
        );
        let proxy = Proxy::start(&yaml);
        assert_eq!(get(proxy.address(0)).is_ok(), served, "{race}");
    }
}

#[test]
fn source_is_what_a_backend_sees() {
    for source in ["127.0.0.5", "127.0.0.6"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::start(&yaml(
            &[listener.local_addr().unwrap()],
            &format!("probe: off\n    connect: {{ source: [ {source} ] }}"),
            "",
        ));
        let _client = TcpStream::connect(proxy.address(0)).unwrap();
        assert_eq!(listener.accept().unwrap().1.ip().to_string(), source);
    }
}

#[test]
fn keys_without_effect_are_warned_of() {
    let base = yaml(&["127.0.0.1:1".parse().unwrap()], "timeouts: { request: 3s }", "");
    let file = base.replace("tcp: p", "tcp: p, timeouts: { handshake: 1s, header: 1s, keepalive: 1s }");
    let loaded = sailover::config::parse(file.as_bytes(), 9_999).unwrap();
    assert_eq!(loaded.warnings.len(), 4);
    assert!(loaded.warnings.iter().all(|warning| warning.message.contains("has no effect")));
    assert!(sailover::config::parse(file.replace("3s", "3").as_bytes(), 9_999).is_err());

    // Keys of sessions, by the listeners that lead to the pool.
    let warned = |listener: &str, affinity: &str| {
        let pool = format!("cells: {{ a: [ '127.0.0.1:1' ] }}, rebalance: 5/s, replay: {{ for: tls }}{affinity}");
        let file = format!("pools: {{ p: {{ {pool} }} }}\nlisteners: [ {{ bind: '127.0.0.1:80', {listener} }} ]");
        let loaded = sailover::config::parse(file.as_bytes(), 9_999).unwrap();
        loaded.warnings.iter().map(|warning| warning.path.clone()).collect::<Vec<_>>()
    };
    assert!(warned("tcp: p", "").is_empty());
    assert!(warned("sni: { routes: { shop.example: p } }", ", affinity: { by: client_ip }").is_empty());
    assert_eq!(warned("sni: { routes: { shop.example: p } }", ", affinity: { by: sni }"), ["pools.p.rebalance"]);
    assert_eq!(warned("http: { routes: [ { pool: p } ] }", ""), ["pools.p.rebalance", "pools.p.replay"]);
}

#[test]
fn idle_ends_a_session_and_half_close_a_half() {
    let a = Backend::start("a");
    a.set(Mode::Echo);
    let silent = Backend::start("s");
    silent.set(Mode::Silent);
    let listener_idle = |text: String| text.replace("tcp: p", "tcp: p, timeouts: { idle: 200ms }");
    for (pool, of_listener, ends) in [("timeouts: { idle: 200ms }", false, true), ("", true, true), ("", false, false)]
    {
        let text = yaml(&[a.address], pool, "");
        let proxy = Proxy::start(&if of_listener { listener_idle(text) } else { text });
        up(&proxy, &a);
        let mut stream = opened(proxy.address(0));
        stream.set_read_timeout(Some(Duration::from_millis(1_500))).unwrap();
        assert_eq!(matches!(stream.read(&mut [0; 1]), Ok(0)), ends, "{pool} {of_listener}");
    }
    // The client has finished; the backend never answers.
    for (half_close, ends) in [("200ms", true), ("30s", false)] {
        let proxy = Proxy::start(&yaml(&[silent.address], &format!("timeouts: {{ half_close: {half_close} }}"), ""));
        let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
        stream.write_all(b"x").unwrap();
        // The scripted backend keeps its side open until its peer has gone for good.
        stream.set_read_timeout(Some(Duration::from_millis(1_500))).unwrap();
        crate::support::backend::finish(&stream);
        let ended = matches!(stream.read(&mut [0; 1]), Ok(0));
        let half_closed = proxy.metric("sailover_connections_total", &["end=\"half_closed\""]) > 0.0;
        assert_eq!((ended, half_closed), (ends, ends), "{half_close}");
    }
}

#[test]
fn on_down_resets_or_keeps() {
    for (on_down, ends) in [("reset", true), ("keep", false), ("stuck", false), ("drain", true)] {
        let (a, b) = (Backend::start("a"), Backend::start("b"));
        a.set(Mode::Echo);
        b.set(Mode::Echo);
        let proxy = over(&[&a, &b], &format!("on_down: {on_down}"), "shutdown: { drain: 1s }");
        let of_a = || proxy.status()["pools"][0]["cells"][0]["backends"][0]["in_flight"].as_u64().unwrap();
        let mut session = eventually("a session on the first backend", Duration::from_secs(5), || {
            let stream = opened(proxy.address(0));
            (of_a() == 1).then_some(stream)
        });
        a.set(Mode::Refuse);
        // Traffic has to see it too: sessions are never reset on the word of probes alone.
        eventually("it is down", Duration::from_secs(20), || {
            let _ = opened(proxy.address(0));
            (proxy.health(&a.address.to_string()) == "down").then_some(())
        });
        session.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
        let ended = session.read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        assert_eq!(ended, ends, "{on_down}");
    }
}

#[test]
fn when_all_are_down_try_or_refuse() {
    for (when, served) in [("try_all", true), ("refuse", false)] {
        let a = Backend::start("a");
        let proxy = over(&[&a], &format!("when_all_down: {when}\n    hold: {{ first: 1m, longest: 1m }}"), "");
        a.set(Mode::Refuse);
        proxy.wait_health(&a.address.to_string(), "down", Duration::from_secs(10));
        a.set(Mode::Serve);
        assert_eq!(get(proxy.address(0)).is_ok(), served, "{when}");
    }
}

#[test]
fn hold_keeps_a_backend_out() {
    let back = |hold: &str| {
        let a = Backend::start("a");
        let proxy = over(&[&a], &format!("probe: {{ interval: 100ms }}\n    hold: {hold}"), "");
        let name = a.address.to_string();
        let mut times = Vec::new();
        for _ in 0..3 {
            a.set(Mode::Refuse);
            proxy.wait_health(&name, "down", Duration::from_secs(10));
            a.set(Mode::Serve);
            let begin = Instant::now();
            proxy.wait_health(&name, "returning", Duration::from_secs(20));
            times.push(begin.elapsed().as_secs_f64());
        }
        times
    };
    let short = back("{ first: 10ms, longest: 20ms }");
    let long = back("{ first: 1s, longest: 1s }");
    let growing = back("{ first: 1s, longest: 60s }");
    let (least, most) = (f64::min, f64::max);
    let shortest_long = long.iter().copied().fold(f64::INFINITY, least);
    assert!(short.iter().copied().fold(0.0, most) < shortest_long, "{short:?} {long:?}");
    assert!(long.iter().copied().fold(0.0, most) < growing[2], "{long:?} {growing:?}");
}

#[test]
fn ramp_is_the_time_of_return() {
    let time = |ramp: &str| {
        let a = Backend::start("a");
        let proxy =
            over(&[&a], &format!("probe: {{ interval: 100ms }}\n    ramp: {ramp}\n    hold: {{ first: 10ms }}"), "");
        let name = a.address.to_string();
        a.set(Mode::Refuse);
        proxy.wait_health(&name, "down", Duration::from_secs(10));
        a.set(Mode::Serve);
        let begin = Instant::now();
        proxy.wait_health(&name, "up", Duration::from_secs(20));
        begin.elapsed()
    };
    let (short, long) = (time("0s"), time("3s"));
    assert!(long > short + Duration::from_secs(2), "{short:?} {long:?}");
}

#[test]
fn caps_of_backend_and_pool_reset_what_is_beyond() {
    let a = Backend::start("a");
    a.set(Mode::Echo);
    for (pool, backend, most) in
        [("limits: { max_connections: 2 }", "", 2), ("limits: {}", ", max_connections: 3", 3), ("limits: {}", "", 9)]
    {
        let proxy = one_cell(pool, &[format!("{{ address: '{}'{backend} }}", a.address)]);
        up(&proxy, &a);
        let mut streams: Vec<TcpStream> = (0..9).map(|_| may_be_refused(proxy.address_cached())).collect();
        let served = streams.iter_mut().filter_map(|stream| echo(stream).ok()).count();
        assert_eq!(served, most, "{pool} {backend}");
        assert_eq!(proxy.metric("sailover_pool_refused_total", &["reason=\"full\""]), 9.0 - most as f64);
    }
}

#[test]
fn allow_and_deny_choose_clients() {
    let a = Backend::start("a");
    let base = yaml(&[a.address], "", "");
    for (rule, served) in [
        ("allow: [ 127.0.0.0/8 ]", true),
        ("allow: [ 10.0.0.0/8 ]", false),
        ("deny: [ 127.0.0.1 ]", false),
        ("deny: [ 10.0.0.0/8 ]", true),
        ("allow: [ 127.0.0.0/8 ], deny: [ 127.0.0.0/16 ]", false),
    ] {
        let proxy = Proxy::start(&base.replace("tcp: p", &format!("tcp: p, {rule}")));
        assert_eq!(get(proxy.address(0)).is_ok(), served, "{rule}");
    }
}

#[test]
fn wait_is_the_time_at_a_cap() {
    let a = Backend::start("a");
    a.set(Mode::Echo);
    let base = yaml(&[a.address], "", "");
    let mut times = Vec::new();
    for wait in [100, 3_000] {
        let proxy =
            Proxy::start(&base.replace("tcp: p", &format!("tcp: p, limits: {{ max_connections: 1, wait: {wait}ms }}")));
        up(&proxy, &a);
        let begin = Instant::now();
        let _held = opened(proxy.address(0));
        let mut waiting = TcpStream::connect(proxy.address(0)).unwrap();
        assert_eq!(read_all(&mut waiting).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        times.push(begin.elapsed());
        assert!(times[times.len() - 1] >= Duration::from_millis(wait), "{wait} {times:?}");
    }
    assert!(times[0] < Duration::from_secs(3), "{times:?}");
}

/// A process that ends with its test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn admin_http_is_off_or_read_only() {
    let a = Backend::start("a");
    let reserved = Port::reserve();
    let port = reserved.address;
    let proxy = over(&[&a], "", "");
    assert!(TcpStream::connect(port).is_err());
    let directory = crate::support::proxy::Directory::new();
    let config = directory.0.join("c.yaml");
    let text = format!(
        "{}\nadmin: {{ socket: {}/s.sock, http: '{port}', hosts: [ edge-1.example ] }}\n",
        yaml(&[a.address], "", ""),
        directory.0.display()
    );
    std::fs::write(&config, &text).unwrap();
    let child = std::process::Command::new(crate::support::proxy::BINARY)
        .args(["run", "--config"])
        .arg(&config)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let child = Killed(child);
    let ask = |request: &str| -> Option<String> {
        let mut stream = TcpStream::connect(port).ok()?;
        stream
            .write_all(format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes())
            .ok()?;
        String::from_utf8(read_all(&mut stream).ok()?).ok()
    };
    eventually("it answers", Duration::from_secs(5), || {
        ask("GET /livez").filter(|answer| answer.starts_with("HTTP/1.1 200"))
    });
    assert!(ask("GET /metrics").unwrap().contains("sailover_build_info"));
    assert!(ask("GET /status").unwrap().contains("\"generation\""));
    for refused in ["POST /reload", "POST /drain", "DELETE /status"] {
        assert!(ask(refused).unwrap().starts_with("HTTP/1.1 405"), "{refused}");
    }
    assert!(ask("GET /config").unwrap().starts_with("HTTP/1.1 404"));
    let asked_as = |line: &str, host: &str| -> String {
        let mut stream = TcpStream::connect(port).unwrap();
        stream.write_all(format!("{line}\r\n{host}\r\n").as_bytes()).unwrap();
        String::from_utf8(read_all(&mut stream).unwrap()).unwrap()
    };
    for good in ["127.0.0.1", "127.0.0.1:9180", "[::1]:9180", "LOCALHOST:1", "edge-1.example", "Edge-1.Example:9180"] {
        let answer = asked_as("GET /livez HTTP/1.1", &format!("Host: {good}\r\n"));
        assert!(answer.starts_with("HTTP/1.1 200"), "{good}: {answer}");
    }
    // Names that somebody else may point here.
    for bad in ["evil.example", "edge-1.example.evil.example", "127.0.0.1.evil.example:9180", "localhost.", ""] {
        let answer = asked_as("GET /status HTTP/1.1", &format!("Host: {bad}\r\n"));
        assert!(answer.starts_with("HTTP/1.1 421") && !answer.contains("generation"), "{bad}: {answer}");
    }
    assert!(asked_as("GET /status HTTP/1.1", "").starts_with("HTTP/1.1 421"));
    assert!(asked_as("GET http://evil.example/status HTTP/1.1", "").starts_with("HTTP/1.1 421"));
    assert!(asked_as("GET /livez HTTP/1.0", "").starts_with("HTTP/1.0 200"));
    assert!(asked_as("HEAD /status HTTP/1.1", "Host: localhost\r\n").starts_with("HTTP/1.1 405"));
    drop(proxy);
    // It moves to all addresses and back, by reloads that it survives.
    let beside = SocketAddr::new("127.0.0.2".parse().unwrap(), port.port());
    for (ip, everywhere) in [("0.0.0.0", true), ("127.0.0.1", false), ("[::]", true)] {
        let moved = format!("http: '{ip}:{}'", port.port());
        let (start, rest) = text.split_once(&format!("http: '{port}'")).unwrap();
        std::fs::write(&config, format!("{start}{moved}{rest}")).unwrap();
        let pid = rustix::process::Pid::from_raw(child.0.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        eventually(ip, Duration::from_secs(5), || {
            (TcpStream::connect(beside).is_ok() == everywhere && ask("GET /livez").is_some()).then_some(())
        });
    }
}

#[test]
fn log_level_format_and_access() {
    let a = Backend::start("a");
    let directory = crate::support::proxy::Directory::new();
    let file = directory.0.join("access.log");
    let run = |log: &str| {
        let proxy = over(&[&a], "", &format!("log: {log}"));
        get(proxy.address(0)).unwrap();
        eventually("it is counted", Duration::from_secs(5), || {
            (proxy.metric("sailover_bytes_total", &["direction=\"in\""]) > 0.0).then_some(())
        });
        // A further line after it proves that the queue has been written.
        proxy.signal(rustix::process::Signal::HUP);
        eventually("the reload is counted", Duration::from_secs(5), || {
            (proxy.status()["generation"] == 2).then_some(())
        });
        if !log.contains("warn") {
            proxy.wait_log("reloaded");
        }
        proxy
    };
    run("{ level: info }").wait_log("\"message\":\"ready\"");
    assert!(!run("{ level: warn }").log().contains("ready"));
    let text = run("{ format: text }").log();
    assert!(text.contains(" INFO ") && !text.contains("{\"timestamp\""), "{text}");
    let stdout = run("{ access: stdout }");
    eventually("a line on standard output", Duration::from_secs(5), || {
        stdout.log().contains("\"kind\":\"connection\"").then_some(())
    });
    assert!(!run("{ access: errors }").log().contains("\"kind\":\"connection\""));
    assert!(!run("{ access: off }").log().contains("\"kind\":\"connection\""));
    let proxy = run(&format!("{{ access: {} }}", file.display()));
    let lines = || std::fs::read_to_string(&file).unwrap_or_default().lines().count();
    eventually("a line in the file", Duration::from_secs(5), || (lines() == 1).then_some(()));
    // Rotated away, then reopened on USR1.
    std::fs::rename(&file, directory.0.join("old.log")).unwrap();
    proxy.signal(rustix::process::Signal::USR1);
    eventually("a line in the new file", Duration::from_secs(5), || {
        get(proxy.address_cached()).unwrap();
        (lines() >= 1).then_some(())
    });
}

#[test]
fn drain_bounds_the_farewell() {
    let a = Backend::start("a");
    a.set(Mode::Echo);
    let time = |drain: &str| {
        let mut proxy = over(&[&a], "", &format!("shutdown: {{ announce: 0s, drain: {drain} }}"));
        let _session = opened(proxy.address(0));
        let begin = Instant::now();
        proxy.signal(rustix::process::Signal::TERM);
        eventually("it ends", Duration::from_secs(10), || proxy.child.try_wait().unwrap());
        begin.elapsed()
    };
    let (short, long) = (time("100ms"), time("2s"));
    assert!(long > short + Duration::from_secs(1), "{short:?} {long:?}");
}
