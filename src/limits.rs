//! Caps and budgets. Each belongs to the process, one listener, one pool or one backend; none is divided by
//! workers, and none is shared between pools.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout_at;
use xxhash_rust::xxh3::xxh3_64;

use crate::clock::{self, Time};
use crate::config::Rate;

/// Number of things in use at once. The bound is given with each request, because a reload may change it.
#[derive(Debug, Default)]
pub struct Gauge {
    used: AtomicU32,
    freed: Notify,
    waiting: AtomicU32,
    /// Who waits for one of several gauges.
    queue: OnceLock<Arc<Queue>>,
}

/// One thing in use; dropping it gives it back.
#[derive(Debug)]
pub struct Permit {
    gauge: Arc<Gauge>,
    /// What belongs to it.
    and: Option<Box<Permit>>,
}

impl Permit {
    /// Both at once.
    pub fn and(mut self, other: Option<Permit>) -> Permit {
        self.and = other.map(Box::new);
        self
    }
}

impl Gauge {
    /// Takes one if fewer than `limit` are in use.
    pub fn take(self: &Arc<Self>, limit: u32) -> Option<Permit> {
        // A refusal leaves the gauge alone: it must not look like a place that became free.
        let taken = self.used.fetch_update(Relaxed, Relaxed, |used| (used < limit).then_some(used + 1));
        taken.is_ok().then(|| Permit { gauge: self.clone(), and: None })
    }

    /// How many are in use.
    pub fn used(&self) -> u32 {
        self.used.load(Relaxed)
    }

    /// Waits until one may have become free.
    pub async fn freed(&self) {
        self.waiting.fetch_add(1, Relaxed);
        let _leave = Leave(&self.waiting);
        self.freed.notified().await;
    }

    fn give_back(&self) {
        self.used.fetch_sub(1, Relaxed);
        if self.waiting.load(Relaxed) > 0 {
            self.freed.notify_waiters();
        }
        if let Some(queue) = self.queue.get() {
            queue.freed();
        }
    }

    /// Tells a queue of what becomes free.
    pub fn tells(&self, queue: &Arc<Queue>) {
        // It has one already: the same.
        let _ = self.queue.set(queue.clone());
    }
}

struct Leave<'a>(&'a AtomicU32);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gauge.give_back();
    }
}

/// Counts per second over the last seconds, without a lock.
#[derive(Debug, Default)]
pub struct Window {
    /// Second in the upper half, count in the lower.
    slots: [AtomicU64; 16],
}

impl Window {
    /// Seconds that [`Window::sum`] looks back.
    pub const SECONDS: u64 = 10;

    /// Counts one at `now`.
    pub fn add(&self, now: Time) {
        let second = now.seconds() & 0xffff_ffff;
        let slot = &self.slots[(second % 16) as usize];
        let mut seen = slot.load(Relaxed);
        loop {
            let next = if seen >> 32 == second { seen + 1 } else { second << 32 | 1 };
            match slot.compare_exchange_weak(seen, next, Relaxed, Relaxed) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }

    /// Count of the last ten seconds, the present one included.
    pub fn sum(&self, now: Time) -> u64 {
        let second = now.seconds() & 0xffff_ffff;
        let slots = self.slots.iter().map(|slot| slot.load(Relaxed));
        slots
            .filter(|slot| (slot >> 32) + Self::SECONDS > second && slot >> 32 <= second)
            .map(|slot| slot & 0xffff_ffff)
            .sum()
    }
}

/// Tokens of one pool for races and retries: a tenth of the client attempts of the last ten seconds, and ten a
/// second besides (the scheme of Finagle's retry budget).
#[derive(Debug, Default)]
pub struct Budget {
    clients: Window,
    extras: Window,
    trials: Window,
    refused: AtomicU64,
}

impl Budget {
    /// Notes one client's first attempt.
    pub fn client(&self, now: Time) {
        self.clients.add(now);
    }

    /// Takes one token for an extra attempt, unless there is none.
    pub fn extra(&self, now: Time) -> bool {
        if self.extras.sum(now) < self.clients.sum(now) / 10 + 10 * Window::SECONDS {
            self.extras.add(now);
            return true;
        }
        self.refused.fetch_add(1, Relaxed);
        false
    }

    /// Takes one token for a trial of a doubtful backend: one in a hundred clients, and at least one a second.
    pub fn trial(&self, now: Time) -> bool {
        let allowed = self.trials.sum(now) < (self.clients.sum(now) / 100).max(Window::SECONDS);
        if allowed {
            self.trials.add(now);
        }
        allowed
    }

    /// How many extra attempts were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }
}

/// Clients of one pool that wait for a place, by priority. Whoever comes later does not overtake.
///
/// A queue of one priority that has stood for a while is no burst but too much: then nobody in it waits long, so that those who
/// are served are served in time (controlled delay, Nichols and Jacobson 2012; as a bound on queueing for requests, Maurer 2015).
#[derive(Debug, Default)]
pub struct Queue {
    lanes: [Lane; 3],
    refused: AtomicU64,
    /// When somebody came last, and how far apart they come, in microseconds.
    came: AtomicU64,
    apart: AtomicU64,
    /// Those who wait for some places only.
    choosy: AtomicU32,
}

#[derive(Debug, Default)]
struct Lane {
    waiting: AtomicU32,
    /// Those of them who wait for the pool's own bound, and not for a backend.
    at_bound: AtomicU32,
    freed: Notify,
    /// Since when somebody is waiting nearly always, and when it last had no place in time for somebody, in microseconds since
    /// the process began.
    standing: AtomicU64,
    refused: AtomicU64,
    /// The first of those who wait asks for all, and the others come after it in their order.
    first: Turn,
}

#[derive(Debug)]
struct Turn(Semaphore);

impl Default for Turn {
    fn default() -> Self {
        Turn(Semaphore::new(1))
    }
}

/// A queue that has stood for this long is more than a burst, and then nobody waits longer than this.
const STANDING: Duration = Duration::from_millis(100);
const STANDING_WAIT: Duration = Duration::from_millis(3);
/// But at least until this many halves of another one have come, so that somebody waits when a place becomes free; and at most this.
const STANDING_HALVES: u32 = 3;
const STANDING_MOST: Duration = Duration::from_millis(250);
/// A queue that was empty has stood all the time, when it has refused somebody no longer ago than this.
const STANDING_GAP: Duration = Duration::from_millis(100);
/// Weight of one who comes in how far apart they come.
const APART: u64 = 8;
/// Part of the queue's length that each priority may use, in tenths.
const LANE_SHARE: [u32; 3] = [10, 8, 5];
/// Places also come with time (a rate, a limit that grows): those who wait ask again after this.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// A place in a queue.
#[derive(Debug)]
pub struct Waiting<'a> {
    queue: &'a Queue,
    lane: usize,
    since: Time,
    until: Time,
}

impl Queue {
    /// Whether somebody of this priority or a higher one waits already. 0 is the highest.
    pub fn waits_before(&self, priority: usize) -> bool {
        self.lanes[..=priority.min(2)].iter().any(|lane| lane.waiting.load(Relaxed) > 0)
    }

    /// A place within the bound of all, at once or in its turn. Whoever waits for a backend only holds up nobody who finds room.
    pub async fn take_within_bound<T>(
        &self,
        priority: usize,
        length: u32,
        timeout: Duration,
        gone: impl Fn() -> bool,
        mut ask: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let lane = priority.min(2);
        if self.lanes[..=lane].iter().all(|lane| lane.at_bound.load(Relaxed) == 0)
            && let Some(taken) = ask()
        {
            return Some(taken);
        }
        let at_bound = &self.lanes[lane].at_bound;
        at_bound.fetch_add(1, Relaxed);
        let _leave = Leave(at_bound);
        // It waits for little more than itself, and every connection would keep the room.
        Box::pin(self.take(priority, length, timeout, gone, ask)).await
    }

    /// How many wait.
    pub fn length(&self) -> u32 {
        self.lanes.iter().map(|lane| lane.waiting.load(Relaxed)).sum::<u32>() + self.choosy.load(Relaxed)
    }

    /// How many it had no place for, or not in time.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// A place at the end of the lane of `priority`, if there is one within `length`, for at most `timeout`.
    pub fn enter(&self, priority: usize, length: u32, timeout: Duration, now: Time) -> Option<Waiting<'_>> {
        let lane = priority.min(2);
        self.comes(now);
        let before = self.length();
        if before >= (length * LANE_SHARE[lane]).div_ceil(10) {
            self.refused.fetch_add(1, Relaxed);
            return None;
        }
        let of_lane = &self.lanes[lane];
        if of_lane.waiting.fetch_add(1, Relaxed) == 0 && now.since(Time(of_lane.refused.load(Relaxed))) > STANDING_GAP {
            of_lane.standing.store(now.0, Relaxed);
        }
        Some(Waiting { queue: self, lane, since: now, until: now + timeout })
    }

    fn comes(&self, now: Time) {
        let since = now.since(Time(self.came.swap(now.0, Relaxed)));
        // What was long ago says nothing of now.
        let since = since.min(STANDING_MOST).as_micros() as u64;
        let apart = self.apart.load(Relaxed);
        self.apart.store(apart - apart / APART + since / APART, Relaxed);
    }

    /// [`Queue::take`] for one who cannot take every place: nobody waits for him, and he for nobody.
    pub async fn take_some<T>(
        &self,
        length: u32,
        timeout: Duration,
        gone: impl Fn() -> bool,
        mut ask: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if self.length() >= length {
            self.refused.fetch_add(1, Relaxed);
            return None;
        }
        self.choosy.fetch_add(1, Relaxed);
        let _leave = Leave(&self.choosy);
        let until = clock::now() + timeout;
        while clock::now() < until {
            if gone() {
                return None;
            }
            if let Some(taken) = ask() {
                return Some(taken);
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        self.refused.fetch_add(1, Relaxed);
        None
    }

    /// A place may have become free: the first of the highest priority is told.
    pub fn freed(&self) {
        if let Some(lane) = self.lanes.iter().find(|lane| lane.waiting.load(Relaxed) > 0) {
            lane.freed.notify_one();
        }
    }
}

impl Queue {
    /// What `ask` gives, now or when it is this client's turn; `None`: no place in the queue, not in time, or the client has
    /// gone. Whoever finds others waiting waits as well.
    pub async fn take<T>(
        &self,
        priority: usize,
        length: u32,
        timeout: Duration,
        gone: impl Fn() -> bool,
        mut ask: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let waiting = self.enter(priority, length, timeout, clock::now())?;
        let mut turn = std::pin::pin!(self.lanes[waiting.lane].first.0.acquire());
        let _first = loop {
            let now = clock::now();
            let look = waiting.until(now).min(now + ASK_AGAIN);
            match timeout_at(look.instant(), turn.as_mut()).await {
                Ok(first) => break first,
                Err(_) if waiting.is_over() || gone() => return None,
                Err(_) => {}
            }
        };
        loop {
            // Work for a client that has left is not begun.
            if gone() {
                return None;
            }
            let higher = waiting.lane > 0 && self.waits_before(waiting.lane - 1);
            if !higher && let Some(taken) = ask() {
                return Some(taken);
            }
            if !waiting.turn().await {
                return None;
            }
        }
    }
}

impl Waiting<'_> {
    /// Waits until it is worth asking for a place again; `false` when the time is up.
    pub async fn turn(&self) -> bool {
        let now = clock::now();
        let until = self.until(now).min(now + ASK_AGAIN);
        // The result does not matter: whether there is a place is seen by asking.
        let _ = timeout_at(until.instant(), self.queue.lanes[self.lane].freed.notified()).await;
        !self.is_over()
    }

    /// Whether its time is up, which is counted.
    fn is_over(&self) -> bool {
        let now = clock::now();
        let over = self.until(now) <= now;
        if over {
            self.queue.refused.fetch_add(1, Relaxed);
            self.queue.lanes[self.lane].refused.store(now.0, Relaxed);
        }
        over
    }

    fn until(&self, now: Time) -> Time {
        let stands = now.since(Time(self.queue.lanes[self.lane].standing.load(Relaxed))) >= STANDING;
        let apart = Duration::from_micros(self.queue.apart.load(Relaxed));
        let wait = STANDING_WAIT.max((apart * STANDING_HALVES / 2).min(STANDING_MOST));
        if stands { self.until.min(self.since + wait) } else { self.until }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let lane = &self.queue.lanes[self.lane];
        lane.waiting.fetch_sub(1, Relaxed);
        if self.queue.length() > 0 {
            // It may have been told of a place that it did not take.
            self.queue.freed();
        }
    }
}

/// A rate, kept by the generic cell rate algorithm (ITU-T I.371): one number, and no clock of its own.
#[derive(Debug, Default)]
pub struct Bucket {
    /// When the next is due, in nanoseconds since the process began.
    due: AtomicU64,
}

impl Bucket {
    /// Takes one if the rate allows it, with this much of it saved up at most.
    pub fn take(&self, rate: Rate, saved: Duration, now: Time) -> bool {
        let apart = 60_000_000_000 / u64::from(rate.per_minute);
        let (now, saved) = (now.0 * 1_000, saved.as_nanos() as u64);
        self.due.fetch_update(Relaxed, Relaxed, |due| (due <= now + saved).then_some(due.max(now) + apart)).is_ok()
    }

    /// Gives back one that was taken and not used.
    pub fn give_back(&self, rate: Rate) {
        self.due.fetch_sub(60_000_000_000 / u64::from(rate.per_minute), Relaxed);
    }
}

/// What clients of one listener use, by network. Memory is bounded: networks without a connection are forgotten first, and
/// when there are too many with one, those that come later are not counted.
#[derive(Debug)]
pub struct Clients {
    shards: [Mutex<Shard>; 16],
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Shard {
    clients: HashMap<u64, Client>,
    /// When it was last looked through, in seconds since the process began.
    swept: u64,
}

#[derive(Debug, Default)]
struct Client {
    connections: u32,
    bucket: Bucket,
    seen: u64,
}

/// Networks in one of the sixteen parts.
const CLIENTS: usize = 4_096;
/// Seconds after which a network without a connection is forgotten.
const CLIENT_KEPT: u64 = 10;

impl Default for Clients {
    fn default() -> Self {
        Clients { shards: std::array::from_fn(|_| Mutex::default()), refused: AtomicU64::new(0) }
    }
}

/// One connection of a client; dropping it gives it back.
#[derive(Debug)]
pub struct ClientPermit {
    clients: Arc<Clients>,
    network: u64,
}

impl Clients {
    /// Counts a connection from `network`, unless it has `most` already. `Some(None)`: it is not counted.
    pub fn connect(self: &Arc<Self>, network: u64, most: u32, now: Time) -> Option<Option<ClientPermit>> {
        let counted = self.with(network, now, |client| {
            let room = client.connections < most;
            client.connections += u32::from(room);
            room
        });
        match counted {
            Some(true) => Some(Some(ClientPermit { clients: self.clone(), network })),
            Some(false) => {
                self.refused.fetch_add(1, Relaxed);
                None
            }
            None => Some(None),
        }
    }

    /// Whether `rate` allows one more from `network`, with a second of it saved up at most.
    pub fn allows(&self, network: u64, rate: Rate, now: Time) -> bool {
        let allowed = self.with(network, now, |client| client.bucket.take(rate, Duration::from_secs(1), now));
        if allowed == Some(false) {
            self.refused.fetch_add(1, Relaxed);
        }
        allowed.unwrap_or(true)
    }

    /// How many were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    fn with<T>(&self, network: u64, now: Time, act: impl FnOnce(&mut Client) -> T) -> Option<T> {
        let shard = &self.shards[(network % 16) as usize];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if shard.clients.len() >= CLIENTS && !shard.clients.contains_key(&network) {
            // Once a second is enough: a crowd of new networks must not make each of them dear.
            if shard.swept == now.seconds() {
                return None;
            }
            shard.swept = now.seconds();
            shard.clients.retain(|_, client| client.connections > 0 || client.seen + CLIENT_KEPT > now.seconds());
            if shard.clients.len() >= CLIENTS {
                shard.clients.retain(|_, client| client.connections > 0);
            }
            if shard.clients.len() >= CLIENTS {
                return None;
            }
        }
        let client = shard.clients.entry(network).or_default();
        client.seen = now.seconds();
        Some(act(client))
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let shard = &self.clients.shards[(self.network % 16) as usize];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = shard.clients.get_mut(&self.network) {
            client.connections = client.connections.saturating_sub(1);
        }
    }
}

/// The network of a client, this many bits of its address, as a hash.
pub fn network(client: IpAddr, (ipv4, ipv6): (u8, u8)) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(v4) => {
            let bits = v4.to_bits() & u32::MAX.checked_shl(32 - u32::from(ipv4)).unwrap_or(0);
            xxh3_64(&bits.to_le_bytes())
        }
        IpAddr::V6(v6) => {
            let bits = v6.to_bits() & u128::MAX.checked_shl(128 - u32::from(ipv6)).unwrap_or(0);
            xxh3_64(&bits.to_le_bytes())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[test]
    fn a_gauge_never_exceeds_its_limit_and_returns_to_zero() {
        let gauge = Arc::new(Gauge::default());
        let held: Vec<_> = (0..5).filter_map(|_| gauge.take(3)).collect();
        assert_eq!((held.len(), gauge.used()), (3, 3));
        drop(held);
        assert_eq!(gauge.used(), 0);
    }

    #[test]
    fn the_budget_is_a_tenth_of_ten_seconds_and_a_hundred_and_renews_itself() {
        let budget = Budget::default();
        let start = Time(100_000_000);
        for i in 0..4_000u64 {
            budget.client(start + Duration::from_millis(i * 10 / 4));
        }
        let now = start + Duration::from_millis(9_999);
        assert_eq!((0..1_000).filter(|_| budget.extra(now)).count(), 500);
        assert_eq!(budget.refused(), 500);
        let later = now + Duration::from_secs(11);
        assert_eq!((0..1_000).filter(|_| budget.extra(later)).count(), 100);
    }

    #[test]
    fn a_rate_is_kept_and_little_of_it_saved_up() {
        let (bucket, rate) = (Bucket::default(), Rate { per_minute: 60_000 });
        let mut now = Time(1_000_000);
        let mut taken = 0;
        for _ in 0..10_000 {
            now = now + Duration::from_micros(500);
            taken += u32::from(bucket.take(rate, Duration::from_millis(50), now));
        }
        assert!((5_000..=5_051).contains(&taken), "{taken} in five seconds at 1,000 a second");
        now = now + Duration::from_secs(60);
        let at_once = (0..1_000).filter(|_| bucket.take(rate, Duration::from_millis(50), now)).count();
        assert!((50..=52).contains(&at_once), "{at_once}");
    }

    #[test]
    fn clients_are_counted_by_network_and_memory_is_bounded() {
        let clients = Arc::new(Clients::default());
        let now = Time(1_000_000);
        let of = |text: &str| network(text.parse().expect("an address"), (24, 64));
        assert_eq!(of("192.0.2.1"), of("192.0.2.200"));
        assert_ne!(of("192.0.2.1"), of("192.0.3.1"));
        assert_ne!(of("0.0.0.0"), of("::"));
        let held: Vec<_> = (0..3).map_while(|_| clients.connect(of("192.0.2.1"), 2, now)).collect();
        assert_eq!((held.len(), clients.refused()), (2, 1));
        drop(held);
        assert!(clients.connect(of("192.0.2.1"), 2, now).is_some());
        let many: Vec<_> = (0..200_000u32)
            .map(|i| clients.connect(xxh3_64(&i.to_le_bytes()), 1, now).expect("each has one"))
            .collect();
        let known: usize = clients.shards.iter().map(|shard| shard.lock().expect("no panic").clients.len()).sum();
        assert!(known <= 16 * CLIENTS, "{known}");
        drop(many);
        let later = now + Duration::from_secs(1);
        assert!(clients.connect(7, 1, later).is_some_and(|permit| permit.is_some()), "and there is room again");
    }

    #[tokio::test(start_paused = true)]
    async fn the_higher_priority_goes_first_and_a_standing_queue_is_short() {
        let queue = Queue::default();
        let now = crate::clock::now();
        assert!(queue.enter(2, 0, Duration::from_secs(1), now).is_none());
        let low = queue.enter(2, 10, Duration::from_secs(1), now).expect("room");
        let high = queue.enter(0, 10, Duration::from_secs(1), now).expect("room");
        assert!(queue.waits_before(2) && queue.waits_before(0));
        queue.freed();
        let start = Instant::now();
        assert!(high.turn().await);
        assert_eq!(start.elapsed(), Duration::ZERO, "the high one is told at once");
        drop(high);
        assert!(low.turn().await, "and what it may not have taken is the next one's");
        let later = now + STANDING;
        // One comes each millisecond.
        for i in 1..100 {
            drop(queue.enter(2, 10, Duration::from_secs(1), now + Duration::from_millis(i)));
        }
        let late = queue.enter(2, 10, Duration::from_secs(1), later).expect("room");
        assert_eq!(late.until(later), later + STANDING_WAIT);
        let other = queue.enter(1, 10, Duration::from_secs(1), later).expect("room");
        assert_eq!(other.until(later), later + Duration::from_secs(1), "that lane has not stood");
        drop(other);
        assert!(
            (0..10)
                .filter(|_| std::mem::ManuallyDrop::new(queue.enter(2, 10, Duration::ZERO, later)).is_some())
                .count()
                <= 5
        );
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_waits_until_others_have_come() {
        let queue = Queue::default();
        let mut start = crate::clock::now();
        // One comes each 40 ms.
        for _ in 0..50 {
            drop(queue.enter(2, 10, Duration::from_secs(1), start));
            start = start + Duration::from_millis(40);
        }
        let low = queue.enter(2, 10, Duration::from_secs(1), start).expect("room");
        let later = start + STANDING;
        let late = queue.enter(2, 10, Duration::from_secs(1), later).expect("room");
        let wait = late.until(later).since(later);
        assert!((60..=75).contains(&wait.as_millis()), "{wait:?}");
        drop((low, late));
        // Empty, and nobody was refused lately: it begins anew.
        let anew = queue.enter(2, 10, Duration::from_secs(1), later).expect("room");
        assert_eq!(anew.until(later), later + Duration::from_secs(1));
    }
}
