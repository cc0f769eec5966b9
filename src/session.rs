//! The running sessions of one worker: what the worker must know to end one that cannot end itself.
//!
//! Once a second the worker asks TCP about sessions that wait to write, now and then about the others, and looks
//! after those whose backend is down. There is no `TCP_USER_TIMEOUT`, because Linux takes a closed window for death.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use slab::Slab;
use socket2::{SockRef, TcpKeepalive};

use crate::backend::Backend;
use crate::clock::Time;
use crate::config::OnDown;
use crate::health::{Depth, State};
use crate::pool::Policy;
use crate::stuck::{ROUNDS, Unacked};
use crate::sys;
use crate::table::{End, Table};

/// A session of a down backend is stuck when nothing of what it sent was acknowledged for this long. It is longer than
/// most interruptions that heal by themselves.
const STUCK: Duration = Duration::from_secs(3);
/// Sessions of this age stay where they are, unless they are asked to go.
const LONG: Duration = Duration::from_secs(10);
/// Time between two looks at what is to be moved back.
const BEAT: Duration = Duration::from_secs(1);
/// Sessions that are looked at for that; one look must not hold up the worker.
const LOOKED_AT: usize = 4_096;
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
    id: u64,
    listener: Arc<str>,
    peer: SocketAddr,
    began: Time,
    backend: Arc<Backend>,
    policy: Arc<Policy>,
    client: RawFd,
    server: RawFd,
    waits: u8,
    /// Since when a look finds bytes unacknowledged, and no acknowledgement since: towards client and backend.
    unacked: [Unacked; 2],
    kept_alive: bool,
    doomed: bool,
    kicked: bool,
    ended: Option<End>,
    waker: Option<Waker>,
}

thread_local! {
    static SESSIONS: RefCell<Slab<Entry>> = const { RefCell::new(Slab::new()) };
    static DOOMED: RefCell<VecDeque<usize>> = const { RefCell::new(VecDeque::new()) };
    static NEXT_ID: Cell<u64> = const { Cell::new(1) };
}

/// A session's place in its worker's list; dropping it takes it out. Stays on the worker's thread, as every
/// task of a single-threaded runtime does.
#[derive(Debug)]
pub struct Handle(usize);

/// Enters a session; both descriptors must stay open while the handle lives.
pub fn enter(
    listener: Arc<str>,
    peer: SocketAddr,
    backend: Arc<Backend>,
    policy: Arc<Policy>,
    client: RawFd,
    server: RawFd,
    began: Time,
) -> Handle {
    let entry = Entry {
        id: NEXT_ID.with(|next| next.replace(next.get() + 1)),
        listener,
        peer,
        began,
        backend,
        policy,
        client,
        server,
        waits: 0,
        unacked: [Unacked::default(); 2],
        kept_alive: false,
        doomed: false,
        kicked: false,
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

    /// Its number among this worker's sessions, for as long as it lives.
    pub fn number(&self) -> usize {
        self.0
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
                let due = turn || entry.waits & wait != 0 || entry.unacked[side].waits() || down && side == 1;
                if due {
                    let info = borrow(fds[side]).and_then(|fd| sys::tcp_info(fd).ok());
                    silent[side] = entry.unacked[side].silence(info, now);
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
                entry.doomed = *fit && doomed(entry, silent[1], now);
            }
            if entry.ended.is_none() && (entry.doomed || entry.kicked) {
                DOOMED.with(|doomed| doomed.borrow_mut().push_back(key));
            }
        }
    });
}

/// Ends at most `most` of the sessions that [`inspect`] found or [`kick`] marked, and returns how many.
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
                if entry.ended.is_some() {
                    continue;
                }
                if entry.kicked {
                    end(entry, End::Kicked);
                    done += 1;
                } else if entry.doomed && entry.backend.view().state == State::Down {
                    end(entry, End::BackendDown);
                    done += 1;
                }
            }
        });
    });
    done
}

/// Ends sessions of cells that have more than their share since another one came back, at the pool's pace, the newest first:
/// older ones may always have been there. Younger ones than ten seconds go by themselves. Each worker looks at its own, which are a
/// sample of all.
pub fn rebalance(table: &Table, now: Time) {
    for pool in &table.pools {
        let Some(rate) = pool.policy.rebalance else { continue };
        let cells: HashMap<u64, usize> = pool.members.iter().map(|member| (member.backend.id, member.cell)).collect();
        SESSIONS.with(|sessions| {
            let mut sessions = sessions.borrow_mut();
            let mut used = vec![0.0; pool.cells.len()];
            let mut long = Vec::new();
            for (key, entry) in sessions.iter().filter(|(_, entry)| entry.ended.is_none()) {
                let Some(&cell) = cells.get(&entry.backend.id) else { continue };
                used[cell] += 1.0;
                if now.since(entry.began) >= LONG {
                    long.push((entry.id, key, cell));
                }
            }
            let mut spare = pool.spare(&used, now);
            if spare.iter().all(|spare| *spare < 1.0) {
                return;
            }
            long.retain(|(_, _, cell)| spare[*cell] >= 1.0);
            long.sort_unstable_by(|a, b| b.cmp(a));
            long.truncate(LOOKED_AT);
            for (_, key, cell) in long {
                if spare[cell] < 1.0 || pool.belongs(sessions[key].peer.ip(), cell, now) != Some(false) {
                    continue;
                }
                if !pool.shared.rebalancing.take(rate, BEAT, now) {
                    break;
                }
                spare[cell] -= 1.0;
                end(&mut sessions[key], End::Rebalanced);
            }
        });
    }
}

/// Which sessions an operator means; every condition that is there must hold.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// Of this pool.
    pub pool: Option<String>,
    /// At the backend of this name or address.
    pub backend: Option<String>,
    /// Of this client.
    pub client: Option<IpAddr>,
    /// By their identities, `WORKER-NUMBER`.
    pub ids: Vec<String>,
}

impl Filter {
    /// Whether it names anything at all.
    pub fn names_something(&self) -> bool {
        self.pool.is_some() || self.backend.is_some() || self.client.is_some() || !self.ids.is_empty()
    }

    /// The numbers of the sessions of one worker that are named; `None`: any.
    fn numbers(&self, worker: usize) -> Option<HashSet<u64>> {
        let number = |id: &String| {
            let (of, number) = id.split_once('-')?;
            (of.parse() == Ok(worker)).then(|| number.parse().ok()).flatten()
        };
        (!self.ids.is_empty()).then(|| self.ids.iter().filter_map(number).collect())
    }

    fn covers(&self, entry: &Entry, numbers: Option<&HashSet<u64>>) -> bool {
        self.pool.as_ref().is_none_or(|pool| *entry.backend.shared.name == **pool)
            && self.backend.as_ref().is_none_or(|backend| entry.backend.is_called(backend))
            && numbers.is_none_or(|numbers| numbers.contains(&entry.id))
            && self.client.is_none_or(|client| entry.peer.ip().to_canonical() == client.to_canonical())
    }
}

/// One session, as an operator sees it.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `WORKER-NUMBER`, unique in the process.
    pub id: String,
    /// The listener that accepted it.
    pub listener: String,
    /// The client.
    pub client: SocketAddr,
    /// Its pool.
    pub pool: String,
    /// Its backend.
    pub backend: String,
    /// Since its acceptance.
    pub age_ms: u64,
    /// Bytes that the client's kernel has acknowledged.
    pub bytes_out: u64,
    /// Bytes received from the client.
    pub bytes_in: u64,
    /// Since the last byte from the client.
    pub client_silent_ms: u64,
    /// Since the last byte from the backend.
    pub backend_silent_ms: u64,
    /// Whether the backend is down.
    pub backend_down: bool,
}

/// The sessions of this worker that `filter` covers: at most `most` of them, oldest first, and the number of all.
pub fn list(filter: &Filter, worker: usize, most: usize, now: Time) -> (Vec<Row>, usize) {
    SESSIONS.with(|sessions| {
        let sessions = sessions.borrow();
        let numbers = filter.numbers(worker);
        let covered = |entry: &&Entry| filter.covers(entry, numbers.as_ref());
        let mut found: Vec<&Entry> = sessions.iter().map(|(_, entry)| entry).filter(covered).collect();
        let all = found.len();
        if all > most {
            found.select_nth_unstable_by_key(most, |entry| entry.id);
            found.truncate(most);
        }
        found.sort_unstable_by_key(|entry| entry.id);
        (found.into_iter().map(|entry| row(entry, worker, now)).collect(), all)
    })
}

fn row(entry: &Entry, worker: usize, now: Time) -> Row {
    let traffic = |fd| borrow(fd).and_then(|fd| sys::tcp_traffic(fd).ok()).unwrap_or_default();
    let (client, server) = (traffic(entry.client), traffic(entry.server));
    Row {
        id: format!("{worker}-{}", entry.id),
        listener: entry.listener.to_string(),
        client: entry.peer,
        pool: entry.backend.shared.name.to_string(),
        backend: entry.backend.name.to_string(),
        age_ms: now.since(entry.began).as_millis() as u64,
        bytes_out: client.acknowledged,
        bytes_in: client.received,
        client_silent_ms: client.silent.as_millis() as u64,
        backend_silent_ms: server.silent.as_millis() as u64,
        backend_down: entry.backend.view().state == State::Down,
    }
}

/// Marks the sessions of this worker that `filter` covers for their end, which comes at a bounded pace, and returns
/// how many they are.
pub fn kick(filter: &Filter, worker: usize) -> usize {
    SESSIONS.with(|sessions| {
        let mut sessions = sessions.borrow_mut();
        let numbers = filter.numbers(worker);
        let mut marked = 0;
        for (key, entry) in sessions.iter_mut() {
            if entry.ended.is_none() && filter.covers(entry, numbers.as_ref()) {
                marked += 1;
                // Asked twice, it still waits once.
                if !std::mem::replace(&mut entry.kicked, true) {
                    DOOMED.with(|doomed| doomed.borrow_mut().push_back(key));
                }
            }
        }
        marked
    })
}

/// Ends all that are left, because the program stops.
pub fn end_all() {
    SESSIONS.with(|sessions| {
        for (_, entry) in sessions.borrow_mut().iter_mut().filter(|(_, entry)| entry.ended.is_none()) {
            end(entry, End::Stopped);
        }
    });
}

/// Ends what a session has with its backend, which says nothing.
pub fn backend_is_silent(number: usize) {
    SESSIONS.with(|sessions| {
        if let Some(entry) = sessions.borrow_mut().get_mut(number).filter(|entry| entry.ended.is_none()) {
            end(entry, End::BackendSilent);
        }
    });
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
