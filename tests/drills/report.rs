//! The page of drills: a table, and a chart of each.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use super::front::{self, Kind};
use super::judge::{Outcome, Point};
use super::scene::{Drill, Outage};

const COLOURS: [&str; 4] = ["#1565c0", "#ef6c00", "#2e7d32", "#8e24aa"];
/// Of a chart: its width, that of its margin on the left, and the height of one of its three panels and of the room below it.
const WIDTH: f64 = 720.0;
const LEFT: f64 = 64.0;
const PANEL: f64 = 110.0;
const BELOW: f64 = 34.0;

/// Writes `drills.md` and a directory `drills` with the charts and the settings of all fronts.
pub fn write(results: &Path, page: &Path, drills: &[(String, Drill)]) {
    let charts = page.join("drills");
    std::fs::create_dir_all(&charts).unwrap();
    let of = |name: &str, kind: Kind| -> Option<Outcome> {
        let text = std::fs::read(results.join(format!("{name}.{}.json", kind.name()))).ok()?;
        serde_json::from_slice(&text).ok()
    };
    let mut text = HEAD.to_owned();
    let fronts: Vec<Kind> =
        Kind::ALL.into_iter().filter(|kind| drills.iter().any(|(name, _)| of(name, *kind).is_some())).collect();
    // A chart shows how fronts differ.
    let compared = |name: &str| fronts.iter().filter(|front| of(name, **front).is_some()).count() > 1;
    let count = drills.iter().filter(|(name, _)| compared(name)).count();
    let _ = writeln!(text, "{count} of the {} drills were run over several fronts.\n", drills.len());
    let column = |name: &&str| format!(" {name} |");
    let names: Vec<&str> = fronts.iter().map(|kind| kind.name()).collect();
    let _ = writeln!(text, "| drill |{}", names.iter().map(column).collect::<String>());
    let _ = writeln!(text, "|---|{}", "---|".repeat(names.len()));
    for (name, _) in drills.iter().filter(|(name, _)| fronts.iter().any(|front| of(name, *front).is_some())) {
        let cell = |kind: &Kind| {
            of(name, *kind).map_or(" – |".to_owned(), |one| {
                let mark = if one.missed.is_empty() { "✓" } else { "✗" };
                format!(" {mark} {} / {:.0} ms / {} |", one.failed, one.fault_p99_ms, one.over_250_ms)
            })
        };
        let title = if compared(name) { format!("[{name}](#{name})") } else { name.clone() };
        let _ = writeln!(text, "| {title} |{}", fronts.iter().map(cell).collect::<String>());
    }
    let met = |kind: &Kind| {
        let all: Vec<Outcome> = drills.iter().filter_map(|(name, _)| of(name, *kind)).collect();
        format!(" {} of {} |", all.iter().filter(|one| one.missed.is_empty()).count(), all.len())
    };
    let _ = writeln!(text, "| **all bars met** |{}", fronts.iter().map(met).collect::<String>());
    let kinds: BTreeSet<Outage> = drills.iter().map(|(_, drill)| drill.kind).collect();
    for kind in kinds {
        if !drills.iter().any(|(name, drill)| drill.kind == kind && compared(name)) {
            continue;
        }
        let _ = write!(text, "\n## {}\n", title(kind));
        for (name, drill) in drills.iter().filter(|(_, drill)| drill.kind == kind) {
            let outcomes: Vec<(Kind, Outcome)> =
                fronts.iter().filter_map(|front| Some((*front, of(name, *front)?))).collect();
            if outcomes.len() < 2 {
                continue;
            }
            std::fs::write(charts.join(format!("{name}.svg")), chart(&outcomes)).unwrap();
            let _ = write!(text, "\n### {name}\n\n{}.\n\n![{name}](drills/{name}.svg)\n", sentence(&drill.about));
            for (front, outcome) in &outcomes {
                for bar in &outcome.missed {
                    let bar = bar.split(": [").next().unwrap_or(bar).split(": Sample").next().unwrap_or(bar);
                    let _ = write!(text, "\n- {}: {bar}", front.name());
                }
            }
            text.push('\n');
        }
    }
    std::fs::write(page.join("drills.md"), text).unwrap();
    // One file of settings for each front and face: those of the drills differ in the distances alone.
    for (face, name) in [("tcp", "refuse-tcp"), ("http", "web-refuse-new")] {
        let Some((_, drill)) = drills.iter().find(|(other, _)| other == name) else { continue };
        let cells = [("a", "10.99.1.2:80"), ("b", "10.99.2.2:80")].map(|(n, at)| (n.to_owned(), at.parse().unwrap()));
        for kind in Kind::ALL {
            std::fs::write(charts.join(format!("{}-{face}.txt", kind.name())), front::settings(kind, drill, &cells))
                .unwrap();
        }
    }
}

const HEAD: &str = "# Drills

Two or more cells in network namespaces, an open-loop client, and faults by a timeline. Each drill is a file in
[tests/drills](../tests/drills) that says what is done and what must hold; `make drills` runs them, and
`make drills PEERS=haproxy,nginx,envoy` puts others in the place of sailover, and writes this page. The settings of every front
are beside the charts ([HAProxy](drills/haproxy-http.txt), [nginx](drills/nginx-http.txt), [Envoy](drills/envoy-http.txt), and the
same with `tcp`): the best we found that also let a slow answer of three seconds live. Better ones are welcome.

One run on two shared cores, client and cells on the same machine: compare fronts, not times. In a cell of the table: whether
every bar was met (those that ask sailover about itself count for it alone), how many requests failed, the p99 during the fault,
and how many requests took more than 250 ms. In half-http and storm-http more is offered than the cells can serve: what is refused
at once counts as failed, and the bars ask for good answers and their times instead.

";

fn title(kind: Outage) -> &'static str {
    match kind {
        Outage::Blackout => "Blackout",
        Outage::CrashLoop => "Crash loop",
        Outage::Tarpit => "Tarpit",
        Outage::ErrorMix => "Errors",
        Outage::BrownOut => "Brown-out",
        Outage::LossyPath => "Lossy path",
        Outage::SplitVerbs => "Split verbs",
        Outage::HalfTheWorld => "Half the world",
        Outage::Homecoming => "Homecoming",
        Outage::CryingWolf => "Crying wolf",
        Outage::Storm => "Storm",
        Outage::PoisonPill => "Poison pill",
        Outage::Siege => "Siege",
        Outage::DoNoHarm => "Do no harm",
    }
}

fn sentence(about: &str) -> String {
    let about = about.trim();
    let mut letters = about.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().collect::<String>() + letters.as_str())
}

/// Failures, p99 and the first cell's share over time, a line for each front.
fn chart(outcomes: &[(Kind, Outcome)]) -> String {
    let Some((_, first)) = outcomes.first() else { return String::new() };
    let end = first.end;
    let x = |at: f64| LEFT + at / end * (WIDTH - LEFT - 10.0);
    let height = 30.0 + 3.0 * (PANEL + BELOW);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    for (i, (kind, _)) in outcomes.iter().enumerate() {
        let at = LEFT + i as f64 * 110.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{at}\" y=\"10\" width=\"12\" height=\"4\" fill=\"{}\"/><text x=\"{}\" y=\"16\">{}</text>",
            colour(*kind),
            at + 16.0,
            kind.name()
        );
    }
    type Value = fn(&Point) -> f64;
    let panels: [(&str, Value, bool); 3] = [
        ("failed of 100", |point| point.failed as f64 * 100.0 / point.requests.max(1) as f64, false),
        ("p99 in ms (log)", |point| point.p99_ms.max(1.0), true),
        ("share of cell a in %", |point| point.shares.first().copied().unwrap_or(0.0) * 100.0, false),
    ];
    for (i, (label, value, logarithmic)) in panels.into_iter().enumerate() {
        let top = 30.0 + i as f64 * (PANEL + BELOW);
        let most = if logarithmic { 10_000.0 } else { 100.0 };
        let y = |value: f64| {
            let part = if logarithmic { value.max(1.0).log10() / f64::log10(most) } else { value / most };
            top + PANEL * (1.0 - part.clamp(0.0, 1.0))
        };
        let (from, to) = (x(first.fault), x(first.heal));
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{PANEL}\" fill=\"#fbe9e7\"/>",
            to - from
        );
        let marks: &[f64] = if logarithmic { &[1.0, 10.0, 100.0, 1_000.0, 10_000.0] } else { &[0.0, 50.0, 100.0] };
        for mark in marks {
            let at = y(*mark);
            let _ = writeln!(
                svg,
                "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{mark}</text>",
                WIDTH - 10.0,
                LEFT - 6.0,
                at + 4.0
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"12\" y=\"{:.1}\" transform=\"rotate(-90 12 {:.1})\" text-anchor=\"middle\">{label}</text>",
            top + PANEL / 2.0,
            top + PANEL / 2.0
        );
        let step = if end > 60.0 { 20 } else { 2 };
        for second in (0..=end as u32).step_by(step) {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{second}</text>",
                x(f64::from(second)),
                top + PANEL + 14.0
            );
        }
        for (kind, outcome) in outcomes.iter().rev() {
            let points = outcome.points.iter().filter(|point| point.requests > 0);
            let line: Vec<String> = points.map(|point| format!("{:.1},{:.1}", x(point.at), y(value(point)))).collect();
            let _ = writeln!(
                svg,
                "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.4\" points=\"{}\"/>",
                colour(*kind),
                line.join(" ")
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn colour(kind: Kind) -> &'static str {
    let at = Kind::ALL.iter().position(|other| *other == kind).unwrap_or(0);
    COLOURS[at]
}
