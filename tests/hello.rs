use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use sailover::sniff::{HelloReader, ProxyVersion, Verdict, proxy_header};

use crate::support::backend::{Backend, Mode, get, may_be_refused, read_all};
use crate::support::proxy::Proxy;
use crate::tcp::yaml;

/// A real ClientHello for `name`, with the post-quantum key share that clients send today or without.
fn client_hello(name: &str, post_quantum: bool) -> Vec<u8> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    if !post_quantum {
        provider.kx_groups.retain(|group| !format!("{:?}", group.name()).contains("MLKEM"));
    }
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

/// A server that tells what each of its connections began with, up to their end or `most` bytes.
fn recorder(most: usize) -> (SocketAddr, Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (told, tell) = channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let told = told.clone();
            std::thread::spawn(move || {
                let mut all = Vec::new();
                let mut part = [0; 4_096];
                while all.len() < most {
                    match stream.read(&mut part) {
                        Ok(0) | Err(_) => break,
                        Ok(n) => all.extend_from_slice(&part[..n]),
                    }
                }
                if !all.is_empty() {
                    let _ = told.send(all);
                }
            });
        }
    });
    (address, tell)
}

fn sni(pools: &[(&str, SocketAddr)], listener: &str) -> Proxy {
    let pools: Vec<String> =
        pools.iter().map(|(name, address)| format!("  {name}: {{ cells: {{ c: [ {address} ] }} }}\n")).collect();
    Proxy::start(&format!("pools:\n{}listeners:\n  - {{ name: l, bind: 127.0.0.1:0, {listener} }}\n", pools.concat()))
}

#[test]
fn server_names_choose_the_pool() {
    let backends = [Backend::start("a"), Backend::start("b"), Backend::start("c")];
    backends.iter().for_each(|backend| backend.set(Mode::Echo));
    let [a, b, c] = [0, 1, 2].map(|i: usize| backends[i].address);
    let proxy = sni(
        &[("exact", a), ("wild", b), ("deep", c)],
        "sni: { routes: { Shop.example: exact, '*.example': wild, '*.deep.example': deep } }",
    );
    let served = |pool: &str| proxy.metric("sailover_attempts_total", &[&format!("pool=\"{pool}\""), "result=\"ok\""]);
    for (name, pool) in [
        ("shop.example", "exact"),
        ("SHOP.example", "exact"),
        ("pay.example", "wild"),
        ("a.b.example", "wild"),
        ("x.deep.example", "deep"),
        ("deep.example", "wild"),
    ] {
        for post_quantum in [false, true] {
            let hello = client_hello(name, post_quantum);
            assert_eq!(hello.len() > 1_200, post_quantum, "{}", hello.len());
            for cut in [1, 5, 6, 43, hello.len() / 2, hello.len() - 1] {
                let before = served(pool);
                let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
                stream.set_nodelay(true).unwrap();
                stream.write_all(&hello[..cut]).unwrap();
                stream.write_all(&hello[cut..]).unwrap();
                crate::support::backend::finish(&stream);
                // The backend echoes: not a byte was lost or changed.
                assert_eq!(read_all(&mut stream).unwrap(), hello, "{name} {cut}");
                assert_eq!(served(pool), before + 1.0, "{name} {cut}");
            }
        }
    }
    // Nobody has this name: a TLS alert, and not a reset.
    let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
    stream.write_all(&client_hello("elsewhere.test", true)).unwrap();
    assert_eq!(read_all(&mut stream).unwrap(), [21, 3, 3, 0, 2, 2, 112]);
    // And this is no TLS: refused at its first byte.
    let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
    stream.write_all(b"G").unwrap();
    assert!(read_all(&mut stream).is_err());
    for end in ["no_route", "malformed"] {
        assert_eq!(proxy.metric("sailover_connections_total", &[&format!("end=\"{end}\"")]), 1.0, "{end}");
    }
    let shown = String::from_utf8(proxy.command(&["explain", "127.0.0.1"]).stdout).unwrap();
    assert!(["pool exact", "pool wild", "pool deep"].iter().all(|pool| shown.contains(pool)), "{shown}");
}

#[test]
fn real_hellos_are_read_at_every_cut() {
    for post_quantum in [false, true] {
        let hello = client_hello("shop.example", post_quantum);
        let wanted = Verdict::Done(Some("shop.example".to_owned()));
        for cut in 0..hello.len() {
            let mut reader = HelloReader::default();
            assert_eq!(reader.read(&hello[..cut]), Verdict::More, "{cut}");
            assert_eq!(reader.read(&hello), wanted, "{cut}");
        }
    }
}

#[test]
fn other_names_and_none_go_to_the_default() {
    let backend = Backend::start("a");
    backend.set(Mode::Echo);
    let proxy = sni(&[("p", backend.address)], "sni: { routes: { shop.example: p }, default: p }");
    for name in ["shop.example", "other.test", "192.0.2.1"] {
        let hello = client_hello(name, true);
        let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
        stream.write_all(&hello).unwrap();
        crate::support::backend::finish(&stream);
        assert_eq!(read_all(&mut stream).unwrap(), hello, "{name}");
    }
}

#[test]
fn a_slow_hello_ends_at_its_deadline() {
    let backend = Backend::start("a");
    for (handshake, ends) in [("200ms", true), ("60s", false)] {
        let proxy = sni(
            &[("p", backend.address)],
            &format!("sni: {{ routes: {{ shop.example: p }} }}, timeouts: {{ handshake: {handshake} }}"),
        );
        let hello = client_hello("shop.example", true);
        let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
        stream.write_all(&hello[..100]).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let ended = stream.read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        assert_eq!(ended, ends, "{handshake}");
        let counted = proxy.metric("sailover_connections_total", &["end=\"handshake_timeout\""]);
        assert_eq!(counted, f64::from(u8::from(ended)), "{handshake}");
    }
}

/// What a client takes for its own beginning is no time of a backend's.
#[test]
fn a_slow_beginning_leaves_the_dialling_its_time() {
    let backend = Backend::start("a");
    backend.set(Mode::Echo);
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ c: [ {} ] }}, connect: {{ timeout: 100ms }} }} }}\n\
         listeners: [ {{ name: l, bind: 127.0.0.1:0, sni: {{ routes: {{ shop.example: p }} }} }} ]\n\
         log: {{ access: stdout }}\n",
        backend.address
    ));
    let hello = client_hello("shop.example", true);
    let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
    stream.write_all(&hello[..600]).unwrap();
    // A reader that waits on purpose: longer than a dial may take.
    stream.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    assert!(stream.read(&mut [0; 1]).is_err());
    stream.write_all(&hello[600..]).unwrap();
    crate::support::backend::finish(&stream);
    assert_eq!(read_all(&mut stream).unwrap(), hello);
    proxy.wait_log("\"attempts\":1,\"raced\":false");
}

/// Unfinished beginnings take half of a listener's places, and no more.
#[test]
fn unfinished_beginnings_leave_room_for_others() {
    let backend = Backend::start("a");
    let proxy = sni(&[("p", backend.address)], "sni: { routes: { shop.example: p } }, limits: { max_connections: 8 }");
    let held: Vec<TcpStream> = (0..7).map(|_| may_be_refused(proxy.address_cached())).collect();
    crate::support::eventually("those beyond the half are refused", Duration::from_secs(5), || {
        (proxy.metric("sailover_connections_total", &["end=\"cap\""]) == 3.0).then_some(())
    });
    drop(held);
}

#[test]
fn the_beginnings_of_one_network_have_a_bound_on_memory() {
    let backend = Backend::start("a");
    let proxy = sni(&[("p", backend.address)], "sni: { routes: { shop.example: p } }");
    // A hello that announces 60,000 bytes and never ends, from many connections.
    let mut begun = vec![22, 3, 1, 0x40, 0, 1, 0, 0xea, 0x60];
    begun.resize(5 + (1 << 14), 0);
    for _ in 0..2 {
        begun.extend_from_slice(&[22, 3, 1, 0x40, 0]);
        begun.resize(begun.len() + (1 << 14), 0);
    }
    let held: Vec<TcpStream> = (0..120)
        .map(|_| {
            let mut stream = may_be_refused(proxy.address_cached());
            // Beyond the bound it is reset, perhaps while it is written.
            let _ = stream.write_all(&begun);
            stream
        })
        .collect();
    crate::support::eventually("the rest is refused", Duration::from_secs(5), || {
        (proxy.metric("sailover_connections_total", &["end=\"malformed\""]) > 20.0).then_some(())
    });
    drop(held);
    // Then there is room again.
    crate::support::eventually("another one is served", Duration::from_secs(5), || {
        let mut stream = TcpStream::connect(proxy.address_cached()).ok()?;
        stream.write_all(&client_hello("elsewhere.test", true)).ok()?;
        (read_all(&mut stream).ok()? == [21, 3, 3, 0, 2, 2, 112]).then_some(())
    });
}

#[test]
fn a_proxy_header_names_the_client_where_it_is_believed() {
    let backend = Backend::start("a");
    let run = |listener: &str| {
        let text = yaml(&[backend.address], "", "log: { access: stdout }");
        Proxy::start(&text.replace("tcp: p", &format!("tcp: p, {listener}")))
    };
    let ask = |proxy: &Proxy, header: &[u8]| -> std::io::Result<String> {
        let mut stream = TcpStream::connect(proxy.address_cached())?;
        stream.write_all(&[header, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"].concat())?;
        read_all(&mut stream).map(|answer| String::from_utf8_lossy(&answer).into_owned())
    };
    let of = |client: &str| Some((client.parse().unwrap(), "198.51.100.1:443".parse().unwrap()));
    let believed = run(
        "proxy_protocol: { accept_from: [ 127.0.0.0/8 ] }, deny: [ 203.0.113.0/24 ], allow: [ 192.0.2.0/24, 2001:db8::/32 ]",
    );
    for (version, client) in [
        (ProxyVersion::V1, "192.0.2.77:5000"),
        (ProxyVersion::V2, "192.0.2.78:5000"),
        (ProxyVersion::V2, "[2001:db8::9]:5"),
    ] {
        assert!(ask(&believed, &proxy_header(version, of(client), &[])).unwrap().ends_with("\r\n\r\na"), "{client}");
        believed.wait_log(&format!("\"client\":\"{client}\""));
    }
    // The client that the header names is judged, and not who brings it.
    assert!(ask(&believed, &proxy_header(ProxyVersion::V1, of("203.0.113.5:1"), &[])).is_err());
    assert_eq!(believed.metric("sailover_connections_total", &["end=\"denied\""]), 1.0);
    // Who must send a header and does not is refused.
    assert!(get(believed.address_cached()).is_err());
    assert_eq!(believed.metric("sailover_connections_total", &["end=\"malformed\""]), 1.0);

    // Where it is not believed it is what the client says, and the backend does not understand it.
    let not_believed = run("proxy_protocol: { accept_from: [ 192.0.2.0/24 ] }");
    assert_eq!(get(not_believed.address_cached()).unwrap(), "a");
    backend.set(Mode::Strict);
    let answer = ask(&not_believed, &proxy_header(ProxyVersion::V1, of("192.0.2.77:5000"), &[]));
    assert!(answer.map_or(true, |answer| answer.is_empty()));
    assert!(!not_believed.log().contains("192.0.2.77"));
}

#[test]
fn a_backend_is_told_who_its_client_is() {
    let (address, received) = recorder(1 << 16);
    let within = Duration::from_secs(5);
    let start = |pool: &str, listener: &str| {
        let text = yaml(&[address], &format!("probe: off\n    {pool}"), "");
        Proxy::start(&text.replace("tcp: p", &format!("tcp: p{listener}")))
    };
    let talk = |proxy: &Proxy, first: &[u8]| {
        let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
        stream.write_all(&[first, b"hello, whoever you are; that is all of it\n"].concat()).unwrap();
        crate::support::backend::finish(&stream);
        (stream.local_addr().unwrap(), received.recv_timeout(within).unwrap())
    };
    for (key, version) in [("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)] {
        let proxy = start(&format!("send_proxy: {key}"), "");
        let (client, got) = talk(&proxy, b"");
        let wanted = proxy_header(version, Some((client, proxy.address_cached())), &[]);
        assert!(got.starts_with(&wanted), "{key}: {got:?}");
        assert!(got[wanted.len()..].starts_with(b"hello"), "{key}: {got:?}");
        // Only what the client said is counted as the client's.
        crate::support::eventually("the bytes are counted", within, || {
            (proxy.metric("sailover_bytes_total", &["direction=\"in\""]) == 42.0).then_some(())
        });
    }
    // What a header brought, values and all, goes on.
    let proxy = start("send_proxy: v2", ", proxy_protocol: { accept_from: [ 127.0.0.1 ] }");
    let named = Some(("192.0.2.77:5000".parse().unwrap(), "198.51.100.1:443".parse().unwrap()));
    let header = proxy_header(ProxyVersion::V2, named, &[5, 0, 2, 7, 8]);
    let (_, got) = talk(&proxy, &header);
    assert!(got.starts_with(&header), "{got:?}");
    // Without the key nothing is added.
    let (_, got) = talk(&start("", ""), b"");
    assert!(got.starts_with(b"hello"));
    // A probe says that it speaks for itself.
    let text =
        yaml(&[address], "send_proxy: v1\n    probe: { exchange: { send: ping, expect: pong }, interval: 200ms }", "");
    let _probing = Proxy::start(&text);
    let got = received.recv_timeout(within).unwrap();
    assert!(got.starts_with(b"PROXY UNKNOWN\r\nping"), "{got:?}");
}

#[test]
fn a_server_name_may_pin() {
    let backends: Vec<Backend> = (0..4).map(|i| Backend::start(&i.to_string())).collect();
    let list: Vec<String> = backends.iter().map(|backend| backend.address.to_string()).collect();
    let (half, other) = list.split_at(2);
    let run = |affinity: &str| {
        let proxy = Proxy::start(&format!(
            "pools: {{ p: {{ cells: {{ a: [ {} ], b: [ {} ] }}, affinity: {{ by: {affinity} }}, probe: off }} }}\n\
             listeners: [ {{ name: l, bind: 127.0.0.1:0, sni: {{ routes: {{ '*.example': p }} }} }} ]\n",
            half.join(", "),
            other.join(", ")
        ));
        let hello = client_hello("shop.example", true);
        for _ in 0..40 {
            let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
            stream.write_all(&hello).unwrap();
            crate::support::backend::finish(&stream);
            let _ = read_all(&mut stream);
        }
        let served = |backend: &&String| {
            proxy.metric("sailover_attempts_total", &[&format!("backend=\"{backend}\""), "result=\"ok\""]) > 0.0
        };
        list.iter().filter(served).count()
    };
    assert_eq!(run("sni"), 1);
    assert!(run("none") > 2);
}

/// A balancer that asks for itself is among those who may, and is counted as no client.
#[test]
fn a_balancers_own_connection_is_judged_as_the_balancers() {
    let backend = Backend::start("a");
    let proxy = Proxy::start(&yaml(&[backend.address], "", "").replace(
        "tcp: p",
        "tcp: p, proxy_protocol: { accept_from: [ 127.0.0.1 ] }, allow: [ 10.0.0.0/8 ], limits: { per_client: { rate: 1/m } }",
    ));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    let ask = |header: &[u8]| {
        let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
        stream.write_all(&[header, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"].concat()).unwrap();
        read_all(&mut stream).is_ok_and(|answer| answer.ends_with(b"a"))
    };
    for _ in 0..10 {
        assert!(ask(&proxy_header(ProxyVersion::V2, None, &[])) && ask(b"PROXY UNKNOWN\r\n"));
    }
    assert!(!ask(b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 443\r\n"), "whom it speaks for is judged");
    assert!(ask(b"PROXY TCP4 10.0.0.1 192.0.2.2 1000 443\r\n"));
}

#[test]
fn the_access_log_says_which_name_and_why() {
    let backend = Backend::start("a");
    let proxy = sni(
        &[("p", backend.address)],
        "sni: { routes: { shop.example: p } }, proxy_protocol: { accept_from: [ 127.0.0.9 ] }",
    );
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.write_all(&client_hello("other.example", false)).unwrap();
    let _ = read_all(&mut stream);
    proxy.wait_log("\"server_name\":\"other.example\"");
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let _ = read_all(&mut stream);
    proxy.wait_log("\"end\":\"malformed\",\"reason\":\"");
}
