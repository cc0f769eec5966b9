//! "Is it me?": when every cell falls silent in one moment, it is our own way out that is broken, and no backend.
//!
//! Silence speaks against a backend only while something else answers: a backend of another cell, of whatever pool, that has
//! shown life since the silence began. Otherwise its state stays as it is, clients are sent as before, and the first sign of
//! life from anywhere lets everything count again.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Time;

/// Cells told apart; more share places, and then vouch less often for each other.
const PLACES: usize = 64;

/// Looks at one stall are no further apart than this.
const APART: Duration = Duration::from_secs(1);
/// A stall of all cells for so long is followed by as much time, at most this, in which nobody's lack of answers counts.
const STALLED: Duration = Duration::from_millis(500);
const GRACE: Duration = Duration::from_secs(5);

/// When each cell showed life last, over all pools.
#[derive(Debug)]
pub struct Uplink {
    /// By handshakes, and by answers (when that was written that was answered).
    connected: [AtomicU64; PLACES],
    answered: [AtomicU64; PLACES],
    names: Mutex<Vec<Arc<str>>>,
    cells: AtomicUsize,
    /// When silence was last put down to ourselves, and since when.
    dark: AtomicU64,
    dark_since: AtomicU64,
    /// The same for answers: since when nobody gave any, and when that was seen last.
    stalled: AtomicU64,
    stalled_since: AtomicU64,
}

impl Default for Uplink {
    fn default() -> Self {
        Uplink {
            connected: [const { AtomicU64::new(0) }; PLACES],
            answered: [const { AtomicU64::new(0) }; PLACES],
            names: Mutex::default(),
            cells: AtomicUsize::new(0),
            dark: AtomicU64::new(0),
            dark_since: AtomicU64::new(0),
            stalled: AtomicU64::new(0),
            stalled_since: AtomicU64::new(0),
        }
    }
}

impl Uplink {
    /// The place of a cell, by its name.
    pub fn place(&self, cell: &str) -> usize {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let found = names.iter().position(|name| **name == *cell);
        let place = found.unwrap_or_else(|| {
            names.push(cell.into());
            names.len() - 1
        });
        place % PLACES
    }

    /// How many cells the table in use has.
    pub fn set_cells(&self, cells: usize) {
        self.cells.store(cells, Relaxed);
    }

    /// A handshake with a backend of the cell.
    pub fn connected(&self, place: usize, now: Time) {
        self.connected[place].store(now.0, Relaxed);
    }

    /// An answer of a backend of the cell to what was written at `written`. Not when it came: where all take longer alike, one is the
    /// first to answer again, and speaks for itself alone.
    pub fn answered(&self, place: usize, written: Time) {
        self.answered[place].fetch_max(written.0, Relaxed);
    }

    /// Whether the silence of a backend of this cell says something about the backend: another cell has shown as much life
    /// since, or there is no other. `answers` asks for answers, not for handshakes alone.
    pub fn vouches(&self, place: usize, answers: bool, since: Time, now: Time) -> bool {
        if self.cells.load(Relaxed) < 2 {
            return true;
        }
        let signs = if answers { &self.answered } else { &self.connected };
        let alive = signs.iter().enumerate().any(|(at, sign)| at != place && sign.load(Relaxed) >= since.0.max(1));
        if !alive && !answers {
            if !self.is_dark() {
                self.dark_since.store(now.0, Relaxed);
            }
            self.dark.store(now.0, Relaxed);
        }
        if !answers {
            return alive;
        }
        let last = Time(self.stalled.load(Relaxed));
        if !alive {
            if now.since(last) > APART {
                self.stalled_since.store(now.0, Relaxed);
            }
            self.stalled.store(now.0, Relaxed);
            return false;
        }
        // Whoever comes out of a common stall works off what has gathered, and nobody waits for that any more.
        let stalled = last.since(Time(self.stalled_since.load(Relaxed)));
        stalled < STALLED || now.since(last) >= stalled.min(GRACE)
    }

    fn is_dark(&self) -> bool {
        let dark = self.dark.load(Relaxed);
        dark > 0 && self.connected.iter().all(|sign| sign.load(Relaxed) < dark)
    }

    /// Since when nothing answers from anywhere; `None` when something does.
    pub fn dark(&self) -> Option<Time> {
        self.is_dark().then(|| Time(self.dark_since.load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_while_another_cell_answers() {
        let uplink = Uplink::default();
        let (a, b) = (uplink.place("a"), uplink.place("b"));
        assert_eq!((a, b, uplink.place("a")), (0, 1, 0));
        assert!(uplink.vouches(a, false, Time(100), Time(200)), "one cell has nobody to be compared with");
        uplink.set_cells(2);
        uplink.connected(a, Time(150));
        assert!(!uplink.vouches(a, false, Time(100), Time(200)), "its own life says nothing");
        assert_eq!(uplink.dark(), Some(Time(200)));
        assert!(!uplink.vouches(b, false, Time(160), Time(210)), "life before the silence says nothing");
        assert_eq!(uplink.dark(), Some(Time(200)));
        uplink.connected(b, Time(220));
        assert_eq!(uplink.dark(), None);
        assert!(uplink.vouches(a, false, Time(210), Time(230)));
        assert!(!uplink.vouches(a, true, Time(210), Time(230)), "a handshake is no answer");
        uplink.answered(b, Time(231));
        assert!(uplink.vouches(a, true, Time(210), Time(232)));
    }

    #[test]
    fn after_a_common_stall_there_is_time_to_work_off_what_has_gathered() {
        let uplink = Uplink::default();
        let (a, b) = (uplink.place("a"), uplink.place("b"));
        uplink.set_cells(2);
        let at = |ms: u64| Time(1_000_000 + ms * 1_000);
        uplink.answered(b, at(0));
        // Three seconds in which nobody answers.
        assert!((1..=300).all(|i| !uplink.vouches(a, true, at(5), at(i * 10))));
        uplink.answered(b, at(3_010));
        assert!(!uplink.vouches(a, true, at(5), at(3_020)), "the other one may still work off its own");
        uplink.answered(b, at(6_000));
        assert!(uplink.vouches(a, true, at(5), at(6_010)), "but not for ever");
        // A moment without an answer is no stall.
        assert!(!uplink.vouches(a, true, at(9_000), at(9_010)));
        uplink.answered(b, at(9_020));
        assert!(uplink.vouches(a, true, at(9_000), at(9_030)));
    }
}
