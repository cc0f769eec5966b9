use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn sources() -> Vec<(PathBuf, String)> {
    fn collect(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((path.clone(), std::fs::read_to_string(path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 20);
    found
}

/// A source up to its tests, which stand at its end.
fn without_tests(text: &str) -> &str {
    let end = ["mod tests", "#[allow(clippy::unwrap_used)]"];
    let end = end.iter().filter_map(|next| text.find(&format!("#[cfg(test)]\n{next}"))).min();
    &text[..end.unwrap_or(text.len())]
}

/// Module names a source may import from this crate, by file stem. The data plane never reads the configuration's
/// file or its reader, the control plane never touches a connection, and pure modules know neither.
#[test]
fn the_import_table_holds() {
    // The types that name a policy's words (Balance, OnDown...) are configuration and routing at once.
    let leaves = ["clock", "metrics", "sys", "estimate"];
    let table: &[(&str, &[&str])] = &[
        ("clock", &[]),
        ("metrics", &[]),
        ("sys", &[]),
        ("estimate", &[]),
        ("health", &["clock"]),
        ("limits", &["clock", "config"]),
        ("pace", &["clock", "estimate"]),
        ("concurrency", &["clock"]),
        ("class", &["clock"]),
        ("uplink", &["clock"]),
        ("tell", &["health"]),
        ("speaks_first", &["config"]),
        ("poison", &["clock"]),
        ("version", &["clock"]),
        ("first_byte", &["backend", "clock", "config", "health", "speaks_first", "pool", "session"]),
        ("govern", &["backend", "clock", "dial", "health", "host", "pace", "pool", "table"]),
        ("sniff", &[]),
        ("hello", &["clock", "limits", "sniff", "table", "blame"]),
        ("blame", &["clock", "health"]),
        ("silence", &["clock", "estimate"]),
        ("error_ratio", &["health"]),
        (
            "backend",
            &[
                "class",
                "clock",
                "concurrency",
                "estimate",
                "health",
                "limits",
                "speaks_first",
                "metrics",
                "pace",
                "poison",
                "error_ratio",
                "silence",
                "tell",
                "uplink",
                "version",
                "blame",
            ],
        ),
        ("pool", &["backend", "clock", "config", "health", "limits", "metrics", "sniff", "tls", "version"]),
        (
            "table",
            &["backend", "clock", "config", "health", "http", "limits", "metrics", "pool", "tls", "uplink", "version"],
        ),
        ("splice", &["host"]),
        ("stuck", &["clock"]),
        ("session", &["backend", "clock", "config", "health", "pool", "stuck", "sys", "table"]),
        ("relay", &["backend", "clock", "host", "session", "splice", "table", "tls"]),
        ("dial", &["backend", "clock", "health", "host", "limits", "pool", "tls"]),
        (
            "tcp",
            &[
                "backend",
                "clock",
                "config",
                "dial",
                "hello",
                "host",
                "limits",
                "listen",
                "log",
                "speaks_first",
                "first_byte",
                "poison",
                "pool",
                "relay",
                "session",
                "sniff",
                "sys",
                "table",
                "tls",
                "blame",
            ],
        ),
        (
            "http",
            &[
                "backend", "class", "clock", "config", "dial", "health", "hello", "host", "limits", "listen", "log",
                "poison", "pool", "sniff", "stuck", "table", "tcp", "tls", "blame",
            ],
        ),
        ("listen", &["clock", "host", "http", "limits", "table", "tcp"]),
        ("worker", &["clock", "host", "http", "listen", "first_byte", "session", "sys"]),
        ("host", &["limits", "log", "metrics", "table"]),
        ("log", &["clock", "config", "dial", "metrics", "table"]),
        ("drain", &["pool", "table"]),
        ("tls", &[]),
        (
            "probe",
            &["backend", "clock", "config", "dial", "health", "host", "pool", "sniff", "sys", "table", "tcp", "tls"],
        ),
        ("reload", &["clock", "config", "host", "probe", "table"]),
        (
            "report",
            &[
                "backend", "clock", "config", "drain", "health", "host", "log", "metrics", "pool", "reload", "session",
                "table", "tls",
            ],
        ),
        ("admin", &["clock", "host", "listen", "reload", "report", "session", "table", "worker"]),
        ("config", &["http", "sniff", "tls"]),
        ("cli", &["admin", "config", "session"]),
        ("demo", &["admin", "config", "server", "sys"]),
    ];
    let mut judged = BTreeSet::new();
    for (path, text) in sources() {
        let relative = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap().to_owned();
        // A directory's files are judged with the module that it belongs to.
        let stem = relative.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
        if stem == "server" || relative.ends_with("tests.rs") || relative.ends_with("contract.rs") {
            continue;
        }
        let Some((_, allowed)) = table.iter().find(|(name, _)| *name == stem) else {
            assert!(["lib", "main"].contains(&stem.as_str()), "{stem} stands in no row of the import table");
            continue;
        };
        judged.insert(stem.clone());
        let code = without_tests(&text);
        let mut imports: Vec<String> = Vec::new();
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for rest in line.split("crate::").skip(1) {
                if let Some(list) = rest.strip_prefix('{') {
                    imports.extend(
                        list.split(',').map(|item| item.trim().split([':', '}', ';']).next().unwrap().to_owned()),
                    );
                } else {
                    imports.push(rest.split([':', ';', ' ', ',', ')']).next().unwrap().to_owned());
                }
            }
        }
        imports.retain(|import| !import.is_empty());
        for import in imports {
            let fine = import == stem
                || allowed.contains(&import.as_str())
                || leaves.contains(&import.as_str()) && !leaves.contains(&stem.as_str());
            assert!(fine, "{} imports {import}, which the import table does not allow", path.display());
        }
    }
    assert_eq!(judged.len(), table.len());
}

#[test]
fn only_the_configuration_reader_uses_yaml_crates() {
    for (path, text) in sources() {
        if !path.to_string_lossy().contains("config/file") && !path.ends_with("config/scan.rs") {
            assert!(!text.contains("serde_yaml") && !text.contains("saphyr"), "{}", path.display());
        }
    }
}

/// pingora is a library of the HTTP face; everything else must stand when it goes.
#[test]
fn only_the_http_face_uses_pingora() {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut users = 0;
    for (path, text) in sources() {
        let inside = path.strip_prefix(&home).unwrap().to_string_lossy().starts_with("http");
        let uses = text.contains("pingora_");
        assert!(inside || !uses, "{}", path.display());
        users += usize::from(uses);
    }
    assert!(users > 3, "the look found what it looks for");
}

#[test]
fn unsafe_stands_only_in_the_files_that_exist_for_it_each_with_its_proof() {
    let homes = ["sys.rs", "splice.rs", "session.rs"];
    let mut blocks = 0;
    for (path, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            if code.contains("unsafe {") {
                blocks += 1;
                assert!(homes.iter().any(|home| path.ends_with(home)), "{}:{}", path.display(), i + 1);
                let proof = lines[i.saturating_sub(4)..i].iter().any(|line| line.contains("SAFETY:"));
                assert!(proof, "{}:{} has no proof", path.display(), i + 1);
            }
        }
    }
    assert!(blocks > 5);
}

#[test]
fn files_stay_short() {
    for (path, text) in sources() {
        assert!(text.lines().count() <= 1_000, "{} has {} lines", path.display(), text.lines().count());
    }
}

#[test]
fn nothing_below_the_server_exits_listens_to_signals_or_reads_the_environment() {
    for (path, text) in sources() {
        // The tables for people are no part of the serving process, and NO_COLOR is theirs.
        if ["server.rs", "main.rs", "cli/show.rs"].into_iter().any(|above| path.ends_with(above)) {
            continue;
        }
        for word in ["process::exit", "signal::unix", "env::var"] {
            assert!(!text.contains(word), "{} uses {word}", path.display());
        }
    }
}

#[test]
fn the_package_has_the_version_of_the_program() {
    let read = |file: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    assert!(read("packaging/debian/changelog").starts_with(&format!("sailover ({version}) ")));
    assert!(read("CHANGELOG.md").contains(&format!("## {version}")));
}

#[test]
fn no_lock_is_unwrapped() {
    for (path, text) in sources() {
        let code = without_tests(&text);
        if path.ends_with("tests.rs") {
            continue;
        }
        assert!(!code.contains("lock().unwrap()") && !code.contains("lock().expect("), "{}", path.display());
    }
}
