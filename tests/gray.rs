//! Backends that look well to whoever does not look closely: to a probe, to whoever reads no further than the head of an answer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::http::{by_hand, pool, proxy, raw, read_request};
use crate::support::backend::{Backend, Mode, get};
use crate::support::eventually;
use crate::support::proxy::Proxy;

const PROBED: &str = "probe: { http: { path: /healthz }, interval: 200ms }";

fn start(face: &str, more: &str, backends: [&Backend; 2]) -> Proxy {
    let [a, b] = backends.map(|backend| backend.address);
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ '{a}' ], b: [ '{b}' ] }}, {PROBED}{more} }} }}\n\
         listeners: [ {{ bind: '127.0.0.1:0', {face} }} ]\nlog: {{ access: stdout }}\nworkers: 1"
    ));
    backends.iter().for_each(|b| proxy.wait_health(&b.address.to_string(), "up", Duration::from_secs(5)));
    proxy
}

/// A POST that waits for its answer.
fn asks(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    stream
}

/// Nobody can tell what became of it, and that is said long before its own time is up.
#[test]
fn a_post_at_one_that_has_fallen_silent_is_answered() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = start("http: { routes: [ { pool: p } ] }", "", [&a, &b]);
    (0..100).for_each(|_| drop(get(proxy.address(0)).unwrap()));
    a.set(Mode::Mute);
    let mut open = Vec::new();
    eventually("it is out", Duration::from_secs(20), || {
        open.push(asks(proxy.address(0)));
        std::thread::park_timeout(Duration::from_millis(10));
        (proxy.health(&a.address.to_string()) == "down").then_some(())
    });
    let answers: Vec<String> = open.iter_mut().map(answer_within_ten_seconds).collect();
    let of = |status: &str| answers.iter().filter(|answer| answer.starts_with(status)).count();
    let (good, bad) = (of("HTTP/1.1 200"), of("HTTP/1.1 504"));
    assert!(good > 0 && bad > 0 && good + bad == answers.len(), "{good} {bad}: {answers:?}");
}

/// Nobody is given up for what he takes by nature, from the first of them on.
#[test]
fn posts_that_take_long_are_waited_for() {
    let slow = Backend::start("a");
    slow.set(Mode::Slow(2_000));
    let proxy =
        proxy(&pool("p", &[slow.address], "probe: { tcp: {}, interval: 200ms }"), "routes: [ { pool: p } ]", "");
    proxy.wait_health(&slow.address.to_string(), "up", Duration::from_secs(5));
    for _ in 0..2 {
        let mut open: Vec<TcpStream> = (0..12).map(|_| asks(proxy.address(0))).collect();
        let answers: Vec<String> = open.iter_mut().map(answer_within_ten_seconds).collect();
        assert!(answers.iter().all(|answer| answer.starts_with("HTTP/1.1 200")), "{answers:?}\n{}", proxy.log());
    }
}

fn answer_within_ten_seconds(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// So ends a process that is replaced: it listens no more, and answers what it has.
#[test]
fn one_that_takes_no_more_connections_may_finish_what_it_has() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (old, b) = (listener.local_addr().unwrap(), Backend::start("b"));
    let (until_it_is_out, is_out) = std::sync::mpsc::channel::<()>();
    let ends = std::thread::spawn(move || {
        let mut streams: Vec<TcpStream> = Vec::new();
        while streams.len() < 6 {
            let mut stream = listener.accept().unwrap().0;
            if read_request(&mut stream).is_some() {
                streams.push(stream);
            }
        }
        drop(listener);
        is_out.recv().unwrap();
        std::thread::park_timeout(Duration::from_secs(3));
        for mut stream in streams {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nold").unwrap();
        }
    });
    let pools = pool("p", &[old, b.address], "probe: { tcp: {}, interval: 200ms }");
    let proxy = proxy(&pools, "routes: [ { pool: p } ]", "");
    b.set(Mode::Slow(50));
    let mut open = Vec::new();
    eventually("it is out", Duration::from_secs(20), || {
        open.push(asks(proxy.address(0)));
        std::thread::park_timeout(Duration::from_millis(10));
        (proxy.health(&old.to_string()) == "down").then_some(())
    });
    until_it_is_out.send(()).unwrap();
    let answers: Vec<String> = open.iter_mut().map(answer_within_ten_seconds).collect();
    ends.join().unwrap();
    assert!(answers.iter().all(|answer| answer.starts_with("HTTP/1.1 200")), "{answers:?}\n{}", proxy.log());
    assert_eq!(answers.iter().filter(|answer| answer.ends_with("old")).count(), 6);
}

/// One request in thirty takes three seconds by nature: five times the slowest hundredth would be fifteen.
#[test]
fn slow_requests_do_not_hide_a_silence() {
    for face in ["tcp: p", "http: { routes: [ { pool: p } ] }"] {
        let (a, b) = (Backend::start("a"), Backend::start("b"));
        let proxy = start(face, "", [&a, &b]);
        let address = proxy.address(0);
        let slow = || drop(raw(address, b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
        std::thread::scope(|scope| {
            (0..20).for_each(|_| drop(scope.spawn(slow)));
            (0..600).for_each(|_| drop(get(address).unwrap()));
        });
        a.set(Mode::Mute);
        let mut open = Vec::new();
        for (health, within) in [("suspect", 5), ("down", 20)] {
            eventually(health, Duration::from_secs(within), || {
                open.push(asks(address));
                std::thread::park_timeout(Duration::from_millis(20));
                (proxy.health(&a.address.to_string()) == health).then_some(())
            });
        }
        assert_eq!(proxy.health(&b.address.to_string()), "up", "{face}");
    }
}

/// While it was away the other one alone answered, which is nearer.
#[test]
fn a_far_backend_that_was_away_is_not_measured_by_a_nearer_one() {
    let (near, far) = (Backend::start("a"), Backend::start("b"));
    far.set(Mode::Slow(150));
    let proxy = start("http: { routes: [ { pool: p } ] }", "", [&near, &far]);
    let address = proxy.address(0);
    let many = |count: usize, threads: usize| -> Vec<String> {
        let ask = || (0..count / threads).map(|_| get(address).unwrap()).collect::<Vec<_>>();
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..threads).map(|_| scope.spawn(ask)).collect();
            all.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        })
    };
    many(400, 8);
    assert!(proxy.command(&["drain", "b"]).status.success());
    many(2_400, 4);
    assert!(proxy.command(&["undrain", "b"]).status.success());
    let answers = many(80, 4);
    assert!(answers.iter().filter(|name| *name == "b").count() > 15, "{answers:?}");
    assert_eq!(proxy.metric("sailover_request_retries_total", &[]), 0.0, "{}", proxy.log());
}

/// Its probe says at once that it answers, each time that it comes into doubt.
#[test]
fn a_probe_does_not_hide_for_ever_that_clients_get_no_answers() {
    for face in ["tcp: p", "http: { routes: [ { pool: p } ] }"] {
        for learned in [0, 100] {
            let (a, b) = (Backend::start("a"), Backend::start("b"));
            let proxy = start(face, "", [&a, &b]);
            (0..learned).for_each(|_| drop(get(proxy.address(0)).unwrap()));
            a.set(Mode::Mute);
            let address = a.address.to_string();
            let mut open = Vec::new();
            eventually("it is out", Duration::from_secs(20), || {
                open.push(asks(proxy.address(0)));
                std::thread::park_timeout(Duration::from_millis(10));
                (proxy.health(&address) == "down").then_some(())
            });
            assert_eq!(proxy.health(&b.address.to_string()), "up", "{face} {learned}");
            assert_eq!(get(proxy.address(0)).unwrap(), "b");
        }
    }
}

#[test]
fn what_fails_behind_the_head_of_an_answer_is_seen() {
    for mode in [Mode::Stop(100), Mode::Cut(100)] {
        let (a, b) = (Backend::start("a"), Backend::start("b"));
        let proxy = start("http: { routes: [ { pool: p } ] }", "", [&a, &b]);
        (0..50).for_each(|_| drop(get(proxy.address(0)).unwrap()));
        a.set(mode);
        let address = proxy.address(0);
        let clients: Vec<_> = (0..40).map(|_| std::thread::spawn(move || get(address))).collect();
        eventually("it is in doubt", Duration::from_secs(10), || {
            (proxy.health(&a.address.to_string()) != "up").then_some(())
        });
        assert_eq!(proxy.health(&b.address.to_string()), "up", "{mode:?}");
        a.set(Mode::Serve);
        drop(clients);
        eventually("it is back", Duration::from_secs(30), || {
            let _ = get(address);
            (proxy.health(&a.address.to_string()) == "up").then_some(())
        });
    }
}

/// It is their clients that take nothing, while the backend has some more to say later.
#[test]
fn a_client_that_does_not_read_is_no_stall_of_its_backend() {
    let backend = |pauses: bool| {
        by_hand(move |mut stream| {
            while let Some(head) = read_request(&mut stream) {
                let long = head.starts_with("get /long");
                let (first, more) = if long { (50_000, 10_000) } else { (1, 0) };
                let said = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}", first + more, "x".repeat(first));
                let _ = stream.write_all(said.as_bytes());
                if long {
                    std::thread::park_timeout(Duration::from_secs(if pauses { 4 } else { 0 }));
                    let _ = stream.write_all(&vec![b'x'; more]);
                }
            }
        })
    };
    let proxy = proxy(&pool("p", &[backend(true), backend(false)], "probe: off"), "routes: [ { pool: p } ]", "");
    let address = proxy.address(0);
    let ask = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    (0..50).for_each(|_| assert!(raw(address, ask("/").as_bytes()).starts_with("HTTP/1.1 200")));
    // Small segments, so that the kernel takes little for them.
    let idle: Vec<TcpStream> = (0..24)
        .map(|_| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_tcp_mss(536).unwrap();
            socket.set_recv_buffer_size(2_048).unwrap();
            socket.connect(&address.into()).unwrap();
            let mut stream: TcpStream = socket.into();
            stream.write_all(ask("/long").as_bytes()).unwrap();
            stream
        })
        .collect();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        assert!(raw(address, ask("/").as_bytes()).starts_with("HTTP/1.1 200"));
    }
    assert_eq!(proxy.metric("sailover_transitions_total", &["to=\"suspect\""]), 0.0, "{}", proxy.log());
    drop(idle);
}

/// Nobody waits for long enough that a stall could be told by its own time.
#[test]
fn clients_who_leave_a_body_that_has_stopped_are_witnesses() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = start("http: { routes: [ { pool: p } ] }", "", [&a, &b]);
    (0..50).for_each(|_| drop(get(proxy.address(0)).unwrap()));
    a.set(Mode::Stop(100));
    eventually("it is in doubt", Duration::from_secs(20), || {
        let mut client = TcpStream::connect(proxy.address(0)).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let _ = client.read_to_end(&mut Vec::new());
        (proxy.health(&a.address.to_string()) != "up").then_some(())
    });
    assert_eq!(proxy.health(&b.address.to_string()), "up");
}

/// One worker of five is deadlocked. Who meets it is sent elsewhere in a moment, the last of them no later than the first.
#[test]
fn some_requests_that_hang_do_not_become_what_is_usual() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = start("http: { routes: [ { pool: p } ] }", "", [&a, &b]);
    let address = proxy.address(0);
    let ask =
        move || raw(address, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").starts_with("HTTP/1.1 200");
    let timed = move || {
        let begin = Instant::now();
        assert!(ask());
        begin.elapsed()
    };
    let longest = (0..300).map(|_| timed()).max().unwrap();
    a.set(Mode::Hang(20));
    let times: Vec<Duration> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(move || (0..150).map(|_| timed()).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let worst = times.iter().max().unwrap();
    assert!(*worst < longest * 3 + Duration::from_secs(1), "{worst:?}, and {longest:?} before");
}
