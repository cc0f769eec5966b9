//! Writes the manual pages and the shell completions, from the command line's own definition and from
//! `configs/reference.yaml`, and the licences of all crates that the program is linked with, into the directory that is
//! given: `cargo run --example manual -- DIRECTORY`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

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
    licences(&root.join("usr/share/doc/sailover"))?;
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

/// Every crate that the program is linked with, and the texts of their licences, each once.
fn licences(place: &Path) -> io::Result<()> {
    fs::create_dir_all(place)?;
    let cargo = |arguments: &[&str]| -> io::Result<Vec<u8>> {
        let output =
            Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args(arguments).output()?;
        if output.status.success() { Ok(output.stdout) } else { Err(io::Error::other(format!("cargo {arguments:?}"))) }
    };
    let tree = cargo(&["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"])?;
    let tree = String::from_utf8_lossy(&tree).into_owned();
    let linked = |name: &str, version: &str| tree.lines().any(|line| line.starts_with(&format!("{name} v{version}")));
    let metadata: serde_json::Value =
        serde_json::from_slice(&cargo(&["metadata", "--locked", "--format-version", "1"])?)
            .map_err(io::Error::other)?;
    let mut crates = Vec::new();
    // Text of a licence to the crates that come under it.
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let word = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
        let (name, version) = (word("name"), word("version"));
        if package["source"].is_null() || !linked(&name, &version) {
            continue;
        }
        crates.push(format!("{name} {version}: {}", word("license")));
        let directory = PathBuf::from(word("manifest_path")).parent().map(Path::to_owned).unwrap_or_default();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let file = entry.file_name().to_string_lossy().to_ascii_uppercase();
            let kind = ["LICENSE", "LICENCE", "COPYING", "NOTICE"].into_iter().any(|start| file.starts_with(start));
            if kind && entry.file_type()?.is_file() && file != "LICENSE-APACHE" {
                texts.entry(fs::read_to_string(entry.path())?).or_default().push(format!("{name} {version}"));
            }
        }
    }
    crates.sort();
    assert!(crates.len() > 50, "the list of crates cannot be whole: {crates:?}");
    let mut out = format!(
        "The crates that sailover is linked with, and their licences. The Apache License, Version 2.0 stands in\n\
         /usr/share/common-licenses/Apache-2.0.\n\n{}\n",
        crates.join("\n")
    );
    for (text, of) in texts {
        out += &format!("\n{}\n{}:\n\n{}\n", "-".repeat(100), of.join(", "), text.trim_end());
    }
    fs::write(place.join("crates.txt"), out)
}
