pub mod attack;
pub mod backend;
pub mod crowd;
pub mod load;
pub mod long;
pub mod netns;
pub mod proxy;

use std::time::{Duration, Instant};

/// Waits until `check` gives something, or panics with `what` after `within`.
pub fn eventually<T>(what: &str, within: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Whether this process may make namespaces, and has what it needs for them.
pub fn can_make_namespaces() -> bool {
    rustix::process::geteuid().is_root() && ["ip", "nft"].iter().all(|tool| on_path(tool))
}

fn on_path(tool: &str) -> bool {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|dir| std::path::Path::new(dir).join(tool).exists())
}

/// Bytes that the kernel holds for sending and for reading on this machine's connection from `local` to `remote`, each a port, once
/// both have stood still for a while.
pub fn settled_queues(local: Option<u16>, remote: u16) -> (u64, u64) {
    let ends = |address: &str, port: u16| address.ends_with(&format!(":{port:04X}"));
    let now = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let mut rows = rows.filter(|row| row.len() > 4 && ends(row[2], remote));
        let row = rows.find(|row| local.is_none_or(|local| ends(row[1], local)))?;
        let (sending, reading) = row[4].split_once(':')?;
        Some((u64::from_str_radix(sending, 16).ok()?, u64::from_str_radix(reading, 16).ok()?))
    };
    let mut last = ((0, 0), 0);
    eventually("the kernel takes no more", Duration::from_secs(20), || {
        let now = now()?;
        last = if now != (0, 0) && now == last.0 { (now, last.1 + 1) } else { (now, 0) };
        (last.1 >= 20).then_some(now)
    })
}
