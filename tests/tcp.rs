use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, Mode, finish, get, read_all};
use crate::support::proxy::Proxy;
use crate::support::{eventually, settled_queues};

/// A pool of these backends, each in a cell of its own, behind one loopback listener.
pub fn yaml(backends: &[SocketAddr], pool: &str, more: &str) -> String {
    let cells: Vec<String> = backends.iter().enumerate().map(|(i, b)| format!("c{i}: [ '{b}' ]")).collect();
    format!(
        "pools:\n  p:\n    cells: {{ {} }}\n    {pool}\nlisteners: [ {{ name: l, bind: '127.0.0.1:0', tcp: p }} ]\n{more}",
        cells.join(", ")
    )
}

fn echo(pool: &str) -> (Backend, Proxy) {
    let backend = Backend::start("e");
    backend.set(Mode::Echo);
    let proxy = Proxy::start(&yaml(&[backend.address], pool, ""));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    (backend, proxy)
}

#[test]
fn half_close_is_exact_both_ways() {
    let (_backend, proxy) = echo("");
    let address = proxy.address(0);
    for size in [0, 1, 65_537, 3_000_000] {
        let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let mut stream = TcpStream::connect(address).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let sent = bytes.clone();
        let writing = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            finish(&writer);
        });
        assert!(read_all(&mut stream).unwrap() == bytes, "{size} bytes came back changed");
        writing.join().unwrap();
    }
    // The other way: the backend finishes first, and what the client sends after that still arrives.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::start(&yaml(&[listener.local_addr().unwrap()], "probe: off", ""));
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"greeting").unwrap();
    finish(&server);
    assert_eq!(read_all(&mut client).unwrap(), b"greeting");
    client.write_all(b"last words").unwrap();
    finish(&client);
    assert_eq!(read_all(&mut server).unwrap(), b"last words");
}

#[test]
fn bulk_goes_through_splice_and_small_messages_do_not() {
    let (_backend, proxy) = echo("");
    let mut small = TcpStream::connect(proxy.address(0)).unwrap();
    small.set_nodelay(true).unwrap();
    let mut buffer = [0; 512];
    for _ in 0..2_000 {
        small.write_all(&buffer).unwrap();
        small.read_exact(&mut buffer).unwrap();
    }
    assert_eq!(proxy.metric("sailover_spliced_bytes_total", &[]), 0.0);

    let mut bulk = TcpStream::connect(proxy.address(0)).unwrap();
    let mut writer = bulk.try_clone().unwrap();
    let total = 64 << 20;
    let writing = std::thread::spawn(move || {
        let block: Vec<u8> = (0..1 << 20).map(|i| (i % 253) as u8).collect();
        (0..64).for_each(|_| writer.write_all(&block).unwrap());
        finish(&writer);
    });
    let (mut seen, mut buffer) = (0usize, vec![0; 1 << 20]);
    loop {
        let n = bulk.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        assert!(buffer[..n].iter().enumerate().all(|(i, b)| *b == (((seen + i) % (1 << 20)) % 253) as u8));
        seen += n;
    }
    writing.join().unwrap();
    assert_eq!(seen, total);
    assert!(proxy.metric("sailover_spliced_bytes_total", &[]) > total as f64 / 2.0);
}

#[test]
fn a_reader_that_stops_for_a_while_loses_nothing() {
    let backend = Backend::start("p");
    let proxy = Proxy::start(&yaml(&[backend.address], "timeouts: { unacked: 1s }", ""));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    backend.set(Mode::Pour);
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut buffer = vec![0; 1 << 20];
    assert!(stream.read(&mut buffer).unwrap() > 0);
    // Longer than `unacked`: a closed window is not death.
    let resume = Instant::now() + Duration::from_secs(4);
    eventually("the pause is over", Duration::from_secs(6), || (Instant::now() > resume).then_some(()));
    for _ in 0..200 {
        assert!(stream.read(&mut buffer).unwrap() > 0);
    }
}

#[test]
fn a_client_that_does_not_read_costs_the_kernel_little() {
    let backend = Backend::start("p");
    let proxy = Proxy::start(&yaml(&[backend.address], "", ""));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    backend.set(Mode::Pour);
    let client = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    client.set_recv_buffer_size(4_096).unwrap();
    client.connect(&proxy.address(0).into()).unwrap();
    let port = client.local_addr().unwrap().as_socket().unwrap().port();
    let (held, _) = settled_queues(Some(proxy.address(0).port()), port);
    // The kernel's own bound is megabytes.
    assert!(held < 400_000, "{held}");
}

#[test]
fn a_reset_is_passed_on_in_both_directions() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::start(&yaml(&[listener.local_addr().unwrap()], "probe: off", ""));
    let reset = |stream: TcpStream| drop(socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)));

    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"x").unwrap();
    client.read_exact(&mut [0; 1]).unwrap();
    reset(server);
    assert_eq!(read_all(&mut client).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);

    let client = TcpStream::connect(proxy.address(0)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    reset(client);
    assert_eq!(read_all(&mut server).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn an_idle_connection_costs_little_memory() {
    sailover::sys::raise_open_files().unwrap();
    let (_backend, proxy) = echo("");
    let address = proxy.address(0);
    let count = 4_000;
    let mut open = Vec::new();
    let mut more = |count: usize| {
        let mut new: Vec<TcpStream> = (0..count).map(|_| TcpStream::connect(address).unwrap()).collect();
        for stream in &mut new {
            stream.write_all(b"hello").unwrap();
            stream.read_exact(&mut [0; 5]).unwrap();
        }
        open.extend(new);
    };
    // What is needed once, by both workers, is there before. Nothing is closed: what is freed need not go back to the system.
    more(100);
    let before = proxy.memory();
    more(count);
    let each = proxy.memory().saturating_sub(before) / count as u64;
    println!("{each} bytes for each of {count} more idle connections");
    assert!(each <= 4_096, "{each} bytes for each idle connection");
}

#[test]
fn ipv6_is_served_and_stays_apart_from_ipv4() {
    let backend = Backend::start("six");
    let yaml = format!(
        "pools: {{ p: {{ cells: {{ a: [ '{}' ] }} }} }}\nlisteners: [ {{ bind: '[::]:0', tcp: p }} ]",
        backend.address
    );
    let proxy = Proxy::start(&yaml);
    let port = proxy.address(0).port();
    assert_eq!(get(SocketAddr::new("::1".parse().unwrap(), port)).unwrap(), "six");
    assert!(get(SocketAddr::new("127.0.0.1".parse().unwrap(), port)).is_err());
}

#[test]
fn one_backend_gone_costs_no_client() {
    let (a, b) = (Backend::start("a"), Backend::start("b"));
    let proxy = Proxy::start(&yaml(&[a.address, b.address], "", ""));
    proxy.wait_health(&b.address.to_string(), "up", Duration::from_secs(5));
    a.set(Mode::Refuse);
    for _ in 0..100 {
        assert_eq!(get(proxy.address(0)).unwrap(), "b");
    }
}

#[test]
fn garbage_from_one_client_moves_no_backend() {
    let backends = [Backend::start("a"), Backend::start("b")];
    let proxy = Proxy::start(&yaml(&[backends[0].address, backends[1].address], "", ""));
    let address = proxy.address(0);
    for backend in &backends {
        proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
        backend.set(Mode::Strict);
    }
    // The same client first behaves, so that its word counts, and goes on behaving in between.
    (0..50).for_each(|_| drop(get(address).unwrap()));
    for i in 0..3_000 {
        let mut stream = TcpStream::connect(address).unwrap();
        let bytes: &[u8] = if i % 3 == 0 { b"GET / HTTP/1.1\r\nHo" } else { b"\x00garbage\r\n\r\n" };
        let _ = stream.write_all(bytes);
        if i % 3 != 0 {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let _ = stream.read(&mut [0; 64]);
        }
        if i % 10 == 0 {
            get(address).unwrap();
        }
    }
    for to in ["suspect", "down"] {
        let entered = proxy.metric("sailover_transitions_total", &[&format!("to=\"{to}\"")]);
        assert_eq!(entered, 0.0, "{to}: {}", proxy.log());
    }
}

/// The write that meets the reset takes the socket's error away, and the read after it ends as if all were well.
#[test]
fn a_reset_that_a_write_has_met_is_not_a_clean_end() {
    use sailover::relay::{Bounds, Carried, relay};
    use sailover::tls::Stream;
    use sailover::{clock, config, host::Host, log::AccessLog, session, table};
    use std::os::fd::AsRawFd;
    use std::sync::Arc;

    let loaded = config::parse(yaml(&["127.0.0.1:1".parse().unwrap()], "", "").as_bytes(), 9_999).unwrap();
    let (table, _) = table::build(Arc::new(loaded.config), loaded.hash, None, 9, clock::now()).unwrap();
    let pool = table.pools[0].clone();
    let host = Host::new(Arc::new(table), 1, AccessLog::off());
    let pair = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        one.set_nonblocking(true).unwrap();
        (one, other)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let ((client, mut outside), (server, mut backend)) = (pair(), pair());
        // All of it has happened before the first look: the answer, the reset, and more from the client.
        backend.write_all(b"half an ans").unwrap();
        socket2::SockRef::from(&backend).set_linger(Some(Duration::ZERO)).unwrap();
        drop(backend);
        outside.write_all(b"more").unwrap();
        let client = tokio::net::TcpStream::from_std(client).unwrap();
        let server = tokio::net::TcpStream::from_std(server).unwrap();
        let backend = pool.members[0].backend.clone();
        let session = session::enter(
            "l".into(),
            "127.0.0.1:1".parse().unwrap(),
            backend,
            pool.policy.clone(),
            client.as_raw_fd(),
            server.as_raw_fd(),
            sailover::clock::now(),
        );
        let timer = std::pin::pin!(tokio::time::sleep(Duration::from_secs(9)));
        let bounds = Bounds { idle: Duration::from_secs(5), half_close: Duration::from_secs(5) };
        let (begin, mut carried) = (tokio::time::Instant::now(), Carried::default());
        client.readable().await.unwrap();
        server.readable().await.unwrap();
        let (mut client, mut server) = (Stream::Plain(client), Stream::Plain(server));
        let end = relay(
            &mut client,
            &mut server,
            (Vec::new(), 0),
            bounds,
            &host,
            &session,
            timer,
            begin,
            &mut carried,
            |_, _| {},
        )
        .await;
        assert_eq!((end, carried.down), (table::End::BackendReset, 11));
        // No FIN has told the client that this was all.
        outside.set_nonblocking(true).unwrap();
        let mut answer = [0; 64];
        assert_eq!(outside.read(&mut answer).unwrap(), 11);
        assert_eq!(outside.read(&mut answer).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    });
}

#[test]
fn a_client_that_has_finished_sending_may_read_at_leisure() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pool = "probe: off\n    timeouts: { half_close: 200ms }";
    let proxy = Proxy::start(&yaml(&[listener.local_addr().unwrap()], pool, ""));
    let mut client = TcpStream::connect(proxy.address(0)).unwrap();
    client.write_all(b"all of it").unwrap();
    finish(&client);
    let (mut server, _) = listener.accept().unwrap();
    assert_eq!(read_all(&mut server).unwrap(), b"all of it");
    let size = 24 << 20;
    let writer = std::thread::spawn(move || {
        server.write_all(&vec![1; size]).unwrap();
    });
    let resume = Instant::now() + Duration::from_secs(2);
    eventually("the pause is over", Duration::from_secs(4), || (Instant::now() > resume).then_some(()));
    assert_eq!(read_all(&mut client).unwrap().len(), size);
    writer.join().unwrap();
}

#[test]
fn a_message_after_a_long_silence_is_no_sign_of_death() {
    let backend = Backend::start("e");
    backend.set(Mode::Echo);
    let proxy = Proxy::start(&yaml(&[backend.address], "timeouts: { unacked: 1s }", ""));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    // Many sessions, so that some are looked at in the moment between a message and its acknowledgement.
    let mut open: Vec<TcpStream> = (0..500).map(|_| TcpStream::connect(proxy.address_cached()).unwrap()).collect();
    for round in 0..3 {
        let resume = Instant::now() + Duration::from_millis(2_500);
        eventually("they are quiet", Duration::from_secs(5), || (Instant::now() > resume || round == 0).then_some(()));
        for stream in &mut open {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.write_all(b"x").unwrap();
        }
        for stream in &mut open {
            stream.read_exact(&mut [0; 1]).expect("still open");
        }
    }
}
