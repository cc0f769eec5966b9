use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sailover::config;

use crate::support::proxy::{BINARY, Directory};

fn configs() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 4);
    files
}

fn errors(text: &str) -> Vec<String> {
    match config::parse(text.as_bytes(), config::DEFAULT_MAX_BYTES) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn every_shipped_configuration_is_good() {
    for file in configs() {
        if let Err(refused) = config::load(&file, config::DEFAULT_MAX_BYTES) {
            panic!("{refused}");
        }
    }
}

#[test]
fn mistakes_in_included_files_name_the_right_file_and_line() {
    use std::os::unix::ffi::OsStrExt;
    let directory = Directory::new();
    let at = |name: &str| directory.0.join(name);
    let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
    std::fs::create_dir(at("conf.d")).unwrap();
    let errors = || match config::load(&at("main.yaml"), 100_000) {
        Ok(_) => Vec::new(),
        Err(refused) => refused.to_string().lines().map(str::to_owned).collect::<Vec<_>>(),
    };
    let pool = |name: &str, port: u16| format!("pools:\n  {name}: {{ cells: {{ c: [ 127.0.0.1:{port} ] }} }}\n");
    let (a, b) = (at("conf.d/a.yaml").display().to_string(), at("conf.d/b.yaml").display().to_string());
    let main = at("main.yaml").display().to_string();

    // A pattern may match nothing, but then something is missing; hidden files are not looked at, nor are names that are
    // no text, nor is the main file itself.
    write("main.yaml", "include: [ conf.d/*.yaml, '*.yaml' ]\n");
    let odd = std::ffi::OsStr::from_bytes(b"\xff.yaml");
    std::fs::write(at("conf.d").join(odd), "nonsense: 1\n").unwrap();
    write("conf.d/.hidden.yaml", "nonsense: 1\n");
    let expected = [
        format!("{main}:1:1: include: no file of the configuration has `pools`"),
        format!("{main}:1:1: include: no file of the configuration has `listeners`"),
    ];
    assert_eq!(errors(), expected);

    write("conf.d/a.yaml", &format!("{}listeners: [ {{ bind: 127.0.0.1:81, tcp: one }} ]\n", pool("one", 1)));
    write("conf.d/b.yaml", &format!("{}listeners:\n  - {{ bind: 127.0.0.1:82, tcp: one }}\n", pool("two", 2)));
    assert_eq!(errors(), Vec::<String>::new());
    let loaded = config::load(&at("main.yaml"), 100_000).unwrap();
    assert_eq!(loaded.files, [at("main.yaml"), at("conf.d/a.yaml"), at("conf.d/b.yaml")]);

    write("conf.d/a.yaml", &format!("{}listeners: [ {{ bind: 127.0.0.1:81, tcp: oen }} ]\n", pool("one", 1)));
    write(
        "conf.d/b.yaml",
        &format!("{}\nadmin: {{}}\nlisteners:\n  - {{ bind: 127.0.0.1:81, tcp: one }}\n", pool("one", 2)),
    );
    let expected = [
        format!("{a}:3:36: listeners[0].tcp: there is no pool \"oen\"; did you mean \"one\"?"),
        format!("{b}:2:3: pools.one: a pool of this name stands at pools.one of {a} already"),
        format!("{b}:4:1: admin: `admin` belongs into the main file, not into an included one"),
        format!(
            "{b}:6:7: listeners[0].bind: 127.0.0.1:81 is already bound by listeners[0].bind of {a}; each address \
             belongs to one listener"
        ),
    ];
    assert_eq!(errors(), expected);

    write("main.yaml", "include:\n  - conf.d/c.yaml\n  - conf.d\n  - conf.d/a.yaml\n");
    let found = errors();
    assert!(found.iter().any(|line| line.starts_with(&format!("{a}:3:36: "))), "{found:#?}");
    assert!(
        found
            .iter()
            .any(|line| line.starts_with(&format!("{main}:2:5: include[0]: "))
                && line.contains("c.yaml cannot be opened")),
        "{found:#?}"
    );
    assert!(
        found.iter().any(
            |line| line.starts_with(&format!("{main}:3:5: include[1]: ")) && line.contains("is not a regular file")
        ),
        "{found:#?}"
    );

    // A directory that cannot be listed is no empty one.
    write("main.yaml", "include: conf.d/a.yaml/*.yaml\n");
    assert!(errors()[0].contains("conf.d/a.yaml cannot be listed"), "{:#?}", errors());
    write("main.yaml", "include: '*/a.yaml'\n");
    assert!(errors()[0].contains("only the last part"), "{:#?}", errors());

    // All files together are bounded.
    write("main.yaml", "include: conf.d/*.yaml\n");
    write("conf.d/b.yaml", &"#".repeat(99_000));
    write("conf.d/a.yaml", &"#".repeat(2_000));
    assert!(errors().iter().any(|line| line.starts_with(&b) && line.contains("at most")), "{:#?}", errors());
}

#[test]
fn what_a_probe_names_is_judged_with_the_file() {
    let directory = Directory::new();
    let file = directory.0.join("c.yaml");
    let errors = |keys: &str| {
        let text = format!(
            "pools:\n  p:\n    cells: {{ c: [ 127.0.0.1:1 ] }}\n    probe:\n      tls: {{ {keys} }}\n\
             listeners: [ {{ bind: 127.0.0.1:81, tcp: p }} ]\n"
        );
        std::fs::write(&file, text).unwrap();
        config::load(&file, 100_000).err().map_or_else(String::new, |refused| refused.to_string())
    };
    assert_eq!(errors("server_name: shop.internal"), "");
    std::fs::write(directory.0.join("empty.pem"), "nothing").unwrap();
    let missing = errors("verify: true, ca: no.pem");
    assert!(
        missing.contains("c.yaml:5:28: pools.p.probe.tls.ca: ") && missing.contains("cannot be opened"),
        "{missing}"
    );
    assert!(errors("verify: true, ca: empty.pem").contains("holds no certificate in PEM form"));
    assert!(errors("ca: no.pem").contains("has no effect without `verify: true`"));
    assert!(errors("server_name: 'not a name'").contains("expected a host name"));
    assert!(errors("verify: yes please").contains("expected true or false"));
}

#[test]
fn check_by_root_sees_with_the_eyes_of_the_service() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("skipped: not root");
        return;
    }
    let directory = Directory::new();
    let file = directory.0.join("c.yaml");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/minimal.yaml"), &file).unwrap();
    let check = |mode: u32| {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        let output = Command::new(BINARY).args(["check", "--user", "nobody"]).arg(&file).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(check(0o644), (0, String::new()));
    let (code, said) = check(0o640);
    assert_eq!(code, 78);
    assert!(said.contains("cannot be read by user nobody: its mode is 0640, its owner 0:0"), "{said}");
    std::fs::set_permissions(&directory.0, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert!(check(0o644).1.contains("cannot let user nobody reach"));

    // A way through a link is judged as it is written, too.
    let open = Directory::new();
    std::fs::set_permissions(&open.0, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::copy(&file, open.0.join("c.yaml")).unwrap();
    std::fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink(open.0.join("c.yaml"), &file).unwrap();
    assert!(check(0o644).1.contains("cannot let user nobody reach"));
    std::fs::set_permissions(&directory.0, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(check(0o644), (0, String::new()));

    // A directory that is searched must let itself be listed.
    std::fs::create_dir(open.0.join("conf.d")).unwrap();
    let main = std::fs::read_to_string(open.0.join("c.yaml")).unwrap();
    std::fs::write(open.0.join("c.yaml"), format!("include: conf.d/*.yaml\n{main}")).unwrap();
    std::fs::set_permissions(open.0.join("conf.d"), std::fs::Permissions::from_mode(0o711)).unwrap();
    let output = Command::new(BINARY).args(["check", "--user", "nobody"]).arg(open.0.join("c.yaml")).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("conf.d cannot be listed by user nobody"));
}

#[test]
fn a_listener_without_an_idle_time_has_its_pools() {
    let idle = |face: &str, listener: &str| {
        let text = format!(
            "pools: {{ p: {{ cells: {{ a: [ 10.0.0.1:1 ] }}, timeouts: {{ idle: 8h }} }} }}\n\
             listeners: [ {{ bind: 10.0.0.2:1, {face}, {listener} }} ]\n"
        );
        let loaded = config::parse(text.as_bytes(), config::DEFAULT_MAX_BYTES).unwrap();
        let (table, _) = sailover::table::build(
            std::sync::Arc::new(loaded.config),
            loaded.hash,
            None,
            1_000,
            sailover::clock::now(),
        )
        .unwrap();
        let listener = table.listeners.values().next().unwrap();
        [listener.idle(&table.pools[0]), listener.http_idle()].map(|idle| idle.as_secs() / 3_600)
    };
    for face in ["tcp: p", "http: { routes: [ { path: /x, respond: { status: 200 } }, { pool: p } ] }"] {
        assert_eq!(idle(face, ""), [8, 8]);
        assert_eq!(idle(face, "timeouts: { idle: 2h }"), [2, 2]);
        assert_eq!(idle(face, "timeouts: { idle: 9h }"), [8, 9]);
    }
}

/// TLS and a PROXY header are asked for where the service is, and not where another one is.
#[test]
fn a_probe_of_the_backends_own_port_is_as_the_pool_is() {
    let header = |port: &str| {
        let text = format!(
            "pools: {{ p: {{ send_proxy: v1, probe: {{ tcp: {{}}{port} }}, cells: {{ a: [ 10.0.0.1:1 ] }} }} }}\n\
             listeners: [ {{ bind: 10.0.0.2:1, tcp: p }} ]\n"
        );
        let loaded = config::parse(text.as_bytes(), config::DEFAULT_MAX_BYTES).unwrap();
        loaded.config.pools[0].probe.as_ref().unwrap().send_proxy.is_some()
    };
    assert_eq!((header(""), header(", port: 1"), header(", port: 2")), (true, true, false));
}

/// Every configuration that a page shows is one that the program takes.
#[test]
fn what_the_pages_show_is_good() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages: Vec<PathBuf> = std::fs::read_dir(root.join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    pages.push(root.join("README.md"));
    let directory = Directory::new();
    let mut judged = 0;
    for page in &pages {
        let text = std::fs::read_to_string(page).unwrap();
        for block in text.split("```yaml\n").skip(1) {
            let mut block = block.split("\n```").next().unwrap().to_owned() + "\n";
            if !block.contains("pools:") {
                block += "pools: { shop: { cells: { a: [ 10.0.0.1:1 ] } } }\n";
            }
            if !block.contains("listeners:") {
                let pool = block.split("pools:\n  ").nth(1).unwrap().split(':').next().unwrap();
                block += &format!("listeners: [ {{ bind: 127.0.0.1:1, tcp: {pool} }} ]\n");
            }
            let file = directory.0.join("page.yaml");
            std::fs::write(&file, &block).unwrap();
            let loaded = config::load(&file, config::DEFAULT_MAX_BYTES);
            let loaded = loaded.unwrap_or_else(|refused| panic!("{}: {refused}\n{block}", page.display()));
            assert!(loaded.warnings.is_empty(), "{}: {:?}", page.display(), loaded.warnings);
            judged += 1;
        }
    }
    assert!(pages.len() >= 5 && judged >= 4, "{} pages, {judged} configurations", pages.len());
}

#[test]
fn the_reference_says_the_defaults() {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name);
        std::fs::read_to_string(path).unwrap()
    };
    let bare = r#"
cells:
  aliyun: { cloud: Alibaba Cloud, region: cn-shenzhen }
  tencent: {}
  standby: {}
pools:
  shop:
    cells:
      aliyun: { backends: [ { address: 10.1.0.10:443, name: web-1 } ] }
      tencent: [ 10.2.0.10:443 ]
      standby: { tier: 1, backends: [ 192.0.2.7:443 ] }
listeners:
  - { name: shop, bind: [ "0.0.0.0:443", "[::]:443" ], tcp: shop }
"#;
    let reference = config::parse(read("reference.yaml").as_bytes(), config::DEFAULT_MAX_BYTES).unwrap();
    assert!(reference.warnings.is_empty());
    let bare = config::parse(bare.as_bytes(), config::DEFAULT_MAX_BYTES).unwrap();
    assert_eq!(reference.config, bare.config);
}

#[test]
fn twenty_planted_errors_give_exactly_twenty_right_lines() {
    let text = r#"version: 1
cells:
  a: { clod: X }
  b: {}
pools:
  shop:
    cells:
      a:
        weight: 0
        backends: [ 10.1.0.10, 10.1.0.11:0 ]
      c: [ 10.2.0.10:443 ]
    balance: two_choice
    affinity: { by: cookie }
    probe:
      interval: 5
      tcp: {}
      http: { path: healthz }
    connect: { attempts: many, timeout: 3 s s }
    hold: { first: 10s, longest: 1s }
    on_down: explode
    limits: { queue: many }
listeners:
  - bind: shop.example:443
    tcp: shopp
  - { bind: 10.0.0.1:80, tcp: shop, allow: [ 10.0.0.1/8 ] }
  - { bind: 10.0.0.1:80, tcp: shop, http: {} }
"#;
    let found = errors(text);
    let lines: Vec<usize> = found.iter().map(|error| error.split(':').next().unwrap().parse().unwrap()).collect();
    let expected = [3, 9, 10, 10, 11, 12, 13, 14, 15, 17, 18, 18, 19, 20, 21, 23, 24, 25, 26, 26];
    assert_eq!(expected.len(), 20);
    assert_eq!(lines, expected, "{found:#?}");
    for (line, words) in [
        (3, "cells.a.clod: unknown key `clod`; did you mean `cloud`?"),
        (12, "did you mean two_choices?"),
        (15, "a duration with its unit"),
        (24, "did you mean \"shop\"?"),
        (26, "a listener has one of `tcp`, `sni` and `http`"),
    ] {
        assert!(
            found.iter().any(|e| e.starts_with(&format!("{line}:")) && e.contains(words)),
            "{line} {words} {found:#?}"
        );
    }
}

#[test]
fn a_misspelt_key_is_one_mistake_and_not_two() {
    for (right, wrong) in [("cells:", "cels:"), ("pools:", "pool:"), ("bind:", "bnd:"), ("listeners:", "listener:")] {
        let good = "pools: { p: { cells: { a: [ 10.0.0.1:1 ] } } }\nlisteners: [ { bind: 10.0.0.2:1, tcp: p } ]\n";
        let found = errors(&good.replace(right, wrong));
        assert!(found.len() == 1 && found[0].contains("did you mean"), "{wrong} {found:?}");
    }
}

#[test]
fn what_belongs_to_later_versions_is_refused_by_name() {
    let files =
        ["pools: { p: { cells: { a: [ shop.example:1 ] } } }\nlisteners: [ { bind: 10.0.0.2:1, tcp: p } ]".to_owned()];
    for file in files {
        let found = errors(&file);
        assert!(found.len() == 1 && found[0].contains("not in this version"), "{file}: {found:?}");
    }
}

#[test]
fn what_could_be_misread_is_refused() {
    let good = "pools: { p: { cells: { a: [ 10.0.0.1:1 ] } } }\nlisteners: [ { bind: 10.0.0.2:1, tcp: p } ]\n";
    assert!(errors(good).is_empty());
    for (text, words) in [
        (format!("{good}log: &x {{}}\n"), "anchors"),
        (format!("{good}log: *x\n"), "unknown anchor"),
        (format!("a: &x 1\n{good}log: *x\n"), "aliases"),
        (format!("{good}log: !tag {{}}\n"), "tags"),
        (format!("{good}log: {{ <<: {{}} }}\n"), "merge keys"),
        (format!("{good}{good}"), "a second time"),
        (format!("{good}---\n{good}"), "second document"),
        (format!("{good}log: {{ level: ~ }}\n"), "found nothing"),
        (format!("{good}log:\n"), "found nothing"),
        (format!("{good}? [ a ]\n: b\n"), "a key must be plain text"),
        (good.replace("pools", "po\u{0}ols"), "control character U+0000"),
        (format!("{good}# \u{85}log: {{}}\n"), "control character U+0085"),
        (format!("{good}# \u{2028}log: {{}}\n"), "control character U+2028"),
        ("[".repeat(40), "nested deeper"),
        (format!("[{}]", "1,".repeat(210_000)), "more than 200000"),
        (format!("{good}# {}", "x".repeat(1 << 20)), "at most 1048576 bytes are read"),
        (String::new(), "the file is empty"),
        ("pools: {}\nlisteners: []\n".into(), "the map is empty"),
    ] {
        // Of this thread's own work, whatever else the machine does.
        let begin = sailover::sys::thread_cpu();
        let found = errors(&text);
        let took = sailover::sys::thread_cpu() - begin;
        let shown: String = text.chars().take(80).collect();
        assert!(found.iter().any(|error| error.contains(words)), "{shown}: {found:?}");
        assert!(took < Duration::from_millis(500), "{shown}: {took:?}");
    }
    let latin = errors_of_bytes(b"pools: \xff\n");
    assert!(latin[0].contains("not UTF-8"), "{latin:?}");
}

fn errors_of_bytes(bytes: &[u8]) -> Vec<String> {
    config::parse(bytes, config::DEFAULT_MAX_BYTES).err().unwrap_or_default().iter().map(ToString::to_string).collect()
}

#[test]
fn three_hundred_hostile_files_are_judged_in_time_and_none_is_taken() {
    let reference = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/reference.yaml")).unwrap();
    let mut files: Vec<Vec<u8>> = (1..reference.len() / 24).map(|n| reference[..n * 24].to_vec()).collect();
    // A truncation may by chance be a whole configuration.
    files.retain(|file| !file.ends_with(b"\n") && config::parse(file, 1 << 20).is_err());
    let mut rng = fastrand::Rng::with_seed(1);
    while files.len() < 320 {
        let mut file = reference.clone();
        for _ in 0..20 {
            let at = rng.usize(..file.len());
            file[at] = *rng.choice(b"{}[]:,&*!|>'\"%@`#- \n\t\x00\xff?~09aZ").unwrap();
        }
        if config::parse(&file, 1 << 20).is_err() {
            files.push(file);
        }
    }
    for kind in ["[", "{a: ", "- ", "? ", "\"", "'", "|\n", "a:\n ", "&a ", "!!", "%", "\t"] {
        files.push(kind.repeat(100_000 / kind.len()).into_bytes());
    }
    let mut worst = Duration::ZERO;
    for file in &files {
        let begin = sailover::sys::thread_cpu();
        assert!(!errors_of_bytes(file).is_empty());
        worst = worst.max(sailover::sys::thread_cpu() - begin);
    }
    println!("{} hostile files, the slowest took {worst:?}", files.len());
    assert!(files.len() >= 300);
    assert!(worst < Duration::from_millis(100), "{worst:?}");
}

#[test]
fn an_alias_bomb_is_refused_within_twenty_megabytes() {
    let directory = Directory::new();
    let file = directory.0.join("bomb.yaml");
    let k = 2_000;
    let list = |item: &str| vec![item; k].join(",");
    std::fs::write(&file, format!("a: &a [{}]\nb: [{}]\n", list("1"), list("*a"))).unwrap();
    let output = Command::new("prlimit").arg("--data=20971520").arg(BINARY).arg("check").arg(&file).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("bomb.yaml:1:") && text.contains("anchors"), "{text}");
}

#[test]
fn check_tells_good_from_bad_by_its_exit_code() {
    let directory = Directory::new();
    let bad = directory.0.join("bad.yaml");
    std::fs::write(&bad, "pools: 3\n").unwrap();
    let good = configs().into_iter().next().unwrap();
    let run = |files: &[&Path]| Command::new(BINARY).arg("check").args(files).output().unwrap();
    assert_eq!(run(&[&good]).status.code(), Some(0));
    let both = run(&[&good, &bad]);
    assert_eq!(both.status.code(), Some(78));
    let text = String::from_utf8_lossy(&both.stderr).into_owned();
    assert!(text.contains(&format!("{}:1:1: pools: found 3", bad.display())), "{text}");
    assert_eq!(run(&[&directory.0.join("missing")]).status.code(), Some(78));
    assert_eq!(run(&[&directory.0]).status.code(), Some(78));
    assert_eq!(run(&[]).status.code(), Some(64));
}

#[test]
fn what_could_never_serve_is_refused() {
    let pools = "pools: { p: { cells: { c: [ 127.0.0.1:1 ] } } }\n";
    let found = |rest: &str| errors(&format!("{pools}{rest}")).join("\n");
    let http =
        |routes: &str| found(&format!("listeners: [ {{ bind: 127.0.0.1:80, http: {{ routes: [ {routes} ] }} }} ]"));
    let twice = found("listeners: [ { bind: 127.0.0.1:80, tcp: p } ]\nadmin: { http: 127.0.0.1:80 }");
    assert!(twice.contains("127.0.0.1:80 is already bound by listeners[0]"), "{twice}");
    assert!(found("listeners: [ { bind: 127.0.0.1:80, sni: { routes: {} } } ]").contains("refuse every client"));
    assert!(http("{ path: /p, pool: p }, { path: /p/, pool: p }").contains("takes the same requests as"));
    assert!(http("{ path: /z, redirect: { path: /z } }").contains("leads back to this route"));
    assert!(http("{ host: a.example, redirect: { host: a.example } }").contains("leads back to this route"));
    for good in [
        "{ path: /p, pool: p }, { path: /p, method: GET, pool: p }",
        "{ host: a.example, redirect: { scheme: https } }",
        "{ host: a.example, redirect: { host: b.example } }, { pool: p }",
        "{ path: /z, redirect: { path: /y } }",
        "{ path: /z, method: POST, redirect: { path: /z, status: 303 } }, { pool: p }",
    ] {
        assert_eq!(http(good), "", "{good}");
    }
}
