//! What the process says of itself: `/status` as JSON and `/metrics` as Prometheus text. Rendered on a helper
//! thread, from atomics and copies; nothing waits for it.

use std::collections::HashMap;
use std::fmt::{Display, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::backend::{Backend, Outcome};
use crate::clock;
use crate::config::Affinity;
use crate::drain::Drains;
use crate::health::{Source, State};
use crate::host::Host;
use crate::log;
use crate::metrics::Histogram;
use crate::pool::{self, Choice, Member, Pool};
use crate::reload::Report;
use crate::session::{self, Row};
use crate::table::{End, Face, Listener, Table};
use crate::tls;

/// What control knows besides the table, copied for the renderers.
#[derive(Clone, Debug, Default)]
pub struct Info {
    /// The last reload.
    pub last_reload: Option<Report>,
    /// When the live table was loaded, RFC 3339.
    pub loaded_at: String,
    /// When the process began to serve, RFC 3339.
    pub started_at: String,
    /// Bound addresses: as configured, as bound, and whether this machine owns the address now.
    pub bound: Vec<(SocketAddr, SocketAddr, bool)>,
    /// What is drained.
    pub drains: Drains,
    /// Prober of each backend, both by their identities.
    pub probers: HashMap<u64, u64>,
    /// Wishes that take effect at the next start only.
    pub at_next_start: Vec<String>,
}

/// What is said of a cell of which this many backends of all that count are fit.
fn cell_state(fit: usize, all: usize) -> &'static str {
    match fit {
        0 => "down",
        n if n < all => "degraded",
        _ => "up",
    }
}

/// `/status`.
pub fn status(host: &Host, info: &Info) -> Value {
    let table = host.live.load_full();
    let pools: Vec<Value> = table.pools.iter().map(|pool| pool_status(pool, info)).collect();
    let workers: Vec<Value> = host
        .beats
        .iter()
        .map(|beat| {
            json!({
                "busy": beat[1].load(Relaxed) as f64 / 1e3,
                "connections": beat[3].load(Relaxed),
                "lag_ms": beat[2].load(Relaxed) as f64 / 1e3,
                "beat_ms_ago": (clock::now().0 / 1_000).saturating_sub(beat[0].load(Relaxed)),
            })
        })
        .collect();
    let local_errors: serde_json::Map<String, Value> =
        host.local_errors.all().filter(|(_, n)| *n > 0).map(|(name, n)| (name.to_owned(), json!(n))).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "started_at": info.started_at,
        "generation": table.generation,
        "stopping": host.stopping.load(Relaxed),
        "config": {
            "hash": table.hash,
            "loaded_at": info.loaded_at,
            "last_reload": info.last_reload,
            "at_next_start": info.at_next_start,
        },
        "connections": { "now": host.connections.used(), "limit": host.max_connections.load(Relaxed) },
        "cells": cells_status(&table),
        "pools": pools,
        "listeners": listeners_status(&table, info),
        "uplink": { "dark_since": table.uplink.dark().map(|at| at.rfc3339()) },
        "workers": workers,
        "drains": info.drains.list(),
        "weights": info.drains.weights(),
        "local_errors": local_errors,
        "panics": host.panics.get(),
        "log_dropped": log::DROPPED.get(),
    })
}

fn cells_status(table: &Table) -> Vec<Value> {
    let mut cells: Vec<(&str, usize, usize, usize)> = Vec::new();
    for pool in &table.pools {
        for member in &pool.members {
            let name = &*pool.cells[member.cell].name;
            let place = cells.iter().position(|cell| cell.0 == name).unwrap_or_else(|| {
                cells.push((name, 0, 0, 0));
                cells.len() - 1
            });
            let fit = matches!(member.backend.view().state, State::Up | State::Returning);
            let fit = fit && !member.backend.version.is_old();
            cells[place].1 += usize::from(fit);
            cells[place].2 += 1;
            cells[place].3 += usize::from(member.backend.drained.load(Relaxed));
        }
    }
    let facts = |name: &str| table.config.cells.iter().find(|facts| facts.name == name);
    cells
        .into_iter()
        .map(|(name, fit, all, drained)| {
            json!({
                "name": name,
                "cloud": facts(name).and_then(|facts| facts.cloud.clone()),
                "region": facts(name).and_then(|facts| facts.region.clone()),
                "state": cell_state(fit, all),
                "admin": if drained == all { "drained" } else if drained > 0 { "partly drained" } else { "ready" },
            })
        })
        .collect()
}

fn pool_status(pool: &Pool, info: &Info) -> Value {
    let shares = pool.shares(clock::now());
    let cells: Vec<Value> = pool
        .cells
        .iter()
        .zip(shares)
        .map(|(cell, (configured, now))| {
            let members = &pool.members[cell.members.clone()];
            json!({
                "name": &*cell.name,
                "tier": cell.tier,
                "share": { "configured": round(configured), "now": round(now) },
                "weight_percent": cell.shared.percent.load(Relaxed),
                "backends": members.iter().map(|member| backend_status(pool, &member.backend, info)).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "name": &*pool.name,
        "connections": { "now": pool.shared.connections.used(), "limit": pool.policy.max_connections },
        "refused": { "full": pool.shared.refused_full.get(), "unreachable": pool.shared.refused_unreachable.get() },
        "races": { "begun": pool.shared.races.get(), "won": pool.shared.raced[1].get(), "no_budget": pool.shared.budget.refused() },
        "client_certificate": pool.policy.tls.as_ref().and_then(|tls| tls.ends).map(ends),
        "cells": cells,
    })
}

fn backend_status(pool: &Pool, backend: &Arc<Backend>, info: &Info) -> Value {
    let health = backend.health();
    let drained = backend.drained.load(Relaxed);
    let in_flight = backend.in_flight.used();
    let admin = match (drained, in_flight) {
        (false, _) => "ready",
        (true, 0) => "drained",
        (true, _) => "draining",
    };
    let cause = health.cause().map(|cause| {
        let seen_by = if cause.source == Source::Probe { "probe" } else { "traffic" };
        json!({
            "kind": cause.kind,
            "depth": cause.depth.word(),
            "detail": format!("{} x {} at {}, seen by {seen_by}", cause.times, cause.kind, cause.depth.word()),
            "at": cause.at.rfc3339(),
        })
    });
    let count = |outcome: Outcome| backend.counters.attempts[outcome as usize].get();
    let quantile = |pick: fn((Duration, Duration)) -> Duration| {
        backend.handshake.learned().map(|learned| round(pick(learned).as_secs_f64() * 1e3))
    };
    let now = clock::now();
    let (hold, until) = health.hold();
    let next_probe = match backend.next_probe_ms.load(Relaxed) {
        0 => None,
        at => Some(at.saturating_sub(now.0 / 1_000)),
    };
    json!({
        "name": &*backend.name,
        "address": backend.address,
        "health": health.state().word(),
        "admin": admin,
        "since": health.since().rfc3339(),
        "cause": cause,
        "hold_ms": (health.state() == State::Down).then(|| until.since(now).as_millis() as u64),
        "class_failing": backend.has_failing_class(),
        "waits_for_operator": health.waits_for_operator(&pool.policy.health, now),
        "last_hold_ms": hold.as_millis() as u64,
        "in_flight": in_flight,
        "attempts": { "ok": count(Outcome::Ok), "failed": count(Outcome::Refused) + count(Outcome::Silent) },
        "handshake_ms": { "p50": quantile(|(p50, _)| p50), "p99": quantile(|(_, p99)| p99) },
        "learned_loss": round(health.loss()),
        "ramp": round(backend.view().ramp_share(&pool.policy.health, now)),
        "pace": round(backend.pace_share()),
        "waiting": { "now": backend.silence.waiting(), "most": backend.most_waiting() },
        "data_version": backend.version.least().map(|least| {
            json!({ "said": backend.version.said(), "at_least": least, "too_old": backend.version.is_old() })
        }),
        "contradiction": backend.contradicts_probes(now).then_some(match backend.last_standing.load(Relaxed) {
            true => "probes fail; as the last of its tier it stays until clients fail too",
            false => "probes fail while clients are served",
        }),
        "next_probe_in_ms": next_probe,
        "prober": info.probers.get(&backend.id),
        "certificate": certificate(backend),
    })
}

/// The certificate that a TLS probe saw last.
fn certificate(backend: &Backend) -> Value {
    ends(backend.certificate_expiry.load(Relaxed))
}

/// A certificate by its end, in seconds since 1970; 0: there is none.
fn ends(expiry: i64) -> Value {
    if expiry == 0 {
        return Value::Null;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(expiry.max(0) as u64)).unwrap_or(UNIX_EPOCH);
    let days = (expiry - now).div_euclid(24 * 3_600);
    json!({ "expires": humantime::format_rfc3339_seconds(at).to_string(), "days": days })
}

fn listeners_status(table: &Table, info: &Info) -> Vec<Value> {
    info.bound
        .iter()
        .filter_map(|(bind, actual, local)| {
            let listener = table.listeners.get(bind)?;
            Some(json!({
                "name": &*listener.name,
                "bind": bind,
                "address": actual,
                "local": local,
                "pool": pool_names(listener),
                "connections": listener.shared.connections.used(),
                "certificates": certificates(listener),
                "at_cap": listener.shared.at_cap.load(Relaxed) > 0,
            }))
        })
        .collect()
}

/// `sailover sessions`: the rows of the workers, with the cell in which the live table has each backend.
pub fn sessions(table: &Table, rows: &[Row]) -> Vec<Value> {
    let members = table.pools.iter().flat_map(|pool| pool.members.iter().map(move |member| (pool, member)));
    let cells: HashMap<(&str, &str), &str> =
        members.map(|(pool, member)| ((&*pool.name, &*member.backend.name), &*pool.cells[member.cell].name)).collect();
    rows.iter()
        .map(|row| {
            let mut shown = json!(row);
            shown["cell"] = json!(cells.get(&(row.pool.as_str(), row.backend.as_str())));
            shown
        })
        .collect()
}

/// Why a filter that no session fits names nothing of the table; `None`: it may.
pub fn names_nothing(table: &Table, filter: &session::Filter) -> Option<String> {
    let listed = |names: Vec<&str>| names.into_iter().take(12).collect::<Vec<_>>().join(" | ");
    if let Some(pool) = filter.pool.as_ref().filter(|pool| !table.pools.iter().any(|known| *known.name == ***pool)) {
        return Some(format!(
            "there is no pool {pool:?}; expected {}",
            listed(table.pools.iter().map(|p| &*p.name).collect())
        ));
    }
    let pools = || table.pools.iter().filter(|known| filter.pool.as_ref().is_none_or(|pool| *known.name == **pool));
    let members = || pools().flat_map(|pool| &pool.members).map(|member| &member.backend);
    let known = |wanted: &String| members().any(|known| known.is_called(wanted));
    if let Some(backend) = filter.backend.as_ref().filter(|backend| !known(backend)) {
        return Some(format!(
            "there is no backend {backend:?}; expected {}",
            listed(members().map(|b| &*b.name).collect())
        ));
    }
    let malformed = filter.ids.iter().find(|id| {
        id.split_once('-')
            .is_none_or(|(worker, number)| worker.parse::<usize>().is_err() || number.parse::<u64>().is_err())
    });
    malformed.map(|id| format!("{id:?} is no session; `sailover sessions` shows their identities, such as 0-17"))
}

/// A word about pools of HTTP, whose connections are no sessions, where the filter names one.
pub fn of_http(table: &Table, filter: &session::Filter) -> Option<String> {
    let pool = filter.pool.as_ref()?;
    let http = table.listeners.values().filter(|listener| matches!(listener.face, Face::Http(_)));
    let serves = http.flat_map(|listener| listener.face.pools()).any(|known| *known.name == **pool);
    serves.then(|| format!("pool {pool} is served by http too: its requests are no sessions, and not among these"))
}

/// `sailover explain`: where this client would go now, at each listener or at one, and why.
pub fn explain(host: &Host, client: IpAddr, listener: Option<&str>) -> Value {
    let table = host.live.load_full();
    let mut listeners: Vec<_> = table.listeners.values().collect();
    listeners.sort_by(|a, b| a.name.cmp(&b.name));
    listeners.dedup_by(|a, b| a.name == b.name);
    let names: Vec<String> = listeners.iter().map(|listener| listener.name.to_string()).collect();
    listeners.retain(|found| listener.is_none_or(|wanted| wanted == &*found.name));
    let ways: Vec<Value> = listeners
        .iter()
        .flat_map(|listener| listener.face.pools().into_iter().map(|pool| explain_at(host, listener, pool, client)))
        .collect();
    json!({ "client": client, "listeners": names, "ways": ways })
}

fn explain_at(host: &Host, listener: &Listener, pool: &Pool, client: IpAddr) -> Value {
    let now = clock::now();
    let pinned = pool.policy.affinity == Affinity::ClientIp;
    let (choice, chances) = pool.explain(pinned.then(|| pool::pin(client)), now);
    let refused = if !listener.admits(client) {
        Some("allow and deny of the listener refuse this client")
    } else if host.connections.used() >= host.max_connections.load(Relaxed) {
        Some("the process has all the connections it may have")
    } else if listener.shared.connections.used() >= listener.max_connections {
        Some("the listener has all the connections it may have")
    } else if pool.shared.connections.used() >= pool.policy.max_connections {
        Some("the pool has all the connections it may have")
    } else {
        None
    };
    let chosen = match choice {
        Some(Choice::Member(member) | Choice::Doubtful(member)) => Some(member),
        _ => None,
    };
    let name = |member: usize| {
        let member = &pool.members[member];
        json!({ "cell": &*pool.cells[member.cell].name, "backend": &*member.backend.name })
    };
    let backends: Vec<Value> = pool
        .members
        .iter()
        .enumerate()
        .map(|(i, member)| {
            let chance = if refused.is_some() {
                0.0
            } else {
                match chosen {
                    Some(chosen) => f64::from(u8::from(chosen == i)),
                    None => chances[i],
                }
            };
            json!({
                "cell": &*pool.cells[member.cell].name,
                "tier": pool.cells[member.cell].tier,
                "backend": &*member.backend.name,
                "chance": round(chance),
                "why": why(pool, member, chosen == Some(i), chances[i], now),
            })
        })
        .collect();
    json!({
        "listener": &*listener.name,
        "pool": &*pool.name,
        "refused": refused,
        "affinity": pool.policy.affinity,
        "goes_to": chosen.filter(|_| refused.is_none()).map(name),
        "backends": backends,
    })
}

/// Why a backend gets of one client what it gets.
fn why(pool: &Pool, member: &Member, chosen: bool, chance: f64, now: clock::Time) -> String {
    let (backend, cell) = (&member.backend, &pool.cells[member.cell]);
    let state = backend.view().state;
    let percent = cell.shared.percent.load(Relaxed);
    if backend.drained.load(Relaxed) {
        return "drained by an operator".into();
    }
    match (backend.version.said(), backend.version.least()) {
        (Some(said), Some(least)) if said < least => {
            return format!("no clients: its data are of version {said}, and {least} is asked for");
        }
        (None, Some(least)) if state != State::Down => {
            return format!("no clients: it has not said which version its data have, and {least} is asked for");
        }
        _ => {}
    }
    if backend.in_flight.used() >= member.max_connections {
        return format!("it has all the {} connections it may have", member.max_connections);
    }
    let mut reasons = match state {
        State::Up if backend.pace_share() < 1.0 => {
            let share = backend.pace_share() * 100.0;
            vec![format!("up, at {share:.1}% of its share: slower, or losing more, than it used to")]
        }
        State::Up => vec!["up".to_owned()],
        State::Returning => {
            let share = backend.share_now(&pool.policy.health, now) * 100.0;
            vec![format!("returning, at {share:.0}% of its share")]
        }
        State::Suspect => vec!["suspect: after the fit ones of its tier".to_owned()],
        State::Unknown => vec!["nothing is known about it yet: after all that are known to be fit".to_owned()],
        State::Down => vec!["down: tried only when nothing else is left".to_owned()],
    };
    let fit = matches!(state, State::Up | State::Returning);
    match percent {
        100 => {}
        0 => reasons.push("its cell has weight 0 by an order: only for whom no other cell can take".into()),
        _ => reasons.push(format!("its cell has {percent}% of its weight by an order")),
    }
    if chosen {
        reasons.push("the client's address is pinned to it".into());
    } else if chance > 0.0 && !fit {
        reasons.push("nothing better is left".into());
    } else if chance == 0.0 && fit && percent > 0 {
        reasons.push(format!("tier {}: the tiers before it carry all", cell.tier));
    }
    reasons.join("; ")
}

/// What a listener serves under TLS.
fn certificates(listener: &Listener) -> Vec<Value> {
    let identities = listener.tls.iter().flat_map(|tls| &tls.identities);
    identities
        .map(|identity| {
            let mut shown = ends(identity.valid.1.clamp(1, tls::LAST_SECOND - 1));
            shown["names"] = json!(identity.names);
            shown
        })
        .collect()
}

/// The pools of a listener, in words.
fn pool_names(listener: &Listener) -> String {
    let names: Vec<&str> = listener.face.pools().into_iter().map(|pool| &*pool.name).collect();
    names.join(", ")
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Prometheus text format, version 0.0.4. Its names and types are the contract's; OpenMetrics, which the client
/// libraries write, does not allow a gauge `x` beside a counter `x_total`.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (i, (key, value)) in labels.iter().enumerate() {
            self.0.push(if i == 0 { '{' } else { ',' });
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{key}=\"{value}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let (sum, total, buckets) = histogram.snapshot();
        let mut below = 0;
        for (bound, count) in buckets {
            below += count;
            let bound = if bound == f64::MAX { "+Inf".to_owned() } else { bound.to_string() };
            let mut labels = labels.to_vec();
            labels.push(("le", &bound));
            self.sample(&format!("{name}_bucket"), &labels, below);
        }
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, total);
    }
}

/// `/metrics`.
pub fn metrics(host: &Host, info: &Info) -> String {
    let table = host.live.load_full();
    let now = clock::now();
    let mut text = Text(String::new());
    let t = &mut text;
    t.family("sailover_build_info", "gauge", "Version of the running program.");
    t.sample("sailover_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    t.family("process_start_time_seconds", "gauge", "When the process began to serve, in seconds since 1970.");
    let started = humantime::parse_rfc3339(&info.started_at).ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    t.sample("process_start_time_seconds", &[], started.unwrap_or_default().as_secs_f64());
    t.family("sailover_config_info", "gauge", "The hash of the live configuration: the same where the files are.");
    t.sample("sailover_config_info", &[("hash", &table.hash)], 1);
    t.family("sailover_config_generation", "gauge", "Number of the live table.");
    t.sample("sailover_config_generation", &[], table.generation);
    t.family("sailover_config_last_reload_successful", "gauge", "1 unless the last reload was refused.");
    let good = info.last_reload.as_ref().is_none_or(|report| report.ok);
    t.sample("sailover_config_last_reload_successful", &[], u8::from(good));

    let mut listeners: Vec<_> = table.listeners.values().collect();
    listeners.sort_by(|a, b| a.name.cmp(&b.name));
    listeners.dedup_by(|a, b| a.name == b.name);
    t.family("sailover_connections", "gauge", "Connections of clients now.");
    for listener in &listeners {
        t.sample("sailover_connections", &[("listener", &listener.name)], listener.shared.connections.used());
    }
    t.family("sailover_connections_total", "counter", "Connections of clients that ended, by how.");
    for listener in &listeners {
        for end in End::ALL.into_iter().filter(|end| !end.of_requests_alone()) {
            let labels = [("listener", &*listener.name), ("end", end.word())];
            t.sample("sailover_connections_total", &labels, listener.shared.ends[end as usize].get());
        }
    }
    let http = || listeners.iter().filter(|listener| matches!(listener.face, Face::Http(_)));
    t.family("sailover_requests_total", "counter", "HTTP requests that ended, by the class of their status.");
    for listener in http() {
        for (class, counter) in ["none", "1xx", "2xx", "3xx", "4xx", "5xx"].into_iter().zip(&listener.shared.requests) {
            t.sample("sailover_requests_total", &[("listener", &listener.name), ("class", class)], counter.get());
        }
    }
    t.family("sailover_request_ends_total", "counter", "HTTP requests that ended, by how.");
    for listener in http() {
        for end in End::ALL {
            let labels = [("listener", &*listener.name), ("end", end.word())];
            t.sample("sailover_request_ends_total", &labels, listener.shared.request_ends[end as usize].get());
        }
    }
    t.family(
        "sailover_client_limit_refused_total",
        "counter",
        "Connections and requests beyond what one client may have.",
    );
    for listener in &listeners {
        t.sample(
            "sailover_client_limit_refused_total",
            &[("listener", &listener.name)],
            listener.shared.clients.refused(),
        );
    }
    t.family("sailover_request_retries_total", "counter", "HTTP requests sent to a second or later backend.");
    for listener in http() {
        t.sample("sailover_request_retries_total", &[("listener", &listener.name)], listener.shared.retries.get());
    }
    t.family("sailover_bytes_total", "counter", "Bytes of ended connections from (in) and to (out) clients.");
    for listener in &listeners {
        for (direction, counter) in ["in", "out"].into_iter().zip(&listener.shared.bytes) {
            t.sample("sailover_bytes_total", &[("listener", &listener.name), ("direction", direction)], counter.get());
        }
    }
    backends_metrics(t, &table, now);
    certificates_metrics(t, &table);
    pools_metrics(t, &table, now);
    process_metrics(t, host);
    text.0
}

/// What has one sample for each backend: name, type, help, and the value where it has one.
type OfBackend = (&'static str, &'static str, &'static str, fn(&Backend, clock::Time) -> Option<f64>);

const OF_BACKENDS: [OfBackend; 10] = [
    ("sailover_backend_drained", "gauge", "1 while an operator keeps new clients away.", |backend, _| {
        Some(flag(backend.drained.load(Relaxed)))
    }),
    (
        "sailover_backend_data_old",
        "gauge",
        "1 while a backend gets no clients because its data are too old.",
        |backend, _| {
            backend.version.least().map(|_| flag(backend.version.said().is_some() && backend.version.is_old()))
        },
    ),
    (
        "sailover_backend_most_waiting",
        "gauge",
        "Clients that may wait for answers at once, where that was learned.",
        |backend, _| backend.most_waiting().map(f64::from),
    ),
    (
        "sailover_class_failures_total",
        "counter",
        "How often one class of requests began to fail alone.",
        |backend, _| Some(backend.counters.class_failures.get() as f64),
    ),
    (
        "sailover_backend_class_failing",
        "gauge",
        "Whether a class of requests fails at a backend, and goes elsewhere.",
        |backend, _| Some(flag(backend.has_failing_class())),
    ),
    ("sailover_paced_total", "counter", "How often a share was cut for slowness or loss.", |backend, _| {
        Some(backend.counters.paced.get() as f64)
    }),
    ("sailover_contradictions_total", "counter", "Probes that failed while clients were served.", |backend, _| {
        Some(backend.counters.contradictions.get() as f64)
    }),
    (
        "sailover_backend_contradiction",
        "gauge",
        "Whether probes of a backend fail while its clients are served; the clients are believed.",
        |backend, now| Some(flag(backend.contradicts_probes(now))),
    ),
    (
        "sailover_backend_pace_ratio",
        "gauge",
        "Share of its clients that a backend keeps for how it does against its own past.",
        |backend, _| Some(backend.pace_share()),
    ),
    (
        "sailover_denial_bursts_total",
        "counter",
        "Bursts of 401, 403 and 429 from a backend where they were rare; reported, not acted on.",
        |backend, _| Some(backend.counters.denial_bursts.get() as f64),
    ),
];

/// The same for each pool.
type OfPool = (&'static str, &'static str, &'static str, fn(&Pool) -> u64);

const OF_POOLS: [OfPool; 4] = [
    ("sailover_queue_length", "gauge", "Clients that wait for a place because all are taken.", |pool| {
        u64::from(pool.shared.queue.length())
    }),
    ("sailover_queue_refused_total", "counter", "Clients that found no place in the queue, or none in time.", |pool| {
        pool.shared.queue.refused()
    }),
    (
        "sailover_replays_total",
        "counter",
        "Sessions carried to another backend because the first did not answer.",
        |pool| pool.shared.replays.get(),
    ),
    ("sailover_budget_refused_total", "counter", "Extra attempts that the pool's budget did not allow.", |pool| {
        pool.shared.budget.refused()
    }),
];

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// Backends with the labels that name them.
fn members(table: &Table) -> impl Iterator<Item = ([(&'static str, &str); 3], &Arc<Backend>)> {
    table.pools.iter().flat_map(|pool| {
        pool.members.iter().map(move |member| {
            let cell = &*pool.cells[member.cell].name;
            ([("pool", &*pool.name), ("cell", cell), ("backend", &*member.backend.name)], &member.backend)
        })
    })
}

fn backends_metrics(t: &mut Text, table: &Table, now: clock::Time) {
    for (name, kind, help, value) in OF_BACKENDS {
        t.family(name, kind, help);
        for (labels, backend) in members(table) {
            if let Some(value) = value(backend, now) {
                t.sample(name, &labels, value);
            }
        }
    }
    let by = |t: &mut Text, name: &str, labels: [(&str, &str); 3], key: &str, word: &str, value: u64| {
        let [pool, cell, backend] = labels;
        t.sample(name, &[pool, cell, backend, (key, word)], value);
    };
    t.family("sailover_attempts_total", "counter", "Attempts at backends for clients, by result.");
    for (labels, backend) in members(table) {
        for outcome in Outcome::ALL {
            let count = backend.counters.attempts[outcome as usize].get();
            by(t, "sailover_attempts_total", labels, "result", outcome.word(), count);
        }
    }
    t.family("sailover_probes_total", "counter", "Probes by result.");
    for (labels, backend) in members(table) {
        for (result, counter) in ["ok", "failed"].into_iter().zip(&backend.counters.probes) {
            by(t, "sailover_probes_total", labels, "result", result, counter.get());
        }
    }
    t.family("sailover_backend_state", "gauge", "1 for the state that the backend is in.");
    for (labels, backend) in members(table) {
        let now = backend.view().state;
        for state in State::ALL {
            by(t, "sailover_backend_state", labels, "state", state.word(), u64::from(state == now));
        }
    }
    t.family("sailover_transitions_total", "counter", "Changes of state, by the state entered.");
    for (labels, backend) in members(table) {
        for state in State::ALL {
            let count = backend.counters.transitions[state as usize].get();
            by(t, "sailover_transitions_total", labels, "to", state.word(), count);
        }
    }
}

fn certificates_metrics(t: &mut Text, table: &Table) {
    const NAME: &str = "sailover_certificate_expiry_timestamp_seconds";
    t.family(
        NAME,
        "gauge",
        "When a certificate ends: one that a listener serves, that we show to a pool's backends, or that a TLS probe of the backend saw last.",
    );
    let mut served: Vec<_> = table.listeners.values().collect();
    served.sort_by(|a, b| a.name.cmp(&b.name));
    served.dedup_by(|a, b| a.name == b.name);
    for listener in served {
        for (number, identity) in listener.tls.iter().flat_map(|tls| &tls.identities).enumerate() {
            let name = identity.names.first().map_or("", String::as_str);
            let labels = [("listener", &*listener.name), ("certificate", &*number.to_string()), ("name", name)];
            t.sample(NAME, &labels, identity.valid.1);
        }
    }
    for pool in &table.pools {
        if let Some(ends) = pool.policy.tls.as_ref().and_then(|tls| tls.ends) {
            t.sample(NAME, &[("pool", &*pool.name), ("certificate", "client")], ends);
        }
    }
    for (labels, backend) in members(table) {
        let expiry = backend.certificate_expiry.load(Relaxed);
        if expiry != 0 {
            t.sample(NAME, &labels, expiry);
        }
    }
}

fn pools_metrics(t: &mut Text, table: &Table, now: clock::Time) {
    t.family("sailover_uplink_dark", "gauge", "Whether nothing answers from any cell, which is held against none.");
    t.sample("sailover_uplink_dark", &[], u8::from(table.uplink.dark().is_some()));
    for (name, kind, help, value) in OF_POOLS {
        t.family(name, kind, help);
        for pool in &table.pools {
            t.sample(name, &[("pool", &pool.name)], value(pool));
        }
    }
    t.family("sailover_races_total", "counter", "Clients for whom attempts raced, by whether the later attempt won.");
    for pool in &table.pools {
        for (won, counter) in ["false", "true"].into_iter().zip(&pool.shared.raced) {
            t.sample("sailover_races_total", &[("pool", &pool.name), ("won", won)], counter.get());
        }
    }
    t.family("sailover_pool_refused_total", "counter", "Clients that no backend could be given, by reason.");
    for pool in &table.pools {
        let reasons = [("full", &pool.shared.refused_full), ("unreachable", &pool.shared.refused_unreachable)];
        for (reason, counter) in reasons {
            t.sample("sailover_pool_refused_total", &[("pool", &pool.name), ("reason", reason)], counter.get());
        }
    }
    t.family("sailover_detect_seconds", "histogram", "From the first failed evidence to leaving up.");
    for pool in &table.pools {
        t.histogram("sailover_detect_seconds", &[("pool", &pool.name)], &pool.shared.detect);
    }
    cells_metrics(t, table, now);
}

fn cells_metrics(t: &mut Text, table: &Table, now: clock::Time) {
    t.family("sailover_cell_share_ratio", "gauge", "Share of the pool's new clients that the cell gets now.");
    for pool in &table.pools {
        for (cell, (_, share)) in pool.cells.iter().zip(pool.shares(now)) {
            t.sample("sailover_cell_share_ratio", &[("pool", &pool.name), ("cell", &cell.name)], share);
        }
    }
    let cells = || table.pools.iter().flat_map(|pool| pool.cells.iter().map(move |cell| (pool, cell)));
    t.family("sailover_handshake_seconds", "histogram", "Handshakes as the kernel measured them.");
    for (pool, cell) in cells() {
        let labels = [("pool", &*pool.name), ("cell", &*cell.name)];
        t.histogram("sailover_handshake_seconds", &labels, &cell.shared.handshake);
    }
    t.family("sailover_first_byte_seconds", "histogram", "From the client's bytes to the first byte of an answer.");
    for (pool, cell) in cells() {
        let labels = [("pool", &*pool.name), ("cell", &*cell.name)];
        t.histogram("sailover_first_byte_seconds", &labels, &cell.shared.first_byte);
    }
}

fn process_metrics(t: &mut Text, host: &Host) {
    t.family("sailover_probe_late_seconds", "histogram", "How late probes began.");
    t.histogram("sailover_probe_late_seconds", &[], &host.probe_late);
    t.family("sailover_worker_busy_ratio", "gauge", "Share of the last second that the worker was busy.");
    for (number, beat) in host.beats.iter().enumerate() {
        t.sample("sailover_worker_busy_ratio", &[("worker", &number.to_string())], beat[1].load(Relaxed) as f64 / 1e3);
    }
    t.family("sailover_worker_lag_seconds", "histogram", "How late the workers' timers ran.");
    t.histogram("sailover_worker_lag_seconds", &[], &host.lag);
    t.family("sailover_accept_paused_total", "counter", "Times that accepting paused, by reason.");
    for (reason, counter) in ["resources", "cap"].into_iter().zip(&host.accept_paused) {
        t.sample("sailover_accept_paused_total", &[("reason", reason)], counter.get());
    }
    t.family("sailover_local_errors_total", "counter", "Errors of this machine's own, never taken for a backend's.");
    for (errno, count) in host.local_errors.all() {
        t.sample("sailover_local_errors_total", &[("errno", errno)], count);
    }
    t.family("sailover_spliced_bytes_total", "counter", "Bytes that went through splice(2).");
    t.sample("sailover_spliced_bytes_total", &[], host.spliced.get());
    t.family("sailover_splice_refused_total", "counter", "Bulk directions that used the buffer for want of a pipe.");
    t.sample("sailover_splice_refused_total", &[], host.splice_refused.get());
    t.family("sailover_log_dropped_total", "counter", "Log lines dropped because a sink was slow.");
    t.sample("sailover_log_dropped_total", &[], log::DROPPED.get());
    t.family("sailover_panics_total", "counter", "Connections and probers that a bug of the program ended.");
    t.sample("sailover_panics_total", &[], host.panics.get());
}
