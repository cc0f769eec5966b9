//! Sessions that last, when one side of them vanishes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, Mode};
use crate::support::netns::{self, Rig};
use crate::support::proxy::Proxy;
use crate::support::{can_make_namespaces, eventually};

/// Sessions of a cell or a client that vanishes without a word.
#[test]
fn sessions_over_veth() {
    if !can_make_namespaces() {
        assert!(std::env::var_os("CI").is_none(), "in CI a drill that cannot run is a failure");
        return;
    }
    let rig = Rig::new(2);
    let backends: Vec<Backend> = (1..=2)
        .map(|i| Backend::start_in(Some(rig.cell(i)), format!("10.99.{i}.2:80").parse().unwrap(), "x"))
        .collect();
    backends.iter().for_each(|backend| backend.set(Mode::Echo));
    let two = "a: [ '10.99.1.2:80' ], b: [ '10.99.2.2:80' ]";
    let proxy = |cells: &str, pool: &str| {
        let proxy = Proxy::start_in(
            Some(rig.edge()),
            &format!(
                "pools: {{ p: {{ cells: {{ {cells} }}, {pool} }} }}\nlisteners: [ {{ bind: 10.99.2.1:8080, tcp: p }} ]"
            ),
        );
        proxy.wait_health("10.99.1.2:80", "up", Duration::from_secs(5));
        proxy
    };
    let on_a = |proxy: &Proxy| {
        let status = proxy.status();
        status["pools"][0]["cells"][0]["backends"][0]["in_flight"].as_u64().unwrap()
    };
    let open = |namespace: String| {
        let connect = move || {
            netns::enter(&namespace);
            let mut stream = TcpStream::connect("10.99.2.1:8080").unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0; 1]).unwrap();
            stream
        };
        std::thread::spawn(connect).join().unwrap()
    };
    let on_first = |proxy: &Proxy, namespace: &str| {
        eventually("a session on the first cell", Duration::from_secs(5), || {
            let stream = open(namespace.to_owned());
            (on_a(proxy) == 1).then_some(stream)
        })
    };

    // A busy session whose cell vanished ends soon after the verdict; on probes alone the session shows it itself.
    let busy = proxy(two, "on_down: stuck");
    let mut session = on_first(&busy, &rig.edge());
    rig.swallow(1);
    session.write_all(b"lost").unwrap();
    busy.wait_health("10.99.1.2:80", "down", Duration::from_secs(10));
    let verdict = Instant::now();
    assert!(session.read(&mut [0; 1]).is_err());
    println!("a busy session of a vanished cell ended {:.1} s after the verdict", verdict.elapsed().as_secs_f64());
    assert!(verdict.elapsed() < Duration::from_secs(6));
    rig.heal(1);
    drop(busy);

    // One that only receives is found out by keepalive, whatever `on_down` says.
    let idle = proxy(two, "on_down: keep");
    let mut session = on_first(&idle, &rig.edge());
    let settled = Instant::now();
    eventually("keepalive is set", Duration::from_secs(3), || {
        (settled.elapsed() > Duration::from_millis(1_500)).then_some(())
    });
    rig.swallow(1);
    let vanished = Instant::now();
    assert!(session.read(&mut [0; 1]).is_err());
    println!("a session that only receives ended {:.1} s after its cell vanished", vanished.elapsed().as_secs_f64());
    assert!(vanished.elapsed() < Duration::from_secs(16));
    rig.heal(1);
    drop(idle);

    // A client that vanishes while much is sent to it ends after `unacked`.
    backends.iter().for_each(|backend| backend.set(Mode::Pour));
    let mut times = Vec::new();
    for unacked in ["1s", "6s"] {
        let pouring = proxy("a: [ '10.99.1.2:80' ]", &format!("timeouts: {{ unacked: {unacked} }}"));
        let namespace = rig.cell(2);
        let client = std::thread::spawn(move || {
            netns::enter(&namespace);
            let mut stream = TcpStream::connect("10.99.2.1:8080").unwrap();
            stream.read_exact(&mut [0; 65_536]).unwrap();
            let draining = stream.try_clone().unwrap();
            std::thread::spawn(move || {
                let mut draining = draining;
                draining.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                let mut buffer = vec![0; 1 << 20];
                while matches!(draining.read(&mut buffer), Ok(n) if n > 0) {}
            });
            stream
        });
        let stream = client.join().unwrap();
        rig.swallow(2);
        let vanished = Instant::now();
        eventually("it has ended", Duration::from_secs(15), || {
            (pouring.metric("sailover_connections_total", &["end=\"client_stuck\""]) == 1.0).then_some(())
        });
        times.push(vanished.elapsed().as_secs_f64());
        drop(stream);
        rig.heal(2);
    }
    println!("a vanished client ended after {times:.1?} s with unacked 1 s and 6 s");
    assert!(times[0] + 3.0 < times[1], "{times:?}");

    // The same through HTTP: an upload to a cell that vanishes, and a client that vanishes under its answer.
    backends.iter().for_each(|backend| backend.set(Mode::Mute));
    let http = |cells: &str| {
        let proxy = Proxy::start_in(
            Some(rig.edge()),
            &format!(
                "pools: {{ p: {{ cells: {{ {cells} }}, probe: off, timeouts: {{ unacked: 1s, request: 60s }} }} }}\n\
                 listeners: [ {{ bind: 10.99.2.1:8080, http: {{ routes: [ {{ pool: p }} ] }} }} ]"
            ),
        );
        eventually("it listens", Duration::from_secs(5), || {
            std::thread::sleep(Duration::from_millis(10));
            (proxy.status()["listeners"][0]["connections"] == 0).then_some(())
        });
        proxy
    };
    let connections = |proxy: &Proxy| proxy.status()["listeners"][0]["connections"].as_u64().unwrap();
    let uploading = http("a: [ '10.99.1.2:80' ]");
    let namespace = rig.edge();
    let upload = std::thread::spawn(move || {
        netns::enter(&namespace);
        let mut stream = TcpStream::connect("10.99.2.1:8080").unwrap();
        stream.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n").unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut answer = [0; 1024];
        // It goes on with its body, so that no time of a request is up.
        loop {
            let _ = stream.write_all(b"more");
            match stream.read(&mut answer) {
                Ok(n) => return String::from_utf8_lossy(&answer[..n]).into_owned(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return error.to_string(),
            }
        }
    });
    eventually("the upload is under way", Duration::from_secs(5), || (on_a(&uploading) == 1).then_some(()));
    rig.swallow(1);
    let vanished = Instant::now();
    let answer = upload.join().unwrap();
    println!("an upload to a vanished cell ended after {:.1} s", vanished.elapsed().as_secs_f64());
    assert!(answer.starts_with("HTTP/1.1 50") && vanished.elapsed() < Duration::from_secs(20), "{answer}");
    rig.heal(1);
    drop(uploading);

    backends.iter().for_each(|backend| backend.set(Mode::Serve));
    let answering = http("a: [ '10.99.1.2:80' ]");
    let namespace = rig.cell(2);
    let client = std::thread::spawn(move || {
        netns::enter(&namespace);
        let mut stream = TcpStream::connect("10.99.2.1:8080").unwrap();
        stream.write_all(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        stream.read_exact(&mut [0; 65_536]).unwrap();
        stream
    });
    let stream = client.join().unwrap();
    assert_eq!(connections(&answering), 1);
    let mut reading = stream.try_clone().unwrap();
    std::thread::spawn(move || {
        reading.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut buffer = vec![0; 4 << 10];
        // Slowly, so that there is always something on its way.
        while matches!(reading.read(&mut buffer), Ok(n) if n > 0) {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    rig.swallow(2);
    let vanished = Instant::now();
    eventually("it has ended", Duration::from_secs(20), || (connections(&answering) == 0).then_some(()));
    println!("a client that vanished under its answer ended after {:.1} s", vanished.elapsed().as_secs_f64());
    drop(stream);
    rig.heal(2);
}
