//! Writes the manual pages and the shell completions, from the command line's own definition and from
//! `configs/reference.yaml`, into the directory that is given: `cargo run --example manual -- DIRECTORY`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};
use sailover::cli::Cli;

fn main() -> io::Result<()> {
    let root = PathBuf::from(std::env::args_os().nth(1).ok_or_else(|| io::Error::other("name a directory"))?);
    let pages = root.join("usr/share/man/man1");
    fs::create_dir_all(&pages)?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    clap_mangen::generate_to(command.clone(), &pages)?;
    configuration(&root.join("usr/share/man/man5"))?;
    for (shell, place, name) in [
        (Shell::Bash, "usr/share/bash-completion/completions", "sailover"),
        (Shell::Fish, "usr/share/fish/vendor_completions.d", "sailover.fish"),
        (Shell::Zsh, "usr/share/zsh/vendor-completions", "_sailover"),
    ] {
        let place = root.join(place);
        fs::create_dir_all(&place)?;
        let written = generate_to(shell, &mut command, "sailover", &place)?;
        fs::rename(written, place.join(name))?;
    }
    Ok(())
}

/// sailover.yaml(5): the reference file as it stands, which a test keeps equal to the program's defaults.
fn configuration(place: &Path) -> io::Result<()> {
    fs::create_dir_all(place)?;
    let reference = include_str!("../configs/reference.yaml");
    // In a manual page a line may not begin with a dot or an apostrophe, and a backslash begins an escape.
    let quoted: Vec<String> =
        reference.lines().map(|line| format!("\\&{}", line.replace('\\', "\\e").replace('-', "\\-"))).collect();
    let page = format!(
        ".TH sailover.yaml 5 \"\" \"sailover {version}\"\n\
         .SH NAME\nsailover.yaml \\- configuration of the failover proxy sailover\n\
         .SH SYNOPSIS\n/etc/sailover/sailover.yaml\n\
         .SH DESCRIPTION\nOne YAML file, and those that it includes. It is judged as a whole: a file with a mistake changes \
         nothing, and\n.B sailover check\ntells all mistakes with their lines.\n\
         .PP\nEvery key follows, with its unit and its default. What stands here is what the program does without it.\n\
         .PP\n.nf\n{reference}\n.fi\n\
         .SH SEE ALSO\n.BR sailover (1)\n",
        version = env!("CARGO_PKG_VERSION"),
        reference = quoted.join("\n"),
    );
    fs::write(place.join("sailover.yaml.5"), page)
}
