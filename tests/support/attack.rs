//! Clients that mean ill: many connections that ask for little and hold on to it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::time::sleep;

use super::netns;

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Connect, and say nothing.
    Idle,
    /// A byte of a head in a second, without end.
    SlowHeader,
    /// A whole head, then a byte of its body in a second.
    SlowBody,
    /// Ask for four megabytes and read none of them.
    SlowRead,
}

/// An attack under way; it ends when dropped.
pub struct Attack {
    stop: Arc<AtomicBool>,
    open: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Attack {
    /// Keeps `count` connections open from one namespace, from addresses of 127.66.0.0/16; each one that is closed is followed
    /// by another after 100 ms.
    pub fn start(namespace: String, target: SocketAddr, kind: Kind, count: usize) -> Attack {
        let (stop, open): (Arc<AtomicBool>, Arc<AtomicUsize>) = Default::default();
        let thread = {
            let (stop, open) = (stop.clone(), open.clone());
            std::thread::spawn(move || {
                netns::enter(&namespace);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async move {
                    for i in 0..count {
                        tokio::spawn(attacker(i, target, kind, open.clone()));
                        if i % 20 == 19 {
                            sleep(Duration::from_millis(2)).await;
                        }
                    }
                    while !stop.load(Relaxed) {
                        sleep(Duration::from_millis(20)).await;
                    }
                });
                // Its runtime ends, and with it every connection.
            })
        };
        Attack { stop, open, thread: Some(thread) }
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.open.load(Relaxed)
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

async fn attacker(i: usize, target: SocketAddr, kind: Kind, open: Arc<AtomicUsize>) {
    let source = Ipv4Addr::new(127, 66, (i / 250) as u8, (i % 250) as u8 + 1);
    loop {
        let opened = async {
            let socket = TcpSocket::new_v4()?;
            if kind == Kind::SlowRead {
                socket.set_recv_buffer_size(4096)?;
            }
            socket.bind(SocketAddr::V4(SocketAddrV4::new(source, 0)))?;
            socket.connect(target).await
        };
        if let Ok(mut stream) = opened.await {
            open.fetch_add(1, Relaxed);
            hold(&mut stream, kind).await;
            open.fetch_sub(1, Relaxed);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Until the other side ends it.
async fn hold(stream: &mut tokio::net::TcpStream, kind: Kind) {
    let start: &[u8] = match kind {
        Kind::Idle => b"",
        Kind::SlowHeader => b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ",
        Kind::SlowBody => b"POST /attack HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
        Kind::SlowRead => b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n",
    };
    if stream.write_all(start).await.is_err() {
        return;
    }
    let mut byte = [0; 1];
    loop {
        match kind {
            Kind::SlowHeader | Kind::SlowBody => {
                let ended = tokio::select! {
                    read = stream.read(&mut byte) => !matches!(read, Ok(1..)),
                    () = sleep(Duration::from_secs(1)) => false,
                };
                if ended || stream.write_all(b"x").await.is_err() {
                    return;
                }
            }
            Kind::Idle => {
                if !matches!(stream.read(&mut byte).await, Ok(1..)) {
                    return;
                }
            }
            // Without reading, only an error tells that it is over.
            Kind::SlowRead => {
                if stream.ready(tokio::io::Interest::ERROR).await.is_ok() {
                    return;
                }
            }
        }
    }
}
