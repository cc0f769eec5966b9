//! Zero-copy between two sockets: `splice(2)` through a pipe. All `unsafe` of the data path.
//!
//! Pipes are few (see `host::MOST_PIPES`) because the kernel gives an unprivileged user 64 MB of pipe buffers in
//! all, and from then on pipes of 8 KB. An empty pipe goes back to its worker's cache; one that still holds
//! bytes is closed, so that no byte can reach another connection.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::host::MOST_PIPES;

/// Wanted size of a pipe in bytes, and the least that is worth using.
const PIPE_SIZE: usize = 256 << 10;
const PIPE_LEAST: usize = 64 << 10;
/// Most idle pipes that one worker keeps.
const CACHED: usize = 16;

/// Pipes that exist in the process, cached ones included.
static PIPES: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static CACHE: RefCell<Vec<Ends>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
}

impl Drop for Ends {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Relaxed);
    }
}

/// A pipe in use by one direction of one connection.
#[derive(Debug)]
pub struct Pipe {
    ends: Option<Ends>,
    /// Bytes in it now.
    held: usize,
}

impl Pipe {
    /// A pipe from the cache or a new one; `None` when there are enough, or the kernel gives only small ones.
    pub fn take() -> Option<Pipe> {
        let ends = CACHE.with(|cache| cache.borrow_mut().pop()).or_else(create)?;
        Some(Pipe { ends: Some(ends), held: 0 })
    }

    /// Bytes in it now.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Moves bytes from `socket` into the pipe, which must be empty; 0 at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when the socket has none; else the socket's error.
    pub fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "a pipe is filled only when it is empty");
        let Some(ends) = &self.ends else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let moved = splice(socket.as_raw_fd(), ends.write.as_raw_fd(), ends.size)?;
        self.held = moved;
        Ok(moved)
    }

    /// Moves bytes from the pipe to `socket`.
    ///
    /// # Errors
    /// `WouldBlock` when the socket takes none; else the socket's error.
    pub fn empty(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let Some(ends) = &self.ends else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let moved = splice(ends.read.as_raw_fd(), socket.as_raw_fd(), self.held)?;
        self.held -= moved;
        Ok(moved)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let Some(ends) = self.ends.take() else { return };
        if self.held == 0 {
            // At the end of a thread its cache is gone already; then the pipe is closed.
            let _ = CACHE.try_with(|cache| {
                let mut cache = cache.borrow_mut();
                if cache.len() < CACHED {
                    cache.push(ends);
                }
            });
        }
    }
}

fn create() -> Option<Ends> {
    if PIPES.fetch_add(1, Relaxed) >= MOST_PIPES {
        PIPES.fetch_sub(1, Relaxed);
        return None;
    }
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors that pipe2 writes.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) } != 0 {
        PIPES.fetch_sub(1, Relaxed);
        return None;
    }
    // SAFETY: pipe2 succeeded, so both descriptors are open and belong to nobody else.
    let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    // SAFETY: fcntl with these commands takes and returns integers only.
    unsafe { libc::fcntl(write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_SIZE as libc::c_int) };
    // SAFETY: as above.
    let size = unsafe { libc::fcntl(write.as_raw_fd(), libc::F_GETPIPE_SZ) };
    // From here on dropping it counts down.
    let ends = Ends { read, write, size: size.max(0) as usize };
    (ends.size >= PIPE_LEAST).then_some(ends)
}

fn splice(from: i32, to: i32, length: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: both descriptors are open for the duration of the call (owned or borrowed by the callers); the
    // null offsets are what the call demands for pipes and sockets.
    let moved = unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), length, flags) };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(moved as usize) }
}
