//! The open-loop client: requests begin by schedule, whatever became of the ones before, so that a stall hides
//! nothing. Latency counts from the scheduled time.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::netns;

/// A client gives up after this.
const PATIENCE: Duration = Duration::from_secs(8);

/// One request.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Scheduled time from the start of the load.
    pub at: Duration,
    pub latency: Duration,
    /// The backend that answered, or what went wrong.
    pub result: Result<String, String>,
}

/// All requests of one load.
#[derive(Clone, Debug, Default)]
pub struct Samples(pub Vec<Sample>);

impl Samples {
    pub fn between(&self, from: f64, to: f64) -> Samples {
        let (from, to) = (Duration::from_secs_f64(from), Duration::from_secs_f64(to));
        Samples(self.0.iter().filter(|s| s.at >= from && s.at < to).cloned().collect())
    }

    pub fn failed(&self) -> usize {
        self.0.iter().filter(|s| s.result.is_err()).count()
    }

    pub fn over(&self, bound: Duration) -> usize {
        self.0.iter().filter(|s| s.latency > bound).count()
    }

    pub fn quantile(&self, q: f64) -> Duration {
        let mut all: Vec<Duration> = self.0.iter().map(|s| s.latency).collect();
        all.sort();
        let rank = ((all.len() as f64 * q).ceil() as usize).clamp(1, all.len().max(1));
        all.get(rank - 1).copied().unwrap_or_default()
    }

    /// Share of the answers that came from `name`.
    pub fn share(&self, name: &str) -> f64 {
        let of = self.0.iter().filter(|s| s.result.as_deref() == Ok(name)).count();
        of as f64 / self.0.len().max(1) as f64
    }

    pub fn errors(&self) -> Vec<String> {
        let mut errors: Vec<String> = self.0.iter().filter_map(|s| s.result.clone().err()).collect();
        errors.sort();
        errors.dedup();
        errors
    }
}

/// A load under way.
pub struct Load(JoinHandle<Samples>);

impl Load {
    /// `rate` new connections a second with one HTTP/1.1 request each, for `length`, from a namespace or from here.
    pub fn start(namespace: Option<String>, target: SocketAddr, rate: f64, length: Duration) -> Load {
        Load(std::thread::spawn(move || {
            if let Some(namespace) = namespace {
                netns::enter(&namespace);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(run(target, rate, length))
        }))
    }

    pub fn finish(self) -> Samples {
        self.0.join().expect("the load ends")
    }
}

async fn run(target: SocketAddr, rate: f64, length: Duration) -> Samples {
    let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0.. {
        let at = Duration::from_secs_f64(f64::from(i) / rate);
        if at >= length {
            break;
        }
        sleep_until(start + at).await;
        let samples = samples.clone();
        tasks.spawn(async move {
            let result = match timeout_at(start + at + PATIENCE, request(target)).await {
                Ok(Ok(body)) => Ok(body),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            };
            let latency = start.elapsed() - at;
            samples.lock().unwrap().push(Sample { at, latency, result });
        });
        while tasks.try_join_next().is_some() {}
    }
    while tasks.join_next().await.is_some() {}
    let mut samples = std::mem::take(&mut *samples.lock().unwrap());
    samples.sort_by_key(|sample| sample.at);
    Samples(samples)
}

async fn request(target: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        Some((head, _)) => Err(std::io::Error::other(head.lines().next().unwrap_or_default().to_owned())),
        None => Err(std::io::Error::other("empty answer")),
    }
}
