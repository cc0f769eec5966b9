//! The `sailover` program: arguments, then the command, then an exit code.
//!
//! Exit codes: 0, 64 for wrong usage, 78 for a wrong configuration, 1 for anything else.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use sailover::cli::{self, Cli, Command};
use sailover::{demo, server};

/// HTTP makes and drops some hundred small things for each request.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and are no errors.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    match cli.command {
        Command::Run(run) => match server::run(run.config, run.max_config_bytes) {
            Ok(()) => ExitCode::SUCCESS,
            Err(fatal) => fatal.report(),
        },
        Command::Check(check) => cli::check(&check),
        Command::Demo(flags) => demo::run(demo::Show {
            length: Duration::from_secs(flags.seconds),
            rate: flags.rate,
            failover: !flags.no_failover,
        }),
        command => cli::ask(command),
    }
}
