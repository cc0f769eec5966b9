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

/// What takes longer than this is noticed.
const LONG: Duration = Duration::from_millis(250);
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

/// Compares what was seen with the bars of its drill.
pub fn judge(name: &str, drill: &Drill, kind: front::Kind, seen: Seen) -> Outcome {
    let (fault_at, heal_at, end) = (drill.fault_at(), drill.heal_at(), drill.load.seconds);
    let samples = seen.samples.of(Kind::Plain);
    let calm = samples.between(1.0, fault_at).good();
    let mut court = Court {
        drill,
        posts: seen.samples.of(Kind::Post),
        settled: samples.between(fault_at + 1.5, heal_at),
        calm_p99: p99(&calm),
        calm,
        samples,
        seen: &seen,
        missed: Vec::new(),
    };
    let failed = court.failures();
    court.times();
    court.shares();
    court.windows();
    let slow_cut = court.slow_requests();
    let posts_twice = court.posts();
    court.stays();
    let (back, tries) = court.sessions();
    court.deaths_and_memory();
    if kind == front::Kind::Sailover {
        court.own_words();
    }

    let Court { samples, posts, settled, calm_p99, missed, .. } = court;
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
    let mut errors = BTreeMap::new();
    for error in seen.samples.0.iter().filter_map(|sample| sample.result.as_ref().err()) {
        *errors.entry(error.clone()).or_insert(0) += 1;
    }
    Outcome {
        drill: name.to_owned(),
        front: kind.name().to_owned(),
        rate: drill.load.rate,
        fault: fault_at,
        heal: heal_at,
        end,
        requests: samples.0.len(),
        failed,
        over_250_ms: samples.over(LONG),
        calm_p99_ms: calm_p99,
        fault_p99_ms: p99(&samples.between(fault_at, heal_at)),
        worst_ms: ms(samples.quantile(1.0)),
        out_after_s: seen.out,
        share_of_faulty_once_settled: settled.share("a"),
        share_after: (heal_at.ceil() as u32..end as u32)
            .map(|second| samples.between(f64::from(second), f64::from(second) + 1.0).share("a"))
            .collect(),
        posts: posts.0.len(),
        posts_failed: posts.failed(),
        posts_twice,
        slow_cut,
        received: seen.received,
        deaths: seen.deaths.len(),
        attackers: seen.attackers,
        sessions_lost: seen.returns.took.len(),
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

/// One drill before its bars.
struct Court<'a> {
    drill: &'a Drill,
    seen: &'a Seen,
    /// Plain requests: all of them, those before the fault that went well, and those of the fault once it has been found.
    samples: Samples,
    calm: Samples,
    calm_p99: f64,
    settled: Samples,
    posts: Samples,
    missed: Vec<String>,
}

impl Court<'_> {
    fn bar(&mut self, met: bool, text: String) {
        if !met {
            self.missed.push(text)
        }
    }

    /// How many plain requests failed that could have been saved.
    fn failures(&mut self) -> usize {
        let (bars, fault_at) = (&self.drill.bars, self.drill.fault_at());
        // Over a long way many requests are under way when their cell vanishes. They have been sent; nobody can save them.
        let far = !self.drill.away_ms.is_empty();
        let under_way = if far { self.samples.between(fault_at - 1.0, fault_at + 0.05).failed() } else { 0 };
        let failed = self.samples.failed() - under_way;
        if let Some(most) = bars.failed {
            self.bar(failed <= most, format!("{failed} failed, at most {most}: {:?}", self.samples.errors()));
        }
        failed
    }

    fn times(&mut self) {
        let (bars, calm) = (&self.drill.bars, self.calm_p99);
        let slow = self.samples.over(LONG);
        if let Some(most) = bars.slow {
            self.bar(slow <= most, format!("{slow} over 250 ms, at most {most}"));
        }
        let of_fault = p99(&self.samples.between(self.drill.fault_at(), self.drill.heal_at()));
        if let Some(most) = bars.p99_ms {
            self.bar(of_fault <= most, format!("p99 {of_fault:.1} ms, at most {most}"));
        }
        if let Some(above) = bars.p99_above_calm_ms {
            let text = format!("p99 {of_fault:.1} ms, calm {calm:.1}, at most {above} above it");
            self.bar(of_fault <= calm + above, text);
        }
        if let Some(most) = bars.times_calm {
            let settled = p99(&self.settled);
            let text = format!("p99 {settled:.1} ms once settled, calm {calm:.1} ms, at most {most} times that");
            self.bar(settled <= calm * most, text);
        }
    }

    fn shares(&mut self) {
        let (bars, end) = (&self.drill.bars, self.drill.load.seconds);
        let (last, settled) = (self.samples.between(end - 2.0, end).share("a"), self.settled.share("a"));
        if let Some([low, high]) = bars.share {
            let text = format!("share of the healed cell {last:.2}, from {low} to {high}");
            self.bar((low..=high).contains(&last), text);
        }
        if let Some(most) = bars.share_in_fault {
            self.bar(settled <= most, format!("share of the faulty cell {settled:.3}, at most {most}"));
        }
    }

    fn windows(&mut self) {
        let before = self.calm.0.len() as f64 / (self.drill.fault_at() - 1.0);
        for window in &self.drill.bars.windows {
            let (from, to) = (window.from, window.to);
            let here = self.samples.between(from, to);
            let (good, bad) = (here.good(), here.bad());
            let goodput = good.0.len() as f64 / (to - from);
            let calm = self.calm_p99;
            let mut within = |met: bool, text: String| self.bar(met, format!("from {from} to {to} s: {text}"));
            if let Some(least) = window.goodput {
                within(goodput >= least, format!("{goodput:.0} good answers a second, at least {least}"));
            }
            if let Some(least) = window.goodput_of_calm {
                let text = format!("{goodput:.0} good answers a second, calm {before:.0}, at least {least} of it");
                within(goodput >= before * least, text);
            }
            if let Some(most) = window.p99_times_calm {
                let p99 = p99(&good);
                within(p99 <= calm * most, format!("p99 {p99:.1} ms, calm {calm:.1} ms, at most {most} times that"));
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
                let text = format!("share of the first cell {share:.3}, from {low} to {high}");
                within((low..=high).contains(&share), text);
            }
        }
    }

    /// A slow request on a fit cell takes its three seconds and no more; one of the faulty cell's may be moved, once. How many were
    /// cut.
    fn slow_requests(&mut self) -> usize {
        let (drill, fault_at, heal_at) = (self.drill, self.drill.fault_at(), self.drill.heal_at());
        let longer = drill.timeline.iter().any(|event| matches!(event.fault, Fault::SlowMs(_) | Fault::AwayMs(_)));
        let cut = |sample: &&Sample| {
            let at = sample.at.as_secs_f64();
            let touched = at > fault_at - 3.2 && at < fault_at + 1.0 || at > heal_at - 0.2;
            let most = if touched || drill.load.poison_one_in > 0 { 6.6 } else { 3.4 } + if longer { 0.6 } else { 0.0 };
            sample.result.is_err() || !(2.99..most).contains(&sample.latency.as_secs_f64())
        };
        let slow = self.seen.samples.of(Kind::Slow);
        let cut: Vec<String> = slow.0.iter().filter(cut).map(|sample| format!("{sample:?}")).collect();
        self.bar(cut.is_empty(), format!("{} slow requests were cut: {}", cut.len(), cut.join(", ")));
        cut.len()
    }

    /// A POST is executed once at most, answered with a status, whatever it is, and not lost when it was answered well. How many
    /// were executed twice.
    fn posts(&mut self) -> usize {
        let (drill, seen) = (self.drill, self.seen);
        let mut ids: Vec<&str> = seen.executed.iter().map(String::as_str).collect();
        let executed = ids.len();
        ids.sort_unstable();
        ids.dedup();
        let twice = executed - ids.len();
        self.bar(twice == 0, format!("{twice} POSTs were executed twice"));
        // Where the backend itself cuts its answers within their bodies, their clients see it.
        let cuts = drill.timeline.iter().any(|event| matches!(event.fault, Fault::CutPercent(_)));
        let is_answer = |error: &String| error.starts_with("HTTP/1.1 50") || cuts && error == CUT_ANSWER;
        let unanswered = |sample: &&Sample| sample.result.as_ref().is_err_and(|error| !is_answer(error));
        let (unanswered, count) = (self.posts.0.iter().filter(unanswered).count(), self.posts.0.len());
        let errors = self.posts.errors();
        self.bar(unanswered == 0, format!("{unanswered} of {count} POSTs had no answer: {errors:?}"));
        let is_lost = |sample: &&Sample| ids.binary_search(&sample.id.to_string().as_str()).is_err();
        let lost = self.posts.good().0.iter().filter(is_lost).count();
        self.bar(lost == 0, format!("{lost} POSTs were answered and not executed"));
        let failed = self.posts.failed();
        if let Some(most) = drill.bars.posts_failed {
            self.bar(failed <= most, format!("{failed} POSTs failed, at most {most}: {errors:?}"));
        }
        if let Some(most) = drill.bars.posts_ms {
            let worst = ms(self.posts.quantile(1.0));
            self.bar(worst <= most, format!("a POST took {worst:.0} ms, at most {most}"));
        }
        if let Some(most) = drill.bars.amplification {
            let times = seen.received as f64 / seen.samples.0.len() as f64;
            self.bar(times <= most, format!("backends received {times:.3} requests for each, at most {most}"));
        }
        twice
    }

    /// What takes as long as the drill is cut by nobody where its cell is fit.
    fn stays(&mut self) {
        let seen = self.seen;
        let reached = |id: &String| seen.stayed_at.iter().any(|ids| ids.contains(id));
        let lost = seen.stays.iter().filter(|stay| !reached(&stay.id)).count();
        self.bar(lost == 0, format!("{lost} of {} clients that stay reached no backend", seen.stays.len()));
        for stay in seen.stays.iter().filter(|stay| seen.stayed_at[1].contains(&stay.id)) {
            self.bar(stay.cut.is_none(), format!("{stay:?} of the fit cell"));
        }
    }

    /// When the last of the sessions that were lost was back, and how many tries each took.
    fn sessions(&mut self) -> (Option<f64>, f64) {
        let (bars, returns, all) = (&self.drill.bars, &self.seen.returns, self.drill.load.sessions);
        let standing: usize = returns.standing.values().sum();
        let back = returns.took.iter().max().map(Duration::as_secs_f64);
        let tries = returns.tries as f64 / returns.took.len().max(1) as f64;
        if let Some(most) = bars.sessions_back_s {
            self.bar(returns.took.len() * 3 > all, format!("{} of {all} sessions were lost", returns.took.len()));
            self.bar(standing == all, format!("{standing} of {all} sessions stand"));
            let text = format!("sessions were back after {back:.1?} s, at most {most}");
            self.bar(back.is_some_and(|back| back <= most), text);
        }
        if let Some(most) = bars.session_tries {
            self.bar(tries <= most, format!("{tries:.1} tries for each session, at most {most}"));
        }
        (back, tries)
    }

    fn deaths_and_memory(&mut self) {
        let (bars, seen) = (&self.drill.bars, self.seen);
        if let Some(most) = bars.deaths {
            let near = |at: &f64| seen.deaths.iter().filter(|other| (*at..at + 10.0).contains(*other)).count();
            let worst = seen.deaths.iter().map(near).max().unwrap_or(0);
            let text = format!("{worst} backends died within ten seconds, at most {most}: {:.1?}", seen.deaths);
            self.bar(worst <= most, text);
        }
        if let Some(most) = bars.attacker_kb {
            let each = (seen.memory[1] - seen.memory[0]) as f64 / 1024.0 / seen.attackers.max(1) as f64;
            self.bar(each <= most, format!("{each:.1} KB for each of {} attackers, at most {most}", seen.attackers));
        }
    }

    /// What only sailover can be asked about.
    fn own_words(&mut self) {
        let (drill, bars, seen) = (self.drill, &self.drill.bars, self.seen);
        let [suspects, downs] = seen.entered.unwrap_or_default();
        if let Some(within) = bars.out_within {
            let took = seen.out.unwrap_or(f64::INFINITY);
            self.bar(took <= within, format!("the faulty cell was out after {took:.2} s, at most {within}"));
        }
        if let Some(most) = bars.attempted {
            let part = seen.tried / (drill.load.rate * (drill.heal_at() - drill.fault_at() - 0.3));
            let text = format!("{:.3} % attempted at the faulty cell, at most {}", part * 100.0, most * 100.0);
            self.bar(part < most, text);
        }
        if let Some(most) = bars.downs {
            self.bar(downs <= most, format!("down entered {downs} times, at most {most}"));
        }
        if let Some(most) = bars.transitions {
            self.bar(suspects + downs <= most, format!("{suspects} suspect and {downs} down, at most {most}"));
        }
        if !self.missed.is_empty() {
            let own = seen.log.lines().filter(|line| !line.contains("\"kind\":"));
            own.take(60).for_each(|line| println!("    {line}"));
        }
    }
}
