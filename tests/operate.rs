use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::backend::{Backend, Mode, Port, get, read_all};
use crate::support::proxy::Proxy;
use crate::support::{eventually, settled_queues};
use crate::tcp::yaml;

fn text(output: &std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn generation(proxy: &Proxy) -> u64 {
    proxy.status()["generation"].as_u64().unwrap()
}

fn two() -> ([Backend; 2], Proxy, String) {
    let backends = [Backend::start("a"), Backend::start("b")];
    let yaml = yaml(&[backends[0].address, backends[1].address], "", "");
    let proxy = Proxy::start(&yaml);
    for backend in &backends {
        proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    }
    (backends, proxy, yaml)
}

#[test]
fn a_touched_file_changes_nothing_and_restarts_no_probe() {
    let (_backends, proxy, yaml) = two();
    let probers = |proxy: &Proxy| -> Vec<serde_json::Value> {
        let status = proxy.status();
        let cells = status["pools"][0]["cells"].as_array().unwrap().clone();
        cells.iter().map(|cell| cell["backends"][0]["prober"].clone()).collect()
    };
    let before = probers(&proxy);
    assert!(before.iter().all(serde_json::Value::is_u64));
    proxy.write(&format!("{yaml}\n# touched"));
    let output = proxy.command(&["reload"]);
    assert!(output.status.success());
    assert!(
        text(&output).contains("generation 2 is live: listeners +0 -0 ~0, pools +0 -0 ~0, backends +0 -0 ~0"),
        "{}",
        text(&output)
    );
    assert_eq!(probers(&proxy), before);
}

#[test]
fn a_bad_file_changes_nothing_and_says_why() {
    let (_backends, proxy, yaml) = two();
    proxy.write(&yaml.replace("tcp: p", "tcp: q"));
    let output = proxy.command(&["reload"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output).contains("there is no pool \"q\""), "{}", text(&output));
    assert_eq!(generation(&proxy), 1);
    assert!(get(proxy.address(0)).is_ok());
    assert_eq!(proxy.metric("sailover_config_last_reload_successful", &[]), 0.0);
    proxy.write(&yaml);
    assert!(proxy.command(&["reload"]).status.success());
    assert_eq!(proxy.metric("sailover_config_last_reload_successful", &[]), 1.0);
}

#[test]
fn health_and_counters_survive_a_reload_and_a_new_address_starts_anew() {
    let (backends, proxy, yaml) = two();
    backends[0].set(Mode::Refuse);
    let name = backends[0].address.to_string();
    proxy.wait_health(&name, "down", Duration::from_secs(10));
    let since = proxy.status()["pools"][0]["cells"][0]["backends"][0]["since"].clone();
    let ok = |proxy: &Proxy| proxy.metric("sailover_attempts_total", &["result=\"ok\""]);
    (0..20).for_each(|_| drop(get(proxy.address(0)).unwrap()));
    let before = ok(&proxy);
    proxy.write(&yaml.replace("tcp: p", "tcp: p, allow: [ 127.0.0.0/8 ]").replace("c0: [", "renamed: ["));
    let output = proxy.command(&["reload"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(proxy.health(&name), "down");
    assert_eq!(proxy.status()["pools"][0]["cells"][0]["backends"][0]["since"], since);
    assert_eq!(ok(&proxy), before);
}

#[test]
fn what_is_in_use_is_removed_only_with_force() {
    let (_backends, proxy, yaml) = two();
    let other = yaml.replace("127.0.0.1:0", "127.0.0.2:0");
    proxy.write(&other);
    proxy.signal(Signal::HUP);
    eventually("the refusal is logged", Duration::from_secs(5), || {
        proxy.log().contains("the file removes listener l on 127.0.0.1:0").then_some(())
    });
    assert_eq!(generation(&proxy), 1);
    let old = proxy.address(0);
    assert_eq!(proxy.command(&["reload"]).status.code(), Some(78));
    assert!(proxy.command(&["reload", "--force"]).status.success());
    assert_eq!(proxy.address(0).ip().to_string(), "127.0.0.2");
    assert!(get(proxy.address(0)).is_ok());
    eventually("the old address is closed", Duration::from_secs(5), || TcpStream::connect(old).is_err().then_some(()));
}

#[test]
fn after_a_storm_of_signals_the_newest_good_file_is_live() {
    let (_backends, proxy, yaml) = two();
    for i in 0..200 {
        proxy.write(&format!("{yaml}\nshutdown: {{ announce: {}s }}", 10 + i));
        proxy.signal(Signal::HUP);
        if i % 50 == 0 {
            assert!(get(proxy.address(0)).is_ok());
        }
    }
    eventually("the newest file is live", Duration::from_secs(10), || {
        let (_, config) = proxy.ask("GET", "/config").ok()?;
        let config: serde_json::Value = serde_json::from_str(&config).ok()?;
        (config["config"]["shutdown"]["announce"] == "3m 29s").then_some(())
    });
}

#[test]
fn a_second_instance_on_the_same_address_fails() {
    let (_backends, proxy, yaml) = two();
    let address = proxy.address(0).to_string();
    let mut second = Proxy::spawn(None, &yaml.replace("127.0.0.1:0", &address), |_| {});
    let code = eventually("it ends", Duration::from_secs(10), || second.child.try_wait().unwrap());
    assert_eq!(code.code(), Some(1));
    assert!(second.log().contains("cannot be bound: Address already in use"), "{}", second.log());
}

#[test]
fn a_drain_moves_all_clients_and_the_last_cell_is_kept() {
    let (_backends, proxy, _) = two();
    let output = proxy.command(&["drain", "c0", "--reason", "maintenance"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!((0..50).all(|_| get(proxy.address(0)).unwrap() == "b"));
    let status = text(&proxy.command(&["status"]));
    assert!(status.contains("drained") && status.contains("maintenance"), "{status}");
    let refused = proxy.command(&["drain", "c1"]);
    assert!(!refused.status.success() && text(&refused).contains("--force"), "{}", text(&refused));
    assert!(text(&proxy.command(&["drain", "c9"])).contains("there is no cell"));
    assert!(proxy.command(&["reload"]).status.success());
    assert!((0..20).all(|_| get(proxy.address(0)).unwrap() == "b"), "a drain survives a reload");
    assert!(proxy.command(&["undrain", "c0"]).status.success());
    eventually("the cell serves again", Duration::from_secs(5), || {
        (get(proxy.address(0)).unwrap() == "a").then_some(())
    });
    assert!(proxy.command(&["drain", "c0", "--for", "1s"]).status.success());
    eventually("a drain ends by itself", Duration::from_secs(5), || {
        (get(proxy.address(0)).unwrap() == "a").then_some(())
    });
}

#[test]
fn a_drain_survives_a_restart_and_a_broken_state_file_is_said() {
    let backends = [Backend::start("a"), Backend::start("b")];
    let yaml = yaml(&[backends[0].address, backends[1].address], "", "");
    let state = crate::support::proxy::Directory::new();
    let start = || {
        let proxy = Proxy::spawn(None, &yaml, |command| {
            command.env("STATE_DIRECTORY", &state.0);
        });
        eventually("it answers", Duration::from_secs(5), || proxy.ask("GET", "/livez").ok());
        backends
            .iter()
            .for_each(|backend| proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5)));
        proxy
    };
    let file = state.0.join("drains.json");
    let first = start();
    assert!(first.command(&["drain", "c0"]).status.success());
    eventually("it is written", Duration::from_secs(5), || file.exists().then_some(()));
    // Killed, not stopped.
    drop(first);
    let second = start();
    assert!((0..30).all(|_| get(second.address_cached()).unwrap() == "b"));
    drop(second);
    std::fs::write(&file, "{").unwrap();
    let third = start();
    third.wait_log("is no list of drains");
    eventually("both serve", Duration::from_secs(5), || (get(third.address_cached()).unwrap() == "a").then_some(()));
}

#[test]
fn status_and_metrics_tell_what_is_up_and_why() {
    let (backends, proxy, _) = two();
    (0..10).for_each(|_| drop(get(proxy.address(0)).unwrap()));
    backends[0].set(Mode::Refuse);
    proxy.wait_health(&backends[0].address.to_string(), "down", Duration::from_secs(10));
    let table = text(&proxy.command(&["status"]));
    assert!(table.contains("down") && table.contains("refused at connect"), "{table}");
    let status = proxy.status();
    assert_eq!(status["cells"][0]["state"], "down");
    assert_eq!(status["pools"][0]["cells"][1]["share"]["now"], 1.0);
    assert_eq!(status["pools"][0]["cells"][0]["backends"][0]["cause"]["kind"], "refused");
    assert!(
        proxy.metric("sailover_connections_total", &["end=\"client_closed\""])
            + proxy.metric("sailover_connections_total", &["end=\"backend_closed\""])
            >= 10.0
    );
    assert_eq!(proxy.metric("sailover_backend_state", &["state=\"down\""]), 1.0);
    assert!(proxy.metric("sailover_detect_seconds_count", &[]) >= 1.0);
    for name in [
        "sailover_build_info",
        "sailover_handshake_seconds_count",
        "sailover_first_byte_seconds_count",
        "sailover_probes_total",
        "sailover_bytes_total",
    ] {
        assert!(proxy.metric(name, &[]) > 0.0, "{name}");
    }
}

#[test]
fn a_stop_announces_serves_what_runs_and_ends() {
    let backend = Backend::start("e");
    backend.set(Mode::Echo);
    let mut proxy = Proxy::start(&yaml(&[backend.address], "", "shutdown: { announce: 3s, drain: 20s }"));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    let address = proxy.address(0);
    let mut running = TcpStream::connect(address).unwrap();
    running.write_all(b"one").unwrap();
    running.read_exact(&mut [0; 3]).unwrap();
    proxy.signal(Signal::TERM);
    eventually("it says that it stops", Duration::from_secs(2), || {
        (proxy.ask("GET", "/readyz").unwrap().0 == 503).then_some(())
    });
    assert!(TcpStream::connect(address).is_ok(), "while it announces it still serves");
    eventually("the listener closes", Duration::from_secs(10), || TcpStream::connect(address).is_err().then_some(()));
    running.write_all(b"two").unwrap();
    running.read_exact(&mut [0; 3]).unwrap();
    assert!(proxy.child.try_wait().unwrap().is_none());
    drop(running);
    let code = eventually("it ends", Duration::from_secs(5), || proxy.child.try_wait().unwrap());
    assert!(code.success());

    let (_backends, mut proxy, _) = two();
    proxy.signal(Signal::TERM);
    eventually("it says that it stops", Duration::from_secs(2), || {
        (proxy.ask("GET", "/readyz").unwrap().0 == 503).then_some(())
    });
    proxy.signal(Signal::TERM);
    assert!(
        eventually("the second signal ends it", Duration::from_secs(5), || proxy.child.try_wait().unwrap()).success()
    );
}

#[test]
fn a_blocked_log_and_a_slow_admin_reader_stop_nothing() {
    let backend = Backend::start("a");
    // A pipe that nobody reads, as standard output.
    let proxy = Proxy::spawn(None, &yaml(&[backend.address], "", "log: { access: stdout }"), |command| {
        command.stdout(Stdio::piped());
    });
    eventually("it answers", Duration::from_secs(5), || proxy.ask("GET", "/livez").ok());
    let mut slow = UnixStream::connect(proxy.socket()).unwrap();
    slow.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    // Each line has some 350 bytes: 64 KB of pipe, what the writer holds and 1 MB of queue take some thousands.
    for _ in 0..9_500 {
        assert_eq!(get(proxy.address_cached()).unwrap(), "a");
    }
    assert!(proxy.metric("sailover_log_dropped_total", &[]) > 0.0);
    assert_eq!(proxy.health(&backend.address.to_string()), "up");
    slow.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn at_its_cap_a_listener_lets_wait_then_resets_and_is_not_ready() {
    let backend = Backend::start("e");
    backend.set(Mode::Echo);
    let base = yaml(&[backend.address], "", "");
    let proxy = Proxy::start(&base.replace("tcp: p", "tcp: p, limits: { max_connections: 2, wait: 300ms }"));
    let address = proxy.address(0);
    let open = |_| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0; 1]).unwrap();
        stream
    };
    let begin = Instant::now();
    let mut held: Vec<TcpStream> = (0..2).map(open).collect();
    let mut waiting = TcpStream::connect(address).unwrap();
    waiting.write_all(b"y").unwrap();
    eventually("readyz says so", Duration::from_secs(2), || {
        (proxy.ask("GET", "/readyz").unwrap().0 == 503).then_some(())
    });
    assert!(read_all(&mut waiting).is_err(), "it was reset");
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert!(proxy.metric("sailover_connections_total", &["end=\"cap\""]) >= 1.0);
    // One that waits gets the place that becomes free.
    let mut waiting = TcpStream::connect(address).unwrap();
    waiting.write_all(b"z").unwrap();
    drop(held.pop());
    waiting.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    waiting.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn an_address_that_is_not_local_yet_is_bound_and_said() {
    let backend = Backend::start("a");
    let base = yaml(&[backend.address], "", "");
    let proxy = Proxy::start(&base.replace("127.0.0.1:0", "192.0.2.77:0"));
    assert_eq!(proxy.status()["listeners"][0]["local"], false);
    proxy.wait_log("not local");
}

#[test]
fn a_stale_admin_socket_is_replaced_and_a_living_one_is_not() {
    let (_backends, proxy, yaml) = two();
    let socket = proxy.socket();
    let mut second = Proxy::spawn(None, &yaml, |_| {});
    let config = std::fs::read_to_string(second.directory.0.join("sailover.yaml")).unwrap();
    let _ = second.child.kill();
    let _ = second.child.wait();
    let shared = config.replace(second.socket().to_str().unwrap(), socket.to_str().unwrap());
    let file = second.directory.0.join("shared.yaml");
    std::fs::write(&file, shared).unwrap();
    let output = std::process::Command::new(crate::support::proxy::BINARY)
        .arg("run")
        .arg("--config")
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("another process answers on it"), "{}", text(&output));
}

#[test]
fn wrong_usage_and_missing_processes_have_their_exit_codes() {
    let run = |arguments: &[&str]| {
        std::process::Command::new(crate::support::proxy::BINARY).args(arguments).output().unwrap()
    };
    assert_eq!(run(&["frobnicate"]).status.code(), Some(64));
    assert_eq!(run(&["run", "--config", "/nonexistent/x.yaml"]).status.code(), Some(78));
    assert_eq!(run(&["status", "--socket", "/nonexistent/x.sock"]).status.code(), Some(1));
    assert_eq!(run(&["--version"]).status.code(), Some(0));
}

#[test]
fn an_access_log_that_cannot_be_written_is_told_of_at_once() {
    let backend = Backend::start("a");
    let yaml = yaml(&[backend.address], "", "") + "\nlog: { access: /nowhere/at/all/access.log }\n";
    let proxy = Proxy::start(&yaml);
    proxy.wait_log("the access log cannot be written");
    proxy.wait_log("\"path\":\"/nowhere/at/all/access.log\"");
    proxy.wait_log("No such file or directory");
}

#[test]
fn sessions_that_the_end_cuts_have_their_lines() {
    let backend = Backend::start("e");
    backend.set(Mode::Echo);
    let mut proxy = Proxy::start(&(yaml(&[backend.address], "", "") + "\nshutdown: { announce: 0s, drain: 100ms }\n"));
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    let mut stream = TcpStream::connect(proxy.address(0)).unwrap();
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    proxy.signal(Signal::TERM);
    assert!(read_all(&mut stream).is_err(), "it is cut");
    let code = eventually("it ends", Duration::from_secs(5), || proxy.child.try_wait().unwrap());
    assert!(code.success());
    assert!(proxy.log().contains("\"end\":\"stopped\""), "{}", proxy.log());
}

/// The same for requests: those that wait, those whose answer is under way, and those whose client takes nothing. A second signal
/// does not wait for them.
#[test]
fn requests_that_the_end_cuts_have_their_lines_and_never_look_whole() {
    // Its answers end with the connection, and never do.
    let endless = crate::http::by_hand(|mut stream| {
        let _ = crate::http::read_request(&mut stream);
        let mut more = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nx");
        while more.is_ok() {
            std::thread::park_timeout(Duration::from_millis(5));
            more = stream.write_all(b"x");
        }
    });
    let (slow, big) = (Backend::start("s"), Backend::start("b"));
    slow.set(Mode::Slow(60_000));
    for (signals, drain) in [(1, "100ms"), (2, "60s")] {
        let pool = |name: &str, at| format!("{name}: {{ probe: off, cells: {{ c: [ '{at}' ] }} }}");
        let pools = [pool("slow", slow.address), pool("endless", endless), pool("big", big.address)].join(", ");
        let routes = ["slow", "endless", "big"].map(|name| format!("{{ path: /{name}, pool: {name} }}")).join(", ");
        let mut proxy = Proxy::start(&format!(
            "pools: {{ {pools} }}\nlisteners: [ {{ bind: '127.0.0.1:0', http: {{ routes: [ {routes} ] }} }} ]\nlog: {{ access: stdout }}\nshutdown: {{ announce: 0s, drain: {drain} }}\n"
        ));
        let address = proxy.address(0);
        let ask = |path: &str, version: u8| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(format!("GET {path} HTTP/1.{version}\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
            stream
        };
        let before = slow.received.load(Relaxed);
        let (mut waits, mut reads, takes_nothing) = (ask("/slow", 1), ask("/endless", 0), ask("/big", 1));
        let mut chunks = ask("/endless", 1);
        let mut more: Vec<TcpStream> = (0..8).map(|_| ask("/endless", 0)).collect();
        more.iter_mut().for_each(|stream| stream.read_exact(&mut [0; 20]).unwrap());
        eventually("it waits", Duration::from_secs(5), || (slow.received.load(Relaxed) > before).then_some(()));
        reads.read_exact(&mut [0; 20]).unwrap();
        settled_queues(Some(address.port()), takes_nothing.local_addr().unwrap().port());
        proxy.signal(Signal::TERM);
        if signals == 2 {
            proxy.wait_log("\"stopping");
            proxy.signal(Signal::TERM);
        }
        assert!(read_all(&mut reads).is_err(), "what ends with the connection must not look whole");
        assert!(!read_all(&mut chunks).unwrap_or_default().ends_with(b"0\r\n\r\n"), "there are more chunks");
        let said = String::from_utf8(read_all(&mut waits).unwrap_or_default()).unwrap();
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 503"), "{said}");
        let code = eventually("it ends", Duration::from_secs(5), || proxy.child.try_wait().unwrap());
        assert!(code.success());
        let log = proxy.log();
        for path in ["/slow", "/endless", "/big"] {
            let mut lines = log.lines().filter(|line| line.contains(&format!("\"path\":\"{path}\""))).peekable();
            assert!(lines.peek().is_some(), "{path} {signals} {log}");
            assert!(lines.all(|line| line.contains("\"end\":\"stopped\"")), "{path} {signals} {log}");
        }
        assert!(!log.contains("\"to\":\"suspect\""), "none of it is a backend's failure: {log}");
    }
}

#[test]
fn an_error_that_is_passed_on_has_its_line() {
    let backend = Backend::start("a");
    let yaml = yaml(&[backend.address], "", "").replace("tcp: p", "http: { routes: [ { pool: p } ] }");
    let proxy = Proxy::start(&yaml);
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    backend.set(Mode::Fail(100));
    let ask = b"POST /told HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    assert!(crate::http::raw(proxy.address(0), ask).starts_with("HTTP/1.1 503"));
    proxy.wait_log("\"path\":\"/told\",\"status\":503");
}

/// A rollback must not wait for the last clients of what it brings back.
#[test]
fn a_listener_that_was_given_up_can_be_taken_back_at_once() {
    let backend = Backend::start("a");
    let reserved = Port::reserve();
    let free = reserved.address;
    let both = yaml(&[backend.address], "", "")
        .replace("listeners: [", &format!("listeners: [ {{ name: other, bind: '{free}', tcp: p }}, "));
    let proxy = Proxy::start(&both);
    proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    for _ in 0..3 {
        assert_eq!(get(free).unwrap(), "a");
        proxy.write(&yaml(&[backend.address], "", ""));
        assert!(proxy.command(&["reload", "--force"]).status.success());
        proxy.write(&both);
        let back = proxy.command(&["reload"]);
        assert!(back.status.success(), "{}", text(&back));
    }
    eventually("the last of those before is gone", Duration::from_secs(10), || {
        std::thread::park_timeout(Duration::from_millis(100));
        (0..20).all(|_| get(free).is_ok()).then_some(())
    });
}

#[test]
fn a_backend_that_is_probed_no_more_shows_no_probe() {
    let backend = Backend::start("a");
    let pool = |name: &str, probe: &str| format!("{name}: {{ {probe} cells: {{ c: [ '{}' ] }} }}", backend.address);
    let file = |of_b: &str| {
        let pools = [pool("a", ""), pool("b", of_b)].join(", ");
        format!(
            "pools: {{ {pools} }}\nlisteners: [ {{ bind: '127.0.0.1:0', tcp: a }}, {{ bind: '127.0.0.2:0', tcp: b }} ]"
        )
    };
    let proxy = Proxy::start(&file(""));
    let next = |pool: usize| proxy.status()["pools"][pool]["cells"][0]["backends"][0]["next_probe_in_ms"].clone();
    eventually("both are probed", Duration::from_secs(5), || (0..2).all(|pool| next(pool).is_u64()).then_some(()));
    proxy.write(&file("probe: off,"));
    assert!(proxy.command(&["reload"]).status.success());
    assert!(next(1).is_null(), "{}", next(1));
    eventually("the other one is", Duration::from_secs(5), || next(0).is_u64().then_some(()));
}
