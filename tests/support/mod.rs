pub mod attack;
pub mod backend;
pub mod load;
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
