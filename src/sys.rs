//! System calls that no safe library offers: what the kernel knows about a TCP connection, and resource limits.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use socket2::SockRef;

/// What the kernel knows about a TCP connection.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo {
    state: u8,
    /// Smoothed round-trip time; right after the handshake it is the handshake's.
    pub rtt: Duration,
    /// Segments sent and not acknowledged.
    pub unacked: u32,
    /// Questions whether the peer is there, or takes something again, that were not answered.
    pub probes: u8,
    /// Time since the last acknowledgement.
    pub last_ack: Duration,
}

/// States of the kernel's include/net/tcp_states.h.
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;

impl TcpInfo {
    /// Whether the peer has not yet answered the handshake.
    pub fn unanswered(&self) -> bool {
        self.state == SYN_SENT
    }

    /// Whether the handshake is over and the peer may still send, or has already finished.
    pub fn connected(&self) -> bool {
        matches!(self.state, ESTABLISHED | CLOSE_WAIT)
    }

    /// Whether the peer has finished sending, or more.
    pub fn finished(&self) -> bool {
        matches!(self.state, CLOSE | CLOSE_WAIT)
    }

    /// Whether the connection is gone: reset, or closed both ways.
    pub fn gone(&self) -> bool {
        self.state == CLOSE
    }
}

/// Ends a TCP connection both ways and leaves its descriptor open: whoever reads from it sees an end.
pub fn shut_down(descriptor: RawFd) {
    // SAFETY: shutdown(2) reads no memory. The caller knows the descriptor for open, and for a socket: it stands in the
    // list of the worker's connections, which an entry leaves before its descriptor is closed, on the same thread.
    unsafe { libc::shutdown(descriptor, libc::SHUT_RDWR) };
}

/// Ends the sending on a TCP connection alone: whoever writes to it sees an error.
pub fn stop_sending(descriptor: RawFd) {
    // SAFETY: as for `shut_down`.
    unsafe { libc::shutdown(descriptor, libc::SHUT_WR) };
}

/// Looks at the first bytes that wait to be read from a TCP connection, without taking them; how many there are.
pub fn peek(descriptor: RawFd, bytes: &mut [u8]) -> usize {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: `bytes` is valid for writing its length. The descriptor is open as for `shut_down`.
    let read = unsafe { libc::recv(descriptor, bytes.as_mut_ptr().cast(), bytes.len(), flags) };
    usize::try_from(read).unwrap_or(0)
}

/// Breaks a TCP connection by a reset and leaves its descriptor open: whoever reads from it sees an error, not an end.
pub fn dissolve(descriptor: RawFd) {
    let none = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: `none` is valid for reading the given length. The descriptor is open as for `shut_down`.
    unsafe { libc::connect(descriptor, &raw const none, size_of::<libc::sockaddr>() as libc::socklen_t) };
}

/// Whether the peer of a TCP connection has finished sending, or more.
pub fn has_finished(descriptor: RawFd) -> bool {
    // SAFETY: the caller knows the descriptor for open: it stands in the link of its connection, which forgets it before it is
    // closed, on the same thread. The borrow ends with this call.
    tcp_info(unsafe { BorrowedFd::borrow_raw(descriptor) }).is_ok_and(|info| info.finished())
}

/// Asks the kernel about a TCP connection that stands in a list of its worker's; `None`: it says nothing.
pub fn info_of(descriptor: RawFd) -> Option<TcpInfo> {
    // SAFETY: the caller knows the descriptor for open, as for `shut_down`. The borrow ends with this call.
    tcp_info(unsafe { BorrowedFd::borrow_raw(descriptor) }).ok()
}

/// Bytes that were written to a TCP connection of such a list and that the peer has not let the kernel send yet.
pub fn unsent(descriptor: RawFd) -> u32 {
    // SAFETY: the caller knows the descriptor for open, as for `shut_down`. The borrow ends with this call.
    tcp_traffic(unsafe { BorrowedFd::borrow_raw(descriptor) }).map_or(0, |traffic| traffic.unsent)
}

/// Asks the kernel about the TCP connection of `socket`.
///
/// # Errors
/// What getsockopt(2) says, for instance that `socket` is none.
pub fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` is valid for `length` bytes of writing, and the kernel writes no more than `length`. The
    // descriptor is borrowed, so it is open for the duration of the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the struct consists of integers and was zeroed; every bit pattern is a valid value.
    let info = unsafe { info.assume_init() };
    Ok(TcpInfo {
        state: info.tcpi_state,
        rtt: Duration::from_micros(u64::from(info.tcpi_rtt)),
        unacked: info.tcpi_unacked,
        probes: info.tcpi_probes,
        last_ack: Duration::from_millis(u64::from(info.tcpi_last_ack_recv)),
    })
}

/// What went over a TCP connection, by the kernel's count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Bytes that the peer's kernel has acknowledged.
    pub acknowledged: u64,
    /// Bytes received.
    pub received: u64,
    /// Since bytes were received last.
    pub silent: Duration,
    /// Bytes that wait to be sent.
    pub unsent: u32,
}

/// Asks the kernel what went over the TCP connection of `socket`. The struct of the C library ends before these
/// fields, so they are taken from where Linux puts them (include/uapi/linux/tcp.h).
///
/// # Errors
/// What getsockopt(2) says, for instance that `socket` is none.
pub fn tcp_traffic(socket: BorrowedFd<'_>) -> io::Result<Traffic> {
    const LAST_DATA_RECV: usize = 52;
    const BYTES_ACKED: usize = 120;
    const BYTES_RECEIVED: usize = 128;
    const NOTSENT_BYTES: usize = 144;
    let mut info = [0u8; 148];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: `info` is valid for `length` bytes of writing, the kernel writes no more than `length`, and every
    // byte is a valid value. The descriptor is borrowed, so it is open for the duration of the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let wide = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| info[at + i]));
    let narrow = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| info[at + i]));
    Ok(Traffic {
        acknowledged: wide(BYTES_ACKED),
        received: wide(BYTES_RECEIVED),
        silent: Duration::from_millis(u64::from(narrow(LAST_DATA_RECV))),
        unsent: narrow(NOTSENT_BYTES),
    })
}

/// Sets `IP_BIND_ADDRESS_NO_PORT`: a bind to port 0 chooses the address only, and connect(2) the port.
///
/// # Errors
/// What setsockopt(2) says.
pub fn bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `on` is valid for reading the given length, and the descriptor is borrowed for the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `SO_BUF_LOCK` (since Linux 5.14): which buffers of a socket do not follow its traffic.
const SO_BUF_LOCK: libc::c_int = 72;

/// Lets no buffer of a socket have a fixed size; false where the kernel cannot.
fn unlock_buffers(descriptor: RawFd) -> bool {
    let none: libc::c_int = 0;
    // SAFETY: `none` is valid for reading the given length. The caller knows the descriptor for open: it borrows it, or finds it in
    // the list of the worker's connections as for `shut_down`.
    let result = unsafe {
        libc::setsockopt(
            descriptor,
            libc::SOL_SOCKET,
            SO_BUF_LOCK,
            (&raw const none).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    result == 0
}

/// Bounds the bytes that the kernel takes for a connection before they are read; says whether it did. It does not where that could
/// not be undone.
pub fn bound_receiving(socket: BorrowedFd<'_>, bytes: usize) -> bool {
    unlock_buffers(socket.as_raw_fd()) && SockRef::from(&socket).set_recv_buffer_size(bytes).is_ok()
}

/// Takes that bound off: the buffer grows with what is read, as the kernel sees fit.
pub fn unbound_receiving(descriptor: RawFd) {
    unlock_buffers(descriptor);
}

/// Raises the soft limit of open files to the hard one and returns it.
///
/// # Errors
/// What getrlimit(2) says. That the limit cannot be raised is no error: the present one is returned.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the kernel to write.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let before = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit for the kernel to read.
    let raised = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } == 0;
    Ok(if raised { limit.rlim_cur } else { before })
}

/// Processor time that the calling thread has used.
pub fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the kernel to write.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
