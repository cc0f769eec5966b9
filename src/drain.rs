//! What operators took out: cells, or single backends, by name and until further notice. Drains survive reloads
//! because they name things and do not point to them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::pool::{Cell, Member, Pool};
use crate::table::Table;

/// Drains older than this are not taken up again: nobody remembers why.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Largest accepted state file in bytes.
const STATE: u64 = 1 << 20;

/// Writes the drains by rename, so that a reader sees the old file or the new one.
///
/// # Errors
/// A sentence. Waits for the disk.
pub fn write(path: &Path, drains: &Drains) -> Result<(), String> {
    let fail = |error: io::Error| format!("{}: cannot be written: {error}", path.display());
    let new = path.with_extension("new");
    let mut file = File::create(&new).map_err(fail)?;
    file.write_all(&serde_json::to_vec_pretty(drains).unwrap_or_default()).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    std::fs::rename(&new, path).map_err(fail)
}

/// Reads what [`write()`] wrote, without what has ended since; `None` when there is no such file.
///
/// # Errors
/// A sentence when the file is no list of drains or older than 30 days. Waits for the disk.
pub fn read(path: &Path, now: SystemTime) -> Result<Option<Drains>, String> {
    let fail = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(&format!("cannot be read: {error}"))),
    };
    let written = file.metadata().and_then(|metadata| metadata.modified()).map_err(|error| fail(&error))?;
    if now.duration_since(written).is_ok_and(|age| age > FORGOTTEN) {
        return Err(fail(&"is older than 30 days"));
    }
    let mut bytes = Vec::new();
    file.take(STATE).read_to_end(&mut bytes).map_err(|error| fail(&error))?;
    let mut drains: Drains =
        serde_json::from_slice(&bytes).map_err(|error| fail(&format!("is no list of drains: {error}")))?;
    drains.expire(now);
    Ok(Some(drains))
}

/// One drain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// The cell.
    pub cell: String,
    /// Only in this pool.
    pub pool: Option<String>,
    /// Only this backend.
    pub backend: Option<String>,
    /// Why, in the operator's words.
    pub reason: Option<String>,
    /// Who: the operator's user id on the admin socket.
    pub by: Option<u32>,
    /// When it began, RFC 3339.
    pub since: String,
    /// Seconds since 1970 at which it ends by itself.
    pub until: Option<u64>,
}

impl Drain {
    fn covers(&self, pool: &Pool, cell: &Cell, member: &Member) -> bool {
        *cell.name == *self.cell
            && self.pool.as_ref().is_none_or(|name| *pool.name == **name)
            && self.backend.as_ref().is_none_or(|name| *member.backend.name == **name)
    }

    fn same_target(&self, other: &Drain) -> bool {
        self.cell == other.cell && self.pool == other.pool && self.backend == other.backend
    }
}

/// All drains of the process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Drains {
    list: Vec<Drain>,
}

impl Drains {
    /// Whether a backend is drained.
    pub fn covers(&self, pool: &Pool, cell: &Cell, member: &Member) -> bool {
        self.list.iter().any(|drain| drain.covers(pool, cell, member))
    }

    /// All drains.
    pub fn list(&self) -> &[Drain] {
        &self.list
    }

    /// Adds a drain; one of the same target is replaced.
    ///
    /// # Errors
    /// A sentence when it names nothing in `table`, or would take the last fit backend of a pool without `force`.
    pub fn add(&mut self, drain: Drain, table: &Table, force: bool) -> Result<(), String> {
        self.check(&drain, table)?;
        if !force {
            for pool in &table.pools {
                let mut taken = 0;
                let mut left = 0;
                for member in pool.members.iter().filter(|member| member.backend.fit()) {
                    if drain.covers(pool, &pool.cells[member.cell], member) { taken += 1 } else { left += 1 }
                }
                if taken > 0 && left == 0 {
                    return Err(format!(
                        "this takes the last fit cell of pool {}; say --force if that is what you want",
                        pool.name
                    ));
                }
            }
        }
        self.list.retain(|old| !old.same_target(&drain));
        self.list.push(drain);
        Ok(())
    }

    /// Ends the drains that name the target, and those inside it.
    ///
    /// # Errors
    /// A sentence when there is none.
    pub fn remove(&mut self, cell: &str, pool: Option<&str>, backend: Option<&str>) -> Result<usize, String> {
        let before = self.list.len();
        self.list.retain(|drain| {
            !(drain.cell == cell
                && pool.is_none_or(|pool| drain.pool.as_deref() == Some(pool))
                && backend.is_none_or(|backend| drain.backend.as_deref() == Some(backend)))
        });
        match before - self.list.len() {
            0 => Err(format!("no drain of cell {cell} matches; `sailover status` lists what is drained")),
            n => Ok(n),
        }
    }

    /// Ends what has reached its time, and says whether anything has.
    pub fn expire(&mut self, now: SystemTime) -> bool {
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let before = self.list.len();
        self.list.retain(|drain| drain.until.is_none_or(|until| until > seconds));
        before != self.list.len()
    }

    fn check(&self, drain: &Drain, table: &Table) -> Result<(), String> {
        let cells = || table.pools.iter().flat_map(|pool| pool.cells.iter().map(move |cell| (pool, cell)));
        if !cells().any(|(_, cell)| *cell.name == *drain.cell) {
            let mut names: Vec<&str> = cells().map(|(_, cell)| &*cell.name).collect();
            names.sort_unstable();
            names.dedup();
            return Err(format!("there is no cell {:?}; expected {}", drain.cell, names.join(" | ")));
        }
        let covered = table
            .pools
            .iter()
            .any(|pool| pool.members.iter().any(|member| drain.covers(pool, &pool.cells[member.cell], member)));
        if covered { Ok(()) } else { Err(format!("cell {:?} has no such pool or backend", drain.cell)) }
    }
}
