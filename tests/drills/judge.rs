//! What was seen against the bars, and the figures that are kept of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::scene::{Drill, Fault};
use super::{NAMES, Seen, front};
use crate::support::load::{CUT_ANSWER, Kind, Sample, Samples};

pub const HEADING: &str =
    "drill                  front     failed   slow  p99 ms    worst  suspect  down  share in fault | after, by second";

/// Seconds of one point of a chart.
const BUCKET: f64 = 0.25;

/// The figures of one drill over one front.
#[derive(Debug, Deserialize, Serialize)]
pub struct Outcome {
    pub drill: String,
    pub front: String,
    pub rate: f64,
    pub fault: f64,
    pub heal: f64,
    pub end: f64,
    pub requests: usize,
    pub failed: usize,
    pub over_250_ms: usize,
    pub calm_p99_ms: f64,
    pub fault_p99_ms: f64,
    pub worst_ms: f64,
    pub out_after_s: Option<f64>,
    pub share_of_faulty_once_settled: f64,
    pub share_after: Vec<f64>,
    pub posts: usize,
    pub posts_failed: usize,
    pub posts_twice: usize,
    pub slow_cut: usize,
    pub received: usize,
    pub deaths: usize,
    pub attackers: usize,
    /// Sessions that were lost, when the last of them stood again, and the tries of each on average.
    #[serde(default)]
    pub sessions_lost: usize,
    #[serde(default)]
    pub sessions_back_s: Option<f64>,
    #[serde(default)]
    pub session_tries: f64,
    pub memory_calm_kb: u64,
    pub memory_most_kb: u64,
    pub processor_s: f64,
    pub entered_suspect: Option<f64>,
    pub entered_down: Option<f64>,
    pub errors: BTreeMap<String, usize>,
    /// What was not met; bars that only sailover can be asked about are left aside for others.
    pub missed: Vec<String>,
    pub points: Vec<Point>,
}

/// One point of a chart.
#[derive(Debug, Deserialize, Serialize)]
pub struct Point {
    pub at: f64,
    pub requests: usize,
    pub failed: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// Share of the good answers by cell.
    pub shares: Vec<f64>,
}

impl Outcome {
    /// A row of the table that is printed.
    pub fn line(&self) -> String {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.0}"));
        let after: Vec<String> = self.share_after.iter().map(|share| format!("{:.0}", share * 100.0)).collect();
        let mut line = format!(
            "{:<23}{:<9}{:>7}{:>7}{:>8.1}{:>9.0}{:>9}{:>6}{:>15.1}% | {}",
            self.drill,
            self.front,
            self.failed,
            self.over_250_ms,
            self.fault_p99_ms,
            self.worst_ms,
            number(self.entered_suspect),
            number(self.entered_down),
            self.share_of_faulty_once_settled * 100.0,
            after.join(" ")
        );
        if self.posts > 0 {
            line += &format!("  [{} of {} POST failed]", self.posts_failed, self.posts);
        }
        if let Some(back) = self.sessions_back_s {
            line += &format!(
                "  [{} sessions lost, back after {back:.1} s, {:.1} tries each]",
                self.sessions_lost, self.session_tries
            );
        }
        for bar in &self.missed {
            line += &format!("\n    missed: {bar}");
        }
        line
    }

    pub fn keep(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        let path = directory.join(format!("{}.{}.json", self.drill, self.front));
        std::fs::write(path, serde_json::to_vec_pretty(self).unwrap()).unwrap();
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn p99(samples: &Samples) -> f64 {
    ms(samples.quantile(0.99))
}

pub fn judge(name: &str, drill: &Drill, kind: front::Kind, seen: Seen) -> Outcome {
    let (fault_at, heal_at, end) = (drill.fault_at(), drill.heal_at(), drill.load.seconds);
    let all = &seen.samples;
    let (samples, posts) = (all.of(Kind::Plain), all.of(Kind::Post));
    let during = samples.between(fault_at, heal_at);
    let settled = samples.between(fault_at + 1.5, heal_at);
    let calm = samples.between(1.0, fault_at).good();
    let (calm_p99, fault_p99) = (p99(&calm), p99(&during));
    let bars = &drill.bars;
    let mut missed = Vec::new();
    let mut bar = |met: bool, text: String| {
        if !met {
            missed.push(text)
        }
    };

    // Over a long way many requests are under way when their cell vanishes. They have been sent; nobody can save them.
    let under_way =
        if drill.away_ms.is_empty() { 0 } else { samples.between(fault_at - 1.0, fault_at + 0.05).failed() };
    let failed = samples.failed() - under_way;
    let slow = samples.over(Duration::from_millis(250));
    if let Some(most) = bars.failed {
        bar(failed <= most, format!("{failed} failed, at most {most}: {:?}", samples.errors()));
    }
    if let Some(most) = bars.slow {
        bar(slow <= most, format!("{slow} over 250 ms, at most {most}"));
    }
    if let Some(most) = bars.p99_ms {
        bar(fault_p99 <= most, format!("p99 {fault_p99:.1} ms, at most {most}"));
    }
    if let Some(above) = bars.p99_above_calm_ms {
        bar(
            fault_p99 <= calm_p99 + above,
            format!("p99 {fault_p99:.1} ms, calm {calm_p99:.1}, at most {above} above it"),
        );
    }
    let last = samples.between(end - 2.0, end).share("a");
    if let Some([low, high]) = bars.share {
        bar((low..=high).contains(&last), format!("share of the healed cell {last:.2}, from {low} to {high}"));
    }
    let share_settled = settled.share("a");
    if let Some(most) = bars.share_in_fault {
        bar(share_settled <= most, format!("share of the faulty cell {share_settled:.3}, at most {most}"));
    }
    if let Some(most) = bars.times_calm {
        let p99 = p99(&settled);
        bar(
            p99 <= calm_p99 * most,
            format!("p99 {p99:.1} ms once settled, calm {calm_p99:.1} ms, at most {most} times that"),
        );
    }
    for window in &bars.windows {
        let (from, to) = (window.from, window.to);
        let here = samples.between(from, to);
        let (good, bad) = (here.good(), here.bad());
        let goodput = good.0.len() as f64 / (to - from);
        let before = calm.0.len() as f64 / (fault_at - 1.0);
        let mut within = |met: bool, text: String| bar(met, format!("from {from} to {to} s: {text}"));
        if let Some(least) = window.goodput {
            within(goodput >= least, format!("{goodput:.0} good answers a second, at least {least}"));
        }
        if let Some(least) = window.goodput_of_calm {
            within(
                goodput >= before * least,
                format!("{goodput:.0} good answers a second, calm {before:.0}, at least {least} of it"),
            );
        }
        if let Some(most) = window.p99_times_calm {
            let p99 = p99(&good);
            within(
                p99 <= calm_p99 * most,
                format!("p99 {p99:.1} ms, calm {calm_p99:.1} ms, at most {most} times that"),
            );
        }
        if let Some(most) = window.refused_p99_ms {
            let p99 = if bad.0.is_empty() { 0.0 } else { p99(&bad) };
            within(p99 <= most, format!("refused after {p99:.1} ms (p99), at most {most}"));
        }
        if let Some(most) = window.failed {
            within(bad.0.len() <= most, format!("{} failed, at most {most}", bad.0.len()));
        }
        if let Some(most) = window.failed_part {
            let part = bad.0.len() as f64 / here.0.len().max(1) as f64;
            within(part <= most, format!("{part:.4} of the requests failed, at most {most}"));
        }
        if let Some([low, high]) = window.share {
            let share = good.share("a");
            within((low..=high).contains(&share), format!("share of the first cell {share:.3}, from {low} to {high}"));
        }
    }

    // A slow request on a fit cell takes its three seconds and no more; one of the faulty cell's may be moved, once.
    let longer = drill.timeline.iter().any(|event| matches!(event.fault, Fault::SlowMs(_) | Fault::AwayMs(_)));
    let cut = |sample: &&Sample| {
        let at = sample.at.as_secs_f64();
        let touched = at > fault_at - 3.2 && at < fault_at + 1.0 || at > heal_at - 0.2;
        let most = if touched || drill.load.poison_one_in > 0 { 6.6 } else { 3.4 } + if longer { 0.6 } else { 0.0 };
        sample.result.is_err() || !(2.99..most).contains(&sample.latency.as_secs_f64())
    };
    let cut: Vec<String> = all.of(Kind::Slow).0.iter().filter(cut).map(|sample| format!("{sample:?}")).collect();
    bar(cut.is_empty(), format!("{} slow requests were cut: {}", cut.len(), cut.join(", ")));

    // A POST is executed once at most, answered with a status, whatever it is, and not lost when it was answered well.
    let mut ids = seen.executed;
    let executed = ids.len();
    ids.sort();
    ids.dedup();
    let twice = executed - ids.len();
    bar(twice == 0, format!("{twice} POSTs were executed twice"));
    // Where the backend itself cuts its answers within their bodies, their clients see it.
    let cuts = drill.timeline.iter().any(|event| matches!(event.fault, Fault::CutPercent(_)));
    let is_answer = |error: &String| error.starts_with("HTTP/1.1 50") || cuts && error == CUT_ANSWER;
    let unanswered = |sample: &&Sample| sample.result.as_ref().is_err_and(|error| !is_answer(error));
    let unanswered = posts.0.iter().filter(unanswered).count();
    bar(unanswered == 0, format!("{unanswered} of {} POSTs had no answer: {:?}", posts.0.len(), posts.errors()));
    let lost = posts.good().0.iter().filter(|sample| ids.binary_search(&sample.id.to_string()).is_err()).count();
    bar(lost == 0, format!("{lost} POSTs were answered and not executed"));
    if let Some(most) = bars.posts_failed {
        bar(posts.failed() <= most, format!("{} POSTs failed, at most {most}: {:?}", posts.failed(), posts.errors()));
    }
    if let Some(most) = bars.posts_ms {
        let worst = posts.0.iter().map(|sample| sample.latency.as_secs_f64() * 1e3).fold(0.0, f64::max);
        bar(worst <= most, format!("a POST took {worst:.0} ms, at most {most}"));
    }
    let asked = all.0.len();
    if let Some(most) = bars.amplification {
        let times = seen.received as f64 / asked as f64;
        bar(times <= most, format!("backends received {times:.3} requests for each, at most {most}"));
    }
    // What takes as long as the drill is cut by nobody where its cell is fit.
    let reached = |id: &String| seen.stayed_at.iter().any(|ids| ids.contains(id));
    let lost = seen.stays.iter().filter(|stay| !reached(&stay.id)).count();
    bar(lost == 0, format!("{lost} of {} clients that stay reached no backend", seen.stays.len()));
    for stay in seen.stays.iter().filter(|stay| seen.stayed_at[1].contains(&stay.id)) {
        bar(stay.cut.is_none(), format!("{stay:?} of the fit cell"));
    }
    let returns = &seen.returns;
    let standing: usize = returns.standing.values().sum();
    let back = returns.took.iter().max().map(Duration::as_secs_f64);
    let tries = returns.tries as f64 / returns.took.len().max(1) as f64;
    if let Some(most) = bars.sessions_back_s {
        let all = drill.load.sessions;
        bar(returns.took.len() * 3 > all, format!("{} of {all} sessions were lost", returns.took.len()));
        bar(standing == all, format!("{standing} of {all} sessions stand"));
        bar(back.is_some_and(|back| back <= most), format!("sessions were back after {back:.1?} s, at most {most}"));
    }
    if let Some(most) = bars.session_tries {
        bar(tries <= most, format!("{tries:.1} tries for each session, at most {most}"));
    }
    if let Some(most) = bars.deaths {
        let near = |at: &f64| seen.deaths.iter().filter(|other| (*at..at + 10.0).contains(*other)).count();
        let worst = seen.deaths.iter().map(near).max().unwrap_or(0);
        bar(worst <= most, format!("{worst} backends died within ten seconds, at most {most}: {:.1?}", seen.deaths));
    }
    if let Some(most) = bars.attacker_kb {
        let each = (seen.memory[1] - seen.memory[0]) as f64 / 1024.0 / seen.attackers.max(1) as f64;
        bar(each <= most, format!("{each:.1} KB for each of {} attackers, at most {most}", seen.attackers));
    }
    if kind == front::Kind::Sailover {
        let [suspects, downs] = seen.entered.unwrap_or_default();
        if let Some(within) = bars.out_within {
            let took = seen.out.unwrap_or(f64::INFINITY);
            bar(took <= within, format!("the faulty cell was out after {took:.2} s, at most {within}"));
        }
        if let Some(most) = bars.attempted {
            let part = seen.tried / (drill.load.rate * (heal_at - fault_at - 0.3));
            bar(part < most, format!("{:.3} % attempted at the faulty cell, at most {}", part * 100.0, most * 100.0));
        }
        if let Some(most) = bars.downs {
            bar(downs <= most, format!("down entered {downs} times, at most {most}"));
        }
        if let Some(most) = bars.transitions {
            bar(suspects + downs <= most, format!("{suspects} suspect and {downs} down, at most {most}"));
        }
        if !missed.is_empty() {
            let own = seen.log.lines().filter(|line| !line.contains("\"kind\":"));
            own.take(60).for_each(|line| println!("    {line}"));
        }
    }

    let mut errors = BTreeMap::new();
    for error in all.0.iter().filter_map(|sample| sample.result.as_ref().err()) {
        *errors.entry(error.clone()).or_insert(0) += 1;
    }
    let shares = |samples: &Samples| NAMES.iter().take(drill.cells()).map(|name| samples.share(name)).collect();
    let point = |i: u32| {
        let at = f64::from(i) * BUCKET;
        let here = samples.between(at, at + BUCKET);
        let good = here.good();
        Point {
            at,
            requests: here.0.len(),
            failed: here.failed(),
            p50_ms: ms(here.quantile(0.5)),
            p99_ms: p99(&here),
            shares: shares(&good),
        }
    };
    Outcome {
        drill: name.to_owned(),
        front: kind.name().to_owned(),
        rate: drill.load.rate,
        fault: fault_at,
        heal: heal_at,
        end,
        requests: samples.0.len(),
        failed,
        over_250_ms: slow,
        calm_p99_ms: calm_p99,
        fault_p99_ms: fault_p99,
        worst_ms: ms(samples.quantile(1.0)),
        out_after_s: seen.out,
        share_of_faulty_once_settled: share_settled,
        share_after: (heal_at.ceil() as u32..end as u32)
            .map(|second| samples.between(f64::from(second), f64::from(second) + 1.0).share("a"))
            .collect(),
        posts: posts.0.len(),
        posts_failed: posts.failed(),
        posts_twice: twice,
        slow_cut: cut.len(),
        received: seen.received,
        deaths: seen.deaths.len(),
        attackers: seen.attackers,
        sessions_lost: returns.took.len(),
        sessions_back_s: back,
        session_tries: tries,
        memory_calm_kb: seen.memory[0] / 1024,
        memory_most_kb: seen.memory[1] / 1024,
        processor_s: seen.processor,
        entered_suspect: seen.entered.map(|[suspects, _]| suspects),
        entered_down: seen.entered.map(|[_, downs]| downs),
        errors,
        missed,
        points: (0..(end / BUCKET) as u32).map(point).collect(),
    }
}
