//! Failures that stay where they are: silence, errors of one class, poison, too many clients, and how a cell comes back.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::http::{by_hand, pool, proxy, raw, read_request};
use crate::support::backend::{Backend, Mode, get, may_be_refused, may_be_refused_by, read_all};
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::tcp::yaml;

const ASK: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

fn up(proxy: &Proxy, backends: &[&Backend]) {
    backends.iter().for_each(|b| proxy.wait_health(&b.address.to_string(), "up", Duration::from_secs(5)));
}

fn over(backends: &[&Backend], more: &str) -> Proxy {
    let addresses: Vec<SocketAddr> = backends.iter().map(|backend| backend.address).collect();
    let proxy = Proxy::start(&yaml(&addresses, more, ""));
    up(&proxy, backends);
    proxy
}

/// A connection that has said something and waits; whether it is still open after a while is for the caller.
fn asks(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(ASK).unwrap();
    stream
}

#[test]
fn a_cell_has_a_cap_and_the_queue_its_time() {
    let backend = Backend::start("a");
    backend.set(Mode::Echo);
    let start = |limits: &str| {
        let yaml = format!(
            "pools: {{ p: {{ cells: {{ c: {{ max_connections: 2, backends: [ '{}' ] }} }}, limits: {{ {limits} }} }} }}\n\
             listeners: [ {{ bind: '127.0.0.1:0', tcp: p }} ]",
            backend.address
        );
        let proxy = Proxy::start(&yaml);
        up(&proxy, &[&backend]);
        proxy
    };
    let session = |proxy: &Proxy| {
        let mut stream = may_be_refused(proxy.address(0));
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // One that is refused may be so before it speaks.
        let _ = stream.write_all(b"x");
        stream
    };
    let served = |stream: &mut TcpStream| stream.read_exact(&mut [0; 1]).is_ok();

    let without = start("queue: 0");
    let mut two = [session(&without), session(&without)];
    assert!(two.iter_mut().all(served));
    assert!(!served(&mut session(&without)), "the third has no place and nowhere to wait");

    // Whoever waits gets the place of one who leaves.
    let long = start("queue: 1, queue_timeout: 20s");
    let mut two = [session(&long), session(&long)];
    assert!(two.iter_mut().all(served));
    let waiting = std::thread::spawn({
        let mut third = session(&long);
        move || served(&mut third)
    });
    eventually("the third waits", Duration::from_secs(5), || {
        (long.metric("sailover_queue_length", &[]) == 1.0).then_some(())
    });
    assert!(!served(&mut session(&long)), "the fourth has no place in the queue");
    drop(two);
    assert!(waiting.join().unwrap());

    let short = start("queue: 1, queue_timeout: 50ms");
    let mut two = [session(&short), session(&short)];
    assert!(two.iter_mut().all(served));
    assert!(!served(&mut session(&short)), "the third waits in vain, but not for long");
}

#[test]
fn a_capacity_is_kept() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let count = |capacity: &str| {
        let yaml = format!(
            "pools: {{ p: {{ cells: {{ a: {{ {capacity} backends: [ '{}' ] }}, b: [ '{}' ] }} }} }}\n\
             listeners: [ {{ bind: '127.0.0.1:0', tcp: p }} ]",
            a.address, b.address
        );
        let proxy = Proxy::start(&yaml);
        up(&proxy, &[&a, &b]);
        let begin = Instant::now();
        let of_a = (0..400).filter(|_| get(proxy.address(0)).unwrap() == "a").count();
        (of_a as f64, begin.elapsed().as_secs_f64())
    };
    let (of_a, _) = count("");
    assert!(of_a > 120.0, "half of them without a bound: {of_a}");
    let (of_a, took) = count("capacity: 60/m,");
    assert!(of_a <= took + 1.1, "{of_a} in {took} s at one a second");
}

#[test]
fn silence_counts_when_an_answer_is_owed() {
    let suspected = |more: &str, learn: usize, both: bool, wait: Duration| {
        let (a, b) = (Backend::start("a"), Backend::start("b"));
        let proxy = over(
            &[&a, &b],
            &format!("probe: off, {more}").replace("probe: off, ", "probe: { interval: 1h, timeout: 1s }\n    "),
        );
        (0..learn).for_each(|_| drop(get(proxy.address(0)).unwrap()));
        a.set(Mode::Silent);
        if both {
            b.set(Mode::Silent);
        }
        let begin = Instant::now();
        let mut open = Vec::new();
        while begin.elapsed() < wait {
            open.push(asks(proxy.address(0)));
            if proxy.health(&a.address.to_string()) != "up" {
                return Some(begin.elapsed());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    };
    let wait = Duration::from_secs(3);
    // Where nobody of the pool has ever answered, nothing is owed; one that answers shows that something is.
    assert_eq!(suspected("first_byte: learn", 0, true, wait / 2), None, "nothing was learned");
    assert!(suspected("first_byte: learn", 0, false, wait).is_some(), "learned from the other one");
    assert!(suspected("first_byte: learn", 100, false, wait).is_some());
    assert_eq!(suspected("first_byte: ignore", 100, false, wait / 2), None);
    let expected = suspected("first_byte: expect", 0, false, wait).expect("an answer is expected");
    let within = "first_byte: expect\n    timeouts: { first_byte: 50ms }";
    let sooner = suspected(within, 0, false, wait).expect("an answer is expected");
    assert!(sooner < expected, "{sooner:?} {expected:?}");
}

/// The one that answers may stand in the same cell, or nobody may have asked the other cell anything yet.
#[test]
fn silence_counts_beside_a_cell_that_stands_by() {
    let http = "http: { routes: [ { pool: p } ] }";
    for (face, fellow) in [("tcp: p", true), ("tcp: p", false), (http, true), (http, false)] {
        let (a, b, idle) = (Backend::start("a"), Backend::start("b"), Backend::start("idle"));
        let beside = if fellow { format!(", '{}'", b.address) } else { String::new() };
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ probe: {{ interval: 1h, timeout: 1s }}, cells: {{ c: [ '{}'{beside} ], \
             standby: {{ tier: 1, backends: [ '{}' ] }} }} }} }}\n\
             listeners: [ {{ bind: '127.0.0.1:0', {face} }} ]",
            a.address, idle.address
        ));
        up(&proxy, &if fellow { vec![&a, &b, &idle] } else { vec![&a, &idle] });
        (0..100).for_each(|_| assert_ne!(get(proxy.address(0)).unwrap(), "idle"));
        a.set(Mode::Silent);
        let mut open = Vec::new();
        // Those that came first go on waiting, and one after another tries it for all; but no POST is spent on that.
        let states: &[&str] = if face == http { &["suspect", "down"] } else { &["down"] };
        eventually("it is out", Duration::from_secs(8), || {
            let mut post = TcpStream::connect(proxy.address(0)).unwrap();
            post.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
            open.push(post);
            states.contains(&&*proxy.health(&a.address.to_string())).then_some(())
        });
        let names: Vec<String> = (0..20).map(|_| get(proxy.address(0)).unwrap()).collect();
        assert_eq!(names.contains(&"b".into()), fellow);
        assert!(names.contains(&"idle".into()) || fellow);
    }
}

#[test]
fn what_a_client_said_is_said_again() {
    // How many of the clients of a backend that falls silent, or ends, are answered by the other one.
    let answered = |replay: &str, mode: Mode, bytes: &'static [u8]| {
        let (a, b) = (Backend::start("a"), Backend::start("b"));
        let proxy = over(&[&a, &b], replay);
        (0..100).for_each(|_| drop(get(proxy.address(0)).unwrap()));
        b.set(Mode::Echo);
        a.set(mode);
        let clients: Vec<_> = (0..40)
            .map(|_| {
                let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
                let _ = stream.write_all(bytes);
                std::thread::spawn(move || {
                    let mut came = vec![0; bytes.len()];
                    stream.read_exact(&mut came).is_ok_and(|()| came == bytes)
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).filter(|whole| *whole).count()
    };
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    const HELLO: &[u8] = b"\x16\x03\x01\x00\x05hello";
    assert!(answered("", Mode::Silent, REQUEST) < 40);
    assert_eq!(answered("replay: { for: any }", Mode::Silent, REQUEST), 40);
    assert!(answered("replay: { for: any, up_to: 8B }", Mode::Silent, REQUEST) < 40, "more than is kept");
    assert!(answered("replay: { for: tls }", Mode::Silent, REQUEST) < 40, "no handshake");
    assert_eq!(answered("replay: { for: tls }", Mode::Silent, HELLO), 40);
}

#[test]
fn when_all_cells_become_slower_alike_nobody_is_refused_or_sent_twice() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = proxy(&pool("p", &[a.address, b.address], "probe: off"), "routes: [ { pool: p } ]", "");
    let address = proxy.address(0);
    (0..300).for_each(|_| drop(get(address).unwrap()));
    let received = || a.received.load(Relaxed) + b.received.load(Relaxed);
    let before = received();
    [&a, &b].iter().for_each(|backend| backend.set(Mode::Slow(400)));
    let clients: Vec<_> = (0..80).map(|_| std::thread::spawn(move || raw(address, ASK))).collect();
    let answers: Vec<String> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    let refused = answers.iter().filter(|answer| !answer.starts_with("HTTP/1.1 200")).count();
    assert_eq!((refused, received() - before), (0, 80), "refused, and received by the cells");
}

#[test]
fn one_that_becomes_slow_is_not_taken_for_silent() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = proxy(&pool("p", &[a.address, b.address], "probe: off, ramp: 1s"), "routes: [ { pool: p } ]", "");
    let address = proxy.address(0);
    let (stop, failed) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    failed.fetch_add(u32::from(!raw(address, ASK).starts_with("HTTP/1.1 200")), Relaxed);
                }
            });
        }
        // Whatever ends this ends the clients.
        let _end = Ends(&stop);
        let is = |health: &str| proxy.health(&b.address.to_string()) == health;
        let share = || proxy.backend(&b.address.to_string())["pace"].as_f64().unwrap();
        let received = || b.received.load(Relaxed);
        let comes_to = |more: usize| {
            let wanted = received() + more;
            eventually("clients come", Duration::from_secs(20), || (received() >= wanted).then_some(()));
        };
        comes_to(500);
        b.set(Mode::Slow(400));
        eventually("its share is cut", Duration::from_secs(5), || (share() < 0.05).then_some(()));
        eventually("it is fit", Duration::from_secs(10), || is("up").then_some(()));
        comes_to(10);
        assert!(share() < 0.05, "{}", share());
        assert_eq!(proxy.metric("sailover_transitions_total", &["to=\"down\""]), 0.0);
        b.set(Mode::Serve);
        eventually("it has its share again", Duration::from_secs(30), || (share() == 1.0).then_some(()));
    });
    assert_eq!(failed.into_inner(), 0);
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn probes_alone_take_out_one_cell_at_a_time() {
    let down_together = |between: &str, floor: bool| {
        let backends: Vec<Backend> = ["a", "b", "c"].map(Backend::start).into();
        let all: Vec<&Backend> = backends.iter().collect();
        let probe = "probe: { http: { path: /healthz }, interval: 100ms, timeout: 80ms }";
        let proxy = over(&all, &format!("{probe}\n    hold: {{ between_probe_removals: {between} }}"));
        backends.iter().for_each(|backend| backend.set(Mode::Unhealthy(100)));
        let down = || backends.iter().filter(|b| proxy.health(&b.address.to_string()) == "down").count();
        eventually("one is down", Duration::from_secs(5), || (down() > 0).then_some(()));
        // Ten more probes of each.
        let probes = || proxy.metric("sailover_probes_total", &["failed"]);
        let before = probes();
        eventually("probes go on", Duration::from_secs(10), || (probes() >= before + 30.0).then_some(()));
        if floor {
            eventually("two are down", Duration::from_secs(10), || (down() == 2).then_some(()));
            let before = probes();
            eventually("probes go on", Duration::from_secs(10), || (probes() >= before + 60.0).then_some(()));
            let said = proxy.status().to_string();
            assert!(said.contains("as the last of its tier it stays until clients fail too"), "{said}");
            assert!(get(proxy.address(0)).is_ok());
        }
        down()
    };
    assert_eq!(down_together("1h", false), 1);
    assert_eq!(down_together("500ms", true), 2);
    assert_eq!(down_together("0s", false), 3);
}

#[test]
fn clients_that_are_served_outweigh_probes_that_fail() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = over(&[&a, &b], "probe: { http: { path: /healthz }, interval: 50ms, timeout: 40ms }");
    [&a, &b].iter().for_each(|backend| backend.set(Mode::Unhealthy(100)));
    let before = proxy.metric("sailover_probes_total", &["failed"]);
    eventually("probes have failed", Duration::from_secs(10), || {
        get(proxy.address(0)).unwrap();
        (proxy.metric("sailover_probes_total", &["failed"]) >= before + 20.0).then_some(())
    });
    assert_eq!(proxy.metric("sailover_backend_contradiction", &[]), 2.0);
    assert_eq!(proxy.health(&a.address.to_string()), "up");
    assert_eq!(proxy.health(&b.address.to_string()), "up");
}

#[test]
fn a_cell_comes_back_as_failback_says() {
    let fast = "probe: { interval: 50ms, timeout: 40ms }\n    hold: { first: 100ms, longest: 3s, between_probe_removals: 0s }\n    ramp: 0s";
    let out_for = |failback: &str, back: &dyn Fn(&Proxy)| {
        let (a, b) = (Backend::start("a"), Backend::start("b"));
        let proxy = over(&[&a, &b], &format!("{fast}\n    failback: {failback}"));
        let health = || proxy.health(&a.address.to_string());
        a.set(Mode::Refuse);
        eventually("it is down", Duration::from_secs(5), || (health() == "down").then_some(()));
        a.set(Mode::Serve);
        let begin = Instant::now();
        back(&proxy);
        eventually("it is back", Duration::from_secs(10), || (health() != "down").then_some(()));
        begin.elapsed()
    };
    let auto = out_for("auto", &|_| {});
    let hold = out_for("hold", &|_| {});
    assert!(hold > auto && hold > Duration::from_secs(2), "{auto:?} {hold:?}");
    out_for("manual", &|proxy| {
        let waits = || proxy.status()["pools"][0]["cells"][0]["backends"][0]["waits_for_operator"] == true;
        eventually("it waits for a word", Duration::from_secs(5), || waits().then_some(()));
        let told = proxy.command(&["failback", "nowhere"]);
        assert!(!told.status.success());
        let told = proxy.command(&["failback", "c0"]);
        assert!(told.status.success(), "{told:?}");
    });
}

#[test]
fn clients_have_bounds_of_their_own() {
    let backend = Backend::start("a");
    let start = |face: &str, per_client: &str| {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ c: [ '{}' ] }} }} }}\n\
             listeners: [ {{ bind: '127.0.0.1:0', {face}, limits: {{ per_client: {{ {per_client} }} }} }} ]",
            backend.address
        ));
        up(&proxy, &[&backend]);
        proxy
    };
    let from = |last: u8, proxy: &Proxy| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 1, last], 0)).into()).unwrap();
        may_be_refused_by(&socket, proxy.address(0));
        let mut stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        let served = stream.read(&mut [0; 512]).is_ok_and(|read| read > 0);
        (stream, served)
    };
    let proxy = start("tcp: p", "connections: 2");
    let held: Vec<_> = (0..3).map(|_| from(1, &proxy)).collect();
    assert_eq!(held.iter().map(|(_, served)| *served).collect::<Vec<_>>(), [true, true, false]);
    assert!(from(2, &proxy).1, "another address is another client");
    drop(held);
    eventually("and there is room again", Duration::from_secs(5), || from(1, &proxy).1.then_some(()));

    let proxy = start("tcp: p", "connections: 2, prefix: { ipv4: 24, ipv6: 64 }");
    let held: Vec<_> = (1..4).map(|last| from(last, &proxy)).collect();
    assert_eq!(held.iter().filter(|(_, served)| *served).count(), 2, "one network is one client");

    let proxy = start("tcp: p", "rate: 60/m");
    let served = (0..20).filter(|_| from(1, &proxy).1).count();
    assert!((1..=4).contains(&served), "{served}");

    let proxy = start("http: { routes: [ { pool: p } ] }", "rate: 60/m");
    let ask = || raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let answers: Vec<String> = (0..5).map(|_| ask()).collect();
    let refused = answers.iter().find(|answer| answer.starts_with("HTTP/1.1 429")).expect("too many");
    assert!(refused.to_ascii_lowercase().contains("retry-after: 1"), "{refused}");

    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ c: [ '{}' ] }} }} }}\n\
         listeners: [ {{ bind: '[::1]:0', tcp: p, limits: {{ per_client: {{ connections: 1, prefix: {{ ipv6: 64 }} }} }} }} ]",
        backend.address
    ));
    up(&proxy, &[&backend]);
    let _first = TcpStream::connect(proxy.address(0)).unwrap();
    eventually("the first is counted", Duration::from_secs(5), || {
        (proxy.metric("sailover_connections", &[]) >= 1.0).then_some(())
    });
    let mut second = may_be_refused(proxy.address(0));
    assert!(read_all(&mut second).map_or(true, |bytes| bytes.is_empty()));
}

/// Writes fail on one cell, reads do not: the writes go elsewhere, and the reads stay.
#[test]
fn a_failing_class_moves_and_the_others_stay() {
    let writes = Arc::new(AtomicU32::new(0));
    let serve = |fails: bool, name: &'static str, writes: Arc<AtomicU32>| {
        by_hand(move |mut stream| {
            while let Some(head) = read_request(&mut stream) {
                let write = head.starts_with("post ");
                writes.fetch_add(u32::from(write && fails), Relaxed);
                let status = if write && fails { "500 Broken" } else { "200 OK" };
                let _ = stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 1\r\n\r\n{name}").as_bytes());
            }
        })
    };
    let (a, b) = (serve(true, "a", writes.clone()), serve(false, "b", writes.clone()));
    let proxy = proxy(&pool("p", &[a, b], "probe: off"), "routes: [ { pool: p } ]", "");
    let ask = |request: &str| {
        raw(
            proxy.address(0),
            format!("{request} / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes(),
        )
    };
    let (mut failed_late, mut reads_of_a) = (0, 0);
    for i in 0..600 {
        let answer = ask(if i % 4 == 0 { "POST" } else { "GET" });
        let failed = answer.starts_with("HTTP/1.1 500");
        assert!(!failed || i % 4 == 0, "a read failed");
        failed_late += u32::from(failed && i >= 100);
        reads_of_a += u32::from(i >= 100 && i % 4 != 0 && answer.ends_with('a'));
    }
    assert!(failed_late <= 1, "{failed_late} writes failed after the class had moved");
    assert!(reads_of_a > 150, "{reads_of_a} of 375 reads went to the first cell\n{}", proxy.log());
    assert_eq!(proxy.metric("sailover_transitions_total", &["to=\"suspect\""]), 0.0);
    assert_eq!(proxy.metric("sailover_class_failures_total", &[]), 1.0);
    assert_eq!(proxy.metric("sailover_backend_class_failing", &[]), 1.0, "of one of the two");
    let said = String::from_utf8_lossy(&proxy.command(&["status"]).stdout).into_owned();
    assert!(said.contains("one class of requests"), "{said}");
}

/// One request kills whoever gets it. It is sent on once, and then to nobody for some seconds.
#[test]
fn a_request_that_kills_is_sent_on_once() {
    let deaths: Vec<Arc<AtomicU32>> = (0..4).map(|_| Arc::default()).collect();
    let backends: Vec<SocketAddr> = deaths
        .iter()
        .map(|deaths| {
            let deaths = deaths.clone();
            by_hand(move |mut stream| {
                while let Some(head) = read_request(&mut stream) {
                    if head.starts_with("get /poison") {
                        deaths.fetch_add(1, Relaxed);
                        return;
                    }
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                }
            })
        })
        .collect();
    let proxy = proxy(&pool("p", &backends, "probe: off"), "routes: [ { pool: p } ]", "");
    let ask = |path: &str| {
        raw(proxy.address(0), format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
    };
    (0..20).for_each(|_| assert!(ask("/").starts_with("HTTP/1.1 200")));
    let answers: Vec<String> = (0..10).map(|_| ask("/poison")).collect();
    assert!(answers.iter().all(|answer| answer.starts_with("HTTP/1.1 50")), "{answers:?}");
    // On an idle connection it cannot be told from one that had ended before, so the same backend is asked once more.
    let died: Vec<u32> = deaths.iter().map(|deaths| deaths.load(Relaxed)).collect();
    assert!(died.iter().filter(|times| **times > 0).count() <= 2 && died.iter().sum::<u32>() <= 4, "{died:?}");
    assert!(answers[9].to_ascii_lowercase().contains("retry-after"), "{}", answers[9]);
    (0..20).for_each(|_| assert!(ask("/").starts_with("HTTP/1.1 200")));
}

/// It goes to nobody else, and its client says it again and again.
#[test]
fn a_post_that_kills_is_not_taken_twice() {
    let backends: Vec<Backend> = ["a", "b", "c", "d"].map(Backend::start).into();
    let addresses: Vec<SocketAddr> = backends.iter().map(|backend| backend.address).collect();
    let proxy = proxy(&pool("p", &addresses, "probe: off"), "routes: [ { pool: p } ]", "");
    let ask = |start: &str| {
        raw(
            proxy.address(0),
            format!("{start} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes(),
        )
    };
    (0..20).for_each(|_| assert!(ask("GET /").starts_with("HTTP/1.1 200")));
    assert!(ask("POST /poison").starts_with("HTTP/1.1 502"));
    for _ in 0..5 {
        assert!(ask("GET /").starts_with("HTTP/1.1 200"));
        assert!(ask("POST /poison").starts_with("HTTP/1.1 503"));
    }
    assert_eq!(backends.iter().map(|backend| backend.deaths.lock().unwrap().len()).sum::<usize>(), 1);
}

/// The same as a session, which is carried to another backend when its own ends without an answer.
#[test]
fn a_session_that_kills_goes_nowhere_else_and_does_not_come_again() {
    let backends: Vec<Backend> = ["a", "b", "c", "d"].map(Backend::start).into();
    let proxy = over(&backends.iter().collect::<Vec<_>>(), "replay: { for: any }");
    let ask = |path: &str| {
        let mut stream = may_be_refused(proxy.address(0));
        let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes());
        read_all(&mut stream).is_ok_and(|answer| answer.starts_with(b"HTTP/1.1 200"))
    };
    (0..40).for_each(|_| assert!(ask("/")));
    for _ in 0..6 {
        assert!(!ask("/poison"));
        assert!(ask("/"));
    }
    assert_eq!(backends.iter().map(|backend| backend.deaths.lock().unwrap().len()).sum::<usize>(), 1);
    assert!(proxy.metric("sailover_connections_total", &["end=\"poison\""]) >= 5.0);
}

/// It has healed, and its hold lasts for a minute. Whom the other one fails is served all the same.
#[test]
fn who_has_nobody_else_is_served_by_one_that_is_out() {
    let hold = "hold: { first: 1m, longest: 1m }";
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let tcp = over(&[&a, &b], hold);
    a.set(Mode::Refuse);
    eventually("it is out", Duration::from_secs(5), || {
        let _ = get(tcp.address(0));
        (tcp.health(&a.address.to_string()) == "down").then_some(())
    });
    a.set(Mode::Serve);
    b.set(Mode::Refuse);
    assert_eq!(get(tcp.address(0)).unwrap(), "a");
    let of_b = format!("backend=\"{}\"", b.address);
    let refused = tcp.metric("sailover_attempts_total", &[&of_b, "result=\"refused\""]);
    assert_eq!(refused, 1.0, "it was asked once, and not again after a pause");

    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy =
        proxy(&pool("p", &[a.address, b.address], &format!("probe: off, {hold}")), "routes: [ { pool: p } ]", "");
    let ask = || raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    (0..40).for_each(|_| assert!(ask().starts_with("HTTP/1.1 200")));
    a.set(Mode::Fail(100));
    eventually("it is out", Duration::from_secs(10), || {
        ask();
        (proxy.health(&a.address.to_string()) == "down").then_some(())
    });
    a.set(Mode::Serve);
    b.set(Mode::Fail(100));
    for _ in 0..5 {
        let answer = ask();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}\n{}", proxy.log());
    }
}

#[test]
fn a_backend_that_is_silent_from_the_start_is_seen_as_such() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    a.set(Mode::Mute);
    let proxy = over(&[&a, &b], "");
    let address = proxy.address(0);
    let mut waiting = Vec::new();
    eventually("it is in doubt", Duration::from_secs(15), || {
        let mut stream = asks(address);
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        if stream.read(&mut [0; 1]).is_err() {
            waiting.push(stream);
        }
        (proxy.health(&a.address.to_string()) != "up").then_some(())
    });
    assert_eq!(proxy.health(&b.address.to_string()), "up");
}

/// Sessions by backend, and those that were ended so far.
fn sessions(proxy: &Proxy, backends: [&Backend; 2]) -> ([usize; 2], usize) {
    let of = |backend: &Backend| {
        let told = proxy.command(&["sessions", "--backend", &backend.address.to_string(), "--json"]);
        let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("a list of sessions");
        told["count"].as_u64().expect("a number") as usize
    };
    (backends.map(of), proxy.metric("sailover_connections_total", &["end=\"rebalanced\""]) as usize)
}

#[test]
fn long_sessions_go_back_to_a_cell_that_returned() {
    let after_a_return = |more: &str| {
        let backends = [Backend::start("a"), Backend::start("b")];
        let fast = "probe: { interval: 50ms, timeout: 40ms }\n    hold: { first: 100ms, longest: 3s, between_probe_removals: 0s }\n    ramp: 0s";
        let proxy = over(&[&backends[0], &backends[1]], &format!("{fast}{more}"));
        backends.iter().for_each(|backend| backend.set(Mode::Echo));
        let a = backends[0].address.to_string();
        backends[0].set(Mode::Refuse);
        proxy.wait_health(&a, "down", Duration::from_secs(5));
        let address = proxy.address(0);
        let client = move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"?").unwrap();
            let mut answer = [0];
            stream.read_exact(&mut answer).unwrap();
            stream.set_nonblocking(true).unwrap();
            stream
        };
        let begin = Instant::now();
        let clients: Vec<TcpStream> = (0..60).map(|_| client()).collect();
        assert_eq!(sessions(&proxy, [&backends[0], &backends[1]]), ([0, 60], 0));
        backends[0].set(Mode::Echo);
        eventually("it is back", Duration::from_secs(10), || (proxy.health(&a) == "up").then_some(()));
        (backends, proxy, clients, client, begin)
    };

    let (stay, proxy, clients, ..) = after_a_return("");
    let (backends, moving, mut moved, client, begin) = after_a_return("\n    rebalance: 10/s");
    eventually("they are moved", Duration::from_secs(60), || {
        for stream in &mut moved {
            // A client whose session was ended connects anew.
            if !matches!(stream.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock) {
                *stream = client();
            }
        }
        let (at, _) = sessions(&moving, [&backends[0], &backends[1]]);
        (at[0] >= 12).then_some(())
    });
    assert!(begin.elapsed() > Duration::from_secs(10), "younger ones were moved after {:?}", begin.elapsed());
    let (at, ended) = sessions(&moving, [&backends[0], &backends[1]]);
    assert!(at[1] >= 24 && (12..=60).contains(&ended), "{at:?} {ended}");
    assert_eq!(sessions(&proxy, [&stay[0], &stay[1]]), ([0, 60], 0), "nobody asked for it");
    drop(clients);
}

#[test]
fn what_is_added_to_a_pool_in_use_begins_with_a_small_share() {
    let backends = [Backend::start("a"), Backend::start("b")];
    let both = yaml(&[backends[0].address, backends[1].address], "ramp: 1m", "");
    let proxy = Proxy::start(&yaml(&[backends[0].address], "ramp: 1m", ""));
    up(&proxy, &[&backends[0]]);
    proxy.write(&both);
    assert!(proxy.command(&["reload"]).status.success());
    let b = backends[1].address.to_string();
    proxy.wait_health(&b, "returning", Duration::from_secs(5));
    let of_b = (0..100).filter(|_| get(proxy.address(0)).unwrap() == "b").count();
    assert!(of_b < 30, "{of_b} of 100");
    // Where the process begins, all begin alike.
    let proxy = Proxy::start(&both);
    up(&proxy, &[&backends[0], &backends[1]]);
}

const VERSIONED: &str = "data_version: { header: X-Data-Version, at_least: 42 }, \
    probe: { http: { path: /healthz, digest: true }, interval: 100ms, timeout: 80ms }, hold: { first: 100ms }";

fn data(proxy: &Proxy, backend: &Backend) -> serde_json::Value {
    proxy.backend(&backend.address.to_string())["data_version"].clone()
}

fn says(proxy: &Proxy, backend: &Backend, version: u32) {
    eventually("it has said its version", Duration::from_secs(10), || {
        (data(proxy, backend)["said"] == version).then_some(())
    });
}

#[test]
fn a_cell_that_returns_with_old_data_gets_no_request() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    [&a, &b].iter().for_each(|backend| backend.set(Mode::Data(42, true)));
    let proxy = proxy(&pool("p", &[a.address, b.address], VERSIONED), "routes: [ { pool: p } ]", "");
    up(&proxy, &[&a, &b]);
    [&a, &b].iter().for_each(|backend| says(&proxy, backend, 42));
    let web = proxy.address(0);
    let from_a = |requests: usize| (0..requests).filter(|_| get(web).unwrap() == "a").count();
    assert!((20..80).contains(&from_a(100)));

    a.set(Mode::Refuse);
    proxy.wait_health(&a.address.to_string(), "down", Duration::from_secs(10));
    assert!(data(&proxy, &a)["said"].is_null(), "whoever starts again has to say it again");
    let before = a.received.load(Relaxed);
    a.set(Mode::Data(41, true));
    eventually("it is well, and its share is whole", Duration::from_secs(30), || {
        assert_eq!(from_a(10), 0);
        (proxy.health(&a.address.to_string()) == "up").then_some(())
    });
    assert_eq!((from_a(100), a.received.load(Relaxed) - before), (0, 0));
    assert_eq!(data(&proxy, &a), serde_json::json!({ "said": 41, "at_least": 42, "too_old": true }));
    assert_eq!(proxy.metric("sailover_backend_data_old", &[&a.address.to_string()]), 1.0);

    a.set(Mode::Data(43, true));
    eventually("it has caught up", Duration::from_secs(10), || (from_a(10) > 0).then_some(()));
    assert_eq!(proxy.metric("sailover_backend_data_old", &[]), 0.0);
}

#[test]
fn data_that_turn_old_reach_no_client_that_may_ask_again() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    [&a, &b].iter().for_each(|backend| backend.set(Mode::Data(42, true)));
    let seldom = VERSIONED.replace("100ms", "60s").replace("80ms", "2s");
    let proxy = proxy(&pool("p", &[a.address, b.address], &seldom), "routes: [ { pool: p } ]", "");
    up(&proxy, &[&a, &b]);
    let before = a.received.load(Relaxed);
    a.set(Mode::Data(41, true));
    let answers: Vec<String> = (0..100).map(|_| get(proxy.address(0)).unwrap()).collect();
    assert!(answers.iter().all(|answer| answer == "b"));
    assert_eq!(a.received.load(Relaxed) - before, 1, "its first answer tells");
    // Nobody has newer data: no answer is better than an old one.
    b.set(Mode::Data(40, true));
    let _ = get(proxy.address(0));
    assert!(raw(proxy.address(0), ASK).starts_with("HTTP/1.1 503"));
}

#[test]
fn content_that_is_not_what_its_digest_says_is_seen_by_probes() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    [&a, &b].iter().for_each(|backend| backend.set(Mode::Data(42, true)));
    let proxy = proxy(&pool("p", &[a.address, b.address], VERSIONED), "routes: [ { pool: p } ]", "");
    up(&proxy, &[&a, &b]);
    a.set(Mode::Data(42, false));
    proxy.wait_health(&a.address.to_string(), "down", Duration::from_secs(10));
    assert_eq!(proxy.backend(&a.address.to_string())["cause"]["kind"], "wrong content");
    assert_eq!(proxy.health(&b.address.to_string()), "up");
}

fn post(path: &str) -> Vec<u8> {
    format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes()
}

/// Where nobody may be sent twice somebody has to find out all the same.
#[test]
fn a_backend_that_errs_returns_where_all_requests_are_posts() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = proxy(&pool("p", &[a.address, b.address], ""), "routes: [ { pool: p } ]", "");
    up(&proxy, &[&a, &b]);
    let ask = || raw(proxy.address(0), &post("/"));
    (0..40).for_each(|_| assert!(ask().starts_with("HTTP/1.1 200")));
    a.set(Mode::Fail(100));
    eventually("it is in doubt", Duration::from_secs(5), || {
        ask();
        (proxy.health(&a.address.to_string()) == "suspect").then_some(())
    });
    // One that tries it still finds errors, and then it has to wait.
    a.set(Mode::Serve);
    let mut failed = 0;
    eventually("it has clients again", Duration::from_secs(30), || {
        failed += u32::from(!ask().starts_with("HTTP/1.1 200"));
        ["returning", "up"].contains(&&*proxy.health(&a.address.to_string())).then_some(())
    });
    assert_eq!(failed, 0);
}

#[test]
fn errors_that_all_have_alike_move_nobody() {
    let backends: Vec<Backend> = ["a", "b", "c"].map(Backend::start).into();
    let addresses: Vec<SocketAddr> = backends.iter().map(|backend| backend.address).collect();
    let proxy = proxy(&pool("p", &addresses, ""), "routes: [ { pool: p } ]", "");
    up(&proxy, &backends.iter().collect::<Vec<_>>());
    let ask = || raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    (0..60).for_each(|_| assert!(ask().starts_with("HTTP/1.1 200")));
    for percent in [100, 40] {
        backends.iter().for_each(|backend| backend.set(Mode::Fail(percent)));
        (0..200).for_each(|_| drop(ask()));
        backends.iter().for_each(|backend| backend.set(Mode::Serve));
        (0..60).for_each(|_| assert!(ask().starts_with("HTTP/1.1 200")));
    }
    let moved = proxy.metric("sailover_transitions_total", &["to=\"suspect\""]);
    assert_eq!(moved, 0.0, "{}", proxy.log());
}

/// Nothing is known of it but that it takes its time.
#[test]
fn the_first_clients_of_a_slow_backend_are_served() {
    let a = Backend::start("a");
    a.set(Mode::Slow(700));
    let proxy = proxy(&pool("p", &[a.address], ""), "routes: [ { pool: p } ]", "");
    up(&proxy, &[&a]);
    let address = proxy.address(0);
    let clients: Vec<_> = (0..60)
        .map(|i| {
            std::thread::park_timeout(Duration::from_millis(10));
            std::thread::spawn(move || {
                raw(address, format!("GET /{i} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
            })
        })
        .collect();
    let answers: Vec<String> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    let refused = answers.iter().filter(|answer| !answer.starts_with("HTTP/1.1 200")).count();
    assert_eq!(refused, 0, "{}", proxy.log());
}

/// Nobody but clients can tell when it is well again, and they do.
#[test]
fn a_short_fault_under_lying_probes_ends_with_the_fault() {
    for face in ["tcp: p", "http: { routes: [ { pool: p } ] }"] {
        let (a, b) = (Backend::start("a"), Backend::start("b"));
        let [of_a, of_b] = [&a, &b].map(|backend| backend.address.to_string());
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: [ '{of_a}' ], b: [ '{of_b}' ] }}, probe: {{ http: {{ path: /healthz }}, interval: 200ms }} }} }}\n\
             listeners: [ {{ bind: '127.0.0.1:0', {face} }} ]"
        ));
        up(&proxy, &[&a, &b]);
        let address = proxy.address(0);
        let asks = || get(address).is_ok();
        [&a, &b].iter().for_each(|backend| backend.set(Mode::Unhealthy(100)));
        // Clients are served after probes have failed, and not just before.
        eventually("the probes are contradicted", Duration::from_secs(20), || {
            assert!(asks());
            let failed = proxy.metric("sailover_probes_total", &["failed"]);
            (proxy.metric("sailover_backend_contradiction", &[]) == 2.0 && failed >= 12.0).then_some(())
        });
        a.set(Mode::Refuse);
        eventually("it is out", Duration::from_secs(20), || {
            assert!(asks());
            (proxy.health(&of_a) == "down").then_some(())
        });
        a.set(Mode::Unhealthy(100));
        eventually("it is back, whatever its probe says", Duration::from_secs(20), || {
            assert!(asks());
            matches!(proxy.health(&of_a).as_str(), "up" | "returning").then_some(())
        });
        assert_eq!(proxy.health(&of_b), "up", "{face}");
    }
}

/// It serves most, and some of its requests hang until their time is up.
#[test]
fn what_hangs_is_an_error_of_the_backend() {
    let hangs = Arc::new(AtomicU32::new(0));
    let serve = |every: u32, hangs: Arc<AtomicU32>| {
        by_hand(move |mut stream| {
            while read_request(&mut stream).is_some() {
                if hangs.fetch_add(1, Relaxed) % every == 1 {
                    let _ = stream.read(&mut [0; 1]);
                    return;
                }
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            }
        })
    };
    let (a, b) = (serve(3, hangs.clone()), serve(u32::MAX, Arc::default()));
    let proxy = proxy(
        &pool("p", &[a, b], "probe: off\n    timeouts: { request: 300ms }".replace('\n', ",").as_str()),
        "routes: [ { pool: p } ]",
        "",
    );
    let address = proxy.address(0);
    eventually("it is in doubt", Duration::from_secs(20), || {
        let clients: Vec<_> = (0..8).map(|_| std::thread::spawn(move || raw(address, &post("/")))).collect();
        clients.into_iter().for_each(|client| drop(client.join()));
        (proxy.health(&a.to_string()) != "up").then_some(())
    });
    assert_eq!(proxy.health(&b.to_string()), "up");
}

#[test]
fn a_class_that_fails_at_one_cell_keeps_the_others_clients_where_they_are() {
    let serve = |name: &'static str, fails: bool| {
        by_hand(move |mut stream| {
            while let Some(head) = read_request(&mut stream) {
                let status = if head.starts_with("post ") && fails { "500 Broken" } else { "200 OK" };
                let _ = stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 1\r\n\r\n{name}").as_bytes());
            }
        })
    };
    let backends = [serve("a", true), serve("b", false), serve("c", false)];
    let proxy =
        proxy(&pool("p", &backends, "probe: off, affinity: { by: { header: X-User } }"), "routes: [ { pool: p } ]", "");
    let ask = |method: &str, user: usize| {
        let head = format!(
            "{method} / HTTP/1.1\r\nHost: x\r\nX-User: {user}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        raw(proxy.address(0), head.as_bytes())
    };
    let homes: Vec<char> = (0..60).map(|user| ask("GET", user).chars().last().unwrap()).collect();
    assert!(['a', 'b', 'c'].iter().all(|name| homes.contains(name)));
    eventually("the class is known to fail there", Duration::from_secs(20), || {
        for user in 0..60 {
            ask("GET", user);
            ask("POST", user);
        }
        (proxy.metric("sailover_class_failures_total", &[]) >= 1.0).then_some(())
    });
    for (user, home) in homes.iter().enumerate() {
        assert_eq!(ask("GET", user).chars().last(), Some(*home), "reads of {user}");
        if *home != 'a' {
            assert_eq!(ask("POST", user).chars().last(), Some(*home), "writes of {user}");
        }
    }
}

#[test]
fn one_that_is_let_in_again_after_long_begins_with_a_small_share() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = over(&[&a, &b], "ramp: 2s");
    (0..20).for_each(|_| drop(get(proxy.address(0)).unwrap()));
    let order = |order: &str| assert!(proxy.command(&[order, "c1"]).status.success());
    let shared = || proxy.metric("sailover_cell_share_ratio", &["cell=\"c1\""]);
    // A moment makes nobody cold.
    order("drain");
    order("undrain");
    assert_eq!(shared(), 0.5);
    order("drain");
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(2_300) {
        assert_eq!(get(proxy.address(0)).unwrap(), "a");
    }
    order("undrain");
    assert!(shared() < 0.4, "{}", shared());
    eventually("the ramp ends", Duration::from_secs(10), || {
        let _ = get(proxy.address(0));
        (shared() == 0.5).then_some(())
    });
}

/// Who can go to one member only, which is full, holds up nobody who can go to another.
#[test]
fn who_waits_for_one_member_holds_up_nobody() {
    let a = by_hand(|mut stream| {
        while let Some(head) = read_request(&mut stream) {
            if head.starts_with("get /bad") {
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                return;
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na");
        }
    });
    let held = Arc::new(AtomicU32::new(0));
    let b = by_hand({
        let held = held.clone();
        move |mut stream| {
            while read_request(&mut stream).is_some() {
                held.fetch_add(1, Relaxed);
                let _ = stream.read(&mut [0; 1]);
            }
        }
    });
    let yaml = format!(
        "pools: {{ p: {{ cells: {{ a: [ '{a}' ], b: [ {{ address: '{b}', max_connections: 1 }} ] }}, probe: off }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:0, http: {{ routes: [ {{ pool: p }} ] }} }} ]"
    );
    let proxy = Proxy::start(&yaml);
    let address = proxy.address(0);
    let ask = move |path: String| {
        std::thread::spawn(move || {
            raw(address, format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
        })
    };
    let mut waiting = Vec::new();
    eventually("one has the only place", Duration::from_secs(5), || {
        waiting.push(ask("/".into()));
        (held.load(Relaxed) > 0).then_some(())
    });
    for round in 0..10 {
        waiting.extend((0..3).map(|i| ask(format!("/bad/{round}/{i}"))));
        for _ in 0..5 {
            let answer = ask("/".into()).join().unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{round}: {answer}");
        }
    }
}
