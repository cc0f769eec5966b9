//! The program as a child process, with its configuration and socket in a directory of its own.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::eventually;

pub const BINARY: &str = env!("CARGO_BIN_EXE_sailover");

/// A directory that is removed when dropped.
pub struct Directory(pub PathBuf);

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Directory {
    pub fn new() -> Directory {
        let name = format!("sailover-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        // A killed run of another time may have left one of this name.
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running sailover; killed when dropped.
pub struct Proxy {
    pub directory: Directory,
    pub child: Child,
    address: OnceLock<SocketAddr>,
}

impl Proxy {
    /// Starts with `yaml`, to which `admin.socket` is added, and waits until it is ready.
    pub fn start(yaml: &str) -> Proxy {
        Proxy::start_in(None, yaml)
    }

    pub fn start_in(namespace: Option<String>, yaml: &str) -> Proxy {
        let proxy = Proxy::spawn(namespace, yaml, |_| {});
        eventually("the proxy answers on its socket", Duration::from_secs(10), || proxy.ask("GET", "/livez").ok());
        proxy
    }

    /// Starts it, changed by `change`, without waiting.
    pub fn spawn(namespace: Option<String>, yaml: &str, change: impl FnOnce(&mut Command)) -> Proxy {
        let directory = Directory::new();
        write_config(&directory, yaml);
        let mut command = match &namespace {
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name, BINARY]);
                command
            }
            None => Command::new(BINARY),
        };
        let log = std::fs::File::create(directory.0.join("log")).unwrap();
        command.arg("run").arg("--config").arg(directory.0.join("sailover.yaml"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        change(&mut command);
        let child = command.spawn().expect("sailover starts");
        Proxy { directory, child, address: OnceLock::new() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.0.join("admin.sock")
    }

    /// Replaces the configuration file, by rename.
    pub fn write(&self, yaml: &str) {
        write_config(&self.directory, yaml);
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Runs a sub-command against it.
    pub fn command(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(BINARY);
        command.args(arguments);
        if !matches!(arguments[0], "check") {
            command.arg("--socket").arg(self.socket());
        }
        command.output().unwrap()
    }

    pub fn ask(&self, method: &str, path: &str) -> Result<(u16, String), String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let method = method.parse().unwrap();
        let (status, body) = runtime.block_on(sailover::admin::ask(&self.socket(), method, path, Vec::new()))?;
        Ok((status.as_u16(), String::from_utf8_lossy(&body).into_owned()))
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.ask("GET", "/status").unwrap().1).unwrap()
    }

    /// Sum of all samples of a metric whose labels contain all of `labels`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let text = self.ask("GET", "/metrics").unwrap().1;
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        let lines = text.lines().filter(of_name).filter(|line| labels.iter().all(|label| line.contains(label)));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// The address of the listener at `place` in the order of the status.
    pub fn address(&self, place: usize) -> SocketAddr {
        self.status()["listeners"][place]["address"].as_str().unwrap().parse().unwrap()
    }

    /// The same for the first listener, asked once.
    pub fn address_cached(&self) -> SocketAddr {
        *self.address.get_or_init(|| self.address(0))
    }

    /// Health of a backend by its name.
    pub fn health(&self, backend: &str) -> String {
        self.backend(backend)["health"].as_str().unwrap().to_owned()
    }

    /// What the status says of a backend.
    pub fn backend(&self, name: &str) -> Value {
        let status = self.status();
        let pools = status["pools"].as_array().unwrap();
        let cells = pools.iter().flat_map(|pool| pool["cells"].as_array().unwrap());
        let mut backends = cells.flat_map(|cell| cell["backends"].as_array().unwrap());
        backends.find(|backend| backend["name"] == name).expect("the backend is in the status").clone()
    }

    pub fn wait_health(&self, backend: &str, wanted: &str, within: Duration) {
        eventually(&format!("{backend} becomes {wanted}"), within, || (self.health(backend) == wanted).then_some(()));
    }

    /// Waits until the log says so: its writer rests for a moment after each writing.
    pub fn wait_log(&self, wanted: &str) {
        eventually(&format!("the log says {wanted}"), Duration::from_secs(5), || {
            self.log().contains(wanted).then_some(())
        });
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.0.join("log")).unwrap_or_default()
    }

    /// Private memory in bytes, as the kernel counts it.
    pub fn memory(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())).unwrap();
        let kilobytes = |key: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(key));
            line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
        };
        (kilobytes("Private_Dirty:") + kilobytes("Private_Clean:")) * 1024
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the proxy's last lines ---");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_config(directory: &Directory, yaml: &str) {
    let socket = directory.0.join("admin.sock");
    let text = format!("{yaml}\nadmin: {{ socket: {} }}\n", socket.display());
    let new = directory.0.join("new.yaml");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, directory.0.join("sailover.yaml")).unwrap();
}
