//! The process: owns every part, starts them in order, and turns events into changes, one at a time.
//!
//! Start: limits, configuration, log, table, sockets, workers, probers, admin, ready. From then on one loop on the
//! control thread takes signals, orders of operators, the end of a reload, and the second's tick. It waits for
//! no disk: files and tables are read and built on helper threads.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::admin::{self, Admin, DrainOrder, Order, WeightOrder};
use crate::clock;
use crate::config;
use crate::drain::{self, Drain, Keeper, Weight};
use crate::govern;
use crate::host::Host;
use crate::listen;
use crate::log::Logger;
use crate::probe::Probers;
use crate::reload::{self, Origin, Prepared, Report};
use crate::report::Info;
use crate::sys;
use crate::table::{self, Table};
use crate::worker::{Command, Worker};

/// Threads for files, tables and renderings: more than one, so that a stalled disk does not stop a status.
const HELPERS: usize = 4;
/// How often the process looks after itself.
const TICK: Duration = Duration::from_secs(1);
/// Sessions that are left when the program stops have this long to be told of.
const ENDING: Duration = Duration::from_millis(300);
/// Addresses are asked whether they are local once in this many ticks.
const LOCAL_TICKS: u64 = 5;

/// Why the process could not start or go on.
#[derive(Debug)]
pub enum Fatal {
    /// The configuration is wrong: exit code 78.
    Config(String),
    /// Anything else: exit code 1.
    Other(String),
}

impl Fatal {
    /// Prints it and gives the exit code.
    pub fn report(&self) -> ExitCode {
        match self {
            Fatal::Config(text) => {
                eprintln!("{text}");
                ExitCode::from(78)
            }
            Fatal::Other(text) => {
                eprintln!("sailover: {text}");
                ExitCode::from(1)
            }
        }
    }
}

struct Bound {
    stop: watch::Sender<bool>,
    address: SocketAddr,
    local: bool,
}

/// A reload under way, and those who wait for its verdict or for the next one's.
#[derive(Default)]
struct Reloading {
    task: Option<JoinHandle<Result<Prepared, Vec<String>>>>,
    force: bool,
    waiting: Vec<oneshot::Sender<Report>>,
    /// Another one has been asked for meanwhile.
    again: bool,
    again_force: bool,
    waiting_again: Vec<oneshot::Sender<Report>>,
}

struct Control {
    host: Arc<Host>,
    origin: Origin,
    open_files: u64,
    logger: Logger,
    workers: Vec<Worker>,
    bound: HashMap<SocketAddr, Bound>,
    /// Addresses that were given up, and when: for some moments they still serve those who had come.
    closing: HashMap<SocketAddr, Instant>,
    probers: Probers,
    info: Arc<Mutex<Info>>,
    reloading: Reloading,
    admin: Admin,
    admin_http: Option<(SocketAddr, JoinHandle<()>)>,
    /// Keeps drains over a restart; `None` when the service manager gave no place.
    keeper: Option<Keeper>,
    /// The admin socket that is open, which is not the file's when that has changed since.
    socket: Option<PathBuf>,
}

/// Runs the program until it is told to stop.
///
/// # Errors
/// [`Fatal`], with its exit code.
pub fn run(file: PathBuf, max_bytes: usize) -> Result<(), Fatal> {
    let open_files = sys::raise_open_files().map_err(|error| Fatal::Other(format!("limit of open files: {error}")))?;
    let origin = Origin { file, max_bytes };
    // At the start there is nothing to serve yet, and waiting for the disk harms nobody.
    let loaded = config::load(&origin.file, max_bytes).map_err(|refused| Fatal::Config(refused.to_string()))?;
    let workers = loaded.config.workers;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("helper")
        .max_blocking_threads(HELPERS)
        .build()
        .map_err(|error| Fatal::Other(format!("control runtime: {error}")))?;
    let logger = Logger::start(&loaded.config.log);
    let flush = logger.flusher();
    let prepared =
        reload::build(&origin, loaded, None, open_files, workers).map_err(|errors| Fatal::Config(errors.join("\n")))?;
    let result = runtime.block_on(serve(origin, open_files, logger, workers, prepared));
    // Helper threads that wait for a stalled disk are left behind.
    runtime.shutdown_background();
    flush();
    result
}

async fn serve(
    origin: Origin,
    open_files: u64,
    logger: Logger,
    workers: usize,
    prepared: Prepared,
) -> Result<(), Fatal> {
    let other = |text: String| Fatal::Other(text);
    let mut hangups = signal(SignalKind::hangup()).map_err(|error| other(format!("signals: {error}")))?;
    let mut reopens = signal(SignalKind::user_defined1()).map_err(|error| other(format!("signals: {error}")))?;
    let mut terms = signal(SignalKind::terminate()).map_err(|error| other(format!("signals: {error}")))?;
    let mut interrupts = signal(SignalKind::interrupt()).map_err(|error| other(format!("signals: {error}")))?;

    let table = prepared.table.clone();
    let host = Arc::new(Host::new(table.clone(), workers, logger.access()));
    host.set_limits(prepared.limits);
    let mut sockets: Vec<(SocketAddr, Vec<std::net::TcpListener>)> = Vec::new();
    for bind in table.listeners.keys() {
        let shared = shares_port(*bind, sockets.iter().map(|(bind, _)| bind));
        sockets.push((*bind, bind_for(*bind, workers, shared).map_err(other)?));
    }
    let (ended, mut worker_ended) = mpsc::unbounded_channel();
    let workers = (0..workers)
        .map(|number| Worker::start(number, host.clone(), ended.clone()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| other(format!("worker: {error}")))?;

    let info = Arc::new(Mutex::new(Info {
        loaded_at: clock::now().rfc3339(),
        started_at: clock::now().rfc3339(),
        ..Info::default()
    }));
    let (orders, mut orders_in) = mpsc::channel(64);
    let admin = Admin::new(host.clone(), info.clone(), orders);
    let config = table.config.clone();
    let mut control = Control {
        host,
        origin,
        open_files,
        logger,
        workers,
        bound: HashMap::new(),
        closing: HashMap::new(),
        probers: Probers::default(),
        info,
        reloading: Reloading::default(),
        admin,
        admin_http: None,
        socket: None,
        keeper: state_directory().map(|directory| Keeper::new(directory.join("drains.json"))),
    };
    control.restore_drains(&table);
    table::take_effect(&table, clock::now());
    control.open_admin(&config.admin).map_err(other)?;
    control.probers.apply(prepared.probers, &control.host);
    for (bind, sockets) in sockets {
        control.listen(bind, sockets);
    }
    control.publish();
    prepared.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    for (bind, bound) in &control.bound {
        let note = if bound.local { "" } else { "; the address is not local now (a standby's is not)" };
        tracing::info!(%bind, address = %bound.address, "listening{note}");
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        generation = table.generation,
        hash = table.hash,
        connections = prepared.limits.connections,
        open_files,
        "ready"
    );
    notify(&[sd_notify::NotifyState::Ready]);

    let mut governing = tokio::spawn(govern::run(control.host.clone()));
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tick = 0u64;
    loop {
        tokio::select! {
            _ = hangups.recv() => control.reload(false, None),
            _ = reopens.recv() => control.logger.reopen(),
            _ = terms.recv() => break,
            _ = interrupts.recv() => break,
            Some(number) = worker_ended.recv() => {
                return Err(other(format!("worker {number} ended, which must not happen; the process ends with it")));
            }
            _ = &mut governing => {
                return Err(other("judging backends ended, which must not happen; the process ends with it".to_owned()));
            }
            Some(order) = orders_in.recv() => control.obey(order),
            prepared = control.reloading.finished() => control.finish_reload(prepared),
            _ = ticks.tick() => {
                tick += 1;
                control.tick(tick);
            }
        }
    }

    let shutdown = control.host.live.load().config.shutdown;
    control.host.stopping.store(true, Relaxed);
    // The unit's own patience is for the default times; the file may name longer ones.
    let longest = (shutdown.announce + shutdown.drain + Duration::from_secs(10)).as_micros();
    let longest = sd_notify::NotifyState::ExtendTimeoutUsec(longest.try_into().unwrap_or(u32::MAX));
    notify(&[sd_notify::NotifyState::Stopping, longest]);
    tracing::info!(announce = ?shutdown.announce, drain = ?shutdown.drain, "stopping; a second signal stops at once");
    {
        let stop = control.stop(shutdown);
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                _ = terms.recv() => break,
                _ = interrupts.recv() => break,
                // Orders are refused by dropping them: their senders see it.
                Some(order) = orders_in.recv() => drop(order),
            }
        }
    }
    let left = control.end_all().await;
    tracing::info!(left, "stopped");
    Ok(())
}

impl Reloading {
    /// The end of the reload under way; never, when there is none.
    async fn finished(&mut self) -> Result<Prepared, Vec<String>> {
        match &mut self.task {
            Some(task) => {
                let result = task.await;
                self.task = None;
                result.unwrap_or_else(|error| Err(vec![format!("the reload itself failed: {error}")]))
            }
            None => std::future::pending().await,
        }
    }
}

impl Control {
    // ---- reload ----

    /// Begins a reload, or remembers that another one is wanted after the one under way.
    fn reload(&mut self, force: bool, reply: Option<oneshot::Sender<Report>>) {
        if self.reloading.task.is_some() {
            self.reloading.again = true;
            // One word for all that were asked for meanwhile: they become one reload.
            self.reloading.again_force |= force;
            self.reloading.waiting_again.extend(reply);
            return;
        }
        self.reloading.force = force;
        self.reloading.waiting.extend(reply);
        let (origin, open_files, workers) = (self.origin.clone(), self.open_files, self.workers.len());
        let live = self.host.live.load_full();
        notify_reloading();
        self.reloading.task =
            Some(tokio::task::spawn_blocking(move || reload::prepare(&origin, Some(&live), open_files, workers)));
    }

    fn finish_reload(&mut self, prepared: Result<Prepared, Vec<String>>) {
        let mut report = Report { at: clock::now().rfc3339(), ..Report::default() };
        match prepared.and_then(|prepared| self.go_live(prepared, &mut report)) {
            Ok(()) => {
                report.ok = true;
                let difference = &report.difference;
                tracing::info!(
                    generation = self.host.live.load().generation,
                    hash = self.host.live.load().hash,
                    backends = %difference.backends,
                    pools = %difference.pools,
                    listeners = %difference.listeners,
                    probers_started = report.probers.0,
                    probers_stopped = report.probers.1,
                    "reloaded"
                );
                report.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            }
            Err(errors) => {
                // A file may hold a thousand mistakes; the log gets the first ones, the asker all.
                for error in errors.iter().take(20) {
                    tracing::warn!("reload refused: {error}");
                }
                report.errors = errors;
            }
        }
        let table = self.host.live.load_full();
        (report.generation, report.hash) = (table.generation, table.hash.clone());
        self.with_info(|info| {
            if report.ok {
                info.loaded_at = report.at.clone();
            }
            info.last_reload = Some(report.clone());
        });
        self.publish();
        notify(&[sd_notify::NotifyState::Ready]);
        for waiting in self.reloading.waiting.drain(..) {
            let _ = waiting.send(report.clone());
        }
        if std::mem::take(&mut self.reloading.again) {
            let force = std::mem::take(&mut self.reloading.again_force);
            let waiting = std::mem::take(&mut self.reloading.waiting_again);
            self.reload(force, None);
            self.reloading.waiting = waiting;
        }
    }

    /// Binds what is new, swaps, and starts and stops the difference. Before the swap any error leaves everything
    /// as it was.
    fn go_live(&mut self, prepared: Prepared, report: &mut Report) -> Result<(), Vec<String>> {
        report.difference = prepared.difference;
        report.warnings = prepared.warnings;
        let dangers = &report.difference.dangers;
        if !dangers.is_empty() && !self.reloading.force {
            let mut errors: Vec<String> = dangers.iter().map(|danger| format!("the file removes {danger}")).collect();
            errors.push("`sailover reload --force` goes on all the same (SIGHUP never does)".into());
            return Err(errors);
        }
        let table = prepared.table;
        let mut sockets: Vec<(SocketAddr, Vec<std::net::TcpListener>)> = Vec::new();
        for bind in table.listeners.keys().filter(|bind| !self.bound.contains_key(bind)) {
            // One that was given up a moment ago may still serve its last clients.
            self.closing.retain(|_, since| since.elapsed() < listen::FAREWELL * 2);
            let ours = self.bound.keys().chain(self.closing.keys()).chain(sockets.iter().map(|(bind, _)| bind));
            let shared = shares_port(*bind, ours);
            sockets.push((*bind, bind_for(*bind, self.workers.len(), shared).map_err(|error| vec![error])?));
        }
        let before = self.host.live.load_full();
        if table.config.admin.http != before.config.admin.http {
            self.open_admin_http(table.config.admin.http).map_err(|error| vec![error])?;
        }

        self.apply_orders(&table);
        table::take_effect(&table, clock::now());
        self.host.set_limits(prepared.limits);
        self.host.live.store(table.clone());
        for pool in &table.pools {
            let before = before.pools.iter().find(|old| old.name == pool.name);
            if before.is_some_and(|old| old.policy.health != pool.policy.health) {
                pool.members.iter().for_each(|member| member.backend.adopt(&pool.policy.health, clock::now()));
            }
        }

        for (bind, sockets) in sockets {
            tracing::info!(%bind, "listening");
            self.listen(bind, sockets);
        }
        let closing = &mut self.closing;
        self.bound.retain(|bind, bound| {
            let keep = table.listeners.contains_key(bind);
            if !keep {
                tracing::info!(%bind, "no longer listening, as soon as those who are connecting now are served");
                closing.insert(*bind, Instant::now());
                let _ = bound.stop.send(true);
            }
            keep
        });
        report.probers = self.probers.apply(prepared.probers, &self.host);
        if table.config.log != before.config.log {
            self.logger.apply(&table.config.log);
        }
        let mut later = Vec::new();
        if table.config.workers != self.workers.len() {
            later.push(format!("workers: {}", table.config.workers));
        }
        if table.config.admin.socket != before.config.admin.socket {
            later.push(format!("admin.socket: {}", table.config.admin.socket.display()));
        }
        report.warnings.extend(later.iter().map(|key| format!("{key} takes effect at the next start")));
        self.with_info(|info| info.at_next_start = later);
        Ok(())
    }

    // ---- orders ----

    fn obey(&mut self, order: Order) {
        match order {
            Order::Reload { force, reply } => self.reload(force, Some(reply)),
            Order::Drain(order, reply) => {
                let done = self.drain(order);
                self.keep(done, reply);
            }
            Order::Undrain(order, reply) => {
                let done = self.undrain(&order);
                self.keep(done, reply);
            }
            Order::Failback(order, reply) => {
                let _ = reply.send(self.failback(&order));
            }
            Order::Weigh(order, reply) => {
                let done = self.weigh(order);
                self.keep(done, reply);
            }
            Order::Sessions { filter, kick, most, by, reply } => {
                for worker in &self.workers {
                    worker.tell(Command::Sessions { filter: filter.clone(), kick, most, reply: reply.clone() });
                }
                if kick {
                    let shown = serde_json::to_string(&*filter).unwrap_or_default();
                    tracing::info!(filter = shown, by_uid = by, "sessions kicked");
                }
            }
        }
    }

    fn drain(&mut self, order: DrainOrder) -> Result<String, String> {
        let table = self.host.live.load_full();
        let (since, until) = term(order.seconds);
        let drain = Drain {
            cell: order.cell,
            pool: order.pool,
            backend: order.backend,
            reason: order.reason,
            by: order.by,
            since,
            until,
        };
        let text = format!("drained {}", drain.cell);
        self.with_info(|info| info.drains.add(drain.clone(), &table, order.force))?;
        self.apply_orders(&table);
        tracing::info!(
            cell = drain.cell,
            pool = drain.pool,
            backend = drain.backend,
            reason = drain.reason,
            by_uid = drain.by,
            "drained"
        );
        Ok(text)
    }

    fn undrain(&mut self, order: &DrainOrder) -> Result<String, String> {
        let (pool, backend) = (order.pool.as_deref(), order.backend.as_deref());
        let ended = self.with_info(|info| info.drains.remove(&order.cell, pool, backend))?;
        self.apply_orders(&self.host.live.load_full());
        tracing::info!(cell = order.cell, pool, backend, reason = order.reason, by_uid = order.by, "undrained");
        Ok(format!("undrained {} ({ended} drain{})", order.cell, if ended == 1 { "" } else { "s" }))
    }

    fn failback(&self, order: &DrainOrder) -> Result<String, String> {
        let table = self.host.live.load_full();
        let pools = table.pools.iter().filter(|pool| order.pool.as_ref().is_none_or(|name| **name == *pool.name));
        let members = pools.flat_map(|pool| pool.members.iter().map(move |member| (pool, member)));
        let mut named = members
            .filter(|(pool, member)| *pool.cells[member.cell].name == *order.cell)
            .filter(|(_, member)| order.backend.as_ref().is_none_or(|name| **name == *member.backend.name))
            .peekable();
        if named.peek().is_none() {
            return Err(format!("there is no such cell, pool or backend: {}; see `sailover status`", order.cell));
        }
        let let_in = named.filter(|(_, member)| member.backend.let_return()).count();
        tracing::info!(
            cell = order.cell,
            pool = order.pool,
            reason = order.reason,
            by_uid = order.by,
            let_in,
            "failback"
        );
        Ok(format!("{let_in} backend{} of {} may return", if let_in == 1 { "" } else { "s" }, order.cell))
    }

    fn weigh(&mut self, order: WeightOrder) -> Result<String, String> {
        let table = self.host.live.load_full();
        let (since, until) = term(order.seconds);
        let WeightOrder { pool, cell, percent, reason, by, .. } = order;
        let weight = Weight { pool, cell, percent, reason, by, since, until };
        let text = format!("cell {} of pool {} has {percent} % of its configured weight", weight.cell, weight.pool);
        self.with_info(|info| info.drains.weigh(weight.clone(), &table))?;
        self.apply_orders(&table);
        tracing::info!(
            pool = weight.pool,
            cell = weight.cell,
            percent,
            reason = weight.reason,
            by_uid = weight.by,
            "weighted"
        );
        Ok(text)
    }

    /// Answers an operator when the order stands on the disk; it is in effect already.
    fn keep(&self, done: Result<String, String>, reply: oneshot::Sender<Result<String, String>>) {
        let text = match done {
            Ok(text) => text,
            refused => {
                let _ = reply.send(refused);
                return;
            }
        };
        let Some(kept) = self.write_down() else {
            let _ = reply.send(Ok(format!("{text} (until the process ends: there is no state directory)")));
            return;
        };
        tokio::spawn(async move {
            let note = kept.await.err().map(|error| format!(" (until the process ends: {error})"));
            let _ = reply.send(Ok(text + &note.unwrap_or_default()));
        });
    }

    fn write_down(&self) -> Option<impl Future<Output = Result<(), String>> + use<>> {
        let info = self.info.clone();
        let now = move || info.lock().unwrap_or_else(PoisonError::into_inner).drains.clone();
        self.keeper.as_ref().map(|keeper| keeper.keep(now))
    }

    /// Takes up the drains of the process before; before there is anything to serve it may wait for the disk.
    fn restore_drains(&mut self, table: &Table) {
        let Some(path) = self.keeper.as_ref().map(|keeper| keeper.path().to_owned()) else { return };
        match drain::read(&path, SystemTime::now()) {
            Ok(None) => {}
            Ok(Some(drains)) => {
                tracing::info!(drains = drains.list().len(), file = %path.display(), "drains taken up again");
                self.with_info(|info| info.drains = drains);
                self.apply_orders(table);
            }
            Err(error) => tracing::warn!("{error}; starting without drains"),
        }
    }

    fn apply_orders(&self, table: &Table) {
        let drains = self.with_info(|info| info.drains.clone());
        table::apply_orders(
            table,
            |pool, cell, member| drains.covers(pool, cell, member),
            |pool, cell| drains.percent(pool, cell),
        );
    }

    fn with_info<T>(&self, f: impl FnOnce(&mut Info) -> T) -> T {
        f(&mut self.info.lock().unwrap_or_else(PoisonError::into_inner))
    }

    // ---- the second's tick ----

    fn tick(&mut self, tick: u64) {
        if admin::stale_worker(&self.host).is_none() {
            notify(&[sd_notify::NotifyState::Watchdog]);
        }
        self.probers.mend(&self.host);
        let now = clock::now();
        let table = self.host.live.load_full();
        for pool in &table.pools {
            pool.shared.failing.sweep(now);
        }
        if self.with_info(|info| info.drains.expire(SystemTime::now())) {
            tracing::info!("a drain or a weight has reached its end");
            self.apply_orders(&table);
            drop(self.write_down());
        }
        if tick.is_multiple_of(LOCAL_TICKS) {
            for (bind, bound) in &mut self.bound {
                let local = listen::is_local(bound.address);
                if local != bound.local {
                    tracing::info!(%bind, local, "whether the listening address is local has changed");
                }
                bound.local = local;
            }
            self.publish();
        }
    }

    /// Copies for the renderers what only control knows.
    fn publish(&self) {
        let mut bound: Vec<_> = self.bound.iter().map(|(bind, bound)| (*bind, bound.address, bound.local)).collect();
        bound.sort();
        let probers = self.probers.ids();
        self.with_info(|info| {
            info.bound = bound;
            info.probers = probers;
        });
    }

    // ---- parts ----

    fn listen(&mut self, bind: SocketAddr, sockets: Vec<std::net::TcpListener>) {
        let (stop, stopped) = watch::channel(false);
        let address = sockets.first().and_then(|socket| socket.local_addr().ok()).unwrap_or(bind);
        for (worker, socket) in self.workers.iter().zip(sockets) {
            worker.tell(Command::Listen { bind, socket, stop: stopped.clone() });
        }
        self.bound.insert(bind, Bound { stop, address, local: listen::is_local(address) });
    }

    /// The default socket may be out of reach for a user without rights; then the process serves without it. One
    /// that the file names must work.
    fn open_admin(&mut self, admin: &config::Admin) -> Result<(), String> {
        match admin::open_socket(&admin.socket) {
            Ok(listener) => {
                let listener =
                    tokio::net::UnixListener::from_std(listener).map_err(|error| format!("admin socket: {error}"))?;
                tokio::spawn(self.admin.clone().serve_unix(listener));
                self.socket = Some(admin.socket.clone());
            }
            Err(error) if admin.socket_given => return Err(error),
            Err(error) => tracing::warn!("{error}; serving without it (name another with admin.socket)"),
        }
        self.open_admin_http(admin.http)
    }

    fn open_admin_http(&mut self, address: Option<SocketAddr>) -> Result<(), String> {
        let new = match address {
            Some(address) => {
                // Between an address and all of them the port moves while the old socket still has it.
                let shared = self.admin_http.iter().any(|(old, _)| old.port() == address.port() && old.port() != 0);
                let listener = admin::open_http(address, shared)?;
                if let Ok(actual) = listener.local_addr() {
                    tracing::info!(address = %actual, "admin http");
                }
                Some((address, tokio::spawn(self.admin.clone().serve_http(listener))))
            }
            None => None,
        };
        if let Some((_, old)) = std::mem::replace(&mut self.admin_http, new) {
            old.abort();
        }
        Ok(())
    }

    /// Announces, closes the listeners, and waits for the sessions.
    async fn stop(&mut self, shutdown: config::Shutdown) {
        sleep_until(Instant::now() + shutdown.announce).await;
        for bound in self.bound.values() {
            let _ = bound.stop.send(true);
        }
        let deadline = Instant::now() + shutdown.drain;
        // Accept loops serve what is queued for two quiet moments before they close.
        let mut quiet = 0;
        while Instant::now() < deadline && quiet < 15 {
            sleep_until((Instant::now() + Duration::from_millis(10)).min(deadline)).await;
            quiet = if self.host.connections.used() == 0 { quiet + 1 } else { 0 };
        }
    }

    /// Cuts what is left, each with its line in the access log; returns how many there were.
    async fn end_all(&mut self) -> u32 {
        let left = self.host.connections.used();
        if left > 0 {
            self.workers.iter().for_each(|worker| worker.tell(Command::EndAll));
            let patience = Instant::now() + ENDING;
            while Instant::now() < patience && self.host.connections.used() > 0 {
                sleep_until(Instant::now() + Duration::from_millis(5)).await;
            }
        }
        if let Some(path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
        left
    }
}

/// The directory that systemd's `StateDirectory=` made for us, or a person named.
fn state_directory() -> Option<PathBuf> {
    let directory = PathBuf::from(std::env::var_os("STATE_DIRECTORY")?);
    directory.is_absolute().then_some(directory)
}

/// When an order begins, RFC 3339, and at which second since 1970 it ends by itself.
fn term(seconds: Option<u64>) -> (String, Option<u64>) {
    let now = SystemTime::now();
    let until = seconds.and_then(|seconds| now.checked_add(Duration::from_secs(seconds)));
    // Whole seconds are kept: a part of one lets it last longer, not shorter.
    let until = until.and_then(|until| Some(until.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs() + 1));
    (humantime::format_rfc3339_seconds(now).to_string(), until)
}

/// Whether one of our own addresses covers this one, or the other way round: 0.0.0.0:443 and 10.0.0.1:443.
fn shares_port<'a>(bind: SocketAddr, mut ours: impl Iterator<Item = &'a SocketAddr>) -> bool {
    ours.any(|other| other.port() == bind.port() && other.is_ipv4() == bind.is_ipv4() && bind.port() != 0)
}

fn bind_for(bind: SocketAddr, workers: usize, shared: bool) -> Result<Vec<std::net::TcpListener>, String> {
    listen::bind(bind, workers, shared).map_err(|error| format!("listener {bind}: cannot be bound: {error}"))
}

/// Tells the service manager; without one it does nothing.
fn notify(states: &[sd_notify::NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}

fn notify_reloading() {
    if let Ok(now) = sd_notify::NotifyState::monotonic_usec_now() {
        notify(&[sd_notify::NotifyState::Reloading, now]);
    }
}
