//! Which backend next: first the cell, then the backend in it. Time and randomness are arguments; no I/O.
//!
//! What depends on health is computed once per transition into a [`Plan`], so that a choice costs the same for
//! ten backends and for ten thousand. A plan may be a moment old: every candidate is checked again against its
//! backend's own state before it is taken.
//!
//! A client's order of candidates: a due trial; the fit backends by share, tier by tier, each tier's suspects
//! after its fit ones; backends nothing is known about; and, when there is nothing else for this client, those that are
//! down, the least recently failed first. Untried always comes before tried.

mod draw;

use std::net::IpAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Acquire, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use fastrand::Rng;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use draw::{Alias, Maglev, turns};

use crate::backend::{Backend, PoolShared};
use crate::clock::Time;
use crate::config::{Affinity, Balance, FirstByte, HttpVersion, OnDown, Queue, Rate, Replay, WhenAllDown};
use crate::health::{self, State};
use crate::limits::{Bucket, Gauge, Permit};
use crate::metrics::{Histogram, TIME_BOUNDS};
use crate::sniff::ProxyVersion;
use crate::tls::Upstream;
use crate::version;

/// A cell carries its full share while at least 1/1.4 of its weight is fit (Envoy's overprovisioning factor).
const OVERPROVISION: f64 = 1.4;
/// While a ramp is under way, or all are down, a plan is good for this long.
const PLAN_MOVING: Duration = Duration::from_millis(100);
/// A plan of more members than this is good for at least this long.
const PLAN_SMALL: usize = 256;
const PLAN_LEAST: Duration = Duration::from_millis(5);
/// Draws before a cell is searched one by one; a search happens only when most of a cell was tried or is full.
const DRAWS: usize = 4;
/// `least_connections` looks at all backends of a cell up to this many, and at as many random ones beyond.
const LEAST_LOOKED_AT: usize = 16;

/// A cell has clearly more than its share with this many times its share.
const OVER: f64 = 1.1;

/// Most of a cell's capacity that is saved up.
const CAPACITY_SAVED: Duration = Duration::from_millis(50);
/// A suspect that has given nobody a first byte for this long does not keep its clients.
const ANSWERS_NOBODY: Duration = Duration::from_millis(250);
/// Backends that await a trial and are asked for one client.
const TRIALS_LOOKED_AT: usize = 8;

/// What a pool's configuration says to the data plane. A running session keeps it, and nothing else of a table.
#[derive(Debug, PartialEq)]
#[allow(missing_docs)] // Each is the key of the same name in configs/reference.yaml.
pub struct Policy {
    pub health: health::Policy,
    pub balance: Balance,
    pub affinity: Affinity,
    pub connect_timeout: Duration,
    pub attempts: u32,
    pub race: bool,
    pub source: Vec<IpAddr>,
    pub send_proxy: Option<ProxyVersion>,
    pub http: HttpVersion,
    pub tls: Option<Arc<Upstream>>,
    pub request_timeout: Duration,
    pub idle: Duration,
    pub half_close: Duration,
    pub unacked: Duration,
    pub on_down: OnDown,
    pub rebalance: Option<Rate>,
    pub drain: Duration,
    pub when_all_down: WhenAllDown,
    pub max_connections: u32,
    pub queue: Queue,
    pub first_byte: FirstByte,
    pub first_byte_time: Duration,
    pub replay: Option<Replay>,
    pub data_version: Option<version::Wanted>,
}

/// The configuration's defaults, without a bound on connections.
impl Default for Policy {
    fn default() -> Self {
        Policy {
            health: health::Policy::default(),
            balance: Balance::TwoChoices,
            affinity: Affinity::None,
            connect_timeout: Duration::from_secs(3),
            attempts: 5,
            race: true,
            source: Vec::new(),
            send_proxy: None,
            http: HttpVersion::Auto,
            tls: None,
            request_timeout: Duration::from_secs(30),
            idle: Duration::from_secs(3_600),
            half_close: Duration::from_secs(30),
            unacked: Duration::from_secs(15),
            on_down: OnDown::Stuck,
            rebalance: None,
            drain: Duration::from_secs(30),
            when_all_down: WhenAllDown::TryAll,
            max_connections: u32::MAX,
            queue: Queue { length: 200, timeout: Duration::from_secs(1) },
            first_byte: FirstByte::Learn,
            first_byte_time: Duration::from_secs(10),
            replay: None,
            data_version: None,
        }
    }
}

/// What is kept of a cell's place in a pool over reloads.
#[derive(Debug)]
pub struct CellShared {
    /// Handshakes, in seconds.
    pub handshake: Histogram,
    /// From the client's bytes to the first byte of an answer, in seconds.
    pub first_byte: Histogram,
    /// How much of its configured weight an operator left it, 0 to 100.
    pub percent: AtomicU32,
    /// Connections, where the cell has a bound.
    pub connections: Arc<Gauge>,
    /// New clients, where it has a capacity.
    pub clients: Bucket,
}

impl Default for CellShared {
    fn default() -> Self {
        CellShared {
            handshake: Histogram::new(&TIME_BOUNDS),
            first_byte: Histogram::new(&TIME_BOUNDS),
            percent: AtomicU32::new(100),
            connections: Arc::default(),
            clients: Bucket::default(),
        }
    }
}

/// One backend's place in a pool.
#[derive(Debug)]
pub struct Member {
    /// The backend.
    pub backend: Arc<Backend>,
    /// Index of its cell.
    pub cell: usize,
    /// Share inside the cell.
    pub weight: u32,
    /// Most connections at once.
    pub max_connections: u32,
}

/// One cell's place in a pool.
#[derive(Debug)]
pub struct Cell {
    /// Its name.
    pub name: Arc<str>,
    /// 0 first.
    pub tier: u8,
    /// Share against the other cells of its tier.
    pub weight: u32,
    /// Its members.
    pub members: Range<usize>,
    /// Most connections at once.
    pub max_connections: u32,
    /// New clients that it can take.
    pub capacity: Option<Rate>,
    /// What survives it.
    pub shared: Arc<CellShared>,
    hash: u64,
    maglev: Option<Maglev>,
    turn: AtomicUsize,
}

impl Cell {
    /// Its weight as it counts now: what was configured, and what an operator left of it.
    pub fn weight_now(&self) -> f64 {
        f64::from(self.weight) * f64::from(self.shared.percent.load(Relaxed)) / 100.0
    }
}

/// A cell before its pool is put together.
#[derive(Debug)]
pub struct NewCell {
    /// Its name.
    pub name: Arc<str>,
    /// 0 first.
    pub tier: u8,
    /// Share against the other cells of its tier.
    pub weight: u32,
    /// Number of its members.
    pub count: usize,
    /// Most connections at once; `u32::MAX`: no bound.
    pub max_connections: u32,
    /// New clients that it can take.
    pub capacity: Option<Rate>,
    /// What survives it.
    pub shared: Arc<CellShared>,
}

/// The same thing served from several cells.
#[derive(Debug)]
pub struct Pool {
    /// Its name.
    pub name: Arc<str>,
    /// Its policy.
    pub policy: Arc<Policy>,
    /// Its cells.
    pub cells: Vec<Cell>,
    /// The backends of all its cells, cell by cell.
    pub members: Vec<Member>,
    /// What survives it.
    pub shared: Arc<PoolShared>,
    plan: ArcSwap<Plan>,
    planning: Mutex<()>,
}

/// What depends on health, as it was at one moment.
#[derive(Debug, Default)]
pub struct Plan {
    epoch: u64,
    built: Time,
    /// Some share changes with time alone.
    moving: bool,
    cells: Vec<CellPlan>,
    tiers: Vec<u8>,
    trials: Vec<usize>,
    unknown: Vec<usize>,
    down: Vec<usize>,
}

#[derive(Debug, Default)]
struct CellPlan {
    /// Share of the pool's new clients, 0 to 1.
    share: f64,
    /// How much of its own clients the cell keeps, 0 to 1.
    keeps: f64,
    /// The same if nothing were drained; negative when everything is.
    could_keep: f64,
    /// Mean share that the fit members have of their full weight, by ramp and pace, 0 to 1.
    present: f64,
    fit: Vec<usize>,
    suspect: Vec<usize>,
    draw: Alias,
    turns: Vec<usize>,
    /// How much of their full weight those of `fit` have, of what the one with the most has, 0 to 1.
    presence: Vec<f64>,
}

/// What one client wants.
#[derive(Clone, Copy, Debug, Default)]
pub struct Want<'a> {
    /// Hash of what pins the client; `None` without affinity.
    pub pin: Option<u64>,
    /// Members already tried.
    pub tried: &'a [usize],
    /// For a race: the cell that is silent.
    pub racing: Option<usize>,
    /// The member where the client was before, and where it belongs.
    pub home: Option<usize>,
    /// Members that he should not go to, though he has not tried them.
    pub avoid: &'a [usize],
    /// Whether he may be sent to a backend in doubt, to see how that does.
    pub trial: Trial,
}

/// Whether a client may try a backend that is in doubt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trial {
    /// He has his place.
    #[default]
    No,
    /// He would lose something: when nobody else has tried it for some time.
    Late,
    /// Yes.
    Yes,
}

/// A choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This member.
    Member(usize),
    /// This member, which is in doubt: another attempt belongs beside it.
    Doubtful(usize),
    /// Every backend that could serve has all the connections it may have.
    Full,
    /// Nothing is left to try.
    Nothing,
}

/// Hash of a server name for affinity.
pub fn pin_name(name: &str) -> u64 {
    xxh3_64(name.as_bytes())
}

/// Hash of a client's address for affinity.
pub fn pin(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(v4) => xxh3_64(&v4.octets()),
        IpAddr::V6(v6) => xxh3_64(&v6.octets()),
    }
}

impl Pool {
    /// Puts a pool together. `members` lists the backends of `cells` one cell after the other.
    pub fn new(shared: Arc<PoolShared>, policy: Arc<Policy>, cells: Vec<NewCell>, members: Vec<Member>) -> Pool {
        let mut first = 0;
        let cells = cells
            .into_iter()
            .map(|NewCell { name, tier, weight, count, max_connections, capacity, shared }| {
                let range = first..first + count;
                first += count;
                let maglev = (policy.affinity != Affinity::None)
                    .then(|| Maglev::new(members[range.clone()].iter().map(|m| (m.backend.address, m.weight))));
                let hash = xxh3_64(name.as_bytes());
                let turn = AtomicUsize::new(0);
                Cell { name, tier, weight, members: range, max_connections, capacity, shared, hash, maglev, turn }
            })
            .collect();
        Pool {
            name: shared.name.clone(),
            policy,
            cells,
            members,
            shared,
            plan: ArcSwap::from_pointee(Plan::default()),
            planning: Mutex::new(()),
        }
    }

    /// Where a client would go now, without going: the choice that its pin makes, and for each member the chance that a
    /// client without one (or whose own place has nothing) comes to it, loads apart.
    pub fn explain(&self, pin: Option<u64>, now: Time) -> (Option<Choice>, Vec<f64>) {
        let plan = self.plan(now);
        let mut chances = vec![0.0; self.members.len()];
        for part in &plan.cells {
            let weight = |m: usize| {
                let member = &self.members[m];
                f64::from(member.weight) * member.backend.share_now(&self.policy.health, now)
            };
            let all: f64 = part.fit.iter().map(|&m| weight(m)).sum();
            for &m in &part.fit {
                chances[m] = if all > 0.0 { part.share * weight(m) / all } else { 0.0 };
            }
        }
        if chances.iter().all(|chance| *chance == 0.0) {
            let last = self.last_resort(&plan);
            last.iter().for_each(|&m| chances[m] = 1.0 / last.len() as f64);
        }
        (pin.and_then(|pin| self.pinned(&plan, pin, now)), chances)
    }

    /// The members that a client gets when no cell has a share, in the order of [`Pool::pick`].
    fn last_resort(&self, plan: &Plan) -> Vec<usize> {
        let of_tier = |tier: u8| (0..self.cells.len()).filter(move |&i| self.cells[i].tier == tier);
        let mut lists = Vec::new();
        for &tier in &plan.tiers {
            lists.push(of_tier(tier).flat_map(|i| plan.cells[i].fit.clone()).collect());
            lists.push(of_tier(tier).flat_map(|i| plan.cells[i].suspect.clone()).collect());
        }
        lists.push(plan.unknown.clone());
        if self.policy.when_all_down == WhenAllDown::TryAll {
            lists.push(plan.down.clone());
        }
        lists.into_iter().find(|list: &Vec<usize>| !list.is_empty()).unwrap_or_default()
    }

    /// Chooses a member for one client.
    pub fn pick(&self, want: &Want<'_>, now: Time, rng: &mut Rng) -> Choice {
        let plan = self.plan(now);
        let plan = &**plan;
        let mut full = false;

        if want.tried.is_empty() && want.racing.is_none() {
            let start = rng.usize(..plan.trials.len().max(1));
            let looked_at = if want.trial == Trial::No { 0 } else { plan.trials.len().min(TRIALS_LOOKED_AT) };
            let late = want.trial == Trial::Late;
            for i in 0..looked_at {
                let member = plan.trials[(start + i) % plan.trials.len()];
                let backend = &self.members[member].backend;
                let avoided = want.avoid.contains(&member);
                if !avoided && self.may_try(member) && backend.claim_trial(&self.policy.health, late, now) {
                    return Choice::Member(member);
                }
            }
            let pinned = want.pin.and_then(|pin| self.pinned(plan, pin, now));
            let avoided = |choice: &Choice| matches!(choice, Choice::Member(member) | Choice::Doubtful(member) if want.avoid.contains(member));
            if let Some(choice) = pinned.filter(|choice| !avoided(choice)) {
                return choice;
            }
            if let Some(choice) = want.home.and_then(|home| self.at_home(plan, home, want, now, rng, &mut full)) {
                return choice;
            }
        }
        // With affinity a race stays in the cell that the client is pinned to, when that has another backend.
        if let (Some(cell), true) = (want.racing, want.pin.is_some())
            && let Some(member) = self.in_cell(plan, cell, want, rng, &mut full)
        {
            return Choice::Member(member);
        }
        let avoid = want.racing;
        let first = self.draw_cell(plan, |i| if Some(i) == avoid { 0.0 } else { plan.cells[i].share }, rng);
        if let Some(cell) = first
            && let Some(member) = self.in_cell(plan, cell, want, rng, &mut full)
        {
            return Choice::Member(self.unless_it_hangs(plan, member, want, now, rng));
        }
        // The rare path: the drawn cell had nothing left for this client.
        for elsewhere in [true, false] {
            for &tier in &plan.tiers {
                let start = rng.usize(..self.cells.len());
                let of_tier = (0..self.cells.len())
                    .map(|i| (start + i) % self.cells.len())
                    .filter(|&i| self.cells[i].tier == tier && (Some(i) != avoid) == elsewhere);
                for cell in of_tier.clone() {
                    if let Some(member) = self.in_cell(plan, cell, want, rng, &mut full) {
                        return Choice::Member(member);
                    }
                }
                for cell in of_tier {
                    let suspects = &plan.cells[cell].suspect;
                    if let Some(member) = self.search(suspects, want, &[State::Suspect], rng, &mut full) {
                        return Choice::Doubtful(member);
                    }
                }
            }
            if avoid.is_none() {
                break;
            }
        }
        if let Some(member) = self.of_cells_by_weight(&plan.unknown, want, State::Unknown, rng, &mut full) {
            return Choice::Member(member);
        }
        let others = plan.cells.iter().any(|cell| !cell.fit.is_empty() || !cell.suspect.is_empty());
        if !full && self.tries_down(others || !plan.unknown.is_empty()) {
            if let Some(member) = self.of_cells_by_weight(&plan.down, want, State::Down, rng, &mut full) {
                return Choice::Member(member);
            }
            if let Some(member) = self.search(&plan.down, want, &[State::Down], rng, &mut full) {
                return Choice::Member(member);
            }
        }
        // Whoever has not said yet how new its data are may say so in a moment.
        if full || self.members.iter().any(|member| member.backend.owes_version()) {
            Choice::Full
        } else {
            Choice::Nothing
        }
    }

    /// Whether an untried member could take this request: one with room that is beyond doubt, or doubted for errors alone. `any` accepts
    /// members in doubt or full as well. Linear in the number of backends: for the rare request that failed.
    pub fn has_untried(&self, tried: &[usize], any: bool, fit: impl Fn(&Backend) -> bool) -> bool {
        (0..self.members.len()).any(|member| {
            let backend = &self.members[member].backend;
            let able = match backend.view().state {
                State::Up | State::Returning => any || self.has_room(member),
                State::Unknown => any,
                State::Suspect => any || backend.errs(),
                State::Down => self.tries_down(true) && (any || backend.errs()),
            };
            able && !tried.contains(&member) && !backend.is_closed() && fit(backend)
        })
    }

    /// Whether a client for whom nothing else is left goes to those that are down: one that is out for its hold may well serve him.
    /// Where an operator decides about a return and there are `others`, he does not.
    fn tries_down(&self, others: bool) -> bool {
        self.policy.when_all_down == WhenAllDown::TryAll && !(others && self.policy.health.asks_operator)
    }

    /// The member, or another one when it has owed its clients their first bytes for some moments. A cell with a smaller share
    /// takes in proportion fewer of them, and a hiccup is no reason to use the next tier.
    fn unless_it_hangs(&self, plan: &Plan, member: usize, want: &Want<'_>, now: Time, rng: &mut Rng) -> usize {
        let hangs = |m: usize| self.policy.first_byte != FirstByte::Ignore && self.members[m].backend.hangs(now);
        if !hangs(member) {
            return member;
        }
        let cell = self.members[member].cell;
        let other = |i: usize| i != cell && Some(i) != want.racing && self.cells[i].tier == self.cells[cell].tier;
        let share = |i: usize| if other(i) { plan.cells[i].share } else { 0.0 };
        let elsewhere =
            self.draw_cell(plan, share, rng).filter(|&i| rng.f64() * plan.cells[cell].share < plan.cells[i].share);
        let cells = [Some(cell), elsewhere].into_iter().flatten();
        let mut others = cells.filter_map(|cell| self.in_cell(plan, cell, want, rng, &mut false));
        // Where all have become slower alike, whoever has just answered is no better.
        let hung = self.members[member].backend.silence.quiet_for(now).unwrap_or_default();
        let sooner = |other: usize| self.members[other].backend.silence.answers_within(hung, now);
        others.find(|&other| !hangs(other) && sooner(other)).unwrap_or(member)
    }

    /// Where a client was before: the same backend, or another of its cell.
    fn at_home(
        &self,
        plan: &Plan,
        home: usize,
        want: &Want<'_>,
        now: Time,
        rng: &mut Rng,
        full: &mut bool,
    ) -> Option<Choice> {
        let member = &self.members[home];
        if !member.backend.is_closed() && self.has_room(home) && !want.avoid.contains(&home) {
            match member.backend.view().state {
                State::Up | State::Returning => return Some(Choice::Member(home)),
                State::Suspect if !member.backend.silence.quiet(ANSWERS_NOBODY, now) => {
                    return Some(Choice::Doubtful(home));
                }
                State::Suspect | State::Unknown | State::Down => {}
            }
        }
        self.in_cell(plan, member.cell, want, rng, full).map(Choice::Member)
    }

    /// Whether some backend other than `id` is fit; used before sessions are reset.
    pub fn has_other_fit(&self, id: u64) -> bool {
        self.members.iter().any(|member| member.backend.id != id && member.backend.fit())
    }

    /// Shares of all cells as configured and as they are now, each 0 to 1; all 0 where nobody gets a client.
    pub fn shares(&self, now: Time) -> Vec<(f64, f64)> {
        let plan = self.plan(now);
        let last = if plan.cells.iter().all(|part| part.share == 0.0) { self.last_resort(&plan) } else { Vec::new() };
        let of_last = |i: usize| {
            let there = last.iter().filter(|&&m| self.members[m].cell == i).count();
            there as f64 / last.len().max(1) as f64
        };
        let lowest = self.cells.iter().map(|cell| cell.tier).min().unwrap_or(0);
        let of_tier =
            |tier| self.cells.iter().filter(|cell| cell.tier == tier).map(|cell| f64::from(cell.weight)).sum::<f64>();
        let total = of_tier(lowest);
        let configured = |cell: &Cell| if cell.tier == lowest { f64::from(cell.weight) / total } else { 0.0 };
        let shares = self.cells.iter().zip(&plan.cells).enumerate();
        shares.map(|(i, (cell, part))| (configured(cell), part.share + of_last(i))).collect()
    }

    /// How many of `used` sessions each cell has beyond its share, where it has clearly more and others have clearly fewer than
    /// theirs and could take them. What one cell has for another that is out, slow or drained is its share.
    pub fn spare(&self, used: &[f64], now: Time) -> Vec<f64> {
        let all: f64 = used.iter().sum();
        let shares = self.shares(now);
        // Two standard deviations: what differs by less may have come about by chance.
        let chance = |share: f64| 2.0 * (all * share * (1.0 - share)).sqrt();
        let missing = |i: usize| {
            let room = self.cells[i].members.clone().any(|m| self.members[m].backend.fit() && self.has_room(m));
            if room { (all * shares[i].1 - used[i]).max(0.0) } else { 0.0 }
        };
        let missing: f64 = (0..self.cells.len()).map(missing).sum();
        let beyond = |i: usize| {
            let share = shares[i].0.max(shares[i].1);
            (used[i] - (all * share * OVER).max(all * share + chance(share))).min(missing)
        };
        (0..self.cells.len()).map(beyond).collect()
    }

    /// Whether a client of this address belongs to the cell; `None`: that cannot be told from the address.
    pub fn belongs(&self, client: IpAddr, cell: usize, now: Time) -> Option<bool> {
        match self.policy.affinity {
            Affinity::None => Some(false),
            Affinity::ClientIp => match self.pinned(&self.plan(now), pin(client), now) {
                Some(Choice::Member(member) | Choice::Doubtful(member)) => Some(self.members[member].cell == cell),
                _ => None,
            },
            Affinity::Sni | Affinity::Header(_) | Affinity::Cookie(_) => None,
        }
    }

    // ---- the plan ----

    /// The plan of this moment: the stored one, or a new one when health has changed since.
    fn plan(&self, now: Time) -> arc_swap::Guard<Arc<Plan>> {
        let plan = self.plan.load();
        let epoch = self.shared.epoch.load(Acquire);
        // In a large pool many transitions of one moment share a plan; every candidate is checked again anyway.
        let settled = self.members.len() <= PLAN_SMALL || now.since(plan.built) >= PLAN_LEAST || plan.epoch == 0;
        let stale = plan.epoch != epoch && settled || plan.moving && now.since(plan.built) >= PLAN_MOVING;
        if !stale {
            return plan;
        }
        // One thread computes; the others go on with what there is, unless there is nothing yet.
        match self.planning.try_lock() {
            Ok(_computing) => self.plan.store(Arc::new(self.compute(epoch, now))),
            Err(std::sync::TryLockError::Poisoned(_)) => self.plan.store(Arc::new(self.compute(epoch, now))),
            Err(std::sync::TryLockError::WouldBlock) if plan.epoch == 0 => {
                return arc_swap::Guard::from_inner(Arc::new(self.compute(epoch, now)));
            }
            Err(std::sync::TryLockError::WouldBlock) => return plan,
        }
        self.plan.load()
    }

    fn compute(&self, epoch: u64, now: Time) -> Plan {
        let policy = &self.policy.health;
        let mut plan = Plan { epoch, built: now, ..Plan::default() };
        plan.tiers = self.cells.iter().map(|cell| cell.tier).collect();
        plan.tiers.sort_unstable();
        plan.tiers.dedup();
        // Per cell: weight ready for traffic (not drained), and all of it.
        let mut ready_weights = Vec::with_capacity(self.cells.len());
        let mut down: Vec<(u64, usize)> = Vec::new();
        for cell in &self.cells {
            let mut part = CellPlan::default();
            let (mut ready, mut all, mut fit, mut fit_full) = (0.0, 0.0, 0.0, 0.0);
            let mut weights = Vec::new();
            let mut most = 0f64;
            for index in cell.members.clone() {
                let member = &self.members[index];
                let weight = f64::from(member.weight);
                all += weight;
                if member.backend.drained.load(Relaxed) {
                    continue;
                }
                ready += weight;
                if member.backend.version.is_old() {
                    continue;
                }
                if member.backend.awaits_trial() {
                    plan.trials.push(index);
                }
                let view = member.backend.view();
                match view.state {
                    State::Up | State::Returning => {
                        plan.moving |= view.ramp_share(policy, now) < 1.0;
                        let share = member.backend.share_now(policy, now);
                        part.fit.push(index);
                        part.presence.push(share);
                        most = most.max(share);
                        weights.push(weight * share);
                        fit += weight * share;
                        fit_full += weight;
                    }
                    State::Suspect => part.suspect.push(index),
                    State::Unknown => plan.unknown.push(index),
                    State::Down => down.push((member.backend.health().last_failure().seconds(), index)),
                }
            }
            part.keeps = (OVERPROVISION * fit / all).min(1.0);
            part.present = if fit_full > 0.0 { fit / fit_full } else { 1.0 };
            if self.policy.balance == Balance::RoundRobin {
                part.turns = turns(&part.fit, &weights);
            }
            part.draw = Alias::new(&weights);
            part.presence.iter_mut().for_each(|presence| *presence /= most.max(f64::MIN_POSITIVE));
            let could_keep = if ready > 0.0 { (OVERPROVISION * fit / ready).min(1.0) } else { 0.0 };
            part.could_keep = if ready > 0.0 { could_keep } else { -1.0 };
            ready_weights.push((ready, could_keep));
            plan.cells.push(part);
        }
        self.share_out(&mut plan, &ready_weights);
        if !down.is_empty() {
            // Only the least recently failed are candidates of a fresh client; the rest follow in order.
            down.sort_unstable();
            plan.down = down.into_iter().map(|(_, index)| index).collect();
            plan.moving |= plan.cells.iter().all(|cell| cell.fit.is_empty());
        }
        plan
    }

    /// Shares by tier: each tier carries what its cells can, the next takes the rest. What is drained makes no
    /// tier short: its share goes to the others of its tier.
    fn share_out(&self, plan: &mut Plan, ready: &[(f64, f64)]) {
        let mut left = 1.0;
        for position in 0..plan.tiers.len() {
            let tier = plan.tiers[position];
            let of_tier = (0..self.cells.len()).filter(|&i| self.cells[i].tier == tier).collect::<Vec<_>>();
            let weight = |i: usize| self.cells[i].weight_now();
            let all: f64 = of_tier.iter().filter(|&&i| ready[i].0 > 0.0).map(|&i| weight(i)).sum();
            let can: f64 = of_tier.iter().filter(|&&i| ready[i].0 > 0.0).map(|&i| weight(i) * ready[i].1).sum();
            let parts: f64 = of_tier.iter().map(|&i| weight(i) * plan.cells[i].keeps).sum();
            if parts <= 0.0 {
                continue;
            }
            let later_fit = (0..self.cells.len()).any(|i| self.cells[i].tier > tier && !plan.cells[i].fit.is_empty());
            let takes = if later_fit && can < all { left * can / all } else { left };
            for i in of_tier {
                plan.cells[i].share = takes * weight(i) * plan.cells[i].keeps / parts;
            }
            left -= takes;
        }
    }

    // ---- choices ----

    /// A cell drawn by `weight`; `None` when all weights are zero.
    fn draw_cell(&self, plan: &Plan, weight: impl Fn(usize) -> f64, rng: &mut Rng) -> Option<usize> {
        let total: f64 = (0..plan.cells.len()).map(&weight).sum();
        let mut point = rng.f64() * total;
        let mut last = None;
        for i in 0..plan.cells.len() {
            let weight = weight(i);
            if weight > 0.0 {
                last = Some(i);
                if point < weight {
                    return last;
                }
                point -= weight;
            }
        }
        last
    }

    /// A fit member of one cell by the pool's way of balancing.
    fn in_cell(&self, plan: &Plan, cell: usize, want: &Want<'_>, rng: &mut Rng, full: &mut bool) -> Option<usize> {
        let part = &plan.cells[cell];
        if part.fit.is_empty() {
            return None;
        }
        let states = &[State::Up, State::Returning];
        match self.policy.balance {
            Balance::TwoChoices => {
                for _ in 0..DRAWS {
                    let pair = [part.fit[part.draw.draw(rng)], part.fit[part.draw.draw(rng)]];
                    let mut open = pair.into_iter().filter(|&m| self.open(m, want, states, full));
                    match (open.next(), open.next()) {
                        (Some(a), Some(b)) => return Some(self.less_loaded(a, b)),
                        (Some(a), None) => return Some(a),
                        _ => {}
                    }
                }
            }
            Balance::RoundRobin => {
                for _ in 0..DRAWS.min(part.turns.len()) {
                    let turn = self.cells[cell].turn.fetch_add(1, Relaxed);
                    let member = part.turns[turn % part.turns.len()];
                    if self.open(member, want, states, full) {
                        return Some(member);
                    }
                }
            }
            Balance::LeastConnections => {
                let all = part.fit.len() <= LEAST_LOOKED_AT;
                let start = rng.usize(..part.fit.len());
                let mut best = None;
                for i in 0..part.fit.len().min(LEAST_LOOKED_AT) {
                    let at = if all { (start + i) % part.fit.len() } else { part.draw.draw(rng) };
                    // One that has a part of its share takes part as often, or it would get all until it has as many as the others.
                    let takes_part = !all || part.presence[at] >= 1.0 || rng.f64() < part.presence[at];
                    if takes_part && self.open(part.fit[at], want, states, full) {
                        best = Some(best.map_or(part.fit[at], |best| self.less_loaded(best, part.fit[at])));
                    }
                }
                if best.is_some() {
                    return best;
                }
            }
        }
        self.search(&part.fit, want, states, rng, full)
    }

    /// The first open one of a list, from a random place on.
    fn search(
        &self,
        list: &[usize],
        want: &Want<'_>,
        states: &[State],
        rng: &mut Rng,
        full: &mut bool,
    ) -> Option<usize> {
        if list.is_empty() {
            return None;
        }
        let start = rng.usize(..list.len());
        (0..list.len()).map(|i| list[(start + i) % list.len()]).find(|&m| self.open(m, want, states, full))
    }

    /// For lists in which no shares are kept: a cell of the best tier by configured weight, and one member of it.
    /// Among those that are down only the least recently failed (to the second) are looked at.
    fn of_cells_by_weight(
        &self,
        list: &[usize],
        want: &Want<'_>,
        state: State,
        rng: &mut Rng,
        full: &mut bool,
    ) -> Option<usize> {
        let rank = |m: usize| {
            let failed =
                if state == State::Down { self.members[m].backend.health().last_failure().seconds() } else { 0 };
            (failed, self.cells[self.members[m].cell].tier)
        };
        let open: Vec<usize> = list.iter().copied().filter(|&m| self.open(m, want, &[state], full)).take(64).collect();
        let best = open.iter().map(|&m| rank(m)).min()?;
        let open: Vec<usize> = open.into_iter().filter(|&m| rank(m) == best).collect();
        let total: u32 = open.iter().map(|&m| self.cell_weight_each(m, &open)).sum();
        let mut point = rng.u32(..total.max(1));
        for &m in &open {
            let weight = self.cell_weight_each(m, &open);
            if point < weight {
                return Some(m);
            }
            point -= weight;
        }
        open.first().copied()
    }

    /// A member's part of its cell's weight among `list`, in thousandths of the cell's.
    fn cell_weight_each(&self, member: usize, list: &[usize]) -> u32 {
        let cell = self.members[member].cell;
        let siblings = list.iter().filter(|&&m| self.members[m].cell == cell).count() as u32;
        ((self.cells[cell].weight_now() * 1_000.0) as u32 / siblings.max(1)).max(1)
    }

    /// Weighted rendezvous over cells (Thaler, Ravishankar 1998; weights by Schindelhauer, Schomaker 2005), and
    /// Maglev inside (Eisenbud et al. 2016). `None` when the client's place has nothing for it now.
    fn pinned(&self, plan: &Plan, pin: u64, now: Time) -> Option<Choice> {
        for (position, &tier) in plan.tiers.iter().enumerate() {
            let mut ranked: Vec<(f64, usize)> = (0..self.cells.len())
                .filter(|&i| self.cells[i].tier == tier && plan.cells[i].could_keep >= 0.0)
                // Weight 0 leaves a cell those whom nobody else can take, and they come without a place of their own.
                .filter(|&i| self.cells[i].weight_now() > 0.0)
                .map(|i| (self.cells[i].weight_now() / -unit(pin, self.cells[i].hash).ln(), i))
                .collect();
            ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
            let later_fit = plan.tiers[position + 1..].iter().any(|later| {
                (0..self.cells.len()).any(|i| self.cells[i].tier == *later && !plan.cells[i].fit.is_empty())
            });
            for (place, &(_, cell)) in ranked.iter().enumerate() {
                let part = &plan.cells[cell];
                let place_of_pin = unit(pin, self.cells[cell].hash ^ 1);
                let kept = place_of_pin < part.keeps;
                if let Some(choice) = self.pinned_in(part, cell, pin, kept, now) {
                    return Some(choice);
                }
                // What this cell cannot carry is the next tier's, when there is one; what is drained is its siblings'.
                if later_fit && place == 0 && place_of_pin >= part.could_keep {
                    break;
                }
            }
        }
        None
    }

    fn pinned_in(&self, part: &CellPlan, cell: usize, pin: u64, kept: bool, now: Time) -> Option<Choice> {
        let maglev = self.cells[cell].maglev.as_ref()?;
        let first = self.cells[cell].members.start;
        for attempt in 0..8u64 {
            let hash = if attempt == 0 { pin } else { xxh3_64_with_seed(&pin.to_le_bytes(), attempt) };
            let member = first + maglev.lookup(hash);
            let backend = &self.members[member].backend;
            if backend.is_closed() || !self.has_room(member) {
                continue;
            }
            match backend.view().state {
                State::Up if kept && backend.pace_share() >= part.present => return Some(Choice::Member(member)),
                State::Up | State::Returning if kept => {
                    let share = backend.share_now(&self.policy.health, now) / part.present;
                    if unit(pin, backend.id) < share {
                        return Some(Choice::Member(member));
                    }
                }
                // Its own clients stay with a suspect, unless it answers nobody; those who would move to it do not come.
                State::Suspect if attempt == 0 && !backend.silence.quiet(ANSWERS_NOBODY, now) => {
                    return Some(Choice::Doubtful(member));
                }
                _ => {}
            }
        }
        // Most of the cell is gone: the rest share its clients, each client always with the same one.
        if !kept || part.fit.is_empty() {
            return None;
        }
        let start = (xxh3_64_with_seed(&pin.to_le_bytes(), u64::MAX) % part.fit.len() as u64) as usize;
        let near = (0..part.fit.len().min(DRAWS)).map(|i| part.fit[(start + i) % part.fit.len()]);
        near.into_iter().find(|&m| self.has_room(m) && self.members[m].backend.fit()).map(Choice::Member)
    }

    /// Whether a member may be taken now.
    fn open(&self, member: usize, want: &Want<'_>, states: &[State], full: &mut bool) -> bool {
        let backend = &self.members[member].backend;
        let passed_over = want.tried.contains(&member) || want.avoid.contains(&member);
        if passed_over || backend.is_closed() || !states.contains(&backend.view().state) {
            return false;
        }
        let room = self.has_room(member);
        *full |= !room;
        room
    }

    fn has_room(&self, member: usize) -> bool {
        let member = &self.members[member];
        let cell = &self.cells[member.cell];
        member.backend.has_room(member.max_connections) && cell.shared.connections.used() < cell.max_connections
    }

    /// Whether a trial may go there: what was learned about its concurrency counts what hangs there since it fell silent, and
    /// would keep away the one client that can find out.
    fn may_try(&self, member: usize) -> bool {
        let member = &self.members[member];
        let cell = &self.cells[member.cell];
        member.backend.in_flight.used() < member.max_connections
            && cell.shared.connections.used() < cell.max_connections
    }

    /// A place at a member: of its backend, of its cell where that has a bound, and one of the clients that the cell can take
    /// in this time.
    pub fn take_place(&self, member: usize, now: Time) -> Option<Permit> {
        let member = &self.members[member];
        let cell = &self.cells[member.cell];
        // First what leaves no trace when it is refused: a place that is given back looks like one that became free.
        if cell.capacity.is_some_and(|rate| !cell.shared.clients.take(rate, CAPACITY_SAVED, now)) {
            return None;
        }
        let places = || {
            let of_cell = match cell.max_connections {
                u32::MAX => None,
                most => Some(cell.shared.connections.take(most)?),
            };
            Some(member.backend.in_flight.take(member.max_connections)?.and(of_cell))
        };
        let place = places();
        match (&place, cell.capacity) {
            (Some(_), _) => member.backend.comes(now),
            (None, Some(rate)) => cell.shared.clients.give_back(rate),
            (None, None) => {}
        }
        place
    }

    /// The one with fewer connections for its weight; the first when they are equal.
    fn less_loaded(&self, a: usize, b: usize) -> usize {
        let load = |m: usize| u64::from(self.members[m].backend.in_flight.used());
        let weight = |m: usize| u64::from(self.members[m].weight);
        if load(b) * weight(a) < load(a) * weight(b) { b } else { a }
    }
}

/// A number from 0 (excluded) to 1 that depends on both.
fn unit(pin: u64, of: u64) -> f64 {
    ((xxh3_64_with_seed(&pin.to_le_bytes(), of) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
