//! Sub-commands and flags, and those commands that only ask a running process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use hyper::{Method, StatusCode};
use serde_json::Value;

use crate::admin::{self, DrainOrder};
use crate::config;

/// Carries clients to a cell that works.
#[derive(Debug, Parser)]
#[command(name = "sailover", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve.
    Run(Run),
    /// Judge configuration files without serving: every error with line and path; exit code 0 or 78.
    Check(Check),
    /// What is up, since when, and why.
    Status {
        /// Whom to ask.
        #[command(flatten)]
        socket: SocketFlag,
        /// As JSON.
        #[arg(long)]
        json: bool,
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
    /// Give a cell no new clients; running sessions go on.
    Drain(DrainFlags),
    /// End a drain.
    Undrain(DrainFlags),
    /// The running configuration, resolved, with hash and generation.
    Config {
        /// Whom to ask.
        #[command(flatten)]
        socket: SocketFlag,
    },
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
    /// Largest accepted configuration in bytes.
    #[arg(long, default_value_t = config::DEFAULT_MAX_BYTES)]
    pub max_config_bytes: usize,
}

/// Where the running process listens for orders.
#[derive(Debug, Args)]
pub struct SocketFlag {
    /// The admin socket.
    #[arg(long, default_value = "/run/sailover/admin.sock")]
    pub socket: PathBuf,
}

/// Flags of `drain` and `undrain`.
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

impl DrainFlags {
    fn order(self) -> (PathBuf, DrainOrder) {
        let order = DrainOrder {
            cell: self.cell,
            pool: self.pool,
            backend: self.backend,
            reason: self.reason,
            seconds: self.duration.map(|duration| duration.as_secs().max(1)),
            force: self.force,
            by: None,
        };
        (self.socket.socket, order)
    }
}

/// `check`: 0 when all files are good, 78 when one is not.
pub fn check(flags: &Check) -> ExitCode {
    let mut good = true;
    for file in &flags.files {
        match config::load(file, flags.max_config_bytes) {
            Ok(loaded) => {
                for warning in &loaded.warnings {
                    eprintln!("{}:{warning} (warning)", file.display());
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

/// The commands that ask a running process.
pub fn ask(command: Command) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return complain(&format!("runtime: {error}")),
    };
    runtime.block_on(async {
        match command {
            Command::Status { socket, json } => {
                match admin::ask(&socket.socket, Method::GET, "/status", Vec::new()).await {
                    Ok((StatusCode::OK, body)) if json => print(&body),
                    Ok((StatusCode::OK, body)) => match serde_json::from_slice(&body) {
                        Ok(status) => print(table(&status).as_bytes()),
                        Err(error) => complain(&format!("the answer is no status: {error}")),
                    },
                    other => failed(other),
                }
            }
            Command::Config { socket } => match admin::ask(&socket.socket, Method::GET, "/config", Vec::new()).await {
                Ok((StatusCode::OK, body)) => print(&body),
                other => failed(other),
            },
            Command::Reload { socket, force } => {
                let path = if force { "/reload?force=true" } else { "/reload" };
                match admin::ask(&socket.socket, Method::POST, path, Vec::new()).await {
                    Ok((_, body)) => verdict(&body),
                    other => failed(other),
                }
            }
            Command::Drain(flags) => send_order(flags, "/drain").await,
            Command::Undrain(flags) => send_order(flags, "/undrain").await,
            Command::Run(_) | Command::Check(_) => ExitCode::from(64),
        }
    })
}

async fn send_order(flags: DrainFlags, path: &str) -> ExitCode {
    let (socket, order) = flags.order();
    let body = serde_json::to_vec(&order).unwrap_or_default();
    match admin::ask(&socket, Method::POST, path, body).await {
        Ok((StatusCode::OK, body)) => print(&body),
        other => failed(other),
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

/// The table of `status`.
fn table(status: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let percent = |value: &Value| format!("{:.0}%", value.as_f64().unwrap_or(0.0) * 100.0);
    let mut out = format!(
        "generation {}, configuration {} loaded {}, {} of {} connections\n",
        status["generation"],
        text(&status["config"]["hash"]),
        text(&status["config"]["loaded_at"]),
        status["connections"]["now"],
        status["connections"]["limit"],
    );
    for listener in status["listeners"].as_array().into_iter().flatten() {
        let local = if listener["local"] == true { "" } else { "  (the address is not local now)" };
        out += &format!(
            "listener {}  {} -> {}{local}\n",
            text(&listener["name"]),
            text(&listener["address"]),
            text(&listener["pool"])
        );
    }
    out += &format!(
        "\n{:<14}{:<12}{:<24}{:<10}{:<10}{:>11}{:>7}  why\n",
        "pool", "cell", "backend", "health", "admin", "share/conf", "conns"
    );
    for pool in status["pools"].as_array().into_iter().flatten() {
        for cell in pool["cells"].as_array().into_iter().flatten() {
            let share = format!("{}/{}", percent(&cell["share"]["now"]), percent(&cell["share"]["configured"]));
            for (i, backend) in cell["backends"].as_array().into_iter().flatten().enumerate() {
                let why = if backend["cause"].is_null() { String::new() } else { text(&backend["cause"]["detail"]) };
                out += &format!(
                    "{:<14}{:<12}{:<24}{:<10}{:<10}{:>11}{:>7}  {why}\n",
                    text(&pool["name"]),
                    text(&cell["name"]),
                    text(&backend["name"]),
                    text(&backend["health"]),
                    text(&backend["admin"]),
                    if i == 0 { share.as_str() } else { "" },
                    backend["in_flight"],
                );
            }
        }
    }
    for drain in status["drains"].as_array().into_iter().flatten() {
        out += &format!("\ndrain: {drain}");
    }
    for (errno, count) in status["local_errors"].as_object().into_iter().flatten() {
        out += &format!("\nerrors of this machine: {errno} {count}");
    }
    let report = &status["config"]["last_reload"];
    if report["ok"] == false {
        out += &format!("\nthe last reload, {}, was refused:\n", text(&report["at"]));
        for error in report["errors"].as_array().into_iter().flatten().take(5) {
            out += &format!("  {}\n", text(error));
        }
    }
    if !out.ends_with('\n') {
        out.push('\n');
    }
    out
}

fn failed(answer: Result<(StatusCode, Vec<u8>), String>) -> ExitCode {
    match answer {
        Ok((_, body)) => complain(String::from_utf8_lossy(&body).trim_end()),
        Err(text) => complain(&text),
    }
}

/// Writes to standard output; a reader that has gone away is no error.
fn print(bytes: &[u8]) -> ExitCode {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| if bytes.ends_with(b"\n") { Ok(()) } else { out.write_all(b"\n") });
    ExitCode::SUCCESS
}

fn complain(text: &str) -> ExitCode {
    eprintln!("sailover: {text}");
    ExitCode::from(1)
}
