//! The moving picture: four rows of bars, a column for each sixtieth of the show. Without a terminal, a line a second.

use std::time::Duration;

use super::{ACTS, Entry, Mode, Show, ms};

const COLUMNS: u32 = 60;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What has been drawn.
pub(super) struct Chart {
    length: Duration,
    terminal: bool,
    /// Lines on the terminal that the next picture replaces.
    drawn: usize,
    /// Seconds told of, without a terminal.
    told: u64,
}

/// What the clients of one stretch of time saw.
#[derive(Clone, Copy, Default)]
struct Stretch {
    cells: [usize; 2],
    failed: usize,
    slowest: Duration,
}

impl Stretch {
    fn add(&mut self, entry: &Entry) {
        match entry.cell {
            Some(b'a') => self.cells[0] += 1,
            Some(_) => self.cells[1] += 1,
            None => self.failed += 1,
        }
        self.slowest = self.slowest.max(entry.took);
    }
}

impl Chart {
    pub(super) fn new(length: Duration, terminal: bool) -> Chart {
        Chart { length, terminal, drawn: 0, told: 0 }
    }

    /// How often it is worth drawing.
    pub(super) fn period(&self) -> Duration {
        if self.terminal { Duration::from_millis(250) } else { Duration::from_millis(100) }
    }

    /// The picture at `now` since the beginning.
    pub(super) fn draw(&mut self, show: Show, now: Duration, entries: &[Entry]) -> String {
        if self.terminal { self.picture(show, now, entries) } else { self.lines(show, now, entries) }
    }

    /// What ends the picture.
    pub(super) fn close(&mut self) -> String {
        if self.terminal { "\x1b[?25h".into() } else { String::new() }
    }

    fn picture(&mut self, show: Show, now: Duration, entries: &[Entry]) -> String {
        let column = self.length / COLUMNS;
        let mut stretches = vec![Stretch::default(); COLUMNS as usize];
        for entry in entries {
            let at = (entry.began.as_nanos() / column.as_nanos().max(1)) as usize;
            stretches[at.min(COLUMNS as usize - 1)].add(entry);
        }
        // A column is full when its time is over and its clients have been answered.
        let full = ((now.as_nanos() / column.as_nanos().max(1)) as usize).min(stretches.len());
        let past = &stretches[..full];
        let last = past.last().copied().unwrap_or_default();
        let most = (show.rate as f64 * column.as_secs_f64()).max(1.0);
        let row = |bar: &dyn Fn(&Stretch) -> char| -> String {
            let bars: String = past.iter().map(bar).collect();
            bars + &" ".repeat(stretches.len() - full)
        };
        let share = |count: usize| match count {
            0 => ' ',
            n => BARS[((n as f64 / most * 8.0).ceil() as usize).clamp(1, 8) - 1],
        };
        // Each bar stands for twice the time: up to 2 ms, 4 ms, and so on, 128 ms and more.
        let slow = |time: Duration| BARS[(time.as_secs_f64() * 1e3 / 2.0).log2().ceil().clamp(0.0, 7.0) as usize];
        let a_second = |count: usize| count as f64 / column.as_secs_f64();
        let failed: usize = stretches.iter().map(|stretch| stretch.failed).sum();
        let lines = [
            format!(
                "sailover demo: two cells behind one address, {} new clients a second   {:>4.1} of {:.0} s",
                show.rate,
                now.as_secs_f64(),
                self.length.as_secs_f64()
            ),
            String::new(),
            format!("cell a   \x1b[36m{}\x1b[0m {:>5.0} /s", row(&|s| share(s.cells[0])), a_second(last.cells[0])),
            format!("cell b   \x1b[32m{}\x1b[0m {:>5.0} /s", row(&|s| share(s.cells[1])), a_second(last.cells[1])),
            format!("slowest  \x1b[33m{}\x1b[0m {:>8}", row(&|s| slow(s.slowest)), ms(last.slowest)),
            format!(
                "failed   \x1b[31m{}\x1b[0m {failed:>5}",
                row(&|s| if s.failed > 0 { share(s.failed) } else { '·' })
            ),
            format!("         {}", self.marks(now)),
        ];
        let up = if self.drawn == 0 { "\x1b[?25l".to_owned() } else { format!("\x1b[{}A", self.drawn) };
        self.drawn = lines.len();
        up + &lines.iter().map(|line| format!("\r{line}\x1b[K\n")).collect::<String>()
    }

    /// Under the column in which each act begins, what it is.
    fn marks(&self, now: Duration) -> String {
        let mut line = String::new();
        for (at, mode) in ACTS.iter().skip(1).filter(|(at, _)| now >= self.length * *at / 30) {
            let column = (at * COLUMNS / 30) as usize;
            line += &" ".repeat(column.saturating_sub(line.chars().count()));
            line += match mode {
                Mode::Serve => "^back",
                Mode::Refuse => "^a refuses",
                Mode::Silent => "^a is silent",
            };
        }
        line
    }

    fn lines(&mut self, show: Show, now: Duration, entries: &[Entry]) -> String {
        let mut out = String::new();
        if self.told == 0 && now < Duration::from_millis(500) && entries.is_empty() {
            out += &format!(
                "sailover demo: two cells behind one address, {} new clients a second, for {:.0} s\n",
                show.rate,
                self.length.as_secs_f64()
            );
        }
        // A second is told of when it is half a second past, so that its clients have had their answers.
        let mut done = now.saturating_sub(Duration::from_millis(500)).as_secs();
        if now >= self.length {
            done = self.length.as_secs();
        }
        while self.told < done {
            let from = Duration::from_secs(self.told);
            let to = from + Duration::from_secs(1);
            let mut second = Stretch::default();
            entries.iter().filter(|entry| (from..to).contains(&entry.began)).for_each(|entry| second.add(entry));
            let act = ACTS.iter().rev().find(|(at, _)| from >= self.length * *at / 30).map_or(Mode::Serve, |act| act.1);
            out += &format!(
                "{:>3} s  a {:>4}/s  b {:>4}/s  slowest {:>8}  failed {:>3}   {}\n",
                self.told + 1,
                second.cells[0],
                second.cells[1],
                ms(second.slowest),
                second.failed,
                act.said(),
            );
            self.told += 1;
        }
        out
    }
}
