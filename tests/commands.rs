use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, Mode, get, read_all};
use crate::support::eventually;
use crate::support::load::Load;
use crate::support::proxy::{BINARY, Directory, Proxy};
use crate::tcp::yaml;

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Two cells, `c0` with the backend `a` and `c1` with `b`, both up.
fn two(pool: &str) -> ([Backend; 2], Proxy) {
    let backends = [Backend::start("a"), Backend::start("b")];
    let proxy = Proxy::start(&yaml(&[backends[0].address, backends[1].address], pool, ""));
    for backend in &backends {
        proxy.wait_health(&backend.address.to_string(), "up", Duration::from_secs(5));
    }
    (backends, proxy)
}

/// The user that runs the tests: number and name.
fn me() -> (u32, String) {
    let uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap());
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let mine = passwd.lines().find(|line| line.split(':').nth(2) == Some(&uid.to_string()));
    (uid, mine.map_or(format!("user {uid}"), |line| line.split(':').next().unwrap().to_owned()))
}

fn done(proxy: &Proxy, arguments: &[&str]) -> String {
    let output = proxy.command(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    assert!(output.stderr.is_empty(), "{arguments:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(proxy: &Proxy, arguments: &[&str], code: i32) -> String {
    let output = proxy.command(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output));
    text(&output)
}

/// Opens a connection through the proxy and has one answer on it, so that the session is known to run.
fn held(proxy: &Proxy) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(proxy.address_cached()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = [0; 256];
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\na") && !seen.ends_with(b"\r\n\r\nb") {
        let n = stream.read(&mut answer).unwrap();
        assert!(n > 0);
        seen.extend_from_slice(&answer[..n]);
    }
    let name = char::from(seen[seen.len() - 1]).to_string();
    (stream, name)
}

#[test]
fn status_of_fifty_backends_fits_a_hundred_columns() {
    let a = Backend::start("a");
    let mut cells = String::new();
    for cell in 0..5 {
        let list: Vec<String> = (0..10).map(|i| format!("\"[2001:db8:1234:5678::{cell}:{i:x}]:44{i:02}\"")).collect();
        cells += &format!("      a-rather-long-name-of-a-cell-{cell}: [ {} ]\n", list.join(", "));
    }
    let proxy = Proxy::start(&format!(
        "pools:\n  shop-of-a-company-with-a-long-name:\n    cells:\n      here: [ {} ]\n{cells}\
         listeners: [ {{ name: front-door, bind: 127.0.0.1:0, tcp: shop-of-a-company-with-a-long-name }} ]\n",
        a.address
    ));
    assert!(proxy.command(&["drain", "here", "--force", "--reason", &"because ".repeat(50)]).status.success());
    let shown = done(&proxy, &["status"]);
    let widest = shown.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 100, "{widest} columns:\n{shown}");
    assert_eq!(shown.lines().filter(|line| line.contains("2001:db8:1234:5678::")).count(), 50, "{shown}");
    assert!(!shown.contains('\x1b'), "no colour without a terminal");
    assert!(shown.contains("front-door"), "{shown}");
}

#[test]
fn status_says_what_is_up_since_when_and_why() {
    let (backends, proxy) = two("probe: { interval: 100ms }");
    backends[0].set(Mode::Refuse);
    proxy.wait_health(&backends[0].address.to_string(), "down", Duration::from_secs(10));
    let shown = done(&proxy, &["status"]);
    for part in ["! of 2 backends: 1 down", "refused at connect, seen by probe", "generation 1", "pool p: "] {
        assert!(shown.contains(part), "{part} in\n{shown}");
    }
    let row = shown.lines().find(|line| line.contains("down ")).unwrap();
    assert!(row.starts_with("c0"), "{row}");
    let shares: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(shares[1..3], ["0%", "50%"], "{row}");
    let json: serde_json::Value = serde_json::from_str(&done(&proxy, &["status", "--json"])).unwrap();
    assert_eq!(json["pools"][0]["cells"][0]["backends"][0]["health"], "down");
}

#[test]
fn status_goes_on_watching_and_survives_a_restart() {
    let (_backends, mut proxy) = two("");
    let mut child = Command::new(BINARY)
        .args(["status", "--watch", "--socket"])
        .arg(proxy.socket())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut until = |wanted: &str| {
        let found = lines.find(|line| line.as_ref().unwrap().contains(wanted));
        assert!(found.is_some(), "{wanted}");
    };
    until("pool p: ");
    until("pool p: ");
    proxy.child.kill().unwrap();
    proxy.child.wait().unwrap();
    until("is sailover running");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_drain_says_who_when_and_why_and_an_undrain_ends_it() {
    let (_backends, proxy) = two("");
    assert!(
        done(&proxy, &["drain", "c0", "--pool", "p", "--for", "2h", "--reason", "new racks"]).starts_with("drained c0")
    );
    let shown = done(&proxy, &["status"]);
    let line = shown.lines().find(|line| line.starts_with('*')).unwrap();
    let by = format!("by {}", me().1);
    for part in ["drained c0 in pool p", &by, "ago, ends in ", ": new racks"] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(line.contains(" 2h00m:") || line.contains(" 1h59m:"), "{line}");
    proxy.wait_log(&format!("\"by_uid\":{}", me().0));
    proxy.wait_log("\"reason\":\"new racks\"");
    assert!(shown.lines().any(|line| line.starts_with("c0") && line.ends_with("drained")), "{shown}");
    assert!(refused(&proxy, &["drain", "c1"], 1).contains("--force"));
    assert!(refused(&proxy, &["undrain", "c1"], 1).contains("no drain of cell c1 matches"));
    assert!(refused(&proxy, &["drain", "c0", "--backend", "nobody"], 1).contains("no such pool or backend"));
    assert!(done(&proxy, &["undrain", "c0"]).contains("undrained c0 (1 drain)"));
    assert!(!done(&proxy, &["status"]).contains('*'));
    assert!(refused(&proxy, &["drain", "c0", "--reason", &"x".repeat(501)], 1).contains("longer than 500 bytes"));
}

#[test]
fn a_drain_under_load_costs_nobody_and_survives_a_kill() {
    let backends = [Backend::start("a"), Backend::start("b")];
    let yaml = yaml(&[backends[0].address, backends[1].address], "", "");
    let state = Directory::new();
    let start = || {
        let proxy = Proxy::spawn(None, &yaml, |command| {
            command.env("STATE_DIRECTORY", &state.0);
        });
        eventually("it answers", Duration::from_secs(5), || proxy.ask("GET", "/livez").ok());
        backends.iter().for_each(|b| proxy.wait_health(&b.address.to_string(), "up", Duration::from_secs(5)));
        proxy
    };
    let proxy = start();
    let mut sessions: Vec<(TcpStream, String)> = (0..20).map(|_| held(&proxy)).collect();
    let begin = Instant::now();
    let load = Load::start(None, proxy.address_cached(), 400.0, Duration::from_secs(4));
    eventually("a and b serve", Duration::from_secs(3), || {
        let now = proxy.status()["pools"][0]["cells"][0]["backends"][0]["attempts"]["ok"].as_u64()?;
        (now > 400).then_some(())
    });
    let asked = begin.elapsed().as_secs_f64();
    assert!(done(&proxy, &["drain", "c0"]).starts_with("drained c0\n"));
    let ordered = begin.elapsed().as_secs_f64();
    assert!(refused(&proxy, &["drain", "c1"], 1).contains("last fit cell of pool p"));
    let samples = load.finish();
    println!("drained after {ordered:.2} s: {} requests, {} failed", samples.0.len(), samples.failed());
    assert_eq!(samples.failed(), 0, "{:?}", samples.errors());
    assert!(samples.between(0.0, asked).share("a") > 0.4);
    assert_eq!(samples.between(ordered + 0.1, 4.0).share("a"), 0.0);
    for (stream, name) in &mut sessions {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        assert!(read_all(stream).unwrap().ends_with(name.as_bytes()), "running sessions are left alone");
    }
    proxy.signal(rustix::process::Signal::KILL);
    drop(proxy);
    let proxy = start();
    assert!((0..40).all(|_| get(proxy.address_cached()).unwrap() == "b"));
    assert!(done(&proxy, &["status"]).contains(&format!("* drained c0, by {}", me().1)));
}

#[test]
fn a_weight_moves_the_share_and_ends_by_itself() {
    let (_backends, proxy) = two("");
    let share = |proxy: &Proxy| proxy.status()["pools"][0]["cells"][0]["share"]["now"].as_f64().unwrap();
    assert!(done(&proxy, &["weight", "p/c0", "25", "--reason", "small"]).contains("25 % of its configured weight"));
    assert_eq!(share(&proxy), 0.2);
    assert!(done(&proxy, &["status"]).contains(&format!("* p/c0 has 25% of its weight, by {}", me().1)));
    done(&proxy, &["weight", "p/c0", "0"]);
    assert_eq!(share(&proxy), 0.0);
    assert!((0..40).all(|_| get(proxy.address_cached()).unwrap() == "b"));
    // At nothing it still takes those whom no other cell can.
    done(&proxy, &["drain", "c1", "--force"]);
    assert_eq!(get(proxy.address_cached()).unwrap(), "a");
    done(&proxy, &["undrain", "c1"]);
    done(&proxy, &["weight", "p/c0", "50", "--for", "3s"]);
    assert!(done(&proxy, &["reload"]).contains("generation 2"));
    assert!((0.3..0.34).contains(&share(&proxy)), "it survives a reload");
    eventually("it ends", Duration::from_secs(10), || (share(&proxy) == 0.5).then_some(()));
    assert!(refused(&proxy, &["weight", "p/c9", "10"], 1).contains("has no cell \"c9\"; expected c0 | c1"));
    assert!(refused(&proxy, &["weight", "q/c0", "10"], 1).contains("there is no pool \"q\"; expected p"));
    assert!(refused(&proxy, &["weight", "p/c0", "101"], 64).contains("101"));
    assert!(refused(&proxy, &["weight", "c0", "10"], 64).contains("POOL/CELL"));
}

#[test]
fn a_pinned_client_follows_the_weight() {
    let (_backends, proxy) = two("affinity: { by: client_ip }");
    let of = |proxy: &Proxy, client: &str| -> (String, String) {
        let shown: serde_json::Value = serde_json::from_str(&done(proxy, &["explain", client, "--json"])).unwrap();
        let to = &shown["ways"][0]["goes_to"];
        (to["cell"].as_str().unwrap().to_owned(), client.to_owned())
    };
    let clients: Vec<String> = (1..60).map(|i| format!("192.0.2.{i}")).collect();
    let before: Vec<_> = clients.iter().map(|client| of(&proxy, client)).collect();
    done(&proxy, &["weight", "p/c0", "50"]);
    let after: Vec<_> = clients.iter().map(|client| of(&proxy, client)).collect();
    let in_c0 = |ways: &[(String, String)]| ways.iter().filter(|way| way.0 == "c0").count();
    assert!(in_c0(&after) < in_c0(&before) && in_c0(&after) > 0, "{} {}", in_c0(&before), in_c0(&after));
    // Nobody moves towards the cell that was made lighter.
    assert!(before.iter().zip(&after).all(|(before, after)| before.0 == "c0" || after.0 == "c1"));
}

#[test]
fn a_pinned_client_leaves_a_cell_of_weight_0() {
    let backends = [Backend::start("a"), Backend::start("b"), Backend::start("s")];
    let [a, b, s] = [0, 1, 2].map(|i: usize| backends[i].address);
    let proxy = Proxy::start(&format!(
        "pools: {{ p: {{ cells: {{ a: [ {a} ], b: [ {b} ], s: {{ tier: 1, backends: [ {s} ] }} }}, affinity: {{ by: client_ip }} }} }}\n\
         listeners: [ {{ name: l, bind: 127.0.0.1:0, tcp: p }} ]\n"
    ));
    backends.iter().for_each(|b| proxy.wait_health(&b.address.to_string(), "up", Duration::from_secs(5)));
    let cells = |proxy: &Proxy| -> Vec<String> {
        let of = |i: u32| {
            let client = format!("192.0.2.{i}");
            let shown: serde_json::Value = serde_json::from_str(&done(proxy, &["explain", &client, "--json"])).unwrap();
            shown["ways"][0]["goes_to"]["cell"].as_str().unwrap().to_owned()
        };
        let mut cells: Vec<String> = (1..20).map(of).collect();
        cells.sort();
        cells.dedup();
        cells
    };
    assert_eq!(cells(&proxy), ["a", "b"]);
    done(&proxy, &["weight", "p/a", "0"]);
    assert_eq!(cells(&proxy), ["b"]);
    assert!(done(&proxy, &["explain", "192.0.2.1"]).contains("weight 0 by an order"));
    done(&proxy, &["weight", "p/b", "0"]);
    assert_eq!(cells(&proxy), ["s"]);
    // Nobody else can take them any more.
    done(&proxy, &["drain", "s", "--force"]);
    assert!(["a", "b"].contains(&get(proxy.address_cached()).unwrap().as_str()));
    let shown = done(&proxy, &["explain", "192.0.2.1"]);
    assert_eq!(shown.matches("50%").count(), 2, "{shown}");
}

#[test]
fn sessions_are_shown_and_kicked() {
    let (backends, proxy) = two("");
    let held: Vec<(TcpStream, String)> = (0..12).map(|_| held(&proxy)).collect();
    let shown = done(&proxy, &["sessions"]);
    assert!(shown.lines().last().unwrap().starts_with("12 of 12 sessions"), "{shown}");
    let client = held[0].0.local_addr().unwrap().to_string();
    let row = shown.lines().find(|line| line.contains(&client)).unwrap();
    // The request's bytes.
    let sent = 27;
    assert!(row.contains(&format!("{sent} B")), "{row}");
    assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
    let of_b = held.iter().filter(|(_, name)| name == "b").count();
    let b = backends[1].address.to_string();
    assert!(done(&proxy, &["sessions", "--backend", &b]).contains(&format!("{of_b} of {of_b} sessions")));
    assert!(done(&proxy, &["sessions", "--limit", "3"]).contains("3 of 12 sessions"));
    assert!(done(&proxy, &["sessions", "--client", "192.0.2.1"]).contains("0 of 0 sessions"));

    let id = row.split_whitespace().next().unwrap();
    assert!(done(&proxy, &["kick", id]).contains("1 sessions are being ended"));
    let mut held = held;
    let (mut first, name) = held.remove(0);
    assert_eq!(read_all(&mut first).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    let of_b = of_b - usize::from(name == "b");
    assert!(done(&proxy, &["kick", "--backend", &b, "--pool", "p"]).contains(&format!("{of_b} sessions")));
    for (mut stream, name) in held {
        if name == "b" {
            assert!(read_all(&mut stream).is_err());
        } else {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            assert!(read_all(&mut stream).unwrap().ends_with(b"a"));
        }
    }
    assert_eq!(proxy.metric("sailover_connections_total", &["end=\"kicked\""]) as usize, of_b + 1);
    assert!(refused(&proxy, &["kick"], 1).contains("name what to end"));
    proxy.wait_log("sessions kicked");
}

#[test]
fn explain_says_where_a_client_goes_and_why() {
    let (backends, proxy) = two("");
    let shown = done(&proxy, &["explain", "192.0.2.7"]);
    assert!(shown.contains("192.0.2.7 at listener l, pool p:") && shown.contains("goes by chance"), "{shown}");
    assert_eq!(shown.matches("50%").count(), 2, "{shown}");
    done(&proxy, &["drain", "c0"]);
    let shown = done(&proxy, &["explain", "192.0.2.7", "--listener", "l"]);
    assert!(shown.contains("drained by an operator") && shown.contains("100%"), "{shown}");
    assert!(
        refused(&proxy, &["explain", "192.0.2.7", "--listener", "m"], 1)
            .contains("there is no listener \"m\"; expected l")
    );
    assert!(refused(&proxy, &["explain", "nobody"], 64).contains("nobody"));
    drop((backends, proxy));

    // What it says of a pinned client is what happens to it.
    let (_backends, proxy) = two("affinity: { by: client_ip }");
    let shown: serde_json::Value = serde_json::from_str(&done(&proxy, &["explain", "127.0.0.1", "--json"])).unwrap();
    let cell = shown["ways"][0]["goes_to"]["cell"].as_str().unwrap();
    let name = if cell == "c0" { "a" } else { "b" };
    assert!((0..10).all(|_| get(proxy.address_cached()).unwrap() == name));
}

#[test]
fn config_check_reload_and_version_say_what_they_found() {
    let (_backends, proxy) = two("");
    let shown: serde_json::Value = serde_json::from_str(&done(&proxy, &["config"])).unwrap();
    assert_eq!(shown["config"]["pools"][0]["name"], "p");
    assert!(done(&proxy, &["reload"]).starts_with("generation 2 is live: listeners +0 -0 ~0"));
    let version = env!("CARGO_PKG_VERSION");
    let shown = done(&proxy, &["version"]);
    assert!(shown.starts_with(&format!("sailover {version}\nthe running process is {version}, since ")), "{shown}");
    assert!(!shown.contains("restart is due"), "{shown}");
    let directory = Directory::new();
    let alone = Command::new(BINARY).args(["version", "--socket"]).arg(directory.0.join("none")).output().unwrap();
    assert_eq!(text(&alone), format!("sailover {version}\n"));
}

/// Without failover the same show loses clients: the figures are the client's own and no decoration.
#[test]
fn the_demo_loses_nobody_with_failover_and_some_without() {
    let play = |arguments: &[&str]| {
        let output = Command::new(BINARY).arg("demo").args(["--seconds", "8"]).args(arguments).output().unwrap();
        let shown = text(&output);
        println!("{shown}");
        let summary = shown.lines().find(|line| line.contains("requests: ")).expect("a summary").to_owned();
        let number = |after: &str| -> u64 {
            let rest = summary.split(after).nth(1).unwrap();
            rest.split_whitespace().next().unwrap().parse().unwrap()
        };
        (output.status.code(), number("s, "), number("requests: "), shown)
    };
    let (code, requests, failed, shown) = play(&[]);
    assert_eq!((code, failed), (Some(0), 0), "{shown}");
    assert!(requests >= 2_300, "{shown}");
    let lost = shown.split("round robin lost ").nth(1).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap();
    assert!(lost * 20 > requests, "{shown}");
    let (code, requests, failed, shown) = play(&["--no-failover"]);
    assert_eq!(code, Some(0), "{shown}");
    assert!(failed * 20 > requests, "{shown}");
}

#[test]
fn sessions_of_nobody_are_not_mistaken_for_none() {
    let (backends, proxy) = two("");
    let (_stream, _) = held(&proxy);
    assert!(refused(&proxy, &["sessions", "--pool", "nope"], 1).contains("there is no pool \"nope\"; expected p"));
    assert!(refused(&proxy, &["kick", "--backend", "127.0.0.1:1"], 1).contains("there is no backend \"127.0.0.1:1\""));
    assert!(refused(&proxy, &["kick", "abc"], 1).contains("\"abc\" is no session"));
    assert!(done(&proxy, &["kick", "0-999999"]).contains("0 sessions are being ended"));
    // Where a backend has a name, its address means it too.
    let yaml = format!(
        "pools: {{ p: {{ cells: {{ c0: [ {{ name: one, address: '{}' }} ] }} }}, \
         q: {{ cells: {{ c1: [ '{}' ] }} }} }}\n\
         listeners: [ {{ bind: '127.0.0.1:0', tcp: p }}, {{ name: web, bind: '127.0.0.2:0', http: {{ routes: [ {{ pool: q }} ] }} }}, \
         {{ name: moved, bind: '127.0.0.3:0', http: {{ routes: [ {{ redirect: {{ scheme: https }} }} ] }} }} ]",
        backends[0].address, backends[1].address
    );
    let proxy = Proxy::start(&yaml);
    proxy.wait_health("one", "up", Duration::from_secs(5));
    let (_stream, _) = held(&proxy);
    assert!(done(&proxy, &["sessions", "--backend", &backends[0].address.to_string()]).contains("1 of 1 sessions"));
    assert!(done(&proxy, &["sessions", "--pool", "q"]).contains("pool q is served by http too"));
    let told = refused(&proxy, &["explain", "10.0.0.1", "--listener", "moved"], 1);
    assert!(told.contains("answers by itself"), "{told}");
}

#[test]
fn a_weight_of_a_cell_that_is_gone_can_be_taken_back() {
    let (backends, proxy) = two("");
    done(&proxy, &["weight", "p/c1", "40"]);
    proxy.write(&yaml(&[backends[0].address], "", ""));
    done(&proxy, &["reload", "--force"]);
    assert!(done(&proxy, &["status"]).contains("p/c1"));
    done(&proxy, &["weight", "p/c1", "100"]);
    assert!(!done(&proxy, &["status"]).contains("p/c1"));
    refused(&proxy, &["weight", "p/c1", "100"], 1);
}

/// Who gets the clients when nobody has a share of his own.
#[test]
fn shares_are_true_when_all_are_down_or_nothing_is_known() {
    let (backends, proxy) = two("");
    backends.iter().for_each(|backend| backend.set(Mode::Refuse));
    for backend in &backends {
        eventually("it is down", Duration::from_secs(15), || {
            let _ = get(proxy.address_cached());
            (proxy.health(&backend.address.to_string()) == "down").then_some(())
        });
    }
    assert!(!done(&proxy, &["status"]).contains("nobody to give clients to"));
    let shares = ["c0", "c1"].map(|cell| proxy.metric("sailover_cell_share_ratio", &[&format!("cell=\"{cell}\"")]));
    assert_eq!(shares, [0.5, 0.5]);
}

#[test]
fn a_pool_that_serves_nobody_says_so() {
    let (_backends, proxy) = two("");
    done(&proxy, &["drain", "c0"]);
    done(&proxy, &["drain", "c1", "--force"]);
    assert!(get(proxy.address_cached()).is_err());
    assert!(done(&proxy, &["status"]).contains("! pool p has nobody to give clients to"));
    assert!(done(&proxy, &["explain", "192.0.2.1"]).contains("refused: no backend may have clients now"));
}
