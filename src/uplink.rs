//! "Is it me?": when everything falls silent in one moment, it is our own way out that is broken, and no backend.
//!
//! A handshake that gets no answer speaks against a backend only while something else shows life: any other backend, of
//! whatever pool, that has answered one since. Otherwise its state stays as it is, clients are sent as before, and the first
//! sign of life from anywhere lets everything count again.
//!
//! Clients that get no answers speak against it while another backend answers, of its own pool where that is asked as well: a pool
//! may wait for one thing that others do not need. Or while there is another cell that owes nobody an answer: one that stands by has
//! nothing to show before it is asked. Where all that are asked are late alike, nobody is blamed.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Time;

/// Backends told apart; more share places, and then vouch less often for each other.
const PLACES: usize = 256;

/// Looks at one stall are no further apart than this.
const APART: Duration = Duration::from_secs(1);
/// A stall of all for this long is followed by as much time, at most this, in which nobody's lack of answers counts.
const STALLED: Duration = Duration::from_millis(500);
const GRACE: Duration = Duration::from_secs(5);
/// What was asked this long ago is owed no more: its client may have left.
const OWED_FOR: Duration = Duration::from_secs(10);

/// When one backend showed life last.
#[derive(Debug)]
struct Signs {
    /// The numbers of its cell, and of its pool.
    cell: AtomicUsize,
    pool: AtomicU64,
    /// Its last handshake.
    connected: AtomicU64,
    /// When it was last asked something; and when the newest request was asked of those that it has answered.
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Signs {
    fn owes(&self, now: Time) -> bool {
        let asked = self.asked.load(Relaxed);
        asked > self.answered.load(Relaxed) && now.since(Time(asked)) < OWED_FOR
    }
}

/// When each backend showed life last, over all pools.
#[derive(Debug)]
pub struct Uplink {
    backends: [Signs; PLACES],
    names: Mutex<Vec<Arc<str>>>,
    cells: AtomicUsize,
    count: AtomicUsize,
    /// When silence was last put down to ourselves, and since when.
    dark: AtomicU64,
    dark_since: AtomicU64,
}

/// When nobody of a pool who was asked gave an answer: when that was seen last, and since when.
#[derive(Debug, Default)]
pub struct Stall {
    seen: AtomicU64,
    since: AtomicU64,
}

impl Stall {
    fn goes_on(&self, now: Time) {
        if now.since(Time(self.seen.load(Relaxed))) > APART {
            self.since.store(now.0, Relaxed);
        }
        self.seen.store(now.0, Relaxed);
    }

    /// Whoever comes out of a common stall works off what has gathered, and nobody waits for that any more.
    fn is_worked_off(&self, now: Time) -> bool {
        let last = Time(self.seen.load(Relaxed));
        let stalled = last.since(Time(self.since.load(Relaxed)));
        stalled < STALLED || now.since(last) >= stalled.min(GRACE)
    }
}

impl Default for Uplink {
    fn default() -> Self {
        let signs = || Signs {
            cell: AtomicUsize::new(usize::MAX),
            pool: AtomicU64::new(u64::MAX),
            connected: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        };
        Uplink {
            backends: std::array::from_fn(|_| signs()),
            names: Mutex::default(),
            cells: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            dark: AtomicU64::new(0),
            dark_since: AtomicU64::new(0),
        }
    }
}

impl Uplink {
    /// The number of a cell, by its name.
    pub fn cell(&self, name: &str) -> usize {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().position(|known| **known == *name).unwrap_or_else(|| {
            names.push(name.into());
            names.len() - 1
        })
    }

    /// The name of a cell, by its number.
    pub fn cell_name(&self, cell: usize) -> Option<Arc<str>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).get(cell).cloned()
    }

    /// How many cells and backends the table in use has.
    pub fn set_cells(&self, cells: usize, backends: usize) {
        self.cells.store(cells, Relaxed);
        self.count.store(backends, Relaxed);
    }

    /// A backend of this pool stands in this cell. Backends and pools are known by the numbers that are theirs in the process.
    pub fn stands_in(&self, backend: u64, pool: u64, cell: usize) {
        self.signs(backend).cell.store(cell, Relaxed);
        self.signs(backend).pool.store(pool, Relaxed);
    }

    /// A handshake with the backend.
    pub fn connected(&self, backend: u64, now: Time) {
        self.signs(backend).connected.store(now.0, Relaxed);
    }

    /// Something was asked of it.
    pub fn asked(&self, backend: u64, now: Time) {
        self.signs(backend).asked.fetch_max(now.0, Relaxed);
    }

    /// Its answer to what was written at `written`. Not when it came: where all take longer alike, one is the first to answer
    /// again, and speaks for itself alone.
    pub fn answered(&self, backend: u64, written: Time) {
        self.signs(backend).answered.fetch_max(written.0, Relaxed);
    }

    /// Whether it says something about this backend that it answers no handshake: another one has answered one since, or there is
    /// no other.
    pub fn vouches(&self, backend: u64, since: Time, now: Time) -> bool {
        if self.count.load(Relaxed) < 2 {
            return true;
        }
        let since = since.0.max(1);
        let alive = self.others(backend).any(|signs| signs.connected.load(Relaxed) >= since);
        if !alive {
            if !self.is_dark() {
                self.dark_since.store(now.0, Relaxed);
            }
            self.dark.store(now.0, Relaxed);
        }
        alive
    }

    /// Whether it says something about this backend that it gives its clients no answers. `stall` is its pool's.
    pub fn vouches_by_answers(&self, backend: u64, stall: &Stall, since: Time, now: Time) -> bool {
        if self.count.load(Relaxed) < 2 {
            return true;
        }
        let since = since.0.max(1);
        let own = self.signs(backend);
        let (cell, pool) = (own.cell.load(Relaxed), own.pool.load(Relaxed));
        let is_fellow = |signs: &Signs| signs.pool.load(Relaxed) == pool;
        // Those of its pool tell more than others, if they have anything to tell.
        let among_fellows = self.others(backend).any(|signs| is_fellow(signs) && signs.asked.load(Relaxed) >= since);
        let others = || self.others(backend).filter(|signs| !among_fellows || is_fellow(signs));
        if others().any(|signs| signs.answered.load(Relaxed) >= since) {
            return stall.is_worked_off(now);
        }
        let is_elsewhere = |signs: &Signs| signs.cell.load(Relaxed) != cell;
        let one_cell = self.cells.load(Relaxed) < 2 || among_fellows && !others().any(is_elsewhere);
        // Whoever still gets a handshake from anywhere has no broken way out.
        let reached = self.backends.iter().any(|signs| signs.connected.load(Relaxed) >= since);
        if reached && !others().any(|signs| (one_cell || is_elsewhere(signs)) && signs.owes(now)) {
            return true;
        }
        stall.goes_on(now);
        false
    }

    fn others(&self, backend: u64) -> impl Iterator<Item = &Signs> {
        let itself = self.place(backend);
        self.backends.iter().enumerate().filter(move |(place, _)| *place != itself).map(|(_, signs)| signs)
    }

    fn place(&self, backend: u64) -> usize {
        (backend % PLACES as u64) as usize
    }

    fn signs(&self, backend: u64) -> &Signs {
        &self.backends[self.place(backend)]
    }

    fn is_dark(&self) -> bool {
        let dark = self.dark.load(Relaxed);
        dark > 0 && self.backends.iter().all(|signs| signs.connected.load(Relaxed) < dark)
    }

    /// Since when nothing answers from anywhere; `None` when something does.
    pub fn dark(&self) -> Option<Time> {
        self.is_dark().then(|| Time(self.dark_since.load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two backends of one cell, and one of another.
    const A: u64 = 1;
    const BESIDE_A: u64 = 2;
    const B: u64 = 3;

    fn two_cells() -> Uplink {
        let uplink = Uplink::default();
        assert_eq!((uplink.cell("a"), uplink.cell("b"), uplink.cell("a")), (0, 1, 0));
        uplink.set_cells(2, 3);
        [(A, 0), (BESIDE_A, 0), (B, 1)].into_iter().for_each(|(backend, cell)| uplink.stands_in(backend, 0, cell));
        uplink
    }

    #[test]
    fn silence_counts_while_another_backend_answers() {
        let stall = Stall::default();
        let uplink = two_cells();
        uplink.set_cells(1, 1);
        assert!(uplink.vouches(A, Time(100), Time(200)), "one backend has nobody to be compared with");
        uplink.set_cells(2, 3);
        uplink.connected(A, Time(150));
        assert!(!uplink.vouches(A, Time(100), Time(200)), "its own life says nothing");
        assert_eq!(uplink.dark(), Some(Time(200)));
        assert!(!uplink.vouches(B, Time(160), Time(210)), "life before the silence says nothing");
        assert_eq!(uplink.dark(), Some(Time(200)));
        uplink.connected(B, Time(220));
        assert_eq!(uplink.dark(), None);
        assert!(uplink.vouches(A, Time(210), Time(230)));
        uplink.asked(B, Time(225));
        assert!(!uplink.vouches_by_answers(A, &stall, Time(210), Time(230)), "a handshake is no answer");
        uplink.answered(B, Time(231));
        assert!(uplink.vouches_by_answers(A, &stall, Time(210), Time(232)));
    }

    #[test]
    fn a_backend_of_the_same_cell_is_as_good_a_witness() {
        let stall = Stall::default();
        let uplink = two_cells();
        assert!(!uplink.vouches(A, Time(100), Time(200)));
        uplink.connected(BESIDE_A, Time(150));
        assert!(uplink.vouches(A, Time(100), Time(200)));
        uplink.asked(B, Time(120));
        assert!(!uplink.vouches_by_answers(A, &stall, Time(100), Time(200)));
        uplink.answered(BESIDE_A, Time(150));
        assert!(uplink.vouches_by_answers(A, &stall, Time(100), Time(200)));
    }

    #[test]
    fn a_cell_that_stands_by_has_nothing_to_show() {
        let stall = Stall::default();
        let uplink = two_cells();
        uplink.asked(BESIDE_A, Time(120));
        assert!(!uplink.vouches_by_answers(A, &stall, Time(100), Time(200)), "not even a handshake comes back");
        uplink.connected(A, Time(150));
        assert!(
            uplink.vouches_by_answers(A, &stall, Time(100), Time(200)),
            "who is asked is silent, and there is another cell"
        );
        uplink.asked(B, Time(160));
        assert!(!uplink.vouches_by_answers(A, &stall, Time(100), Time(200)), "that is late too");
        let later = Time(160) + OWED_FOR;
        uplink.connected(A, later);
        assert!(uplink.vouches_by_answers(A, &stall, Time(200), later), "its client may have left");
    }

    #[test]
    fn in_one_cell_its_backends_are_compared_with_each_other() {
        let stall = Stall::default();
        let uplink = two_cells();
        uplink.set_cells(1, 2);
        uplink.connected(A, Time(150));
        uplink.asked(BESIDE_A, Time(160));
        assert!(!uplink.vouches_by_answers(A, &stall, Time(100), Time(200)), "all that are asked are late");
        uplink.answered(BESIDE_A, Time(160));
        assert!(uplink.vouches_by_answers(A, &stall, Time(100), Time(200)));
    }

    #[test]
    fn after_a_common_stall_there_is_time_to_work_off_what_has_gathered() {
        let stall = Stall::default();
        let uplink = two_cells();
        let at = |ms: u64| Time(1_000_000 + ms * 1_000);
        uplink.answered(B, at(0));
        uplink.asked(B, at(1));
        // Three seconds in which nobody answers.
        assert!((1..=300).all(|i| !uplink.vouches_by_answers(A, &stall, at(5), at(i * 10))));
        uplink.answered(B, at(3_010));
        assert!(!uplink.vouches_by_answers(A, &stall, at(5), at(3_020)), "the other one may still work off its own");
        uplink.answered(B, at(6_000));
        assert!(uplink.vouches_by_answers(A, &stall, at(5), at(6_010)), "but not for ever");
        // A moment without an answer is no stall.
        uplink.asked(B, at(8_999));
        assert!(!uplink.vouches_by_answers(A, &stall, at(9_000), at(9_010)));
        uplink.answered(B, at(9_020));
        assert!(uplink.vouches_by_answers(A, &stall, at(9_000), at(9_030)));
    }

    /// One pool waits for one thing that the other does not need.
    #[test]
    fn another_pool_is_no_witness_where_those_of_the_same_are_asked() {
        let (uplink, stall) = (Uplink::default(), Stall::default());
        uplink.set_cells(2, 4);
        let (a, b, of_another) = (1, 2, 3);
        [(a, 0, 0), (b, 0, 1), (of_another, 1, 1)]
            .into_iter()
            .for_each(|(backend, pool, cell)| uplink.stands_in(backend, pool, cell));
        uplink.connected(b, Time(150));
        uplink.answered(of_another, Time(150));
        assert!(uplink.vouches_by_answers(a, &stall, Time(100), Time(200)), "nobody else of its pool is asked");
        uplink.asked(b, Time(120));
        assert!(!uplink.vouches_by_answers(a, &stall, Time(100), Time(200)));
        uplink.answered(b, Time(120));
        assert!(uplink.vouches_by_answers(a, &stall, Time(100), Time(200)));
    }
}
