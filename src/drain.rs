//! What operators took out: cells, or single backends, by name and until further notice; and how much of its weight a
//! cell was left. Both survive reloads because they name things and do not point to them, and a restart because a
//! [`Keeper`] writes them down.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::pool::{Cell, Member, Pool};
use crate::table::Table;

/// Drains older than this are not taken up again: nobody remembers why.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Longest reason in bytes, and most drains or weights: all of them fit into the state file.
const REASON: usize = 500;
const MOST: usize = 500;
/// Names in an error.
const NAMES: usize = 20;
/// Largest accepted state file in bytes.
const STATE: u64 = 1 << 20;

/// How long an operator waits for the disk before the answer says that the disk has not answered.
const PATIENCE: Duration = Duration::from_secs(2);

/// Writes the orders down where the next process will look, on helper threads, one writer after the other.
#[derive(Clone, Debug)]
pub struct Keeper(Arc<Keeping>);

#[derive(Debug)]
struct Keeping {
    path: PathBuf,
    /// Held by the helper that writes.
    alone: Mutex<()>,
    /// Whether a writer waits for its turn; it will write whatever is ordered until then.
    unwritten: AtomicBool,
    /// Counts the orders.
    ordered: AtomicU64,
    /// The last order that a writer came to, and what went wrong with it.
    written: watch::Sender<(u64, Option<String>)>,
}

impl Keeper {
    /// One that writes to `path`.
    pub fn new(path: PathBuf) -> Keeper {
        let (written, _) = watch::channel((0, None));
        Keeper(Arc::new(Keeping {
            path,
            alone: Mutex::default(),
            unwritten: AtomicBool::new(false),
            ordered: AtomicU64::new(0),
            written,
        }))
    }

    /// Where it writes.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Begins to write what `now` gives at the time of writing; the result tells when that stands on the disk, or what
    /// became of it, within two seconds. A stalled disk holds two helpers at most.
    pub fn keep<F>(&self, now: F) -> impl Future<Output = Result<(), String>> + use<F>
    where
        F: FnOnce() -> Drains + Send + 'static,
    {
        let keeping = self.0.clone();
        let order = keeping.ordered.fetch_add(1, SeqCst) + 1;
        let mut written = keeping.written.subscribe();
        if !keeping.unwritten.swap(true, SeqCst) {
            tokio::task::spawn_blocking(move || {
                let _alone = keeping.alone.lock().unwrap_or_else(PoisonError::into_inner);
                keeping.unwritten.store(false, SeqCst);
                let order = keeping.ordered.load(SeqCst);
                let error = write(&keeping.path, &now()).err();
                if let Some(error) = &error {
                    tracing::warn!("{error}; the drains will not survive a restart");
                }
                keeping.written.send_replace((order, error));
            });
        }
        async move {
            let seen = timeout(PATIENCE, written.wait_for(|(done, _)| *done >= order)).await;
            match seen {
                Ok(Ok(seen)) => seen.1.clone().map_or(Ok(()), Err),
                _ => Err("the disk has not answered yet".into()),
            }
        }
    }
}

/// Writes by rename, so that a reader sees the old file or the new one.
fn write(path: &Path, drains: &Drains) -> Result<(), String> {
    let fail = |error: io::Error| format!("{}: cannot be written: {error}", path.display());
    let new = path.with_extension("new");
    let mut file = File::create(&new).map_err(fail)?;
    file.write_all(&serde_json::to_vec_pretty(drains).unwrap_or_default()).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    std::fs::rename(&new, path).map_err(fail)?;
    // The rename itself is on the disk when the directory is.
    path.parent().map_or(Ok(()), |directory| File::open(directory).and_then(|it| it.sync_all())).map_err(fail)
}

/// Reads what a [`Keeper`] wrote, without what has ended since; `None` when there is no such file.
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

/// What is ordered must fit into the file that keeps it.
fn bounded(reason: Option<&str>, orders: usize) -> Result<(), String> {
    if reason.is_some_and(|reason| reason.len() > REASON) {
        return Err(format!("the reason is longer than {REASON} bytes"));
    }
    if orders >= MOST { Err(format!("there are {MOST} such orders already; end some first")) } else { Ok(()) }
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
            && self.backend.as_ref().is_none_or(|backend| member.backend.is_called(backend))
    }

    fn same_target(&self, other: &Drain) -> bool {
        self.cell == other.cell && self.pool == other.pool && self.backend == other.backend
    }
}

/// How much of its configured weight an operator left a cell of one pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weight {
    /// The pool.
    pub pool: String,
    /// The cell.
    pub cell: String,
    /// 0 to 99; at 0 the cell gets only those whom no other cell can take.
    pub percent: u32,
    /// Why, in the operator's words.
    pub reason: Option<String>,
    /// Who: the operator's user id on the admin socket.
    pub by: Option<u32>,
    /// When it began, RFC 3339.
    pub since: String,
    /// Seconds since 1970 at which it ends by itself.
    pub until: Option<u64>,
}

/// All that operators ordered and that still holds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Drains {
    list: Vec<Drain>,
    #[serde(default)]
    weights: Vec<Weight>,
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

    /// All weights that are not as configured.
    pub fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// How much of its configured weight a cell has, 0 to 100.
    pub fn percent(&self, pool: &Pool, cell: &Cell) -> u32 {
        let of_cell = self.weights.iter().find(|weight| *weight.pool == *pool.name && *weight.cell == *cell.name);
        of_cell.map_or(100, |weight| weight.percent.min(100))
    }

    /// Sets a cell's weight; 100 % takes back what was set before.
    ///
    /// # Errors
    /// A sentence when it names nothing in `table`, or is beyond 100.
    pub fn weigh(&mut self, weight: Weight, table: &Table) -> Result<(), String> {
        let of_it = |old: &Weight| (&old.pool, &old.cell) == (&weight.pool, &weight.cell);
        if weight.percent == 100 && self.weights.iter().any(of_it) {
            // Whether or not the file still has the cell.
            self.weights.retain(|old| !of_it(old));
            return Ok(());
        }
        let Some(pool) = table.pools.iter().find(|pool| *pool.name == *weight.pool) else {
            let names: Vec<&str> = table.pools.iter().map(|pool| &*pool.name).take(NAMES).collect();
            return Err(format!("there is no pool {:?}; expected {}", weight.pool, names.join(" | ")));
        };
        if !pool.cells.iter().any(|cell| *cell.name == *weight.cell) {
            let names: Vec<&str> = pool.cells.iter().map(|cell| &*cell.name).take(NAMES).collect();
            return Err(format!("pool {} has no cell {:?}; expected {}", weight.pool, weight.cell, names.join(" | ")));
        }
        if weight.percent > 100 {
            return Err(format!("{} % is more than the cell's configured weight; expected 0 to 100", weight.percent));
        }
        bounded(weight.reason.as_deref(), self.weights.len())?;
        self.weights.retain(|old| !of_it(old));
        if weight.percent < 100 {
            self.weights.push(weight);
        }
        Ok(())
    }

    /// Adds a drain; one of the same target is replaced.
    ///
    /// # Errors
    /// A sentence when it names nothing in `table`, or would take the last fit backend of a pool without `force`.
    pub fn add(&mut self, drain: Drain, table: &Table, force: bool) -> Result<(), String> {
        self.check(&drain, table)?;
        bounded(drain.reason.as_deref(), self.list.len())?;
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
        let before = self.list.len() + self.weights.len();
        self.list.retain(|drain| drain.until.is_none_or(|until| until > seconds));
        self.weights.retain(|weight| weight.until.is_none_or(|until| until > seconds));
        before != self.list.len() + self.weights.len()
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
