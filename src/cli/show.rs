//! Answers of a running process as tables for people: plain text that fits the screen, in colour on a terminal.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, SystemTime};

use serde_json::Value;

/// Columns when the output is no terminal.
const COLUMNS: usize = 100;

/// What the text is written for.
pub struct Screen {
    columns: usize,
    colour: bool,
}

impl Screen {
    /// Standard output. Colour only on a terminal, and not where `NO_COLOR` asks for none.
    pub fn of_stdout() -> Screen {
        let terminal = std::io::stdout().is_terminal();
        let columns = terminal_size::terminal_size().filter(|_| terminal).map_or(COLUMNS, |(width, _)| width.0.into());
        Screen { columns, colour: terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colour && !colour.is_empty() { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// One line, cut where the screen ends.
    fn line(&self, text: &str) -> String {
        cut(text, self.columns) + "\n"
    }
}

const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const BOLD: &str = "1";
const DIM: &str = "2";

/// Rows under a heading, each column as wide as its widest cell, within bounds.
struct Table {
    heading: Vec<(&'static str, usize, bool)>,
    rows: Vec<Row>,
}

enum Row {
    Cells(Vec<(String, &'static str)>),
    /// A remark on the row before.
    Remark(String),
}

impl Table {
    /// Columns: name, most characters, whether it is a number (and stands on the right).
    fn new(heading: &[(&'static str, usize, bool)]) -> Table {
        Table { heading: heading.to_vec(), rows: Vec::new() }
    }

    fn row<const N: usize>(&mut self, cells: [(String, &'static str); N]) {
        self.rows.push(Row::Cells(cells.into()));
    }

    fn render(&self, screen: &Screen) -> String {
        let widths: Vec<usize> = self
            .heading
            .iter()
            .enumerate()
            .map(|(i, (name, most, _))| {
                let cells = self.rows.iter().filter_map(|row| match row {
                    Row::Cells(cells) => cells.get(i).map(|(text, _)| text.chars().count()),
                    Row::Remark(_) => None,
                });
                cells.max().unwrap_or(0).min(*most).max(name.chars().count())
            })
            .collect();
        let pad = |i: usize, text: &str| {
            let text = cut(text, widths[i]);
            let space = " ".repeat(widths[i] - text.chars().count());
            if self.heading[i].2 { space + &text } else { text + &space }
        };
        let heading: Vec<String> = (0..widths.len()).map(|i| pad(i, self.heading[i].0)).collect();
        let mut out = screen.paint(DIM, &cut(heading.join("  ").trim_end(), screen.columns)) + "\n";
        for row in &self.rows {
            match row {
                Row::Remark(text) => out += &screen.paint(DIM, &cut(&format!("  └ {text}"), screen.columns)),
                Row::Cells(cells) => {
                    let mut left = screen.columns;
                    for (i, (text, colour)) in cells.iter().enumerate() {
                        let gap = if i == 0 { "" } else { "  " };
                        let last = i + 1 == cells.len();
                        let text = if last { cut(text, left.saturating_sub(2)) } else { pad(i, text) };
                        let text = cut(&text, left.saturating_sub(gap.len()));
                        left = left.saturating_sub(gap.len() + text.chars().count());
                        out += &format!("{gap}{}", screen.paint(colour, &text));
                    }
                    out.truncate(out.trim_end().len());
                }
            }
            out.push('\n');
        }
        out
    }
}

/// At most `most` characters of a line; what is missing is marked. Control characters become a space.
fn cut(text: &str, most: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    if text.chars().count() <= most {
        return text.chars().map(clean).collect();
    }
    let mut short: String = text.chars().take(most.saturating_sub(1)).map(clean).collect();
    if most > 0 {
        short.push('…');
    }
    short
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn percent(value: &Value) -> String {
    format!("{:.0}%", value.as_f64().unwrap_or(0.0) * 100.0)
}

/// A time as a person says it.
fn brief(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..100 => format!("{seconds}s"),
        100..3_600 => format!("{}m", seconds / 60),
        3_600..36_000 => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
        36_000..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn millis(value: &Value) -> String {
    match value.as_u64().unwrap_or(0) {
        ms @ 0..1_000 => format!("{ms}ms"),
        ms => brief(Duration::from_millis(ms)),
    }
}

/// How long an RFC 3339 time is past.
fn past(value: &Value) -> String {
    let at = value.as_str().and_then(|text| humantime::parse_rfc3339(text).ok());
    at.map_or_else(String::new, |at| brief(SystemTime::now().duration_since(at).unwrap_or_default()))
}

/// How long until a second since 1970.
fn until(value: &Value) -> Option<String> {
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(value.as_u64()?))?;
    Some(brief(at.duration_since(SystemTime::now()).unwrap_or_default()))
}

fn bytes(value: &Value) -> String {
    let n = value.as_u64().unwrap_or(0) as f64;
    match n {
        _ if n < 1e3 => format!("{n} B"),
        _ if n < 1e6 => format!("{:.1} kB", n / 1e3),
        _ if n < 1e9 => format!("{:.1} MB", n / 1e6),
        _ => format!("{:.1} GB", n / 1e9),
    }
}

/// Names of the users of this machine by their ids.
struct Users(HashMap<u64, String>);

impl Users {
    fn of_this_machine() -> Users {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let line = |line: &str| {
            let mut fields = line.split(':');
            Some((fields.nth(2)?.parse().ok()?, line.split(':').next()?.to_owned()))
        };
        Users(passwd.lines().filter_map(line).collect())
    }

    fn name(&self, uid: &Value) -> String {
        match uid.as_u64() {
            Some(uid) => self.0.get(&uid).cloned().unwrap_or_else(|| format!("user {uid}")),
            None => "an unknown user".into(),
        }
    }
}

/// The table of `status`.
pub fn status(status: &Value, screen: &Screen) -> String {
    let config = &status["config"];
    let busy: Vec<String> = list(&status["workers"]).map(|worker| percent(&worker["busy"])).collect();
    let mut out = screen.line(&format!(
        "sailover {}, up {}; generation {} ({}), loaded {} ago",
        text(&status["version"]),
        past(&status["started_at"]),
        status["generation"],
        text(&config["hash"]),
        past(&config["loaded_at"]),
    ));
    out += &screen.line(&format!(
        "{} of {} connections; workers busy {}",
        status["connections"]["now"],
        status["connections"]["limit"],
        busy.join(" ")
    ));
    for alarm in alarms(status) {
        out += &screen.paint(RED, &screen.line(&format!("! {alarm}")));
    }
    out += &orders(status, screen);
    out.push('\n');
    out += &listeners(status, screen);
    for pool in list(&status["pools"]) {
        out.push('\n');
        out += &pool_table(pool, screen);
    }
    out
}

/// What somebody has to know first.
fn alarms(status: &Value) -> Vec<String> {
    let mut alarms = Vec::new();
    if status["stopping"] == true {
        alarms.push("the process is stopping".to_owned());
    }
    let backends: Vec<&Value> =
        list(&status["pools"]).flat_map(|pool| list(&pool["cells"])).flat_map(|cell| list(&cell["backends"])).collect();
    let of = |state: &str| backends.iter().filter(|backend| backend["health"] == state).count();
    let troubled: Vec<String> = ["down", "suspect", "unknown", "returning"]
        .into_iter()
        .map(|state| (of(state), state))
        .filter(|(count, _)| *count > 0)
        .map(|(count, state)| format!("{count} {state}"))
        .collect();
    if !troubled.is_empty() {
        alarms.push(format!("of {} backends: {}", backends.len(), troubled.join(", ")));
    }
    if !status["uplink"]["dark_since"].is_null() {
        let since = past(&status["uplink"]["dark_since"]);
        alarms.push(format!(
            "nothing answers from any cell for {since}: our own uplink seems to be down; no backend is blamed"
        ));
    }
    for pool in list(&status["pools"]) {
        if list(&pool["cells"]).all(|cell| cell["share"]["now"].as_f64() == Some(0.0)) {
            alarms.push(format!("pool {} has nobody to give clients to: they are refused", text(&pool["name"])));
        }
    }
    let report = &status["config"]["last_reload"];
    if report["ok"] == false {
        alarms.push(format!("the last reload, {} ago, was refused:", past(&report["at"])));
        alarms.extend(list(&report["errors"]).take(5).map(|error| format!("  {}", text(error))));
    }
    alarms.extend(list(&status["config"]["at_next_start"]).map(|key| format!("{}: takes a restart", text(key))));
    let own = status["local_errors"].as_object().into_iter().flatten();
    alarms.extend(own.map(|(errno, count)| format!("errors of this machine: {errno} {count} times")));
    if status["panics"].as_u64().unwrap_or(0) > 0 {
        alarms
            .push(format!("{} connections or probers ended by bugs of sailover; please report them", status["panics"]));
    }
    alarms
}

/// What operators ordered: who, since when, until when, why.
fn orders(status: &Value, screen: &Screen) -> String {
    let (drains, weights) = (&status["drains"], &status["weights"]);
    if list(drains).chain(list(weights)).next().is_none() {
        return String::new();
    }
    let users = Users::of_this_machine();
    let circumstances = |order: &Value| {
        let ends = until(&order["until"]).map_or_else(String::new, |left| format!(", ends in {left}"));
        let why = order["reason"].as_str().map_or_else(String::new, |why| format!(": {why}"));
        format!("by {} {} ago{ends}{why}", users.name(&order["by"]), past(&order["since"]))
    };
    let mut out = String::new();
    for drain in list(drains) {
        let mut what = format!("drained {}", text(&drain["cell"]));
        if !drain["backend"].is_null() {
            what += &format!(" backend {}", text(&drain["backend"]));
        }
        if !drain["pool"].is_null() {
            what += &format!(" in pool {}", text(&drain["pool"]));
        }
        out += &screen.paint(YELLOW, &screen.line(&format!("* {what}, {}", circumstances(drain))));
    }
    for weight in list(weights) {
        let what =
            format!("{}/{} has {}% of its weight", text(&weight["pool"]), text(&weight["cell"]), weight["percent"]);
        out += &screen.paint(YELLOW, &screen.line(&format!("* {what}, {}", circumstances(weight))));
    }
    out
}

fn listeners(status: &Value, screen: &Screen) -> String {
    let mut table = Table::new(&[
        ("LISTENER", 24, false),
        ("ADDRESS", 28, false),
        ("POOL", 20, false),
        ("CONNS", 9, true),
        ("", 40, false),
    ]);
    for listener in list(&status["listeners"]) {
        let mut notes = Vec::new();
        if listener["local"] == false {
            notes.push("the address is not local now".to_owned());
        }
        if listener["at_cap"] == true {
            notes.push("at its cap".to_owned());
        }
        for certificate in list(&listener["certificates"]) {
            let names: Vec<String> = list(&certificate["names"]).map(text).collect();
            notes.extend(ends_soon(certificate).map(|said| format!("the certificate of {} {said}", names.join(", "))));
        }
        table.row([
            (text(&listener["name"]), ""),
            (text(&listener["address"]), ""),
            (text(&listener["pool"]), ""),
            (text(&listener["connections"]), ""),
            (notes.join(", "), YELLOW),
        ]);
    }
    table.render(screen)
}

fn pool_table(pool: &Value, screen: &Screen) -> String {
    let refused = |kind: &str| pool["refused"][kind].as_u64().unwrap_or(0);
    let mut head = format!("pool {}: {} connections", text(&pool["name"]), pool["connections"]["now"]);
    for (kind, words) in [("full", "refused as full"), ("unreachable", "found no backend")] {
        if refused(kind) > 0 {
            head += &format!(", {} {words}", refused(kind));
        }
    }
    let mut table = Table::new(&[
        ("CELL", 18, false),
        ("SHARE", 5, true),
        ("CONF", 4, true),
        ("BACKEND", screen.columns.saturating_sub(62).max(20), false),
        ("HEALTH", 9, false),
        ("FOR", 5, true),
        ("CONNS", 6, true),
        ("", 8, false),
    ]);
    for cell in list(&pool["cells"]) {
        for (i, backend) in list(&cell["backends"]).enumerate() {
            let health = text(&backend["health"]);
            let colour = match health.as_str() {
                "up" => GREEN,
                "down" => RED,
                _ => YELLOW,
            };
            let of_cell = |value: String| if i == 0 { value } else { String::new() };
            let admin = if backend["admin"] == "ready" { String::new() } else { text(&backend["admin"]) };
            table.row([
                (of_cell(text(&cell["name"])), BOLD),
                (of_cell(percent(&cell["share"]["now"])), ""),
                (of_cell(percent(&cell["share"]["configured"])), DIM),
                (text(&backend["name"]), ""),
                (health.clone(), colour),
                (past(&backend["since"]), ""),
                (text(&backend["in_flight"]), ""),
                (admin, YELLOW),
            ]);
            table.rows.extend(remarks(backend).into_iter().map(Row::Remark));
        }
    }
    if let Some(said) = ends_soon(&pool["client_certificate"]) {
        table.rows.push(Row::Remark(format!("the certificate that its backends are shown {said}")));
    }
    screen.line(&head) + &table.render(screen)
}

/// Why a backend has not got what it should have, and what else somebody should know of it.
fn remarks(backend: &Value) -> Vec<String> {
    let health = text(&backend["health"]);
    let mut remarks = Vec::new();
    if health != "up" && !backend["cause"].is_null() {
        let mut why = text(&backend["cause"]["detail"]);
        if backend["name"] != backend["address"] {
            why = format!("{}: {why}", text(&backend["address"]));
        }
        if let Some(hold) = backend["hold_ms"].as_u64().filter(|hold| *hold > 0) {
            why += &format!(", held for {} more", brief(Duration::from_millis(hold)));
        }
        if health == "returning" {
            why += &format!(", at {} of its share", percent(&backend["ramp"]));
        }
        remarks.push(why);
    }
    if backend["waits_for_operator"] == true {
        remarks.push("it could come back, and waits for `sailover failback`".to_owned());
    }
    if let Some(pace) = backend["pace"].as_f64().filter(|pace| *pace < 0.995 && health == "up") {
        let left = percent(&pace.into());
        remarks.push(format!("at {left} of its share: slower than it was, or losing more handshakes than others"));
    }
    if backend["class_failing"] == true {
        remarks.push("one class of requests (a route's reads, or its writes) fails here and goes elsewhere".to_owned());
    }
    if backend["data_version"]["too_old"] == true && health != "down" {
        let version = &backend["data_version"];
        let said = version["said"].as_u64().map_or("it has said none".into(), |said| format!("it has {said}"));
        remarks.push(format!("no clients: data of version {} are asked for, and {said}", version["at_least"]));
    }
    if !backend["contradiction"].is_null() {
        remarks.push(text(&backend["contradiction"]));
    }
    remarks.extend(ends_soon(&backend["certificate"]).map(|said| format!("its certificate {said}")));
    remarks
}

/// What is to be said of a certificate that ends within two weeks.
fn ends_soon(certificate: &Value) -> Option<String> {
    let days = certificate["days"].as_i64().filter(|days| *days < 14)?;
    Some(if days < 0 { "has expired".to_owned() } else { format!("expires in {days} days") })
}

/// The table of `sessions`.
pub fn sessions(found: &Value, screen: &Screen) -> String {
    let mut table = Table::new(&[
        ("ID", 12, false),
        ("CLIENT", 22, false),
        ("CELL", 12, false),
        ("BACKEND", 22, false),
        ("AGE", 6, true),
        ("SILENT", 6, true),
        ("IN", 8, true),
        ("OUT", 8, true),
    ]);
    for row in list(&found["sessions"]) {
        let silent = row["client_silent_ms"].as_u64().min(row["backend_silent_ms"].as_u64());
        let down = if row["backend_down"] == true { RED } else { "" };
        table.row([
            (text(&row["id"]), ""),
            (text(&row["client"]), ""),
            (text(&row["cell"]), ""),
            (text(&row["backend"]), down),
            (millis(&row["age_ms"]), ""),
            (millis(&Value::from(silent)), ""),
            (bytes(&row["bytes_in"]), ""),
            (bytes(&row["bytes_out"]), ""),
        ]);
    }
    let shown = list(&found["sessions"]).count();
    let note = found["note"].as_str().map_or(String::new(), |note| screen.line(note));
    table.render(screen) + &screen.line(&format!("{shown} of {} sessions", found["count"])) + &note
}

/// The words of `explain`.
pub fn explain(found: &Value, screen: &Screen) -> String {
    let mut out = String::new();
    for way in list(&found["ways"]) {
        let (client, listener, pool) = (text(&found["client"]), text(&way["listener"]), text(&way["pool"]));
        out += &screen.line(&format!("{client} at listener {listener}, pool {pool}:"));
        let goes_to = &way["goes_to"];
        out += &screen.line(&match (way["refused"].as_str(), goes_to.is_null()) {
            (Some(refused), _) => format!("refused: {refused}"),
            (None, false) => {
                format!("goes to backend {} of cell {}", text(&goes_to["backend"]), text(&goes_to["cell"]))
            }
            (None, true) if list(&way["backends"]).all(|backend| backend["chance"].as_f64() == Some(0.0)) => {
                "refused: no backend may have clients now".to_owned()
            }
            (None, true) => "goes by chance; connections that run already move it within a cell".to_owned(),
        });
        let mut table =
            Table::new(&[("CELL", 18, false), ("BACKEND", 30, false), ("CHANCE", 6, true), ("WHY", 60, false)]);
        for backend in list(&way["backends"]) {
            table.row([
                (text(&backend["cell"]), BOLD),
                (text(&backend["backend"]), ""),
                (percent(&backend["chance"]), ""),
                (text(&backend["why"]), ""),
            ]);
        }
        out += &table.render(screen);
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out + "\n"
}
