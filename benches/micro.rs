//! What one choice, one table and one step of health cost by themselves. `make micro`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use fastrand::Rng;
use sailover::clock::Time;
use sailover::config;
use sailover::health::{Depth, Evidence, Health, Policy, Seen, Source};
use sailover::pool::{self, Trial, Want};
use sailover::table::{self, Table};

/// A pool of two cells with `backends` in all.
fn yaml(backends: usize, more: &str) -> String {
    let list = |cell: usize| -> String {
        let each = (0..backends.div_ceil(2)).map(|i| format!("10.{cell}.{}.{}:443", i / 250, i % 250 + 1));
        each.collect::<Vec<_>>().join(", ")
    };
    format!(
        "pools: {{ shop: {{ cells: {{ a: [ {} ], b: [ {} ] }}, {more} }} }}\n\
         listeners: [ {{ bind: 127.0.0.1:443, tcp: shop }} ]\n",
        list(1),
        list(2)
    )
}

fn load(backends: usize, more: &str) -> config::Loaded {
    config::parse(yaml(backends, more).as_bytes(), 16 << 20).expect("a good file")
}

/// A table in which every backend is up.
fn built(backends: usize, more: &str) -> Table {
    let loaded = load(backends, more);
    let now = Time(1_000_000);
    let (table, _) = table::build(Arc::new(loaded.config), loaded.hash, None, 100_000, now).expect("a table");
    for pool in &table.pools {
        for member in &pool.members {
            member.backend.success(&pool.policy.health, Source::Probe, Depth::Connect, now, now);
        }
    }
    table
}

fn choose(c: &mut Criterion) {
    let mut group = c.benchmark_group("choose");
    for backends in [2, 100, 10_000] {
        for (name, more) in [
            ("two_choices", "balance: two_choices"),
            ("round_robin", "balance: round_robin"),
            ("least_connections", "balance: least_connections"),
            ("client_ip", "affinity: { by: client_ip }"),
        ] {
            let table = built(backends, more);
            let pool = &table.pools[0];
            let mut rng = Rng::with_seed(1);
            let now = Time(20_000_000);
            let mut client = 0u32;
            group.bench_function(BenchmarkId::new(name, backends), |b| {
                b.iter(|| {
                    client = client.wrapping_add(1);
                    let pin = (name == "client_ip").then(|| pool::pin(std::net::Ipv4Addr::from(client).into()));
                    black_box(pool.pick(&Want { pin, trial: Trial::Yes, ..Want::default() }, now, &mut rng))
                });
            });
        }
    }
    group.finish();
}

fn build(c: &mut Criterion) {
    let mut group = c.benchmark_group("table");
    group.sample_size(20);
    for backends in [100, 5_000] {
        let loaded = load(backends, "affinity: { by: client_ip }");
        let config = Arc::new(loaded.config);
        let before = built(backends, "affinity: { by: client_ip }");
        group.bench_function(BenchmarkId::new("new", backends), |b| {
            b.iter(|| table::build(config.clone(), String::new(), None, 100_000, Time(1)));
        });
        group.bench_function(BenchmarkId::new("unchanged", backends), |b| {
            b.iter(|| table::build(config.clone(), String::new(), Some(&before), 100_000, Time(1)));
        });
        let text = yaml(backends, "affinity: { by: client_ip }");
        group.bench_function(BenchmarkId::new("read the file", backends), |b| {
            b.iter(|| config::parse(text.as_bytes(), 16 << 20).is_ok());
        });
    }
    group.finish();
}

fn health(c: &mut Criterion) {
    let policy = Policy::default();
    let now = Time(1_000_000);
    let evidence = |seen| Evidence { source: Source::Traffic, depth: Depth::Connect, seen, began: now };
    let mut health = Health::new(&policy, now);
    let mut at = now;
    c.bench_function("health/success", |b| {
        b.iter(|| {
            at = at + Duration::from_millis(1);
            black_box(health.step(&policy, &evidence(Seen::Success { hits: 1 }), at))
        });
    });
    c.bench_function("health/refused and back", |b| {
        b.iter(|| {
            at = at + Duration::from_millis(1);
            black_box(health.step(&policy, &evidence(Seen::Refused), at));
            at = at + Duration::from_millis(1);
            black_box(health.step(&policy, &evidence(Seen::Success { hits: 1 }), at))
        });
    });
}

criterion_group!(benches, choose, build, health);
criterion_main!(benches);
