//! Bytes between two connected sockets, both ways, until both ends have finished.
//!
//! 1. A direction reads into the worker's one buffer and writes on at once. Only what the peer did not take is
//!    copied aside, so an idle connection holds no buffer at all.
//! 2. After a write that the peer did not take whole, the next read asks for little: the peer is slow.
//! 3. After a few full reads the direction moves to `splice(2)`, and back when the reads become small.
//! 4. The end of one direction is passed on as a half-close; the other goes on under the half-close timer.
//! 5. TLS that ends without `close_notify` ends as the connection under it does: all of it is passed on, then the end; but
//!    to a peer under TLS by a close alone.
//! 6. A direction whose peer refuses further bytes does not end the other: an answer may still be on its way.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::time::{Instant, Sleep};
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::PoolShared;
use crate::clock;
use crate::host::Host;
use crate::session::{Handle, WAITS_BACKEND, WAITS_CLIENT};
use crate::splice::Pipe;
use crate::table::End;
use crate::tls::Stream;

/// The worker's buffer.
const BUFFER: usize = 64 << 10;
/// What is read after a peer did not take everything.
const CAUTIOUS: usize = 8 << 10;
/// Full reads in a row before a direction moves to a pipe.
const FULL_READS: u8 = 3;
/// Pipe fills below this are small; after this many in a row the direction goes back to the buffer.
const SMALL_FILL: usize = 32 << 10;
const SMALL_FILLS: u8 = 8;
/// Most reads of one direction before the other connections of the worker have their turn.
const TURN: usize = 16;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Bounds on a session.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Without a byte either way.
    pub idle: Duration,
    /// The same once one side has finished.
    pub half_close: Duration,
}

/// What a session carried, filled as it runs.
#[derive(Debug, Default)]
pub struct Carried {
    /// Bytes from the client.
    pub up: u64,
    /// Bytes to the client.
    pub down: u64,
    /// When the client's first byte was on its way.
    pub spoke: Option<Instant>,
    /// When the backend's first byte came.
    pub answered: Option<Instant>,
    /// Whether the client finished or reset before the backend did.
    pub client_left_first: bool,
    /// Whether bytes were taken from one side that the other did not get: then a clean close would be a lie.
    pub cut: bool,
    /// All that the client said, as long as the backend had not said anything and there was room.
    pub kept: Option<Box<Kept>>,
}

/// A session's beginning, kept to be sent again to another backend.
#[derive(Debug)]
pub struct Kept {
    /// What the client said.
    pub bytes: Vec<u8>,
    /// Most that is kept.
    pub most: usize,
    /// Whose backends must not get what others of them have died of.
    pub shared: Arc<PoolShared>,
}

impl Kept {
    /// Whether a backend has died of exactly this. One that merely ends such sessions may do so by nature.
    fn kills(&self) -> bool {
        self.shared.poison.is_convicted(xxh3_64(&self.bytes), clock::now())
    }
}

/// What is worth knowing at the moment it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The client's first byte is on its way, and the backend has not said anything.
    Spoke,
    /// The backend's first byte came.
    Answered,
    /// The backend closed or reset before its first byte, and before the client did.
    Unanswered,
}

#[derive(Debug, Default)]
struct Direction {
    /// What the peer did not take, and how much of it has been written since.
    aside: Vec<u8>,
    written: usize,
    pipe: Option<Pipe>,
    moved: u64,
    /// What it has read until now; boxed, because nearly all sessions are past it.
    kept: Option<Box<Kept>>,
    full_reads: u8,
    small_fills: u8,
    cautious: bool,
    /// The sink may hold bytes that it has taken.
    unflushed: bool,
    /// No pipe was to be had; ask no more.
    no_pipe: bool,
    ended: Ended,
    /// Waits for the peer to take bytes.
    waits: bool,
    done: bool,
}

/// Whether the source has finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Ended {
    #[default]
    Not,
    Yes,
    /// By a close under TLS, without the word for it.
    Unsaid,
}

/// Which of the two sockets of a direction failed, of the sink how; or why it may not go on.
enum Broken {
    Source,
    Sink(io::ErrorKind),
    /// What it says is not sent on, because others have died of it.
    Poison,
}

/// Relays until the session ends, and says how. `begin` is this moment; `first` goes to the backend before anything
/// else, and this many of its bytes at the front are not the client's. `carried.kept` is what it begins with and what it ends with.
#[allow(clippy::too_many_arguments)] // One call site; a struct would only name them a second time.
pub async fn relay(
    client: &mut Stream,
    server: &mut Stream,
    first: (Vec<u8>, usize),
    bounds: Bounds,
    host: &Host,
    session: &Handle,
    mut timer: Pin<&mut Sleep>,
    begin: Instant,
    carried: &mut Carried,
    mut notice: impl FnMut(Notice, &Carried),
) -> End {
    let (first, ours) = first;
    let ours = ours as u64;
    let kept = carried.kept.take();
    if kept.as_ref().is_some_and(|kept| !kept.bytes.is_empty() && kept.kills()) {
        return End::Poison;
    }
    let mut up = Direction { moved: first.len() as u64, aside: first, kept, ..Direction::default() };
    let mut down = Direction::default();
    let mut waits = 0;
    let mut registered = false;
    // The timer runs four times within a bound and compares counts, so that a byte costs no look at the clock.
    let mut every = tick(bounds.idle);
    let mut quiet = Duration::ZERO;
    let mut seen = 0;
    timer.as_mut().reset(begin + every);
    let mut first_poll = true;
    let mut server_reset = false;
    let mut cut = false;

    let end = poll_fn(|context| {
        if !registered {
            session.wake_by(context.waker());
            registered = true;
        }
        if let Some(end) = session.ended() {
            return Poll::Ready(end);
        }
        if !up.done {
            match up.poll(context, client, server, host, down.done && server.plain().is_some()) {
                Poll::Ready(Ok(())) => up.done = true,
                // Many clients of TLS leave without a word once they have their answer.
                Poll::Ready(Err(Broken::Source)) if down.done && client.plain().is_none() => {
                    // But whether it had said all is not known, so the backend is not told so.
                    (up.done, cut) = (true, true);
                }
                Poll::Ready(Err(Broken::Source)) => {
                    carried.client_left_first = !down.done;
                    return Poll::Ready(End::ClientReset);
                }
                Poll::Ready(Err(Broken::Poison)) => return Poll::Ready(End::Poison),
                // The backend takes no more, but may have answered.
                Poll::Ready(Err(Broken::Sink(how))) => {
                    // This write has taken the socket's error away: its reads would end as if all were well.
                    server_reset = how != io::ErrorKind::BrokenPipe;
                    let (moved, kept) = (up.moved, up.kept.take());
                    up = Direction { moved, kept, done: true, ..Direction::default() };
                }
                Poll::Pending => {}
            }
            if carried.spoke.is_none() && up.moved > ours {
                // What was there from the start needs no look at the clock.
                carried.spoke = Some(if first_poll { begin } else { Instant::now() });
                if carried.answered.is_none() {
                    notice(Notice::Spoke, carried);
                }
            }
            carried.up = up.moved - ours;
            carried.client_left_first |= up.finished() && !down.finished();
        }
        if !down.done {
            // After a reset of the backend's no FIN may tell the client that this was all.
            let leave = server_reset || up.done && client.plain().is_some();
            let result = down.poll(context, server, client, host, leave);
            if carried.answered.is_none() && down.moved > 0 {
                carried.answered = Some(Instant::now());
                carried.kept = up.kept.take();
                notice(Notice::Answered, carried);
                carried.kept = None;
            }
            carried.down = down.moved;
            match result {
                Poll::Ready(Ok(())) => {
                    down.done = true;
                    if down.moved == 0 && !carried.client_left_first {
                        notice(Notice::Unanswered, carried);
                    }
                    if server_reset {
                        return Poll::Ready(End::BackendReset);
                    }
                }
                Poll::Ready(Err(Broken::Source)) => {
                    if down.moved == 0 && !carried.client_left_first {
                        notice(Notice::Unanswered, carried);
                    }
                    return Poll::Ready(End::BackendReset);
                }
                Poll::Ready(Err(Broken::Sink(_) | Broken::Poison)) => return Poll::Ready(End::ClientReset),
                Poll::Pending => {}
            }
        }
        first_poll = false;
        if up.done && down.done {
            return Poll::Ready(if carried.client_left_first { End::ClientClosed } else { End::BackendClosed });
        }
        let waits_now = if down.waits { WAITS_CLIENT } else { 0 } | if up.waits { WAITS_BACKEND } else { 0 };
        if waits_now != waits {
            waits = waits_now;
            session.set_waits(waits);
        }
        // Who has something to write waits for its peer, not for the other side's last words.
        let half = (up.done || down.done || up.finished() || down.finished()) && waits == 0;
        let bound = if half { bounds.half_close.min(bounds.idle) } else { bounds.idle };
        let piped = up.pipe.is_some() || down.pipe.is_some();
        let wanted = if piped { tick(bound).min(Duration::from_secs(1)) } else { tick(bound) };
        if wanted < every {
            every = wanted;
            quiet = Duration::ZERO;
            timer.as_mut().reset(Instant::now() + every);
        }
        while timer.as_mut().poll(context).is_ready() {
            if up.delivered() + down.delivered() == seen {
                quiet += every;
                up.release_pipe();
                down.release_pipe();
            } else {
                quiet = Duration::ZERO;
            }
            seen = up.delivered() + down.delivered();
            if quiet >= bound {
                return Poll::Ready(if half { End::HalfClosed } else { End::Idle });
            }
            every = wanted;
            timer.as_mut().reset(Instant::now() + every);
        }
        Poll::Pending
    })
    .await;
    carried.kept = up.kept.take();
    (carried.up, carried.down) = (up.moved - ours, down.moved);
    carried.cut = cut || up.held() + down.held() > 0 || up.unflushed || down.unflushed;
    end
}

fn tick(bound: Duration) -> Duration {
    (bound / 4).max(Duration::from_millis(5))
}

impl Direction {
    /// Moves what can be moved. Ready when the source has finished, all is written, and the sink knows; `last` says
    /// that the close will tell it (or must not), because the other direction is done.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
        host: &Host,
        last: bool,
    ) -> Poll<Result<(), Broken>> {
        for _ in 0..TURN {
            self.waits = true;
            ready!(self.poll_aside(context, sink)).map_err(|error| Broken::Sink(error.kind()))?;
            ready!(self.poll_pipe(context, sink, host)).map_err(|error| Broken::Sink(error.kind()))?;
            if self.unflushed {
                // TLS holds what the socket did not take; without it this is nothing.
                let flushed = Pin::new(&mut *sink).poll_flush(context);
                self.cautious |= flushed.is_pending();
                ready!(flushed).map_err(|error| Broken::Sink(error.kind()))?;
                self.unflushed = false;
            }
            self.waits = false;
            if self.finished() {
                self.release_pipe();
                if last {
                    return Poll::Ready(Ok(()));
                }
                // An error here means that the sink is gone; whoever reads from it will see that.
                self.waits = true;
                if self.ended == Ended::Unsaid && sink.plain().is_none() {
                    // Nobody said that this was all, and so we do not say it either.
                    let _ = SockRef::from(sink.socket()).shutdown(Shutdown::Write);
                    self.waits = false;
                    return Poll::Ready(Ok(()));
                }
                let _ = ready!(Pin::new(&mut *sink).poll_shutdown(context));
                self.waits = false;
                return Poll::Ready(Ok(()));
            }
            let piped = source.plain().is_some() && sink.plain().is_some();
            if piped && self.full_reads >= FULL_READS && self.pipe.is_none() && !self.no_pipe {
                self.pipe = Pipe::take();
                self.small_fills = 0;
                if self.pipe.is_none() {
                    self.no_pipe = true;
                    host.splice_refused.add(1);
                }
            }
            let read = if self.pipe.is_some() {
                self.poll_fill(context, source)
            } else {
                self.poll_copy(context, source, sink)
            };
            ready!(read)?;
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads into the shared buffer and writes on at once.
    fn poll_copy(
        &mut self,
        context: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
    ) -> Poll<Result<(), Broken>> {
        SHARED.with(|shared| {
            let mut shared = shared.borrow_mut();
            let most = if self.cautious { CAUTIOUS } else { BUFFER };
            let mut buffer = ReadBuf::new(&mut shared[..most]);
            let read = ready!(Pin::new(source).poll_read(context, &mut buffer));
            // Many peers end TLS by closing the connection under it. What came before is passed on as without TLS.
            let unsaid = matches!(&read, Err(error) if error.kind() == io::ErrorKind::UnexpectedEof);
            if !unsaid {
                read.map_err(|_| Broken::Source)?;
            }
            let bytes = buffer.filled();
            if bytes.is_empty() {
                self.ended = if unsaid { Ended::Unsaid } else { Ended::Yes };
                return Poll::Ready(Ok(()));
            }
            self.moved += bytes.len() as u64;
            if let Some(kept) = &mut self.kept {
                if kept.bytes.len() + bytes.len() <= kept.most {
                    kept.bytes.extend_from_slice(bytes);
                    if kept.kills() {
                        return Poll::Ready(Err(Broken::Poison));
                    }
                } else {
                    self.kept = None;
                }
            }
            self.full_reads = if bytes.len() == BUFFER { self.full_reads.saturating_add(1) } else { 0 };
            self.cautious = false;
            self.unflushed = sink.plain().is_none();
            let taken = match Pin::new(sink).poll_write(context, bytes) {
                Poll::Ready(Ok(taken)) => taken,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::Sink(error.kind()))),
                Poll::Pending => 0,
            };
            if taken < bytes.len() {
                self.cautious = true;
                self.aside.extend_from_slice(&bytes[taken..]);
            }
            Poll::Ready(Ok(()))
        })
    }

    fn poll_aside(&mut self, context: &mut Context<'_>, sink: &mut Stream) -> Poll<io::Result<()>> {
        while self.written < self.aside.len() {
            let rest = &self.aside[self.written..];
            match ready!(Pin::new(&mut *sink).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.written += n,
            }
            self.unflushed = sink.plain().is_none();
        }
        if !self.aside.is_empty() {
            // Freed, not kept: an idle connection holds no buffer.
            self.aside = Vec::new();
            self.written = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// Moves what the pipe holds to the sink.
    fn poll_pipe(&mut self, context: &mut Context<'_>, sink: &Stream, host: &Host) -> Poll<io::Result<()>> {
        let (Some(pipe), Some(sink)) = (&mut self.pipe, sink.plain()) else { return Poll::Ready(Ok(())) };
        while pipe.held() > 0 {
            match sink.try_io(Interest::WRITABLE, || pipe.empty(sink.as_fd())) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => host.spliced.add(n as u64),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(sink.poll_write_ready(context))?,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_fill(&mut self, context: &mut Context<'_>, source: &Stream) -> Poll<Result<(), Broken>> {
        let (Some(pipe), Some(source)) = (&mut self.pipe, source.plain()) else { return Poll::Ready(Ok(())) };
        loop {
            match source.try_io(Interest::READABLE, || pipe.fill(source.as_fd())) {
                Ok(0) => {
                    self.ended = Ended::Yes;
                    return Poll::Ready(Ok(()));
                }
                Ok(n) => {
                    self.moved += n as u64;
                    self.small_fills = if n < SMALL_FILL { self.small_fills.saturating_add(1) } else { 0 };
                    if self.small_fills >= SMALL_FILLS {
                        self.full_reads = 0;
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.full_reads == 0 {
                        // Small pieces: the buffer is cheaper.
                        self.pipe = None;
                        return Poll::Ready(Ok(()));
                    }
                    ready!(source.poll_read_ready(context)).map_err(|_| Broken::Source)?;
                }
                Err(_) => return Poll::Ready(Err(Broken::Source)),
            }
        }
    }

    fn finished(&self) -> bool {
        self.ended != Ended::Not
    }

    /// Bytes taken from the source and not yet by the sink.
    fn held(&self) -> u64 {
        (self.aside.len() - self.written + self.pipe.as_ref().map_or(0, Pipe::held)) as u64
    }

    /// Bytes that the sink has taken.
    fn delivered(&self) -> u64 {
        self.moved - self.held()
    }

    /// Gives an empty pipe back.
    fn release_pipe(&mut self) {
        if self.pipe.as_ref().is_some_and(|pipe| pipe.held() == 0) {
            self.pipe = None;
            self.full_reads = 0;
        }
    }
}
