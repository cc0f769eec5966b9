//! The control thread's look at all backends, ten times a second: what each showed since the last look is judged against its
//! own past and against the others of its pool ([`crate::pace`]), and its share follows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::backend::Backend;
use crate::clock::{self, LOOK};
use crate::dial;
use crate::health::State;
use crate::host::Host;
use crate::pace::{self, Alike};
use crate::pool::Pool;
use crate::table::Table;

/// A look this much later than it was due means that the process stood still: what was measured meanwhile, and what ends in this many
/// looks, is our own time and no backend's.
const LATE: Duration = Duration::from_millis(60);
const SKIPPED: u32 = 2;
/// Backends between two turns of everything else on this thread.
const TURN: usize = 256;
/// Most backends probed out of turn while nothing answers from anywhere.
const MOST_ASKED: usize = 50;

/// Looks for as long as the process lives.
pub async fn run(host: Arc<Host>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Looks since nothing has answered from anywhere.
    let mut dark = 0;
    let mut late = 0;
    loop {
        let due = ticks.tick().await;
        late = if due.elapsed() > LATE { SKIPPED } else { u32::saturating_sub(late, 1) };
        let table = host.live.load_full();
        dark = tell(&table, dark);
        if dark > 0 {
            ask_one(&table, dark);
        }
        let mut looked = 0;
        for pool in &table.pools {
            look(pool, late > 0);
            looked += pool.members.len();
            if looked >= TURN {
                looked = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}

fn look(pool: &Pool, late: bool) {
    let now = clock::now();
    let shifted = pool.members.iter().any(|member| member.backend.is_out(now));
    let lost_known_after = |backend: &Backend| dial::delays(backend, &pool.policy).1 + LOOK / 2;
    let looks: Vec<Option<pace::Look>> = pool
        .members
        .iter()
        .map(|member| member.backend.look(shifted, late, lost_known_after(&member.backend), now))
        .collect();
    let known = pool.members.iter().filter_map(|member| member.backend.first_byte.learned());
    let usual = known.map(|(_, p99)| p99.as_micros() as u32).max().unwrap_or(0);
    pool.shared.usual.store(usual, Relaxed);
    let mut alike = Alike::default();
    looks.iter().enumerate().for_each(|(i, look)| look.iter().for_each(|look| alike.add(i, *look, now)));
    find_last_standing(pool);
    // With nobody to send to instead there is nothing to decide.
    if pool.members.len() < 2 {
        return;
    }
    let mut changed = false;
    for (i, (member, look)) in pool.members.iter().zip(&looks).enumerate() {
        if let Some(look) = look {
            changed |= member.backend.judge(*look, alike.but(i), now);
        }
    }
    if changed {
        pool.shared.changed();
    }
}

/// Of each tier of several cells the backend that alone is not out: a probe may be wrong about all of them alike, and a client
/// finds out at the cost of one attempt.
fn find_last_standing(pool: &Pool) {
    let mut tiers: BTreeMap<u8, (usize, Vec<u64>)> = BTreeMap::new();
    pool.cells.iter().for_each(|cell| tiers.entry(cell.tier).or_default().0 += 1);
    for member in &pool.members {
        let backend = &member.backend;
        if backend.view().state != State::Down && !backend.drained.load(Relaxed) {
            tiers.entry(pool.cells[member.cell].tier).or_default().1.push(backend.id);
        }
    }
    for member in &pool.members {
        let (cells, standing) = &tiers[&pool.cells[member.cell].tier];
        let last = *cells > 1 && standing == &[member.backend.id];
        if member.backend.last_standing.load(Relaxed) != last {
            member.backend.last_standing.store(last, Relaxed);
        }
    }
}

/// Tells when nothing answers from anywhere any more, and when something does again.
fn tell(table: &Table, before: usize) -> usize {
    match (table.uplink.dark(), before) {
        (Some(_), 0) => {
            tracing::info!("nothing answers from any cell: our own uplink seems to be down; no backend is blamed");
            1
        }
        (Some(_), looks) => looks + 1,
        (None, 0) => 0,
        (None, _) => {
            tracing::info!("cells answer again");
            0
        }
    }
}

/// While all is dark one backend is probed at each look, another cell's each time: whatever comes back first ends it.
fn ask_one(table: &Table, looks: usize) {
    if looks > MOST_ASKED {
        return;
    }
    let cells: Vec<_> = table.pools.iter().flat_map(|pool| pool.cells.iter().map(move |cell| (pool, cell))).collect();
    let Some((pool, cell)) = cells.get(looks % cells.len().max(1)) else { return };
    let members = &pool.members[cell.members.clone()];
    if let Some(member) = members.get(looks / cells.len() % members.len().max(1)) {
        member.backend.probe_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Counters};
    use crate::pool::{Member, NewCell, Policy};

    #[test]
    fn a_stranger_is_given_the_time_of_those_who_are_known() {
        let shared = Arc::new(crate::backend::PoolShared::new("p", Arc::default()));
        let policy = Arc::new(Policy::default());
        let member = |i: usize| {
            let address = format!("10.0.0.{i}:80").parse().expect("an address");
            let counters = Arc::new(Counters::default());
            let backend = Backend::new(shared.clone(), "b", address, counters, &policy.health, clock::now());
            Member { backend: Arc::new(backend), cell: 0, weight: 1, max_connections: u32::MAX }
        };
        let cell = NewCell {
            name: Arc::from("c"),
            tier: 0,
            weight: 1,
            count: 3,
            max_connections: u32::MAX,
            capacity: None,
            shared: Arc::default(),
        };
        let pool = Pool::new(shared.clone(), policy.clone(), vec![cell], (0..3).map(member).collect());
        let ms = Duration::from_millis;
        let given = |known: u64, way: u64| {
            if known > 0 {
                (0..2_000).for_each(|_| pool.members[1].backend.first_byte.record(ms(known)));
            }
            if way > 0 {
                (0..2_000).for_each(|_| pool.members[0].backend.handshake.record(ms(way)));
            }
            look(&pool, false);
            pool.members[0].backend.stranger_silent_after()
        };
        assert_eq!(given(0, 1), ms(1_000), "nobody is known");
        assert!((ms(250)..ms(260)).contains(&given(2, 0)), "the least, and its way");
        assert!((ms(400)..ms(700)).contains(&given(50, 0)), "they take their time");
        assert!((ms(560)..ms(900)).contains(&given(0, 80)), "it is far");
        assert_eq!(given(500, 0), ms(1_000), "nobody is waited for longer");
    }
}
