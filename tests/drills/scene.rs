//! What the file of a drill says.

use serde::Deserialize;

use crate::support::attack;

/// One drill; times in seconds from the start of the load.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drill {
    /// What a reader must know.
    pub about: String,
    /// Which kind of outage it is: its section in the report.
    pub kind: Outage,
    /// Whether it is run with every test.
    #[serde(default)]
    pub quick: bool,
    /// Through which face, and how the client asks.
    #[serde(default)]
    pub through: Through,
    pub probe: Probe,
    /// Keys of sailover's pool; no other front has them.
    #[serde(default)]
    pub pool: String,
    /// Cells, each of one backend; the first is called `a`.
    #[serde(default = "two")]
    pub cells: usize,
    /// Round-trip times of the cells in milliseconds; empty: bare veth.
    #[serde(default)]
    pub away_ms: Vec<f64>,
    /// What each backend can do; nothing: whatever comes, at once.
    #[serde(default)]
    pub work: Option<Work>,
    pub load: Shape,
    pub timeline: Vec<Event>,
    pub bars: Bars,
}

fn two() -> usize {
    2
}

/// The kinds of outages on record, by what a proxy sees of them.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum Outage {
    Blackout,
    CrashLoop,
    Tarpit,
    ErrorMix,
    BrownOut,
    LossyPath,
    SplitVerbs,
    HalfTheWorld,
    Homecoming,
    CryingWolf,
    Storm,
    PoisonPill,
    Siege,
    DoNoHarm,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Through {
    /// A `tcp` listener; a new connection for each request.
    #[default]
    Tcp,
    /// An `http` listener; a new connection for each request.
    Http,
    /// An `http` listener; connections that are kept.
    HttpKept,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    Tcp,
    Http,
}

/// So many requests at once take so many milliseconds each; more wait for their turn.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    pub at_once: u8,
    pub ms: u16,
}

/// The load: requests begin by schedule, whatever became of the ones before.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Requests a second.
    pub rate: f64,
    pub seconds: f64,
    /// One in so many takes three seconds and is never to be cut while its cell is fit; by default one a second through HTTP.
    pub slow_one_in: Option<u32>,
    /// One in so many is a POST with an id; by default 20 through HTTP.
    pub post_one_in: Option<u32>,
    /// One in so many ends the backend that receives it, which is back a second later.
    #[serde(default)]
    pub poison_one_in: u32,
    /// How often a client tries, and how long it waits for each try.
    #[serde(default = "once")]
    pub tries: u32,
    #[serde(default = "eight")]
    pub patience_s: f64,
    /// Besides, so many clients keep one connection each, and come again at once when it ends.
    #[serde(default)]
    pub sessions: usize,
}

fn once() -> u32 {
    1
}

fn eight() -> f64 {
    8.0
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    pub from: f64,
    pub to: f64,
    #[serde(default)]
    pub whom: Whom,
    /// On for so many seconds, off for as many, in turn.
    pub pulse: Option<f64>,
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub fault: Fault,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Whom {
    #[default]
    A,
    B,
    All,
    /// The proxy itself.
    Front,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Nothing listens.
    Refuse,
    /// Every connection is reset, and nothing listens.
    Crash,
    /// The network drops every packet to and from the cell.
    Swallow,
    /// The network answers that the host cannot be reached.
    Unreachable,
    /// Connections are accepted and reset.
    Reset,
    /// Connections are reset when a request has arrived.
    ResetLate,
    /// Requests are accepted and not answered.
    Mute,
    /// The same, and worked on when it is over.
    Stall,
    /// Answers take so much longer.
    SlowMs(u16),
    /// 503 to so many requests of a hundred.
    FailPercent(u8),
    /// So many answers of a hundred stop behind their heads.
    StopPercent(u8),
    /// So many answers of a hundred end within their bodies.
    CutPercent(u8),
    /// So many requests of a hundred are never answered.
    HangPercent(u8),
    /// 500 to so many POST requests of a hundred, and to so many GET requests.
    FailVerbs { post: u8, get: u8 },
    /// It serves, with data of this version; without a fault they are of version 1.
    DataVersion(u32),
    /// 503 to so many probes of a hundred.
    UnhealthyPercent(u8),
    /// So many packets of a hundred are lost.
    LosePercent(u8),
    /// One flow in so many is dead for as long as it lasts.
    BreakOneFlowIn(u8),
    /// The round-trip time becomes this.
    AwayMs(f64),
    /// It can do a part of its work at first, and all at the end.
    WarmFrom(f64),
    /// It stands still.
    Pause,
    /// Connections that ask for little and hold on to it.
    Attack { kind: attack::Kind, count: usize },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bars {
    /// Requests that may fail; slow ones, POST and poison are judged apart.
    pub failed: Option<usize>,
    /// Requests slower than 250 ms.
    pub slow: Option<usize>,
    /// Seconds from the fault until the faulty backend has left `up`.
    pub out_within: Option<f64>,
    /// Of the requests from the fault to its end.
    pub p99_ms: Option<f64>,
    /// Of the requests from the fault to its end, beyond the calm p99 of the slowest cell.
    pub p99_above_calm_ms: Option<f64>,
    /// Share of new connections attempted at the faulty cell from 300 ms after the fault on.
    pub attempted: Option<f64>,
    /// Bounds on the healed cell's share in the two seconds before the end.
    pub share: Option<[f64; 2]>,
    /// Most times that any backend enters `down`.
    pub downs: Option<f64>,
    /// Most transitions of any backend to suspect or down.
    pub transitions: Option<f64>,
    /// From one and a half seconds after the fault to its end: the faulty cell's greatest share, and how many times the
    /// calm p99 the p99 may be.
    pub share_in_fault: Option<f64>,
    pub times_calm: Option<f64>,
    /// POST requests that may be answered by an error.
    pub posts_failed: Option<usize>,
    /// Milliseconds that any POST took at most, whatever became of it.
    pub posts_ms: Option<f64>,
    /// Backends that poison may end in any ten seconds.
    pub deaths: Option<usize>,
    /// Kilobytes of the front's private memory for each attacker.
    pub attacker_kb: Option<f64>,
    /// Requests the backends got for each that the clients sent.
    pub amplification: Option<f64>,
    /// Seconds until each session that was lost stands again, from its loss; and its tries on average.
    pub sessions_back_s: Option<f64>,
    pub session_tries: Option<f64>,
    pub windows: Vec<Window>,
}

/// What must hold of the requests of some time.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Window {
    pub from: f64,
    pub to: f64,
    /// Good answers a second, and as a part of those of the calm time.
    pub goodput: Option<f64>,
    pub goodput_of_calm: Option<f64>,
    /// Of the good answers, in times the calm p99.
    pub p99_times_calm: Option<f64>,
    /// Of the refused ones.
    pub refused_p99_ms: Option<f64>,
    pub failed: Option<usize>,
    pub failed_part: Option<f64>,
    /// Bounds of the first cell's share.
    pub share: Option<[f64; 2]>,
}

impl Drill {
    /// When the first fault begins; where the load itself is the fault, after two seconds.
    pub fn fault_at(&self) -> f64 {
        self.timeline.iter().map(|event| event.from).reduce(f64::min).unwrap_or(2.0)
    }

    /// When the last one ends.
    pub fn heal_at(&self) -> f64 {
        self.timeline.iter().map(|event| event.to).reduce(f64::max).unwrap_or(self.load.seconds)
    }

    /// Whether the second cell serves HTTP and nothing happens to it, so that none of its requests may be cut, however long they take.
    pub fn has_a_fit_cell(&self) -> bool {
        let only_a = self.timeline.iter().all(|event| event.whom == Whom::A);
        self.is_http() && only_a && !self.timeline.is_empty() && self.load.poison_one_in == 0 && self.work.is_none()
    }

    pub fn is_http(&self) -> bool {
        self.through != Through::Tcp
    }

    pub fn cells(&self) -> usize {
        if self.away_ms.is_empty() { self.cells } else { self.away_ms.len() }
    }

    /// What is wrong with the file, if anything is.
    pub fn check(&self) -> Result<(), String> {
        let wrong = |what: &str| Err(what.to_owned());
        for event in &self.timeline {
            if event.from >= event.to || event.to > self.load.seconds {
                return wrong("an event ends before it begins, or after the load");
            }
            let on_front = matches!(event.fault, Fault::Pause | Fault::Attack { .. });
            if on_front != (event.whom == Whom::Front) {
                return wrong("pause and attack are for the front, the others for cells");
            }
            if matches!(event.fault, Fault::AwayMs(_)) && self.away_ms.is_empty() {
                return wrong("away_ms as a fault needs away_ms of the cells");
            }
            if matches!(event.fault, Fault::Stall | Fault::WarmFrom(_)) && self.work.is_none() {
                return wrong("stall and warm_from need work");
            }
        }
        let faultless = self.timeline.is_empty() && self.load.poison_one_in == 0;
        if self.about.is_empty() || faultless || self.cells() > crate::drills::NAMES.len() {
            return wrong("about, timeline and at most four cells are needed");
        }
        Ok(())
    }
}
