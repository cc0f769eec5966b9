//! Sessions whose backend owes them a first byte, and what its silence means.
//!
//! A backend that accepts and then says nothing passes every handshake. It is called silent when several sessions wait for
//! their first byte and nobody has got one for longer than it takes ([`crate::silence`]); one slow session is no silence. Whether
//! a first byte is owed at all is learned for each pool ([`crate::speaks_first`]).

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::backend::{Backend, TOO_LONG};
use crate::clock::{self, Time};
use crate::config::FirstByte;
use crate::health::{Depth, Evidence, Seen, Source};
use crate::pool::Policy;
use crate::session;
use crate::speaks_first::Owes;

/// Time between two looks at backends that owe something.
const LOOK: Duration = Duration::from_millis(10);
/// A look this much later than it was due ran late by our own fault and proves no silence.
const LATE: Duration = Duration::from_millis(10);
/// A backend is silent no earlier than this, nor than this many learned 99th percentiles of its first bytes.
const FLOOR: Duration = Duration::from_millis(50);
const FACTOR: u32 = 5;
/// For whoever tries a doubted backend.
const TRIED: Duration = Duration::from_secs(1);

struct Watched {
    backend: Arc<Backend>,
    policy: Arc<Policy>,
    waiting: u32,
    /// The first that tries it since it is in doubt, while he waits. Those that were there before tell nothing new.
    tried: Option<Time>,
}

/// A session that can be carried to another backend.
struct Movable {
    session: usize,
    since: Time,
}

#[derive(Default)]
struct Here {
    backends: HashMap<u64, Watched>,
    movable: HashMap<u64, Vec<Movable>>,
}

thread_local! {
    static HERE: RefCell<Here> = RefCell::default();
    static BEGUN: Arc<Notify> = Arc::new(Notify::new());
}

/// One session's claim; dropping it withdraws the claim. Stays on its worker's thread.
#[derive(Debug)]
pub struct Owed {
    backend: u64,
    session: usize,
    movable: bool,
    since: Time,
}

impl Owed {
    /// From now on the backend owes the session its first byte; `movable` says whether the session can be carried elsewhere.
    pub fn begin(
        backend: &Arc<Backend>,
        policy: &Arc<Policy>,
        session: &session::Handle,
        movable: bool,
        prefix: u32,
        now: Time,
    ) -> Owed {
        let session = session.number();
        HERE.with_borrow_mut(|here| {
            if here.backends.is_empty() {
                BEGUN.with(|begun| begun.notify_one());
            }
            let new = || Watched { backend: backend.clone(), policy: policy.clone(), waiting: 0, tried: None };
            let watched = here.backends.entry(backend.id).or_insert_with(new);
            // A reload may have changed it while others waited.
            if !Arc::ptr_eq(&watched.policy, policy) {
                watched.policy = policy.clone();
            }
            watched.waiting += 1;
            let doubted = backend.doubted_since();
            if doubted.is_some_and(|since| now >= since && watched.tried.is_none_or(|tried| tried < since)) {
                watched.tried = Some(now);
            }
            if movable {
                here.movable.entry(backend.id).or_default().push(Movable { session, since: now });
            }
        });
        backend.asked(prefix, now);
        Owed { backend: backend.id, session, movable, since: now }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        // At the end of the thread there is nobody left to owe anything to.
        let _ = HERE.try_with(|here| {
            let mut here = here.borrow_mut();
            let Some(watched) = here.backends.get_mut(&self.backend) else { return };
            watched.waiting -= 1;
            watched.tried = watched.tried.filter(|tried| *tried != self.since);
            watched.backend.waits_no_more(self.since);
            if watched.waiting == 0 {
                here.backends.remove(&self.backend);
            }
            if self.movable
                && let Some(list) = here.movable.get_mut(&self.backend)
            {
                list.retain(|one| one.session != self.session);
                if list.is_empty() {
                    here.movable.remove(&self.backend);
                }
            }
        });
    }
}

/// After how long without a first byte to anybody a backend is silent; `None`: its silence says nothing.
fn silent_after(backend: &Backend, policy: &Policy) -> Option<Duration> {
    let longest = policy.first_byte_time;
    let one = match (backend.first_byte.learned(), policy.first_byte) {
        (_, FirstByte::Ignore) => None,
        (Some((_, p99)), FirstByte::Learn) if p99 >= TOO_LONG => None,
        (Some((_, p99)), _) => Some((p99 * FACTOR).max(FLOOR).max(backend.slow_for()).min(longest)),
        (None, FirstByte::Expect) => Some(backend.stranger_silent_after().min(longest)),
        // It has answered nobody yet, and the others of its pool have shown that they do.
        (None, FirstByte::Learn) if backend.shared.speaks_first.owes(FirstByte::Learn) != Owes::Nothing => {
            Some(backend.stranger_silent_after().min(longest))
        }
        (None, FirstByte::Learn) => None,
    };
    let many = backend.many_silent_after().filter(|_| policy.first_byte != FirstByte::Ignore);
    one.into_iter().chain(many).min()
}

/// Looks at what is owed, for as long as the worker lives.
pub async fn watch() {
    let begun = BEGUN.with(Arc::clone);
    loop {
        begun.notified().await;
        loop {
            let due = Instant::now() + LOOK;
            sleep_until(due).await;
            if HERE.with_borrow(|here| here.backends.is_empty()) {
                break;
            }
            if due.elapsed() <= LATE {
                look(clock::now());
            }
        }
    }
}

fn look(now: Time) {
    HERE.with_borrow_mut(|here| {
        for (id, watched) in &here.backends {
            let (backend, policy) = (&watched.backend, &watched.policy);
            let Some(limit) = silent_after(backend, policy) else { continue };
            let found = backend.silence.mute(limit, now);
            let doubted = backend.doubted_since();
            let quiet = doubted.is_some() && backend.silence.quiet(limit, now);
            // Whoever tries a doubted backend has his answer. One that has become slow may give it late.
            let unanswered = |tried: Time| now.since(tried) >= limit.max(TRIED) && backend.silence.heard_at() < tried;
            let tried =
                watched.tried.filter(|tried| doubted.is_some_and(|since| *tried >= since) && unanswered(*tried));
            if let Some(tried) = tried {
                accuse(backend, policy, tried, now);
            } else if let Some(found) = found {
                // One client prefix makes no transition where there are others.
                if found.only.is_none_or(|prefix| !backend.others_than(prefix, now)) {
                    accuse(backend, policy, found.since, now);
                }
            }
            if found.is_none() && !quiet && !backend.silence.stays_mute(limit, now) && !backend.vanished() {
                continue;
            }
            for one in here.movable.get_mut(id).into_iter().flatten() {
                if now.since(one.since) >= limit && backend.shared.budget.extra(now) {
                    session::backend_is_silent(one.session);
                    backend.moved_silent(now);
                    // Once is enough: the session withdraws its claim as soon as it runs.
                    one.since = Time(u64::MAX);
                }
            }
        }
    });
}

fn accuse(backend: &Backend, policy: &Policy, began: Time, now: Time) {
    let evidence = Evidence { source: Source::Traffic, depth: Depth::FirstByte, seen: Seen::Mute, began };
    backend.observe(&policy.health, &evidence, now);
}
