//! Clients that each keep one connection for as long as it lives, and come again at once when it ends.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use super::netns;

/// One that is not served within this time comes again.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after the first try that failed, doubled with each that follows, and the longest; a half of it is drawn.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_LONGEST: Duration = Duration::from_secs(2);

/// What became of them.
#[derive(Clone, Debug, Default)]
pub struct Returns {
    /// By backend, the sessions that stand.
    pub standing: BTreeMap<String, usize>,
    /// How long it took each that was lost to stand again.
    pub took: Vec<Duration>,
    /// Tries of those that were lost.
    pub tries: usize,
}

/// So many at once; they end when dropped.
pub struct Crowd {
    stop: Arc<AtomicBool>,
    returns: Arc<Mutex<Returns>>,
    thread: Option<JoinHandle<()>>,
}

impl Crowd {
    /// `count` clients come within a time from one namespace, from addresses of 127.67.0.0/16.
    pub fn start(namespace: String, target: SocketAddr, count: usize, within: Duration) -> Crowd {
        let (stop, returns): (Arc<AtomicBool>, Arc<Mutex<Returns>>) = Default::default();
        let thread = {
            let (stop, returns) = (stop.clone(), returns.clone());
            std::thread::spawn(move || {
                netns::enter(&namespace);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async move {
                    for i in 0..count {
                        tokio::spawn(client(i, within.mul_f64(i as f64 / count as f64), target, returns.clone()));
                    }
                    while !stop.load(Relaxed) {
                        sleep(Duration::from_millis(20)).await;
                    }
                });
            })
        };
        Crowd { stop, returns, thread: Some(thread) }
    }

    /// What became of them until now.
    pub fn returns(&self) -> Returns {
        self.returns.lock().unwrap().clone()
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

async fn client(i: usize, after: Duration, target: SocketAddr, returns: Arc<Mutex<Returns>>) {
    sleep(after).await;
    let source = SocketAddrV4::new(Ipv4Addr::new(127, 67, (i / 250) as u8, (i % 250) as u8 + 1), 0);
    let mut lost = None;
    loop {
        let mut pause = PAUSE;
        let (mut stream, backend) = loop {
            returns.lock().unwrap().tries += usize::from(lost.is_some());
            match timeout(PATIENCE, begin(source.into(), target)).await {
                Ok(Ok(begun)) => break begun,
                _ => sleep(pause.mul_f64(0.5 + 0.5 * fastrand::f64())).await,
            }
            pause = (pause * 2).min(PAUSE_LONGEST);
        };
        {
            let mut returns = returns.lock().unwrap();
            *returns.standing.entry(backend.clone()).or_default() += 1;
            returns.took.extend(lost.map(|lost: Instant| lost.elapsed()));
        }
        while matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {}
        lost = Some(Instant::now());
        *returns.lock().unwrap().standing.entry(backend).or_default() -= 1;
    }
}

/// Connects, asks once, and says who answered.
async fn begin(source: SocketAddr, target: SocketAddr) -> std::io::Result<(TcpStream, String)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(source)?;
    let mut stream = socket.connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    let (mut answer, mut part) = (Vec::new(), [0; 512]);
    loop {
        match stream.read(&mut part).await? {
            0 => return Err(std::io::Error::other("closed without an answer")),
            read => answer.extend_from_slice(&part[..read]),
        }
        // The name of a backend is one letter, and the whole body.
        if let Some((head, body)) = String::from_utf8_lossy(&answer).split_once("\r\n\r\n")
            && !body.is_empty()
        {
            return match head.starts_with("HTTP/1.1 200") {
                true => Ok((stream, body.to_owned())),
                false => Err(std::io::Error::other(head.lines().next().unwrap_or_default().to_owned())),
            };
        }
    }
}
