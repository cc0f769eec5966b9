//! Network namespaces joined by veth pairs: one for the edge, one for each cell.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// Moves the calling thread into a namespace; sockets made by it from then on belong there.
pub fn enter(name: &str) {
    let file = File::open(format!("/run/netns/{name}")).expect("the namespace exists");
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))
        .expect("the thread may enter it");
}
