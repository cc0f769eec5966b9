//! Network namespaces joined by veth pairs: one for the edge, one for each cell.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A star of namespaces; taken down when dropped.
pub struct Rig {
    prefix: String,
    cells: usize,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

fn run(line: &str) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().expect("the command starts");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Rig {
    /// An edge and `cells` cells. Cell `i` (from 1) has 10.99.i.2 and more addresses above it; the edge has
    /// 10.99.i.1 towards it.
    pub fn new(cells: usize) -> Rig {
        let prefix = format!("so{}x{}", std::process::id() % 100_000, NEXT.fetch_add(1, Ordering::Relaxed));
        let rig = Rig { prefix, cells };
        run(&format!("ip netns add {}", rig.edge()));
        run(&format!("ip -n {} link set lo up", rig.edge()));
        for i in 1..=cells {
            let (edge, cell) = (rig.edge(), rig.cell(i));
            run(&format!("ip netns add {cell}"));
            run(&format!("ip -n {cell} link set lo up"));
            run(&format!("ip link add {edge}v{i} netns {edge} type veth peer name eth0 netns {cell}"));
            run(&format!("ip -n {edge} addr add 10.99.{i}.1/24 dev {edge}v{i}"));
            run(&format!("ip -n {edge} link set {edge}v{i} up"));
            run(&format!("ip -n {cell} link set eth0 up"));
            for host in 2..32 {
                run(&format!("ip -n {cell} addr add 10.99.{i}.{host}/24 dev eth0"));
            }
            run(&format!("ip -n {cell} route add default via 10.99.{i}.1"));
        }
        rig
    }

    /// Puts a delay between edge and cell `i`: packets to 10.98.i.2 go through a TUN pair and user space, because
    /// netem is not everywhere. Returns the handle that changes it.
    pub fn delay(&self, i: usize, one_way: Duration) -> Delay {
        let delay = Delay::start(&self.edge(), &self.cell(i), i, one_way);
        let (edge, cell) = (self.edge(), self.cell(i));
        run(&format!("ip -n {edge} addr add 10.98.{i}.1/24 dev sotun{i}"));
        run(&format!("ip -n {edge} link set sotun{i} up"));
        run(&format!("ip -n {cell} addr add 10.98.{i}.2/24 dev sotun{i}"));
        run(&format!("ip -n {cell} link set sotun{i} up"));
        delay
    }

    /// Name of the edge's namespace.
    pub fn edge(&self) -> String {
        format!("{}e", self.prefix)
    }

    /// Name of a cell's namespace.
    pub fn cell(&self, i: usize) -> String {
        format!("{}c{i}", self.prefix)
    }

    /// Drops every packet to and from the cell, as a vanished cell does, and counts the handshakes among them.
    pub fn swallow(&self, i: usize) {
        self.nft(
            i,
            "table ip fault {
                counter syn { }
                chain in { type filter hook input priority 0; policy drop; tcp flags syn / syn,ack counter name syn; }
                chain out { type filter hook output priority 0; policy drop; }
            }",
        );
    }

    /// Drops so many of a hundred packets to and from the cell, at random.
    pub fn lose(&self, i: usize, percent: u8) {
        let drop = format!("numgen random mod 1000 < {} drop", u32::from(percent) * 5);
        self.nft(
            i,
            &format!(
                "table ip fault {{
                    chain in {{ type filter hook input priority 0; {drop}; }}
                    chain out {{ type filter hook output priority 0; {drop}; }}
                }}"
            ),
        );
    }

    /// Drops every packet of one flow in so many to the cell: the same flows for as long as it lasts.
    pub fn break_flows(&self, i: usize, one_in: u8) {
        self.nft(
            i,
            &format!(
                "table ip fault {{
                    chain in {{ type filter hook input priority 0; jhash tcp sport mod {one_in} == 1 drop; }}
                }}"
            ),
        );
    }

    /// Refuses every handshake of the cell as a closed port does, and leaves the connections that there are.
    pub fn refuse(&self, i: usize) {
        self.nft(
            i,
            "table ip fault {
                chain in { type filter hook input priority 0; tcp flags & (syn | ack) == syn reject with tcp reset; }
            }",
        );
    }

    /// Answers every packet to the cell with ICMP: host unreachable.
    pub fn refuse_by_icmp(&self, i: usize) {
        self.nft(
            i,
            "table ip fault {
                chain in { type filter hook input priority 0; ip protocol tcp reject with icmp type host-unreachable; }
                chain out { type filter hook output priority 0; ip protocol tcp drop; }
            }",
        );
    }

    /// First handshake packets that the cell has swallowed.
    pub fn swallowed(&self, i: usize) -> f64 {
        let text = self.nft(i, "list counters");
        let after = text.split("packets ").nth(1).and_then(|rest| rest.split_whitespace().next());
        after.and_then(|number| number.parse().ok()).unwrap_or(0.0)
    }

    /// Ends every fault of the network.
    pub fn heal(&self, i: usize) {
        self.nft(i, "flush ruleset");
    }

    fn nft(&self, i: usize, rule: &str) -> String {
        let output =
            Command::new("ip").args(["netns", "exec", &self.cell(i), "nft", rule]).output().expect("nft starts");
        assert!(output.status.success(), "nft {rule}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let names = std::iter::once(self.edge()).chain((1..=self.cells).map(|i| self.cell(i)));
        for name in names {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

/// A TUN pair with user space between its ends.
pub struct Delay {
    one_way_us: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Delay {
    fn start(edge: &str, cell: &str, i: usize, one_way: Duration) -> Delay {
        let open = |namespace: &str| {
            let (namespace, name) = (namespace.to_owned(), format!("sotun{i}"));
            std::thread::spawn(move || {
                enter(&namespace);
                tun(&name)
            })
            .join()
            .unwrap()
        };
        let (a, b) = (open(edge), open(cell));
        let delay = Delay { one_way_us: Arc::default(), stop: Arc::default() };
        delay.set(one_way);
        for (from, to) in [(a.try_clone().unwrap(), b.try_clone().unwrap()), (b, a)] {
            let (one_way, stop) = (delay.one_way_us.clone(), delay.stop.clone());
            std::thread::spawn(move || carry(from, to, &one_way, &stop));
        }
        delay
    }

    /// Changes the delay of packets that come from now on.
    pub fn set(&self, one_way: Duration) {
        self.one_way_us.store(one_way.as_micros() as u64, Ordering::Relaxed);
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn carry(mut from: File, mut to: File, one_way: &AtomicU64, stop: &AtomicBool) {
    let mut queue: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        while let Ok(n) = from.read(&mut buffer) {
            let due = Instant::now() + Duration::from_micros(one_way.load(Ordering::Relaxed));
            queue.push_back((due, buffer[..n].to_vec()));
        }
        while queue.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            if let Some((_, packet)) = queue.pop_front() {
                let _ = to.write(&packet);
            }
        }
        let wait =
            queue.front().map_or(Duration::from_millis(20), |(due, _)| due.saturating_duration_since(Instant::now()));
        let wait = wait.min(Duration::from_millis(20));
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        let mut fds = [rustix::event::PollFd::new(&from, rustix::event::PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
    }
}

/// Opens a TUN device in the namespace of the calling thread.
fn tun(name: &str) -> File {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .expect("the kernel has TUN");
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&((libc::IFF_TUN | libc::IFF_NO_PI) as u16).to_ne_bytes());
    // SAFETY: `request` is as large as the kernel's ifreq, and the descriptor is open.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    file
}

/// Moves the calling thread into a namespace; sockets made by it from then on belong there.
pub fn enter(name: &str) {
    let file = File::open(format!("/run/netns/{name}")).expect("the namespace exists");
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))
        .expect("the thread may enter it");
}
