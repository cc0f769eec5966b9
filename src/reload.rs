//! A new configuration: read, resolve, build, and judge the difference. All of it on a helper thread, and without
//! any effect; `server` binds, swaps and starts the difference when this has succeeded.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::clock;
use crate::config;
use crate::host::{DescriptorLimits, descriptor_limits};
use crate::probe;
use crate::table::{self, Difference, Table};

/// Where the configuration comes from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The file.
    pub file: PathBuf,
    /// Largest accepted size in bytes.
    pub max_bytes: usize,
}

/// What came of one reload.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whether its table went live.
    pub ok: bool,
    /// When, RFC 3339.
    pub at: String,
    /// Generation that is live now.
    pub generation: u64,
    /// Hash of the live file.
    pub hash: String,
    /// What the file would change, or changed.
    pub difference: Difference,
    /// Probers started and stopped.
    pub probers: (usize, usize),
    /// Why it was refused; empty when it was not.
    pub errors: Vec<String>,
    /// What deserves attention.
    pub warnings: Vec<String>,
}

/// A table that is ready to go live.
pub struct Prepared {
    /// The table.
    pub table: Arc<Table>,
    /// Against the previous one.
    pub difference: Difference,
    /// What the process may hold with it.
    pub limits: DescriptorLimits,
    /// Its probers.
    pub probers: probe::Wanted,
    /// What deserves attention.
    pub warnings: Vec<String>,
}

/// Reads the file and builds its table on top of `previous`.
///
/// # Errors
/// Every problem of the file, one line each.
pub fn prepare(
    origin: &Origin,
    previous: Option<&Table>,
    open_files: u64,
    workers: usize,
) -> Result<Prepared, Vec<String>> {
    let loaded = config::load(&origin.file, origin.max_bytes).map_err(|refused| {
        refused.problems.iter().map(|problem| problem.with_file(&origin.file)).collect::<Vec<_>>()
    })?;
    build(origin, loaded, previous, open_files, workers)
}

/// The same of a file that has been read.
///
/// # Errors
/// Every problem that its table has, one line each.
pub fn build(
    origin: &Origin,
    loaded: config::Loaded,
    previous: Option<&Table>,
    open_files: u64,
    workers: usize,
) -> Result<Prepared, Vec<String>> {
    let mut warnings: Vec<String> = loaded.warnings.iter().map(|problem| problem.with_file(&origin.file)).collect();
    // One that has ended is no reason to give up one that has not. But where it is served already, or nothing is, a door
    // that some clients refuse is better than none, and no other change must wait for it.
    let served = |digest: &u128| {
        let listeners = previous.iter().flat_map(|table| &table.config.listeners);
        let pairs = listeners.filter_map(|listener| listener.tls.as_ref()).flat_map(|tls| &tls.certificates);
        let pools = previous.iter().flat_map(|table| &table.config.pools);
        let shown = pools.filter_map(|pool| pool.tls.as_ref()).filter_map(|tls| tls.identity.as_ref());
        pairs.chain(shown).any(|pair| pair.certificate.digest == *digest)
    };
    let (old, new): (Vec<_>, Vec<_>) =
        loaded.ended.iter().partition(|(digest, _)| previous.is_none() || served(digest));
    if !new.is_empty() {
        return Err(new.iter().map(|(_, problem)| problem.with_file(&origin.file)).collect());
    }
    warnings.extend(old.iter().map(|(_, problem)| problem.with_file(&origin.file)));
    let config = Arc::new(loaded.config);
    let listening = config.listeners.iter().map(|listener| listener.bind.len()).sum::<usize>() * workers;
    let backends = config.pools.iter().filter(|pool| pool.probe.is_some());
    let at_most = backends.flat_map(|pool| &pool.cells).map(|cell| cell.backends.len()).sum();
    let http = config.listeners.iter().any(|listener| matches!(listener.face, config::Face::Http(_)));
    let limits = descriptor_limits(open_files, listening, at_most, http);
    let (table, difference) = table::build(config, loaded.hash, previous, limits.connections, clock::now())?;
    let probers = probe::wanted(&table)?;
    Ok(Prepared { table: Arc::new(table), difference, limits, probers, warnings })
}
