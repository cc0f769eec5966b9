//! Clients that stay: a stream of events, an upload that takes its time, and a WebSocket that says nothing for long.

use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::netns;

/// Of each kind.
pub const EACH: usize = 4;
/// Time between two bytes of an upload, and the longest wait for what must come at once.
const BETWEEN: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(3);

/// What became of one.
#[derive(Clone, Debug)]
pub struct Stay {
    /// Its kind and number, which is its `X-Id`.
    pub id: String,
    /// When it ended before its time, in seconds, and how.
    pub cut: Option<(f64, String)>,
}

/// Some of each kind under way.
pub struct Long(JoinHandle<Vec<Stay>>);

impl Long {
    /// They stay for `length`.
    pub fn start(namespace: String, target: SocketAddr, length: Duration) -> Long {
        Long(std::thread::spawn(move || {
            netns::enter(&namespace);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let begin = Instant::now();
                let end = begin + length;
                let mut tasks = tokio::task::JoinSet::new();
                for (i, kind) in ["events", "upload", "socket"].repeat(EACH).into_iter().enumerate() {
                    let id = format!("{kind}-{i}");
                    tasks.spawn(async move {
                        let stayed = match kind {
                            "events" => events(target, &id, end).await,
                            "upload" => upload(target, &id, end).await,
                            _ => socket(target, &id, end).await,
                        };
                        let cut = stayed.err().map(|error| (begin.elapsed().as_secs_f64(), error.to_string()));
                        Stay { id, cut }
                    });
                }
                tasks.join_all().await
            })
        }))
    }

    pub fn finish(self) -> Vec<Stay> {
        self.0.join().expect("they end")
    }
}

fn ended<T>(how: &str) -> std::io::Result<T> {
    Err(std::io::Error::other(how.to_owned()))
}

/// Says a head, and reads one.
async fn open(target: SocketAddr, head: &str, status: &str) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(head.as_bytes()).await?;
    if status.is_empty() {
        return Ok(stream);
    }
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await?);
    }
    let answer = String::from_utf8_lossy(&answer);
    if answer.starts_with(status) { Ok(stream) } else { ended(answer.lines().next().unwrap_or_default()) }
}

async fn events(target: SocketAddr, id: &str, end: Instant) -> std::io::Result<()> {
    let head = format!("GET /events HTTP/1.1\r\nHost: x\r\nX-Id: {id}\r\n\r\n");
    let mut stream = open(target, &head, "HTTP/1.1 200").await?;
    let mut last = Instant::now();
    let mut buffer = [0; 1024];
    loop {
        let read = tokio::select! {
            read = stream.read(&mut buffer) => read?,
            () = sleep_until(end) => break,
        };
        if read == 0 {
            return ended("the events end");
        }
        last = Instant::now();
    }
    // One that is silently dead is as bad.
    if last.elapsed() > EVENT_EVERY + PATIENCE { ended("no event came") } else { Ok(()) }
}

/// Time between two events of a backend.
pub const EVENT_EVERY: Duration = Duration::from_secs(6);

async fn upload(target: SocketAddr, id: &str, end: Instant) -> std::io::Result<()> {
    let bytes = 1 + (end.saturating_duration_since(Instant::now()).as_millis() / BETWEEN.as_millis()) as usize;
    let head = format!("POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: {bytes}\r\nX-Id: {id}\r\n\r\n");
    let mut stream = open(target, &head, "").await?;
    let mut answer = [0; 512];
    for _ in 0..bytes {
        stream.write_all(b"x").await?;
        tokio::select! {
            read = stream.read(&mut answer) => {
                let answer = String::from_utf8_lossy(&answer[..read?]).into_owned();
                return match answer.starts_with("HTTP/1.1 200") && Instant::now() + BETWEEN * 2 > end {
                    true => Ok(()),
                    false => ended(answer.lines().next().unwrap_or("closed before its end")),
                };
            }
            () = sleep(BETWEEN) => {}
        }
    }
    let read = timeout(PATIENCE, stream.read(&mut answer)).await??;
    if answer[..read].starts_with(b"HTTP/1.1 200") { Ok(()) } else { ended("no good answer") }
}

async fn socket(target: SocketAddr, id: &str, end: Instant) -> std::io::Result<()> {
    let head = format!(
        "GET /socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Id: {id}\r\n\r\n"
    );
    let mut stream = open(target, &head, "HTTP/1.1 101").await?;
    let mut echo = [0; 6];
    tokio::select! {
        read = stream.read(&mut echo) => return ended(&format!("{read:?} out of nothing")),
        () = sleep_until(end) => {}
    }
    stream.write_all(b"there?").await?;
    timeout(PATIENCE, stream.read_exact(&mut echo)).await??;
    if &echo == b"there?" { Ok(()) } else { ended("something else came back") }
}
