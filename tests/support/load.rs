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

/// What a client says of a connection that ended without an answer, and within one.
const NO_ANSWER: &str = "closed without an answer";
pub const CUT_ANSWER: &str = "closed within its answer";
/// A client gives up after this.
const PATIENCE: Duration = Duration::from_secs(8);

/// How the client asks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Manner {
    /// Over connections that it keeps, and not over a new one each time.
    pub kept: bool,
    /// One request in so many asks for `/slow`, which takes three seconds; 0: none.
    pub slow_one_in: u32,
    /// How long one try may take; zero: eight seconds.
    pub patience: Duration,
    /// How often it tries; zero: once.
    pub tries: u32,
    /// One request in so many is a POST with an id of its own; 0: none.
    pub post_one_in: u32,
    /// One request in so many asks for `/poison`, which ends the backend that receives it; 0: none.
    pub poison_one_in: u32,
    /// Where plain requests go, without the first slash.
    pub path: &'static str,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// GET `/`.
    Plain,
    /// GET `/slow`.
    Slow,
    /// POST `/` with an id.
    Post,
    /// GET `/poison`.
    Poison,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Sample {
    pub kind: Kind,
    /// Its number, which is the id of a POST.
    pub id: u32,
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

    /// Those of one kind.
    pub fn of(&self, kind: Kind) -> Samples {
        Samples(self.0.iter().filter(|sample| sample.kind == kind).cloned().collect())
    }

    /// Those that were answered as they should.
    pub fn good(&self) -> Samples {
        Samples(self.0.iter().filter(|sample| sample.result.is_ok()).cloned().collect())
    }

    pub fn bad(&self) -> Samples {
        Samples(self.0.iter().filter(|sample| sample.result.is_err()).cloned().collect())
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
        Load::start_with(namespace, target, rate, length, Manner::default())
    }

    /// The same in a manner of choice.
    pub fn start_with(
        namespace: Option<String>,
        target: SocketAddr,
        rate: f64,
        length: Duration,
        manner: Manner,
    ) -> Load {
        Load(std::thread::spawn(move || {
            if let Some(namespace) = namespace {
                netns::enter(&namespace);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(run(target, rate, length, manner))
        }))
    }

    pub fn finish(self) -> Samples {
        self.0.join().expect("the load ends")
    }
}

async fn run(target: SocketAddr, rate: f64, length: Duration, manner: Manner) -> Samples {
    let kept: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
    let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0.. {
        let at = Duration::from_secs_f64(f64::from(i) / rate);
        if at >= length {
            break;
        }
        sleep_until(start + at).await;
        let (samples, kept) = (samples.clone(), kept.clone());
        let one_in = |many: u32| many > 0 && i % many == 0;
        let kind = match () {
            () if one_in(manner.slow_one_in) => Kind::Slow,
            () if i > 0 && one_in(manner.poison_one_in) => Kind::Poison,
            () if one_in(manner.post_one_in) => Kind::Post,
            () => Kind::Plain,
        };
        let start_of_request = match kind {
            Kind::Slow => "GET /slow HTTP/1.1\r\nHost: x\r\n".to_owned(),
            Kind::Post => format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nX-Id: {i}\r\n"),
            Kind::Poison => "GET /poison HTTP/1.1\r\nHost: x\r\n".to_owned(),
            Kind::Plain => format!("GET /{} HTTP/1.1\r\nHost: x\r\n", manner.path),
        };
        tasks.spawn(async move {
            let patience = if manner.patience.is_zero() { PATIENCE } else { manner.patience };
            let mut result = Err(String::new());
            for number in 0..manner.tries.max(1) {
                let begun = if number == 0 { start + at } else { Instant::now() };
                let head = start_of_request.clone();
                let asked = async {
                    match manner.kept {
                        true => request_kept(target, &kept, head).await,
                        false => request(target, head).await,
                    }
                };
                result = match timeout_at(begun + patience, asked).await {
                    Ok(Ok(body)) => Ok(body),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err("no answer in time".to_owned()),
                };
                if result.is_ok() {
                    break;
                }
            }
            let latency = start.elapsed() - at;
            samples.lock().unwrap().push(Sample { kind, id: i, at, latency, result });
        });
        while tasks.try_join_next().is_some() {}
    }
    while tasks.join_next().await.is_some() {}
    let mut samples = std::mem::take(&mut *samples.lock().unwrap());
    samples.sort_by_key(|sample| sample.at);
    Samples(samples)
}

/// One request over a connection that another left behind, or a new one.
async fn request_kept(target: SocketAddr, kept: &Mutex<Vec<TcpStream>>, head: String) -> std::io::Result<String> {
    let old = kept.lock().unwrap().pop();
    let mut stream = match old {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(target).await?;
            stream.set_nodelay(true)?;
            stream
        }
    };
    stream.write_all(format!("{head}\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        let read = stream.read(&mut part).await?;
        if read == 0 {
            return Err(std::io::Error::other(if answer.is_empty() { NO_ANSWER } else { CUT_ANSWER }));
        }
        answer.extend_from_slice(&part[..read]);
        let text = String::from_utf8_lossy(&answer);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let head_lower = head.to_ascii_lowercase();
        let length = head_lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        let length = length.ok_or_else(|| std::io::Error::other("an answer without a length"))?;
        if body.len() < length {
            continue;
        }
        let result = match head.starts_with("HTTP/1.1 200") {
            true => Ok(body.to_owned()),
            false => Err(std::io::Error::other(head.lines().next().unwrap_or_default().to_owned())),
        };
        if !head_lower.contains("connection: close") {
            kept.lock().unwrap().push(stream);
        }
        return result;
    }
}

async fn request(target: SocketAddr, head: String) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        Some((head, _)) => Err(std::io::Error::other(head.lines().next().unwrap_or_default().to_owned())),
        None => Err(std::io::Error::other("empty answer")),
    }
}
