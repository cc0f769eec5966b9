//! The running sessions of one worker: what the worker must know to end one that cannot end itself.
//!
//! Once a second the worker asks TCP about sessions that wait to write, now and then about the others, and looks
//! after those whose backend is down. There is no `TCP_USER_TIMEOUT`, because Linux takes a closed window for death.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use slab::Slab;
use socket2::{SockRef, TcpKeepalive};

use crate::backend::Backend;
use crate::clock::Time;
use crate::config::OnDown;
use crate::health::{Depth, State};
use crate::pool::Policy;
use crate::sys;
use crate::table::{End, Table};

/// A session of a down backend is stuck when nothing of what it sent was acknowledged for this long. It is longer than
/// most interruptions that heal by themselves.
const STUCK: Duration = Duration::from_secs(3);
/// Looks in which every session is asked about once.
const ROUNDS: usize = 5;
/// Most sessions of down backends that are reset in a tenth of a second, over all workers: 500 a second.
pub const RESETS_PER_TICK: usize = 50;

/// Keepalive towards backends: a vanished peer is noticed after 15 seconds. It is set when a session is first
/// inspected, because a session that ends within its first second needs none and is spared four system calls.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(5)).with_interval(Duration::from_secs(5)).with_retries(2);

/// Bits of what a session waits to write to.
pub const WAITS_CLIENT: u8 = 1;
/// The same for the backend.
pub const WAITS_BACKEND: u8 = 2;

#[derive(Debug)]
struct Entry {
    backend: Arc<Backend>,
    policy: Arc<Policy>,
    client: RawFd,
    server: RawFd,
    waits: u8,
    /// Since when a look finds bytes unacknowledged, and no acknowledgement since: towards client and backend.
    unacked: [Option<Time>; 2],
    kept_alive: bool,
    doomed: bool,
    ended: Option<End>,
    waker: Option<Waker>,
}

thread_local! {
    static SESSIONS: RefCell<Slab<Entry>> = const { RefCell::new(Slab::new()) };
    static DOOMED: RefCell<VecDeque<usize>> = const { RefCell::new(VecDeque::new()) };
}

/// A session's place in its worker's list; dropping it takes it out. Stays on the worker's thread, as every
/// task of a single-threaded runtime does.
#[derive(Debug)]
pub struct Handle(usize);

/// Enters a session; both descriptors must stay open while the handle lives.
pub fn enter(backend: Arc<Backend>, policy: Arc<Policy>, client: RawFd, server: RawFd) -> Handle {
    let entry = Entry {
        backend,
        policy,
        client,
        server,
        waits: 0,
        unacked: [None; 2],
        kept_alive: false,
        doomed: false,
        ended: None,
        waker: None,
    };
    Handle(SESSIONS.with(|sessions| sessions.borrow_mut().insert(entry)))
}

impl Handle {
    /// Whom to wake when the session must end.
    pub fn wake_by(&self, waker: &Waker) {
        self.with(|entry| entry.waker = Some(waker.clone()));
    }

    /// Notes what the session waits to write to.
    pub fn set_waits(&self, waits: u8) {
        self.with(|entry| entry.waits = waits);
    }

    /// Why the session must end now, if it must.
    pub fn ended(&self) -> Option<End> {
        self.with(|entry| entry.ended).flatten()
    }

    fn with<T>(&self, f: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        SESSIONS.with(|sessions| sessions.borrow_mut().get_mut(self.0).map(f))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // At the end of the thread the list may be gone before the last task.
        let _ = SESSIONS.try_with(|sessions| sessions.borrow_mut().try_remove(self.0));
    }
}

/// Number of running sessions of this worker.
pub fn count() -> usize {
    SESSIONS.with(|sessions| sessions.borrow().len())
}

/// The look at all sessions, once a second.
///
/// A session that waits to write is asked about each time. The others may have bytes on the way too, in the
/// kernel's buffer; each is asked about once in `ROUNDS` looks.
pub fn inspect(table: &Table, now: Time) {
    let round = now.seconds() as usize % ROUNDS;
    let mut another_is_fit: HashMap<u64, bool> = HashMap::new();
    // Each look finds all of them anew.
    DOOMED.with(|doomed| doomed.borrow_mut().clear());
    SESSIONS.with(|sessions| {
        let mut sessions = sessions.borrow_mut();
        for (key, entry) in sessions.iter_mut().filter(|(_, entry)| entry.ended.is_none()) {
            if !entry.kept_alive {
                entry.kept_alive = true;
                if let Some(server) = borrow(entry.server) {
                    // A socket that refuses it is about to end anyway.
                    let _ = SockRef::from(&server).set_tcp_keepalive(&KEEPALIVE);
                }
            }
            let turn = key % ROUNDS == round;
            let down = entry.policy.on_down != OnDown::Keep && entry.backend.view().state == State::Down;
            let fds = [entry.client, entry.server];
            let mut silent = [Duration::ZERO; 2];
            for (side, wait) in [WAITS_CLIENT, WAITS_BACKEND].into_iter().enumerate() {
                let due = turn || entry.waits & wait != 0 || entry.unacked[side].is_some() || down && side == 1;
                if due {
                    silent[side] = silence(fds[side], &mut entry.unacked[side], now);
                }
            }
            entry.doomed = false;
            if silent[0] >= entry.policy.unacked {
                end(entry, End::ClientStuck);
            } else if silent[1] >= entry.policy.unacked {
                end(entry, End::BackendStuck);
            } else if down {
                let fit = another_is_fit.entry(entry.backend.id).or_insert_with(|| {
                    let pool = table.pools.iter().find(|pool| pool.name == entry.backend.shared.name);
                    pool.is_some_and(|pool| pool.has_other_fit(entry.backend.id))
                });
                if *fit && doomed(entry, silent[1], now) {
                    entry.doomed = true;
                    DOOMED.with(|doomed| doomed.borrow_mut().push_back(key));
                }
            }
        }
    });
}

/// Ends at most `most` of the sessions that [`inspect`] found, and returns how many.
pub fn reset_doomed(most: usize) -> usize {
    let mut done = 0;
    SESSIONS.with(|sessions| {
        let mut sessions = sessions.borrow_mut();
        DOOMED.with(|doomed| {
            let mut doomed = doomed.borrow_mut();
            while done < most {
                let Some(key) = doomed.pop_front() else { break };
                // The place may have been given to another session since, and the backend may be back.
                let Some(entry) = sessions.get_mut(key) else { continue };
                if entry.doomed && entry.ended.is_none() && entry.backend.view().state == State::Down {
                    end(entry, End::BackendDown);
                    done += 1;
                }
            }
        });
    });
    done
}

/// Whether any session waits for its reset.
pub fn any_doomed() -> bool {
    DOOMED.with(|doomed| !doomed.borrow().is_empty())
}

/// Whether the session of a down backend has to end. What probes alone said never resets a session that does
/// not show the failure itself; what a probe said about content never resets any.
fn doomed(entry: &Entry, silent: Duration, now: Time) -> bool {
    let health = entry.backend.health();
    let by_traffic = health.seen_by_traffic();
    if !by_traffic && health.blamed() == Depth::Answer {
        return false;
    }
    match entry.policy.on_down {
        OnDown::Reset if by_traffic => true,
        OnDown::Reset | OnDown::Stuck => silent >= STUCK,
        OnDown::Drain => now.since(health.since()) >= entry.policy.drain,
        OnDown::Keep => false,
    }
}

/// For how long looks have found bytes that the peer's kernel has not acknowledged, and no acknowledgement since.
///
/// The age of the last acknowledgement alone would not do: after a quiet hour the first byte sent finds it an hour
/// old.
fn silence(fd: RawFd, since: &mut Option<Time>, now: Time) -> Duration {
    let info = borrow(fd).and_then(|fd| sys::tcp_info(fd).ok()).filter(|info| info.unacked > 0);
    let Some(info) = info else {
        *since = None;
        return Duration::ZERO;
    };
    let first = *since.get_or_insert(now);
    if info.last_ack < now.since(first) {
        *since = Some(now);
        return Duration::ZERO;
    }
    now.since(first)
}

fn end(entry: &mut Entry, how: End) {
    entry.ended = Some(how);
    if let Some(waker) = entry.waker.take() {
        waker.wake();
    }
}

#[allow(unsafe_code)]
fn borrow<'a>(fd: RawFd) -> Option<BorrowedFd<'a>> {
    // SAFETY: whoever entered the session keeps both sockets open while its handle lives, the entry is removed
    // with the handle on this same thread, and the borrow ends before this thread does anything else.
    (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
}
