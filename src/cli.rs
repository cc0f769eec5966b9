//! Sub-commands and flags, and those commands that only ask a running process. `show` makes their answers readable,
//! `eyes` sees files as the service's user does.

mod eyes;
mod show;

use std::io::{IsTerminal, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use hyper::{Method, StatusCode};
use serde_json::Value;

use crate::admin::{self, DrainOrder, ExplainOrder, SessionsOrder, WeightOrder};
use crate::config;
use crate::session::Filter;

use eyes::Eyes;
use show::Screen;

/// Carries clients to a cell that works.
#[derive(Debug, Parser)]
#[command(name = "sailover", version, about, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 64 wrong usage, 78 a configuration was refused, 1 anything else \
    (no answer from the process, an order that was refused).";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve.
    Run(Run),
    /// Judge configuration files without serving: every error with line and path; exit code 0 or 78.
    Check(Check),
    /// The product in half a minute: two toy cells, the proxy and a client on loopback; no set-up, no rights.
    Demo(Demo),
    /// What is up, since when, and why.
    Status {
        /// Whom to ask.
        #[command(flatten)]
        socket: SocketFlag,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// Again every second, until it is interrupted.
        #[arg(long, short)]
        watch: bool,
    },
    /// As SIGHUP, but waits and prints the verdict; exit code 0, or 78 when the file was refused.
    Reload {
        /// Whom to ask.
        #[command(flatten)]
        socket: SocketFlag,
        /// Even when the file removes a listener or a pool in use, or most of the backends.
        #[arg(long)]
        force: bool,
    },
    /// Give a cell no new clients; running sessions go on. Survives reload and restart.
    Drain(DrainFlags),
    /// End a drain.
    Undrain(UndrainFlags),
    /// Let a cell that failed return, where its pool has `failback: manual`.
    Failback(UndrainFlags),
    /// Change a cell's weight in a pool until further notice: a percentage of what is configured.
    Weight(WeightFlags),
    /// Running sessions, oldest first.
    Sessions(SessionsFlags),
    /// End running sessions by a reset, at most 500 a second.
    Kick(KickFlags),
    /// Where a client would go now, and why.
    Explain(ExplainFlags),
    /// The running configuration, resolved, with hash and generation.
    Config {
        /// Whom to ask.
        #[command(flatten)]
        socket: SocketFlag,
    },
    /// The version of this program, and of the running process when there is one.
    Version {
        /// Whom to ask.
        #[command(flatten)]
        socket: SocketFlag,
    },
}

/// Flags of `demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Length of the show in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(6..=600))]
    pub seconds: u64,
    /// New clients a second.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..=2_000))]
    pub rate: u64,
    /// Without failover: each client is bound to one cell, so that the losses show.
    #[arg(long)]
    pub no_failover: bool,
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The configuration.
    #[arg(long, short, default_value = "/etc/sailover/sailover.yaml")]
    pub config: PathBuf,
    /// Largest accepted configuration in bytes.
    #[arg(long, default_value_t = config::DEFAULT_MAX_BYTES)]
    pub max_config_bytes: usize,
}

/// Flags of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Files to judge.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Run by root: whether this user can read what the files name; by default the service's, where there is one.
    #[arg(long)]
    pub user: Option<String>,
    /// Largest accepted configuration in bytes.
    #[arg(long, default_value_t = config::DEFAULT_MAX_BYTES)]
    pub max_config_bytes: usize,
}

/// Where the running process listens for orders.
#[derive(Debug, Args)]
pub struct SocketFlag {
    /// The admin socket.
    #[arg(long, env = "SAILOVER_SOCKET", default_value = "/run/sailover/admin.sock")]
    pub socket: PathBuf,
}

/// Flags of `drain`.
#[derive(Debug, Args)]
pub struct DrainFlags {
    #[command(flatten)]
    socket: SocketFlag,
    /// The cell.
    cell: String,
    /// Only in this pool.
    #[arg(long)]
    pool: Option<String>,
    /// Only this backend of the cell.
    #[arg(long)]
    backend: Option<String>,
    /// Why; shown in status and log.
    #[arg(long)]
    reason: Option<String>,
    /// End by itself after this time, such as 2h.
    #[arg(long = "for", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// Even when it takes the last fit cell of a pool.
    #[arg(long)]
    force: bool,
}

/// Flags of `undrain` and `failback`.
#[derive(Debug, Args)]
pub struct UndrainFlags {
    #[command(flatten)]
    socket: SocketFlag,
    /// The cell.
    cell: String,
    /// Only in this pool.
    #[arg(long)]
    pool: Option<String>,
    /// Only this backend.
    #[arg(long)]
    backend: Option<String>,
    /// Why; shown in the log.
    #[arg(long)]
    reason: Option<String>,
}

/// Flags of `weight`.
#[derive(Debug, Args)]
pub struct WeightFlags {
    #[command(flatten)]
    socket: SocketFlag,
    /// The cell in its pool, as POOL/CELL.
    #[arg(value_name = "POOL/CELL", value_parser = pool_and_cell)]
    cell: (String, String),
    /// Percentage of the configured weight; 0: only clients that no other cell can take; 100: as configured.
    #[arg(value_parser = clap::value_parser!(u32).range(0..=100))]
    percent: u32,
    /// End by itself after this time, such as 2h.
    #[arg(long = "for", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// Why; shown in status and log.
    #[arg(long)]
    reason: Option<String>,
}

/// Which sessions.
#[derive(Debug, Args)]
pub struct Which {
    /// Only at this backend.
    #[arg(long)]
    backend: Option<String>,
    /// Only of this pool.
    #[arg(long)]
    pool: Option<String>,
    /// Only of this client.
    #[arg(long)]
    client: Option<IpAddr>,
}

/// Flags of `sessions`.
#[derive(Debug, Args)]
pub struct SessionsFlags {
    #[command(flatten)]
    socket: SocketFlag,
    #[command(flatten)]
    which: Which,
    /// Show at most this many.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    limit: u64,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Flags of `kick`.
#[derive(Debug, Args)]
pub struct KickFlags {
    #[command(flatten)]
    socket: SocketFlag,
    /// Sessions by the identities that `sessions` shows.
    ids: Vec<String>,
    #[command(flatten)]
    which: Which,
}

/// Flags of `explain`.
#[derive(Debug, Args)]
pub struct ExplainFlags {
    #[command(flatten)]
    socket: SocketFlag,
    /// The client's address.
    client: IpAddr,
    /// Only at this listener.
    #[arg(long)]
    listener: Option<String>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

fn pool_and_cell(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((pool, cell)) if !pool.is_empty() && !cell.is_empty() => Ok((pool.to_owned(), cell.to_owned())),
        _ => Err("expected POOL/CELL, such as shop/aliyun".into()),
    }
}

fn seconds(duration: Option<Duration>) -> Option<u64> {
    duration.map(|duration| duration.as_millis().div_ceil(1_000).max(1) as u64)
}

impl Which {
    fn filter(self, ids: Vec<String>) -> Filter {
        Filter { pool: self.pool, backend: self.backend, client: self.client, ids }
    }
}

/// The user that the package makes for the service.
const SERVICE_USER: &str = "sailover";

/// `check`: 0 when all files are good, 78 when one is not.
pub fn check(flags: &Check) -> ExitCode {
    let eyes = Eyes::of(flags.user.as_deref().unwrap_or(SERVICE_USER)).filter(|_| eyes::we_are_root());
    if let (Some(user), None) = (&flags.user, &eyes) {
        return complain(&format!("--user: there is no user {user:?}, or you are not root"));
    }
    let mut good = true;
    for file in &flags.files {
        match config::load(file, flags.max_config_bytes) {
            Ok(loaded) => {
                if !loaded.ended.is_empty() {
                    good = false;
                    loaded.ended.iter().for_each(|(_, problem)| eprintln!("{}", problem.with_file(file)));
                    continue;
                }
                let unreadable = eyes.as_ref().map_or_else(Vec::new, |eyes| unreadable(&loaded, eyes));
                if !unreadable.is_empty() {
                    good = false;
                    unreadable.iter().for_each(|problem| eprintln!("{}: {problem}", file.display()));
                    continue;
                }
                for warning in &loaded.warnings {
                    eprintln!("{} (warning)", warning.with_file(file));
                }
                println!("{}: ok", file.display());
            }
            Err(refused) => {
                good = false;
                eprintln!("{refused}");
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::from(78) }
}

/// What the service's user could not read or write.
fn unreadable(loaded: &config::Loaded, eyes: &Eyes) -> Vec<String> {
    let mut problems: Vec<String> = loaded.files.iter().filter_map(|file| eyes.read(file).err()).collect();
    problems.extend(loaded.directories.iter().filter_map(|directory| eyes.list(directory).err()));
    if let config::Access::File(log) = &loaded.config.log.access {
        problems.extend(eyes.write(Path::new(log)).err().map(|problem| format!("log.access: {problem}")));
    }
    problems
}

/// The commands that ask a running process.
pub fn ask(command: Command) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return complain(&format!("runtime: {error}")),
    };
    runtime.block_on(async {
        match command {
            Command::Status { socket, json, watch } => status(&socket.socket, json, watch).await,
            Command::Config { socket } => match admin::ask(&socket.socket, Method::GET, "/config", Vec::new()).await {
                Ok((StatusCode::OK, body)) => print(&body),
                other => failed(other),
            },
            Command::Reload { socket, force } => {
                let path = if force { "/reload?force=true" } else { "/reload" };
                match admin::ask(&socket.socket, Method::POST, path, Vec::new()).await {
                    Ok((StatusCode::OK | StatusCode::UNPROCESSABLE_ENTITY, body)) => verdict(&body),
                    other => failed(other),
                }
            }
            Command::Drain(flags) => {
                let order = DrainOrder {
                    cell: flags.cell,
                    pool: flags.pool,
                    backend: flags.backend,
                    reason: flags.reason,
                    seconds: seconds(flags.duration),
                    force: flags.force,
                    by: None,
                };
                send(&flags.socket, "/drain", &order, print).await
            }
            Command::Undrain(flags) => {
                let UndrainFlags { socket, cell, pool, backend, reason } = flags;
                let order = DrainOrder { cell, pool, backend, reason, ..DrainOrder::default() };
                send(&socket, "/undrain", &order, print).await
            }
            Command::Failback(flags) => {
                let UndrainFlags { socket, cell, pool, backend, reason } = flags;
                let order = DrainOrder { cell, pool, backend, reason, ..DrainOrder::default() };
                send(&socket, "/failback", &order, print).await
            }
            Command::Weight(flags) => {
                let (pool, cell) = flags.cell;
                let (percent, reason) = (flags.percent, flags.reason);
                let order = WeightOrder { pool, cell, percent, reason, seconds: seconds(flags.duration), by: None };
                send(&flags.socket, "/weight", &order, print).await
            }
            Command::Sessions(flags) => {
                let order = SessionsOrder { filter: flags.which.filter(Vec::new()), limit: flags.limit as usize };
                send(&flags.socket, "/sessions", &order, |body| shown(body, flags.json, show::sessions)).await
            }
            Command::Kick(flags) => {
                let order = SessionsOrder { filter: flags.which.filter(flags.ids), limit: 1 };
                send(&flags.socket, "/kick", &order, |body| {
                    shown(body, false, |found, _| {
                        let note = found["note"].as_str().map_or(String::new(), |note| format!("{note}\n"));
                        format!("{} sessions are being ended\n{note}", found["count"])
                    })
                })
                .await
            }
            Command::Explain(flags) => {
                let order = ExplainOrder { client: flags.client, listener: flags.listener.clone() };
                send(&flags.socket, "/explain", &order, |body| explained(body, &flags)).await
            }
            Command::Version { socket } => version(&socket.socket).await,
            Command::Run(_) | Command::Check(_) | Command::Demo(_) => ExitCode::from(64),
        }
    })
}

async fn status(socket: &Path, json: bool, watch: bool) -> ExitCode {
    let get = || admin::ask(socket, Method::GET, "/status", Vec::new());
    if !watch {
        return match get().await {
            Ok((StatusCode::OK, body)) => shown(&body, json, show::status),
            other => failed(other),
        };
    }
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        // A process that is restarting is what a watcher waits for: it goes on.
        let text = match get().await {
            Ok((StatusCode::OK, body)) => match serde_json::from_slice::<Value>(&body) {
                Ok(status) if json => format!("{status}\n"),
                Ok(status) => show::status(&status, &Screen::of_stdout()) + "\n",
                Err(error) => format!("the answer is no status: {error}\n"),
            },
            Ok((_, body)) => String::from_utf8_lossy(&body).into_owned(),
            Err(text) => format!("{text}\n"),
        };
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[J" } else { "" };
        let mut out = std::io::stdout().lock();
        if out.write_all(format!("{clear}{text}").as_bytes()).and_then(|()| out.flush()).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}

async fn version(socket: &Path) -> ExitCode {
    let ours = env!("CARGO_PKG_VERSION");
    let mut text = format!("sailover {ours}\n");
    if let Ok((StatusCode::OK, body)) = admin::ask(socket, Method::GET, "/status", Vec::new()).await
        && let Ok(status) = serde_json::from_slice::<Value>(&body)
    {
        let running = status["version"].as_str().unwrap_or("unknown");
        let since = status["started_at"].as_str().unwrap_or("unknown");
        text += &format!("the running process is {running}, since {since}\n");
        if running != ours {
            text += "a restart is due: it still runs the other version\n";
        }
    }
    print(text.as_bytes())
}

fn explained(body: &[u8], flags: &ExplainFlags) -> ExitCode {
    let Ok(found) = serde_json::from_slice::<Value>(body) else {
        return complain(&String::from_utf8_lossy(body));
    };
    if found["ways"].as_array().is_none_or(Vec::is_empty) {
        let names: Vec<&str> = found["listeners"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let wanted = flags.listener.as_deref().unwrap_or_default();
        if names.contains(&wanted) {
            return complain(&format!("listener {wanted:?} answers by itself; none of its routes leads to a pool"));
        }
        return complain(&format!("there is no listener {wanted:?}; expected {}", names.join(" | ")));
    }
    shown(body, flags.json, show::explain)
}

/// Sends an order and hands the body of its answer on.
async fn send(
    socket: &SocketFlag,
    path: &str,
    order: &impl serde::Serialize,
    then: impl FnOnce(&[u8]) -> ExitCode,
) -> ExitCode {
    let body = serde_json::to_vec(order).unwrap_or_default();
    match admin::ask(&socket.socket, Method::POST, path, body).await {
        Ok((StatusCode::OK, body)) => then(&body),
        other => failed(other),
    }
}

/// Prints a JSON answer as it is, or as `show` tells it.
fn shown(body: &[u8], json: bool, show: impl FnOnce(&Value, &Screen) -> String) -> ExitCode {
    match serde_json::from_slice::<Value>(body) {
        Ok(_) if json => print(body),
        Ok(value) => print(show(&value, &Screen::of_stdout()).as_bytes()),
        Err(error) => complain(&format!("the answer cannot be read: {error}")),
    }
}

fn verdict(body: &[u8]) -> ExitCode {
    let Ok(report) = serde_json::from_slice::<Value>(body) else {
        return complain(&String::from_utf8_lossy(body));
    };
    for key in ["warnings", "errors"] {
        for line in report[key].as_array().into_iter().flatten() {
            eprintln!("{}", line.as_str().unwrap_or_default());
        }
    }
    let counts = |kind: &str| {
        let counts = &report["difference"][kind];
        format!("{kind} +{} -{} ~{}", counts["added"], counts["removed"], counts["changed"])
    };
    let difference = ["listeners", "pools", "backends"].map(counts).join(", ");
    for gone in report["difference"]["gone"].as_array().into_iter().flatten().take(50) {
        println!("gone: {}", gone.as_str().unwrap_or_default());
    }
    if report["ok"] == true {
        println!("generation {} is live: {difference}", report["generation"]);
        ExitCode::SUCCESS
    } else {
        println!("refused; generation {} stays live ({difference})", report["generation"]);
        ExitCode::from(78)
    }
}

fn failed(answer: Result<(StatusCode, Vec<u8>), String>) -> ExitCode {
    match answer {
        Ok((_, body)) => complain(String::from_utf8_lossy(&body).trim_end()),
        Err(text) => complain(&text),
    }
}

/// Writes to standard output; a reader that has gone away is no error.
fn print(bytes: &[u8]) -> ExitCode {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| if bytes.ends_with(b"\n") { Ok(()) } else { out.write_all(b"\n") });
    ExitCode::SUCCESS
}

fn complain(text: &str) -> ExitCode {
    eprintln!("sailover: {text}");
    ExitCode::from(1)
}
