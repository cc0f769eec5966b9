//! An accepted connection as the engine's IO: judged, bounded in time, buffered on its way out.
//!
//! Towards the engine it gives the bytes of one request and no more: what comes behind a whole request waits in `ahead`
//! until the next may begin. A request that the framer refuses never reaches the engine; it is answered here, the
//! connection is closed so that the answer arrives, and the engine sees an end.

use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use pingora_http::ResponseHeader;
use slab::Slab;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::framer::{Framer, Refusal};
use super::{answer, upstream};
use crate::clock::{self, Time};
use crate::config::http::Page;
use crate::stuck::{ROUNDS, Unacked};
use crate::{sys, tcp, tls};

/// Bytes on their way to the client are gathered up to this many, until the engine says that they should go.
const GATHER: usize = 16 * 1024;
/// A large answer goes out in this many bytes at a time.
const BURST: usize = 128 * 1024;
/// Most bytes of next requests that wait while one is served.
const AHEAD: usize = 64 * 1024;
/// Looks at whether anything moves during a request, within the time in which something has to.
const TICKS: u32 = 4;
/// Connections that are looked at for one that can make room, and how long each may take for its request before it does.
const LOOKED_AT: usize = 64;
const YOUNG: Duration = Duration::from_millis(500);
/// A client that has gone is seen by the stream itself, unless nothing has moved for this long.
const LEFT_FOR: Duration = Duration::from_secs(2);
/// How long the rest of a request may take for its next bytes, once its answer has been given.
const REST: Duration = Duration::from_secs(5);
/// How long, and for how many bytes, a connection is read after its last answer, so that a reset does not overtake it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;

/// Bounds on a client's time.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a whole head, from its first byte; for the first head from the beginning.
    pub header: Duration,
    /// Between requests.
    pub keepalive: Duration,
    /// During a request, without a byte either way.
    pub idle: Duration,
}

/// Where a connection stands in its present request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// Nothing of a next request has come.
    Waiting,
    /// A head has begun.
    Head,
    /// A request is being served.
    Busy,
}

/// What the engine's callbacks and the stream tell each other.
#[derive(Debug, Default)]
pub struct Link {
    /// Requests that ended.
    turns: AtomicU32,
    /// Requests being served.
    pub active: AtomicU32,
    /// Bytes from the client, and to it.
    pub bytes: [AtomicU64; 2],
    upgraded: AtomicBool,
    /// It is going: answers say so. Then: it ends where no request has begun.
    going: AtomicBool,
    closing: AtomicBool,
    /// The engine waits for more of a body.
    awaits_body: AtomicBool,
    /// Milliseconds without a byte that the present request may have; 0: as long as the connection.
    idle_ms: AtomicU64,
    /// Milliseconds that bytes for the client may wait for their acknowledgement; 0: not known yet.
    unacked_ms: AtomicU64,
    timed_out: AtomicBool,
    /// The client waits for leave to send its body.
    pub expects: AtomicBool,
    /// The present answer has been given whole, whatever more of the request may come.
    answered: AtomicBool,
    /// What more of the present request goes to, for a client of HTTP/1.
    feeds: Mutex<Option<upstream::Place>>,
    /// The body of the present answer ends with the connection; and it has ended before its time.
    pub until_close: AtomicBool,
    /// See `until_close`.
    pub cut: AtomicBool,
    /// Which listener it came by: a number of the listener's own.
    pub listener: AtomicUsize,
    /// Since when it has had no request, in the time of [`Time`]; 0: it has one, or is to go already.
    quiet_since: AtomicU64,
    /// It has to make room for another connection.
    makes_room: AtomicBool,
    /// The client takes nothing for now.
    blocked: AtomicBool,
    /// The program ends, and what has not ended by itself is cut.
    ended: AtomicBool,
    /// The client's socket; 0: it is closed.
    descriptor: AtomicI32,
    waker: Mutex<Option<Waker>>,
    refused: Mutex<Option<(Refusal, Option<String>)>>,
}

impl Link {
    /// Requests that ended.
    pub fn turns(&self) -> u32 {
        self.turns.load(Relaxed)
    }

    /// The present request has been served: the next may begin.
    pub fn next(&self) {
        self.turns.fetch_add(1, Relaxed);
    }

    /// The connection changed its protocol.
    pub fn upgrade(&self) {
        self.upgraded.store(true, Relaxed);
    }

    /// Whether the connection was told to end.
    pub fn closing(&self) -> bool {
        self.going.load(Relaxed)
    }

    /// From now on answers say that it is going.
    pub fn say_close(&self) {
        self.going.store(true, Relaxed);
    }

    /// The present request may go this long without a byte, where that is shorter than the connection's own bound.
    pub fn bound_idle(&self, idle: Duration) {
        self.idle_ms.store(idle.as_millis() as u64, Relaxed);
    }

    /// Bytes may wait this long for the client's acknowledgement.
    pub fn bound_unacked(&self, unacked: Duration) {
        self.unacked_ms.store(unacked.as_millis() as u64, Relaxed);
    }

    /// How long it may go without a byte either way, where the request has come whole or not; `None`: as long as the connection.
    fn idle(&self, whole: bool) -> Option<Duration> {
        let idle = Some(self.idle_ms.load(Relaxed)).filter(|ms| *ms > 0).map(Duration::from_millis);
        let rest = !whole && self.answered.load(Relaxed) && !self.is_blocked();
        idle.into_iter().chain(rest.then_some(REST)).min()
    }

    /// All of the answer has been given. What is left of the request is waited for no longer than five seconds.
    pub fn is_answered(&self) {
        self.answered.store(true, Relaxed);
    }

    /// More of the present request is to come, and goes there.
    pub fn feeds(&self, place: Option<upstream::Place>) {
        *self.feeds.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }

    fn fed(&self) -> Option<upstream::Place> {
        *self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) -> u64 {
        self.bytes.iter().map(|bytes| bytes.load(Relaxed)).sum()
    }

    /// Whether it is the client that has to go on, with more of its body.
    pub fn awaits_body(&self) -> bool {
        self.awaits_body.load(Relaxed)
    }

    /// A request begins.
    pub fn begins(&self) {
        self.active.fetch_add(1, Relaxed);
        self.quiet_since.store(0, Relaxed);
        self.answered.store(false, Relaxed);
    }

    /// A request has ended.
    pub fn ends_one(&self, now: Time) {
        *self.feeds.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if self.active.fetch_sub(1, Relaxed) == 1 && !self.makes_room() {
            self.quiet_since.store(now.0, Relaxed);
        }
    }

    /// Whether it has to make room for another connection, as soon as nothing is left to say.
    pub fn makes_room(&self) -> bool {
        self.makes_room.load(Relaxed)
    }

    /// Waits until it has to make room.
    pub async fn has_to_make_room(&self) {
        poll_fn(|context| {
            self.wake_by(context.waker());
            if self.makes_room() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// The connection ends as soon as no request is being served.
    pub fn close_when_idle(&self) {
        self.closing.store(true, Relaxed);
        self.wake();
    }

    /// Whether the client has finished sending, or more.
    pub fn is_left(&self) -> bool {
        match self.descriptor.load(Relaxed) {
            0 => true,
            descriptor => sys::has_finished(descriptor),
        }
    }

    /// Whether the client takes nothing for now.
    pub fn is_blocked(&self) -> bool {
        self.blocked.load(Relaxed)
    }

    /// Whether the program has ended under it.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Relaxed)
    }

    /// Waits until the program ends under it.
    pub async fn ends(&self) {
        poll_fn(|context| {
            self.wake_by(context.waker());
            if self.has_ended() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waker.wake();
        }
    }

    fn wake_by(&self, waker: &Waker) {
        let mut known = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *known = Some(waker.clone());
        }
    }

    fn refuse(&self, refusal: Refusal, line: Option<String>) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some((refusal, line));
    }

    /// Why a request was refused before the engine saw it, and the beginning of what was refused.
    pub fn refused(&self) -> Option<(Refusal, Option<String>)> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the connection ended because a head, a next request or any byte did not come in time.
    pub fn timed_out(&self) -> bool {
        self.timed_out.load(Relaxed)
    }
}

thread_local! {
    /// The connections of this worker.
    static OPEN: RefCell<Slab<(Arc<Link>, Seen)>> = const { RefCell::new(Slab::new()) };
}

/// What the looks once a second saw of a connection: whether its client's kernel acknowledges, how many bytes have gone either way,
/// and since when none has.
#[derive(Debug, Default)]
struct Seen {
    unacked: Unacked,
    moved: u64,
    since: Time,
}

/// A connection's place in the list of its worker; dropping it takes it out. Stays on its worker's thread.
#[derive(Debug)]
pub struct Place {
    link: Arc<Link>,
    at: usize,
}

impl Place {
    /// A connection that has no request yet.
    pub fn of(link: Arc<Link>) -> Place {
        link.quiet_since.store(clock::now().0, Relaxed);
        let at = OPEN.with_borrow_mut(|open| open.insert((link.clone(), Seen::default())));
        Place { link, at }
    }

    /// Its link.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // At the end of the thread the list may be gone before the last connection.
        let _ = OPEN.try_with(|open| open.borrow_mut().try_remove(self.at));
    }
}

/// How many connections this worker has.
pub fn count() -> usize {
    OPEN.with_borrow(Slab::len)
}

/// Ends a connection of this worker that has had no request for long, so that another one gets its place: of some taken at random the
/// one that has been quiet for the longest; where `listener` is full and not the process, of that one's. Those that have just come are
/// left: their requests are on their way.
pub fn make_room(listener: Option<usize>, now: Time) {
    OPEN.with_borrow(|open| {
        let taken = (0..LOOKED_AT).filter_map(|_| open.get(fastrand::usize(..open.capacity().max(1))));
        let fits = |link: &Link| listener.is_none_or(|listener| link.listener.load(Relaxed) == listener);
        let quiet = taken.map(|(link, _)| (link.quiet_since.load(Relaxed), link));
        let quiet = quiet.filter(|(since, link)| *since > 0 && fits(link));
        let Some((since, link)) = quiet.min_by_key(|(since, _)| *since) else { return };
        if now.since(Time(since)) >= YOUNG {
            link.quiet_since.store(0, Relaxed);
            link.makes_room.store(true, Relaxed);
            // Its next request may be on its way.
            link.say_close();
            link.wake();
        }
    });
}

/// The look at all clients that are served, once a second: a connection whose client's kernel has not acknowledged anything for too
/// long is broken, as the kernel would break it after a quarter of an hour; and so is what stands still because a backend does not
/// take what its client sends. Then the engine waits for nothing else, and sees neither the client's end nor that of its time.
pub fn break_stuck(now: Time) {
    let round = now.seconds() as usize % ROUNDS;
    let (mut stuck, mut lines) = (Vec::new(), Vec::new());
    OPEN.with_borrow_mut(|open| {
        for (place, (link, seen)) in open.iter_mut() {
            let (descriptor, may_wait) = (link.descriptor.load(Relaxed), link.unacked_ms.load(Relaxed));
            if descriptor == 0 || may_wait == 0 || link.active.load(Relaxed) == 0 {
                seen.unacked = Unacked::default();
                continue;
            }
            let asked = place % ROUNDS == round || seen.unacked.waits();
            let info = asked.then(|| sys::info_of(descriptor)).flatten();
            if asked && seen.unacked.silence(info, now) >= Duration::from_millis(may_wait) {
                sys::dissolve(descriptor);
                stuck.push(link.clone());
            }
            let moved = link.moved();
            if moved != seen.moved {
                (seen.moved, seen.since) = (moved, now);
            }
            if let Some(line) = link.fed() {
                let still = now.since(seen.since);
                // Where the stream itself is asked it has ended by then.
                let over = link.idle(false).is_some_and(|idle| still >= idle + idle / 2);
                if over || still >= LEFT_FOR && info.is_some_and(|info| info.gone()) {
                    lines.push(line);
                }
            }
        }
    });
    stuck.iter().for_each(|link| link.wake());
    lines.into_iter().for_each(upstream::dissolve);
}

/// Cuts what is left of this worker's exchanges, because the program ends: each has its line, and none looks whole.
pub fn end_all() {
    let open: Vec<Arc<Link>> = OPEN.with_borrow(|open| open.iter().map(|(_, (link, _))| link.clone()).collect());
    open.iter().for_each(|link| link.ended.store(true, Relaxed));
    upstream::break_all();
    // Who waits for its client is told of by that.
    open.iter().for_each(|link| link.wake());
}

/// See the module.
pub struct Edge {
    inner: tls::Stream,
    link: Arc<Link>,
    digest: Arc<ProxyDigest>,
    h2: bool,
    framer: Framer,
    turn: u32,
    /// Bytes that came before the engine may have them; of those behind `at`, `give` belong to the present request.
    ahead: Vec<u8>,
    at: usize,
    give: usize,
    out: Vec<u8>,
    /// Bytes written since others had their turns.
    burst: usize,
    patience: Patience,
    /// Bodies of answers of our own, by status.
    pages: Arc<[(u16, Page)]>,
    phase: Phase,
    since: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    /// Sum of bytes when the timer last ran during a request, and since when it has been the same; `None`: it has not run since the
    /// request began.
    seen: Option<(u64, Instant)>,
    ending: Option<Ending>,
    /// In the list of this worker's connections.
    _place: Place,
}

/// The last steps of a connection that was refused.
#[derive(Debug)]
struct Ending {
    answer: Vec<u8>,
    written: usize,
    shut: bool,
    until: Instant,
    left: usize,
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Edge").field("phase", &self.phase).field("h2", &self.h2).finish_non_exhaustive()
    }
}

impl Edge {
    /// Wraps an accepted connection. `first` was read from it already. What `about` holds is found in the digest of each
    /// session.
    pub fn new(
        inner: tls::Stream,
        first: Vec<u8>,
        h2: bool,
        place: Place,
        patience: Patience,
        pages: Arc<[(u16, Page)]>,
        about: Box<dyn std::any::Any + Send + Sync>,
    ) -> io::Result<Edge> {
        let response = ResponseHeader::build(200, Some(0)).map_err(|error| io::Error::other(error.to_string()))?;
        let link = place.link.clone();
        link.descriptor.store(inner.socket().as_raw_fd(), Relaxed);
        Ok(Edge {
            inner,
            link,
            digest: Arc::new(ProxyDigest::new(Box::new(response), Some(about))),
            h2,
            framer: if h2 { Framer::raw() } else { Framer::default() },
            turn: 0,
            ahead: first,
            at: 0,
            give: 0,
            out: Vec::new(),
            burst: 0,
            patience,
            pages,
            // The first head is due at once, not after a pause between requests.
            phase: if h2 { Phase::Busy } else { Phase::Head },
            since: Instant::now(),
            timer: None,
            seen: None,
            ending: None,
            _place: place,
        })
    }

    fn limit(&self) -> Duration {
        match self.phase {
            Phase::Waiting => self.patience.keepalive,
            Phase::Head => self.patience.header,
            Phase::Busy => {
                self.link.idle(self.framer.done()).map_or(self.patience.idle, |idle| idle.min(self.patience.idle))
            }
        }
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase == phase {
            return;
        }
        self.phase = phase;
        self.seen = None;
        if phase != Phase::Busy {
            self.since = Instant::now();
            let deadline = self.since + self.limit();
            // A timer that runs too early finds its deadline moved; only one that would run too late is set anew.
            if let Some(timer) = &mut self.timer
                && timer.deadline() > deadline
            {
                timer.as_mut().reset(deadline);
            }
        }
    }

    /// Whether the time is up; registers for it otherwise.
    fn overdue(&mut self, context: &mut Context<'_>) -> bool {
        let (limit, since, phase) = (self.limit(), self.since, self.phase);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(since + limit)));
        // During a request it runs several times within the bound; it may stand where a longer one put it.
        if phase == Phase::Busy && timer.deadline() > Instant::now() + limit / TICKS {
            timer.as_mut().reset(Instant::now() + limit / TICKS);
        }
        while timer.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            if phase != Phase::Busy {
                if now >= since + limit {
                    self.link.timed_out.store(true, Relaxed);
                    return true;
                }
                timer.as_mut().reset(since + limit);
                continue;
            }
            let sum = self.link.moved();
            let since = self.seen.filter(|(known, _)| *known == sum).map_or(now, |(_, since)| since);
            if now >= since + limit {
                self.link.timed_out.store(true, Relaxed);
                return true;
            }
            self.seen = Some((sum, since));
            timer.as_mut().reset((now + limit / TICKS).min(since + limit));
        }
        false
    }

    /// Reads once from the client; 0 is its end.
    fn read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        let read = buffer.filled().len() - before;
        self.link.bytes[0].fetch_add(read as u64, Relaxed);
        Poll::Ready(Ok(read))
    }

    /// Reads once into `ahead`.
    fn read_ahead(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut buffer = ReadBuf::uninit(&mut space);
        let read = ready!(self.read(context, &mut buffer))?;
        self.ahead.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(read))
    }

    /// Gives on what of `ahead` belongs to the present request.
    fn give_on(&mut self, buffer: &mut ReadBuf<'_>) {
        let given = self.give.min(buffer.remaining());
        buffer.put_slice(&self.ahead[self.at..self.at + given]);
        self.at += given;
        self.give -= given;
        if self.at == self.ahead.len() {
            // What waits between requests holds no memory.
            self.ahead = Vec::new();
            self.at = 0;
        }
    }

    /// Judges what of `bytes`, the beginning of a request or more of one, belongs to it; 0 while its head is not whole.
    fn judge(framer: &mut Framer, bytes: &[u8]) -> Result<usize, Refusal> {
        let head = match framer.in_head() {
            true => match framer.head(bytes)? {
                Some(head) => head,
                None => return Ok(0),
            },
            false => 0,
        };
        Ok(head + framer.body(&bytes[head..])?)
    }

    /// Answers a request whose head is refused, and ends the connection.
    fn refuse(&mut self, refusal: Refusal) {
        let line = self.ahead[self.at..].split(|byte| matches!(byte, b'\r' | b'\n')).find(|line| !line.is_empty());
        let line = line.map(|line| String::from_utf8_lossy(&line[..line.len().min(256)]).into_owned());
        self.link.refuse(refusal, line);
        self.ahead = Vec::new();
        (self.at, self.give) = (0, 0);
        let until = Instant::now() + LINGER;
        let answer = answer::raw(refusal.status, refusal.reason, &self.pages);
        self.ending = Some(Ending { answer, written: 0, shut: false, until, left: LINGER_BYTES });
    }

    /// The engine must not see what was refused behind a good head: it gets an error, and answers by itself.
    fn refuse_body(&mut self, refusal: Refusal) -> io::Error {
        self.link.refuse(refusal, None);
        io::Error::new(io::ErrorKind::InvalidData, refusal.reason)
    }

    /// Writes the last answer, says the end, and reads on until the client has said its own.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(ending) = &mut self.ending else { return Poll::Ready(()) };
        let until = ending.until;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if timer.deadline() != until {
            timer.as_mut().reset(until);
        }
        if timer.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        while ending.written < ending.answer.len() {
            match ready!(Pin::new(&mut self.inner).poll_write(context, &ending.answer[ending.written..])) {
                Ok(written) if written > 0 => ending.written += written,
                Ok(_) | Err(_) => return Poll::Ready(()),
            }
        }
        if !ending.shut {
            if ready!(Pin::new(&mut self.inner).poll_shutdown(context)).is_err() {
                return Poll::Ready(());
            }
            ending.shut = true;
        }
        loop {
            let mut space = [0; 4096];
            let mut buffer = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut self.inner).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() && ending.left > buffer.filled().len() => {
                    ending.left -= buffer.filled().len();
                }
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
    }

    /// Takes note of what the engine's callbacks said since the last look.
    fn look_at_link(&mut self) {
        if self.link.upgraded.load(Relaxed) && !self.framer.is_raw() {
            self.framer.upgrade();
            self.give = self.ahead.len() - self.at;
        }
        // A request may have been answered before it came whole; then its rest comes first.
        let turns = self.link.turns.load(Relaxed);
        if self.framer.done() && self.turn != turns {
            self.turn = turns;
            self.framer.next();
            self.enter(if self.ahead.is_empty() { Phase::Waiting } else { Phase::Head });
        }
    }

    /// Waits for a whole head of HTTP/1.1, so that whoever has not said one costs nothing of the engine's. False: the connection
    /// is over.
    pub async fn head(&mut self) -> bool {
        poll_fn(|context| self.poll_head(context)).await
    }

    fn poll_head(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        self.look_at_link();
        loop {
            if self.ending.is_some() {
                ready!(self.poll_end(context));
                return Poll::Ready(false);
            }
            if self.give > 0 || !self.framer.in_head() {
                return Poll::Ready(true);
            }
            if !self.ahead.is_empty() {
                match Self::judge(&mut self.framer, &self.ahead[self.at..]) {
                    Ok(0) => self.enter(Phase::Head),
                    Ok(whole) => {
                        self.give = whole;
                        return Poll::Ready(true);
                    }
                    Err(refusal) => {
                        self.refuse(refusal);
                        continue;
                    }
                }
            } else if self.link.closing.load(Relaxed) {
                return Poll::Ready(false);
            }
            match self.read_ahead(context) {
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(false),
                Poll::Pending => return self.pending(context).map(|_| false),
            }
        }
    }

    fn poll_request(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.look_at_link();
        self.link.awaits_body.store(false, Relaxed);
        loop {
            if self.ending.is_some() {
                ready!(self.poll_end(context));
                return Poll::Ready(Ok(()));
            }
            // What came before, judged as far as it goes.
            if self.give == 0 && !self.ahead.is_empty() && !self.framer.done() {
                let in_head = self.framer.in_head();
                match Self::judge(&mut self.framer, &self.ahead[self.at..]) {
                    Ok(0) => self.enter(Phase::Head),
                    Ok(whole) => self.give = whole,
                    Err(refusal) if in_head => {
                        self.refuse(refusal);
                        continue;
                    }
                    Err(refusal) => return Poll::Ready(Err(self.refuse_body(refusal))),
                }
            }
            if self.give > 0 {
                self.enter(Phase::Busy);
                self.give_on(buffer);
                return Poll::Ready(Ok(()));
            }
            if self.framer.in_head() && self.ahead.is_empty() && self.link.closing.load(Relaxed) {
                return Poll::Ready(Ok(()));
            }
            // A request that has come whole: the engine looks whether its client is still there, and what comes is ahead.
            let ahead = !self.ahead.is_empty() || self.framer.done();
            if ahead && self.framer.done() && self.ahead.len() - self.at >= AHEAD {
                return self.pending(context);
            }
            let before = buffer.filled().len();
            let read = if ahead { self.read_ahead(context) } else { self.read(context, buffer) };
            match read {
                Poll::Pending => return self.pending(context),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(_)) if ahead => continue,
                Poll::Ready(Ok(_)) => {}
            }
            // The common case: a whole head, or more of a body, without a copy.
            let in_head = self.framer.in_head();
            let judged = Self::judge(&mut self.framer, &buffer.filled()[before..]);
            let whole = *judged.as_ref().unwrap_or(&0);
            if whole < buffer.filled().len() - before {
                self.ahead.extend_from_slice(&buffer.filled()[before + whole..]);
                buffer.set_filled(before + whole);
            }
            match judged {
                Ok(0) => self.enter(Phase::Head),
                Ok(_) => {
                    self.enter(Phase::Busy);
                    return Poll::Ready(Ok(()));
                }
                Err(refusal) if in_head => self.refuse(refusal),
                Err(refusal) => return Poll::Ready(Err(self.refuse_body(refusal))),
            }
        }
    }

    /// Nothing to read yet, or no more time for it.
    fn pending(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.overdue(context) {
            return match self.phase {
                Phase::Head if !self.ahead.is_empty() => {
                    self.refuse(Refusal { status: 408, reason: "the header did not come in time" });
                    ready!(self.poll_end(context));
                    Poll::Ready(Ok(()))
                }
                Phase::Head | Phase::Waiting => Poll::Ready(Ok(())),
                Phase::Busy => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            };
        }
        if !self.out.is_empty()
            && let Poll::Ready(Err(error)) = self.poll_gathered(context)
        {
            // The engine has nothing more for the moment, so what there is goes out.
            return Poll::Ready(Err(error));
        }
        self.link.awaits_body.store(self.phase == Phase::Busy && !self.framer.done(), Relaxed);
        if self.framer.in_head() {
            self.link.wake_by(context.waker());
            // It may have been told to close between our look and this.
            if self.ahead.is_empty() && self.link.closing.load(Relaxed) {
                return Poll::Ready(Ok(()));
            }
            if self.out.is_empty() && self.link.makes_room() {
                return Poll::Ready(Ok(()));
            }
        }
        Poll::Pending
    }

    /// The client takes no more for now: the error that ends the wait for it.
    fn blocked(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        self.link.wake_by(context.waker());
        self.link.blocked.store(true, Relaxed);
        if self.link.has_ended() {
            return Poll::Ready(io::ErrorKind::ConnectionAborted.into());
        }
        match self.overdue(context) {
            true => Poll::Ready(io::ErrorKind::TimedOut.into()),
            false => Poll::Pending,
        }
    }

    /// Writes out what was gathered.
    fn poll_gathered(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut at = 0;
        let result = loop {
            if at == self.out.len() {
                break Poll::Ready(Ok(()));
            }
            match Pin::new(&mut self.inner).poll_write(context, &self.out[at..]) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => at += written,
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        self.link.bytes[1].fetch_add(at as u64, Relaxed);
        if at == self.out.len() {
            self.out = Vec::new();
        } else {
            self.out.drain(..at);
        }
        if result.is_pending() {
            return self.blocked(context).map(Err);
        }
        self.link.blocked.store(false, Relaxed);
        result
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // On the same thread as whoever asks about the descriptor, which is open until this has returned.
        self.link.descriptor.store(0, Relaxed);
        if self.link.cut.load(Relaxed) && self.link.until_close.load(Relaxed) {
            tcp::reset(self.inner.socket());
        }
    }
}

impl AsyncRead for Edge {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_request(context, buffer)
    }
}

impl AsyncWrite for Edge {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let edge = self.get_mut();
        if edge.ending.is_some() {
            // The connection has had its last answer.
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if edge.out.len() + bytes.len() > GATHER {
            ready!(edge.poll_gathered(context))?;
        }
        if bytes.len() > GATHER {
            // Whoever takes much lets the others of this worker have their turns.
            if edge.burst >= BURST {
                edge.burst = 0;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            return match Pin::new(&mut edge.inner).poll_write(context, bytes) {
                Poll::Ready(Ok(written)) => {
                    edge.link.bytes[1].fetch_add(written as u64, Relaxed);
                    edge.link.blocked.store(false, Relaxed);
                    edge.burst += written;
                    Poll::Ready(Ok(written))
                }
                Poll::Pending => {
                    edge.burst = 0;
                    edge.blocked(context).map(Err)
                }
                other => other,
            };
        }
        edge.out.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        ready!(edge.poll_gathered(context))?;
        // Under TLS what was written may wait here.
        match Pin::new(&mut edge.inner).poll_flush(context) {
            Poll::Pending => edge.blocked(context).map(Err),
            ready => {
                edge.link.blocked.store(false, Relaxed);
                ready
            }
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        ready!(edge.poll_gathered(context))?;
        Pin::new(&mut edge.inner).poll_shutdown(context)
    }
}

#[async_trait]
impl Shutdown for Edge {
    /// The last answer leaves whole, and what the client still sends does not turn the close into a reset.
    async fn shutdown(&mut self) {
        if self.ending.is_none() {
            let answer = std::mem::take(&mut self.out);
            self.link.bytes[1].fetch_add(answer.len() as u64, Relaxed);
            let until = Instant::now() + LINGER;
            self.ending = Some(Ending { answer, written: 0, shut: false, until, left: LINGER_BYTES });
        }
        poll_fn(|context| self.poll_end(context)).await;
    }
}

impl UniqueID for Edge {
    fn id(&self) -> UniqueIDType {
        self.inner.socket().as_raw_fd()
    }
}

impl Ssl for Edge {
    fn selected_alpn_proto(&self) -> Option<ALPN> {
        Some(if self.h2 { ALPN::H2 } else { ALPN::H1 })
    }
}

impl GetTimingDigest for Edge {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Edge {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        Some(self.digest.clone())
    }
}

impl GetSocketDigest for Edge {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        None
    }
}

impl Peek for Edge {}
