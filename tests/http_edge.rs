//! Where HTTP is hard: frames and targets by hand, halves of answers, requests that have nowhere to go, words of our own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::http::{Origin, Version, by_hand, pool, proxy, raw, read_request, told};
use crate::support::backend::{Backend, Port, read_all};
use crate::support::proxy::Proxy;
use crate::support::{eventually, settled_queues};

/// Frames of HTTP/2 by hand: type, flags, stream, payload.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A literal header without Huffman coding and without indexing.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0, name.len() as u8];
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(value.len() as u8);
    bytes.extend_from_slice(value.as_bytes());
    bytes
}

#[test]
fn a_body_that_ends_with_an_empty_frame_ends_once() {
    let got: Arc<Mutex<Vec<u8>>> = Arc::default();
    let list = got.clone();
    let backend = by_hand(move |mut stream| {
        let mut part = [0; 4096];
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        while let Ok(n @ 1..) = stream.read(&mut part) {
            list.lock().unwrap().extend_from_slice(&part[..n]);
            if list.lock().unwrap().ends_with(b"\r\n0\r\n\r\n") {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            }
        }
    });
    let proxy = proxy(&pool("p", &[backend], "probe: off"), "h2c: true, routes: [ { pool: p } ]", "");
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    let head =
        [literal(":method", "POST"), literal(":scheme", "http"), literal(":path", "/"), literal(":authority", "a")];
    bytes.extend(frame(1, 4, 1, &head.concat()));
    bytes.extend(frame(0, 0, 1, b"abc"));
    bytes.extend(frame(0, 1, 1, b""));
    client.write_all(&bytes).unwrap();
    eventually("the backend has the body", Duration::from_secs(5), || {
        got.lock().unwrap().ends_with(b"\r\n0\r\n\r\n").then_some(())
    });
    // A second end would come with the first, or right behind it.
    let proof = raw(proxy.address(0), b"GET /after HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    drop(proof);
    let text = String::from_utf8_lossy(&got.lock().unwrap()).into_owned();
    assert_eq!(text.matches("\r\n0\r\n\r\n").count(), 1, "{text}");
    assert!(text.contains("\r\n\r\n3\r\nabc\r\n0\r\n\r\n"), "{text}");
}

#[test]
fn a_host_of_http_2_is_judged_as_strictly() {
    let origin = Origin::start(Version::One);
    let proxy = proxy(&pool("p", &[origin.address], ""), "h2c: true, routes: [ { pool: p } ]", "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let (path, host) = ((":path", "/bad"), (":authority", "a"));
    for said in [
        &[path, ("host", "y\";for=\"6.6.6.6")][..],
        &[path, (":authority", "x!y")],
        &[path, (":authority", "x:99999999")],
        &[(":path", "*"), host],
        &[path, host, ("x\"y", "1")],
        &[path, host, ("content-length", "0"), ("content-length", "0")],
    ] {
        let mut client = TcpStream::connect(proxy.address(0)).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        let mut head = vec![literal(":method", "GET"), literal(":scheme", "http")];
        head.extend(said.iter().map(|(name, value)| literal(name, value)));
        bytes.extend(frame(1, 5, 1, &head.concat()));
        client.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        assert!(!answer.is_empty());
    }
    assert!(origin.seen.lock().unwrap().is_empty(), "{:?}", origin.seen);
}

#[test]
fn a_whole_target_of_http_1_0_is_routed_by_its_own_host() {
    let origin = Origin::start(Version::One);
    let routes = "routes: [ { host: own.example, respond: { body: own } }, { pool: p } ]";
    let proxy = proxy(&pool("p", &[origin.address], ""), routes, "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    assert!(raw(proxy.address(0), b"GET http://own.example/ HTTP/1.0\r\n\r\n").ends_with("own"));
    let other = raw(proxy.address(0), b"GET http://x.example/a?b HTTP/1.0\r\n\r\n");
    assert!(other.contains("x-path: /a?b") && told(&other).contains("host: x.example|"), "{other}");
    assert!(!other.to_ascii_lowercase().contains("chunked"), "HTTP/1.0 knows no chunks: {other}");
}

#[test]
fn what_a_backend_has_said_reaches_the_client_at_once() {
    let (tell, arrived) = std::sync::mpsc::channel();
    let arrived = Mutex::new(arrived);
    let backend = by_hand(move |mut stream| {
        let Some(_) = read_request(&mut stream) else { return };
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        // The second half is said when the first has arrived.
        let _ = arrived.lock().unwrap().recv();
        let _ = stream.write_all(b"world");
    });
    let proxy = proxy(&pool("p", &[backend], "probe: off"), "routes: [ { pool: p } ]", "");
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    while !answer.ends_with(b"hello") {
        let n = client.read(&mut part).expect("the first half comes before the second");
        answer.extend_from_slice(&part[..n]);
    }
    tell.send(()).unwrap();
    while !answer.ends_with(b"world") {
        let n = client.read(&mut part).unwrap();
        assert!(n > 0);
        answer.extend_from_slice(&part[..n]);
    }
}

#[test]
fn a_slow_request_that_has_nowhere_to_go_is_waited_for() {
    let slow = |mut stream: TcpStream| {
        while let Some(head) = read_request(&mut stream) {
            if head.contains("x-slow") {
                std::thread::sleep(Duration::from_millis(900));
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    };
    let backends = [by_hand(slow), by_hand(slow)];
    for count in 1..=2 {
        let proxy = proxy(&pool("p", &backends[..count], "probe: off"), "routes: [ { pool: p } ]", "");
        let address = proxy.address(0);
        let ask = move |more: &str| {
            raw(address, format!("GET /v HTTP/1.1\r\nHost: a\r\n{more}Connection: close\r\n\r\n").as_bytes())
        };
        (0..120).for_each(|_| assert!(ask("").starts_with("HTTP/1.1 200")));
        let slow: Vec<_> = (0..4).map(|_| std::thread::spawn(move || ask("x-slow: 1\r\n"))).collect();
        for asked in slow {
            let answer = asked.join().unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
    }
}

#[test]
fn an_upload_that_nobody_reads_ends_in_its_time_and_a_client_that_pauses_is_waited_for() {
    // Accepts by its kernel alone.
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let origin = Origin::start(Version::One);
    let pools = pool("deaf", &[deaf.local_addr().unwrap()], "probe: off, timeouts: { request: 700ms }")
        + &pool("p", &[origin.address], "probe: off, timeouts: { request: 700ms }");
    let proxy = proxy(&pools, "routes: [ { path: /deaf, pool: deaf }, { pool: p } ]", "");
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    client.write_all(b"POST /deaf HTTP/1.1\r\nHost: a\r\nContent-Length: 33554432\r\n\r\n").unwrap();
    let mut writer = client.try_clone().unwrap();
    std::thread::spawn(move || {
        let part = vec![7; 1 << 20];
        (0..32).all(|_| writer.write_all(&part).is_ok())
    });
    let mut answer = [0; 512];
    let n = client.read(&mut answer).expect("an answer and not a hang");
    assert!(
        String::from_utf8_lossy(&answer[..n]).starts_with("HTTP/1.1 504"),
        "{}",
        String::from_utf8_lossy(&answer[..n])
    );

    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\nConnection: close\r\n\r\nhello").unwrap();
    std::thread::sleep(Duration::from_millis(1_600));
    client.write_all(b"world").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("x-length: 10"), "{answer}");
}

#[test]
fn an_upgrade_that_is_none_is_none_for_the_backend_either() {
    let origin = Origin::start(Version::Two);
    let one = Origin::start(Version::One);
    let pools = pool("two", &[origin.address], "http: { version: 2 }") + &pool("one", &[one.address], "");
    let proxy = proxy(&pools, "routes: [ { path: /2, pool: two }, { pool: one } ]", "");
    for backend in [origin.address, one.address] {
        proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5));
    }
    let curls =
        "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n";
    let answer = raw(proxy.address(0), format!("GET /2 HTTP/1.1\r\nHost: a\r\n{curls}\r\n").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let half = raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: close\r\n\r\n");
    assert!(half.starts_with("HTTP/1.1 200") && !told(&half).contains("upgrade"), "{half}");
}

/// A backend of HTTP/2 by hand: answers the first request of each connection with 200, and then says that it is going, for a
/// reason that is none of the request's.
fn going_backend() -> std::net::SocketAddr {
    by_hand(|mut stream| {
        let mut preface = [0; 24];
        if stream.read_exact(&mut preface).is_err() {
            return;
        }
        let _ = stream.write_all(&frame(4, 0, 0, &[]));
        let mut head = [0; 9];
        while stream.read_exact(&mut head).is_ok() {
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let mut payload = vec![0; length];
            if stream.read_exact(&mut payload).is_err() {
                return;
            }
            let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            match (head[3], head[4] & 1) {
                (4, 0) => drop(stream.write_all(&frame(4, 1, 0, &[]))),
                (1, _) => {
                    // 0x88 is `:status: 200` by its number in the static table.
                    let _ = stream.write_all(&frame(1, 5, id, &[0x88]));
                    let _ = stream.write_all(&frame(7, 0, 0, &[0, 0, 0, id as u8, 0, 0, 0, 11]));
                }
                _ => {}
            }
        }
    })
}

#[test]
fn an_idle_connection_that_turned_bad_costs_no_request() {
    let backend = going_backend();
    let proxy = proxy(&pool("p", &[backend], "probe: off, http: { version: 2 }"), "routes: [ { pool: p } ]", "");
    for i in 0..10 {
        let answer =
            raw(proxy.address(0), b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "request {i}: {answer}\n{}", proxy.log());
    }
}

#[test]
fn a_page_of_our_own_is_shown_for_what_the_engine_never_saw_too() {
    let errors =
        "errors: { 400: { body: '<p>odd</p>', type: text/html }, 408: { body: late } }, routes: [ { respond: {} } ]";
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ 127.0.0.1:1 ] }}, probe: off }} }}\nlisteners: [ {{ bind: 127.0.0.1:0, http: {{ {errors} }}, timeouts: {{ header: 300ms }} }} ]"
    ));
    let odd = raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n");
    assert!(odd.starts_with("HTTP/1.1 400") && odd.contains("text/html") && odd.ends_with("<p>odd</p>"), "{odd}");
    let late = raw(proxy.address(0), b"GET / HT");
    assert!(late.starts_with("HTTP/1.1 408") && late.ends_with("late"), "{late}");
}

#[test]
fn a_whole_target_is_sent_elsewhere_by_its_path_alone() {
    let proxy = Proxy::start(
        "pools: { p: { cells: { a: [ 127.0.0.1:1 ] }, probe: off } }\nlisteners: [ { bind: 127.0.0.1:0, http: { routes: [ { host: old.example, redirect: { host: new.example } }, { redirect: { scheme: https } } ] } } ]",
    );
    let ask = |request: &str| raw(proxy.address(0), format!("{request}Connection: close\r\n\r\n").as_bytes());
    let moved = ask("GET http://old.example/a?b HTTP/1.1\r\nHost: old.example\r\n");
    assert!(moved.contains("http://new.example/a?b\r\n"), "{moved}");
    let secured = ask("GET /a?b HTTP/1.1\r\nHost: x.example\r\n");
    assert!(secured.contains("https://x.example/a?b\r\n"), "{secured}");
}

#[test]
fn a_request_without_a_byte_ends_in_the_idle_time_of_its_pool() {
    // Begins an answer, and says no more.
    let half = by_hand(|mut stream| {
        let Some(_) = read_request(&mut stream) else { return };
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        let _ = stream.read(&mut [0; 1]);
    });
    let pools = pool("short", &[half], "probe: off, timeouts: { idle: 400ms }")
        + &pool("long", &[half], "probe: off, timeouts: { idle: 1500ms }");
    let proxy = proxy(&pools, "routes: [ { path: /short, pool: short }, { pool: long } ]", "");
    let ended = |path: &str| {
        let begin = Instant::now();
        let mut client = TcpStream::connect(proxy.address(0)).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        assert!(answer.ends_with(b"hello"), "{}", String::from_utf8_lossy(&answer));
        begin.elapsed()
    };
    let (short, long) = (ended("/short"), ended("/"));
    assert!(
        short >= Duration::from_millis(400) && long >= Duration::from_millis(1_500) && short < long,
        "{short:?} {long:?}"
    );
}

#[test]
fn requests_are_counted_by_their_end_and_connections_by_theirs() {
    let origin = Origin::start(Version::One);
    let nobody = Port::reserve();
    let pools =
        pool("p", &[origin.address], "") + &pool("gone", &[nobody.address], "probe: off, connect: { timeout: 200ms }");
    let routes = "routes: [ { path: /own, respond: {} }, { path: /gone, pool: gone }, { pool: p } ]";
    let proxy = proxy(&pools, routes, "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    for path in ["/", "/own", "/gone"] {
        raw(proxy.address(0), format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes());
    }
    for end in ["answered", "responded", "unreachable"] {
        eventually(end, Duration::from_secs(5), || {
            (proxy.metric("sailover_request_ends_total", &[&format!("end=\"{end}\"")]) == 1.0).then_some(())
        });
    }
    let text = proxy.ask("GET", "/metrics").unwrap().1;
    let never =
        text.lines().find(|line| line.starts_with("sailover_connections_total{") && line.contains("end=\"answered\""));
    assert_eq!(never, None, "a connection cannot end so");
}

#[test]
fn leave_to_send_a_body_is_given_or_the_wait_for_it_ends() {
    let two = Origin::start(Version::Two);
    let silent = by_hand(|stream| {
        // It reads, and says nothing.
        let mut stream = stream;
        while matches!(stream.read(&mut [0; 4_096]), Ok(1..)) {}
    });
    let pools = pool("two", &[two.address], "http: { version: 2 }")
        + &pool("silent", &[silent], "timeouts: { request: 400ms }, probe: off");
    let proxy = proxy(&pools, "routes: [ { path: /two, pool: two }, { path: /silent, pool: silent } ]", "");
    proxy.wait_health(&two.address.to_string(), "up", Duration::from_secs(5));
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        (stream, String::from_utf8_lossy(&answer).into_owned())
    };
    let (mut stream, first) = ask("/two");
    assert_eq!(first, "HTTP/1.1 100");
    stream.write_all(b"hello").unwrap();
    let mut rest = Vec::new();
    while !String::from_utf8_lossy(&rest).contains("HTTP/1.1 200") {
        let mut more = [0; 200];
        let read = stream.read(&mut more).unwrap();
        assert!(read > 0, "{}", String::from_utf8_lossy(&rest));
        rest.extend_from_slice(&more[..read]);
    }
    // Nobody gives leave: the client has nothing to answer for.
    assert_eq!(ask("/silent").1, "HTTP/1.1 504");
}

#[test]
fn a_client_of_http_1_0_gets_no_chunks_and_no_half_answer_that_looks_whole() {
    let two = Origin::start(Version::Two);
    let half = by_hand(|mut stream| {
        if read_request(&mut stream).is_some() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        }
    });
    let pools = pool("two", &[two.address], "http: { version: 2 }") + &pool("half", &[half], "probe: off");
    let proxy = proxy(&pools, "routes: [ { path: /two, pool: two }, { path: /half, pool: half } ]", "");
    proxy.wait_health(&two.address.to_string(), "up", Duration::from_secs(5));
    for _ in 0..12 {
        assert!(raw(proxy.address(0), b"GET /two HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 505"));
    }
    assert_eq!(proxy.health(&two.address.to_string()), "up", "what we cannot pass on is no error of its own");
    let counted = raw(proxy.address(0), b"GET /two HTTP/1.0\r\nX-Answer: length\r\n\r\n");
    assert!(counted.starts_with("HTTP/1.1 200") && !counted.contains("chunked"), "{counted}");
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.write_all(b"GET /half HTTP/1.0\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer);
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn answers_of_routes_have_their_headers_and_say_which_listener_has_no_route() {
    let origin = Origin::start(Version::One);
    let hsts = r#"response: { add: { strict-transport-security: "max-age=1" } }"#;
    let routes = format!(
        "routes: [ {{ host: a, path: /old, redirect: {{ scheme: https }}, {hsts} }}, \
         {{ host: a, path: /own, respond: {{ status: 200, body: x }}, {hsts} }}, {{ host: a, path: /to, pool: p }} ]"
    );
    let proxy = proxy(&pool("p", &[origin.address], ""), &routes, "");
    proxy.wait_health(&origin.address.to_string(), "up", Duration::from_secs(5));
    let ask = |host: &str, target: &str| {
        let request =
            format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nX_Forwarded_For: 6.6.6.6\r\nConnection: close\r\n\r\n");
        raw(proxy.address(0), request.as_bytes()).to_ascii_lowercase()
    };
    for path in ["/old", "/own"] {
        assert!(ask("a", path).contains("strict-transport-security: max-age=1\r\n"));
    }
    assert!(ask("a", "/none").contains("404 nothing is served under this address. (listener web)"));
    assert!(ask("b", "/to").contains("421 this host is not served here. (listener web)"));
    // What browsers put into queries passes, and a second spelling of a header of ours does not.
    let answer = ask("a", "/to?q={a}|b^`\\");
    assert!(answer.contains("x-path: /to?q={a}|b^`\\\r\n"), "{answer}");
    assert!(!told(&answer).contains("6.6.6.6"), "{answer}");
}

#[test]
fn a_length_that_a_backend_says_twice_is_passed_on_once() {
    let twice = by_hand(|mut stream| {
        while read_request(&mut stream).is_some() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi");
        }
    });
    let proxy = proxy(&pool("p", &[twice], "probe: off"), "routes: [ { pool: p } ]", "");
    let answer = raw(proxy.address(0), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert_eq!(answer.to_ascii_lowercase().matches("content-length: 2\r\n").count(), 1, "{answer}");
    assert!(answer.ends_with("hi"));
}

#[test]
fn a_backend_whose_calls_end_in_internal_errors_is_left() {
    let calls = |status: &'static str| {
        by_hand(move |mut stream| {
            while read_request(&mut stream).is_some() {
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n";
                let _ = stream.write_all(format!("{head}grpc-status: {status}\r\n\r\n").as_bytes());
            }
        })
    };
    let (well, ill) = (calls("0"), calls("13"));
    let proxy = proxy(&pool("p", &[well, ill], ""), "routes: [ { pool: p } ]", "");
    [well, ill].iter().for_each(|backend| proxy.wait_health(&backend.to_string(), "up", Duration::from_secs(5)));
    eventually("it is in doubt", Duration::from_secs(10), || {
        raw(proxy.address(0), b"POST /call HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        (proxy.health(&ill.to_string()) != "up").then_some(())
    });
    assert_eq!(proxy.health(&well.to_string()), "up");
}

#[test]
fn a_client_that_does_not_read_costs_the_kernel_little_on_either_side() {
    let backend = Backend::start("x");
    let proxy = proxy(&pool("p", &[backend.address], "probe: off"), "routes: [ { pool: p } ]", "");
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.write_all(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let (to_client, _) = settled_queues(Some(proxy.address(0).port()), client.local_addr().unwrap().port());
    let (_, from_backend) = settled_queues(None, backend.address.port());
    // Each would be megabytes.
    assert!(to_client < 400_000 && from_backend < 400_000, "{to_client}, {from_backend}");
    // Whoever goes on reading gets all of it.
    assert!(read_all(&mut client).unwrap().len() > 4 << 20);
}

/// A client of HTTP/2 by hand, and what it reads of the frames of stream 1: their kinds and payloads.
struct ByHand(TcpStream);

impl ByHand {
    fn new(proxy: &Proxy, settings: &[u8]) -> ByHand {
        let mut client = TcpStream::connect(proxy.address(0)).unwrap();
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        client.write_all(&frame(4, 0, 0, settings)).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        ByHand(client)
    }

    fn ask(&mut self, method: &str, path: &str, end: bool) {
        let head = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "a")]
            .map(|(n, v)| literal(n, v));
        self.0.write_all(&frame(1, if end { 5 } else { 4 }, 1, &head.concat())).unwrap();
    }

    /// Asks ten times a second whether the connection is there, until the stream ends; what came on it.
    fn pings_until_the_end(&mut self) -> Vec<(u8, Vec<u8>)> {
        let (mut bytes, mut seen) = (Vec::new(), Vec::new());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(90) {
            self.0.write_all(&frame(6, 0, 0, &[0; 8])).unwrap();
            let mut part = [0; 16 << 10];
            match self.0.read(&mut part) {
                Ok(0) => panic!("the connection ended, which others may share: {seen:?}"),
                Ok(n) => bytes.extend_from_slice(&part[..n]),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
            while bytes.len() >= 9 {
                let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
                if bytes.len() < 9 + length {
                    break;
                }
                let all: Vec<u8> = bytes.drain(..9 + length).collect();
                if all[5..9] == 1u32.to_be_bytes() {
                    seen.push((all[3], all[9..].to_vec()));
                    if all[3] == 3 || all[3] <= 1 && all[4] & 1 != 0 {
                        return seen;
                    }
                }
            }
        }
        panic!("its stream never ended: {seen:?}");
    }
}

#[test]
fn a_stream_has_its_time_however_alive_its_connection_is() {
    let listens = by_hand(|mut stream| while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {});
    let pools = pool("listens", &[listens], "probe: off, timeouts: { idle: 500ms }");
    let proxy = proxy(&pools, "h2c: true, routes: [ { pool: listens } ]", "");
    // A body that does not go on.
    let mut client = ByHand::new(&proxy, &[]);
    client.ask("POST", "/stalled", false);
    client.0.write_all(&frame(0, 0, 1, b"abc")).unwrap();
    client.pings_until_the_end();
    proxy.wait_log("\"path\":\"/stalled\",\"status\":408");
}

#[test]
#[ignore = "a minute; make show"]
fn an_answer_over_http_2_that_is_not_taken_has_its_time() {
    let backend = Backend::start("x");
    let pools = pool("p", &[backend.address], "probe: off, timeouts: { idle: 500ms }");
    let proxy = proxy(&pools, "h2c: true, routes: [ { pool: p } ]", "");
    // SETTINGS_INITIAL_WINDOW_SIZE is 0.
    let mut client = ByHand::new(&proxy, &[0, 4, 0, 0, 0, 0]);
    client.ask("GET", "/big", true);
    client.pings_until_the_end();
    proxy.wait_log("\"path\":\"/big\",\"status\":200");
    eventually("its place is free", Duration::from_secs(5), || {
        (proxy.status()["pools"][0]["connections"]["now"] == 0).then_some(())
    });
}

#[test]
fn who_asks_for_nothing_makes_room_at_the_cap_for_who_does() {
    ["", "h2c: true,"].into_iter().for_each(makes_room);
}

fn makes_room(h2c: &str) {
    let slow = by_hand(|mut stream| {
        while let Some(head) = read_request(&mut stream) {
            if head.starts_with("get /slow") {
                std::thread::sleep(Duration::from_secs(3));
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let proxy = Proxy::start(&format!(
        "pools:\n{}\nlisteners:\n  - {{ bind: 127.0.0.1:0, limits: {{ max_connections: 24 }}, http: {{ {h2c} routes: [ {{ pool: p }} ] }} }}\n  \
         - {{ bind: 127.0.0.2:0, http: {{ routes: [ {{ pool: p }} ] }} }}\nworkers: 1",
        pool("p", &[slow], "probe: off")
    ));
    let mut other = TcpStream::connect(proxy.address(1)).unwrap();
    other.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let address = proxy.address(0);
    let busy = std::thread::spawn(move || raw(address, b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
    eventually("it is served", Duration::from_secs(5), || {
        (proxy.status()["pools"][0]["connections"]["now"] == 1).then_some(())
    });
    // Some say nothing, some never end their head, and some have had an answer.
    let hold = |words: &[u8]| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(words).unwrap();
        stream
    };
    let held: Vec<TcpStream> = [&b""[..], b"GET / HTTP/1.1\r\nX-Long: ", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"]
        .into_iter()
        .cycle()
        .take(40)
        .map(hold)
        .collect();
    eventually("it is at its cap", Duration::from_secs(5), || {
        (proxy.status()["listeners"][0]["connections"] == 24).then_some(())
    });
    for _ in 0..40 {
        let answer = raw(address, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let busy = busy.join().unwrap();
    assert!(busy.starts_with("HTTP/1.1 200"), "what is served makes no room: {busy}");
    other.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let answered = other.read(&mut [0; 512]).expect("another listener's connections are its own");
    assert!(answered > 0);
    drop(held);
}
