//! The control thread's look at all backends, ten times a second: what each showed since the last look is judged against its
//! own past and against the others of its pool ([`crate::pace`]), and its share follows.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::backend::Backend;
use crate::clock;
use crate::dial;
use crate::host::Host;
use crate::pace::{self, Alike};
use crate::pool::Pool;
use crate::table::Table;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// A look so much later than it was due means that the process stood still: what was measured meanwhile, and what ends in this many
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
    let mut alike = Alike::default();
    looks.iter().enumerate().for_each(|(i, look)| look.iter().for_each(|look| alike.add(i, *look, now)));
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

/// Tells when nothing answers from anywhere any more, and when something does again.
fn tell(table: &Table, before: usize) -> usize {
    match (table.uplink.dark(), before) {
        (Some(_), 0) => {
            tracing::info!("nothing answers from any cell: taken for our own way out, and held against no backend");
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
