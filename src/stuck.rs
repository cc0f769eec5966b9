//! Whether the kernel at the other end of a connection has vanished: bytes wait for its acknowledgement, and none comes.
//!
//! A peer that reads slowly, or not at all, has a kernel that goes on acknowledging; only a machine or a way that is gone does not.

use std::time::Duration;

use crate::clock::Time;
use crate::sys::TcpInfo;

/// Connections that show nothing are asked about once in this many looks, which come once a second.
pub const ROUNDS: usize = 5;

/// A peer that takes nothing is asked by our kernel whether it does again, ever more seldom; this many of these in a row are not lost by
/// chance.
const PROBES: u8 = 3;

/// What was seen of one connection at the last looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unacked(Option<Time>);

impl Unacked {
    /// Whether bytes waited for their acknowledgement at the last look; then it is asked about at each.
    pub fn waits(&self) -> bool {
        self.0.is_some()
    }

    /// How long bytes have been waiting without any acknowledgement, by what the kernel says now. The age of the last one alone
    /// would not do: after a quiet hour the first byte sent finds it an hour old.
    pub fn silence(&mut self, info: Option<TcpInfo>, now: Time) -> Duration {
        let Some(info) = info.filter(|info| info.unacked > 0 || info.probes >= PROBES) else {
            self.0 = None;
            return Duration::ZERO;
        };
        let first = *self.0.get_or_insert(now);
        if info.last_ack < now.since(first) {
            self.0 = Some(now);
            return Duration::ZERO;
        }
        now.since(first)
    }
}
