//! First pass over the file: parser events. It builds nothing, so nothing in the file can make it grow.
//!
//! It bounds size, depth and node count, refuses what a reader of the file could misread, and leaves an [`Index`]
//! from path to position, by which every later problem finds its line.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use saphyr_parser::{Event, Parser, Span};

const MAX_DEPTH: usize = 32;
const MAX_NODES: usize = 200_000;
/// Beyond this many problems a file is not a configuration with mistakes but something else.
pub(super) const MAX_PROBLEMS: usize = 1_000;

/// One thing wrong with the file: where, what was found, what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line, counted from 1; 0 when the problem belongs to no line (an unreadable file).
    pub line: usize,
    /// Column, counted from 1.
    pub column: usize,
    /// Path of the value, such as `pools.shop.cells.a[0]`; empty for the whole document.
    pub path: String,
    /// A clear sentence without the place.
    pub message: String,
    /// The included file it stands in; `None`: the main one.
    pub file: Option<Arc<Path>>,
}

impl Problem {
    /// The problem with the name of its file, when `main` is the main one.
    pub fn with_file(&self, main: &Path) -> String {
        format!("{}:{self}", self.file.as_deref().unwrap_or(main).display())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}: ", self.line, self.column)?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Position of every node by its path.
#[derive(Debug, Default)]
pub struct Index(HashMap<String, (usize, usize)>);

impl Index {
    /// Line and column of `path`, or of its nearest parent that stands in the file.
    pub fn position(&self, path: &str) -> (usize, usize) {
        let mut path = path;
        loop {
            if let Some(&position) = self.0.get(path) {
                return position;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return self.0.get("").copied().unwrap_or((1, 1)),
            }
        }
    }

    /// A problem at `path`.
    pub fn problem(&self, path: &str, message: impl Into<String>) -> Problem {
        let (line, column) = self.position(path);
        Problem { line, column, path: path.to_owned(), message: message.into(), file: None }
    }
}

/// One open collection of the event walk.
enum Frame {
    Map { path: String, keys: HashSet<String>, key: Option<String> },
    List { path: String, next: usize },
}

/// First pass: bounds, forbidden constructs, and the index from path to position.
pub fn scan(text: &str) -> (Index, Vec<Problem>) {
    let mut index = Index::default();
    let mut problems: Vec<Problem> = Vec::new();
    let mut frames: Vec<Frame> = Vec::new();
    let mut nodes = 0usize;
    let mut documents = 0usize;

    // What one parser takes for the end of a line and another for a letter could hide a key from one of the two
    // passes: NEL and the Unicode separators, and a byte order mark in the middle. YAML allows no other control
    // characters than tab and line ends.
    let odd = |c: &char| {
        c.is_control() && !matches!(c, '\t' | '\n' | '\r') || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
    };
    if let Some((at, c)) = text.char_indices().find(|(_, c)| odd(c)) {
        let line = 1 + text[..at].matches('\n').count();
        let message =
            format!("control character U+{:04X}; a configuration may hold none but tab and line ends", c as u32);
        return (index, vec![Problem { line, column: 1, path: String::new(), message, file: None }]);
    }

    for event in Parser::new_from_str(text) {
        let (event, span) = match event {
            Ok(event) => event,
            Err(error) => {
                let marker = error.marker();
                problems.push(Problem {
                    line: marker.line().max(1),
                    column: marker.col() + 1,
                    path: String::new(),
                    message: format!("not valid YAML here: {}", error.info()),
                    file: None,
                });
                return (index, problems);
            }
        };
        let forbid = |what: &str, path: String, problems: &mut Vec<Problem>| {
            problems.push(Problem {
                line: span.start.line(),
                column: span.start.col() + 1,
                path,
                message: format!("{what}; write the value out in full"),
                file: None,
            });
        };
        match event {
            Event::DocumentStart(_) => {
                documents += 1;
                if documents > 1 {
                    problems.push(at_span(&span, "", "a second document begins here; a configuration is one document"));
                    return (index, problems);
                }
            }
            Event::Alias(_) => {
                let path = place(&mut frames, None, &span, &mut index, &mut problems);
                forbid("aliases (*name) are not accepted", path, &mut problems);
            }
            Event::Scalar(value, style, anchor, tag) => {
                nodes += 1;
                let is_key = matches!(frames.last(), Some(Frame::Map { key: None, .. }));
                let plain = matches!(style, saphyr_parser::ScalarStyle::Plain);
                let path = place(&mut frames, Some(&value), &span, &mut index, &mut problems);
                if is_key && plain && &*value == "<<" {
                    forbid("merge keys (<<) are not accepted", path.clone(), &mut problems);
                }
                if anchor > 0 {
                    forbid("anchors (&name) are not accepted", path.clone(), &mut problems);
                }
                if tag.is_some() {
                    forbid("tags (!name) are not accepted", path, &mut problems);
                }
            }
            Event::SequenceStart(anchor, ref tag) | Event::MappingStart(anchor, ref tag) => {
                nodes += 1;
                let path = place(&mut frames, None, &span, &mut index, &mut problems);
                if anchor > 0 {
                    forbid("anchors (&name) are not accepted", path.clone(), &mut problems);
                }
                if tag.is_some() {
                    forbid("tags (!name) are not accepted", path.clone(), &mut problems);
                }
                frames.push(match event {
                    Event::MappingStart(..) => Frame::Map { path, keys: HashSet::new(), key: None },
                    _ => Frame::List { path, next: 0 },
                });
            }
            Event::SequenceEnd | Event::MappingEnd => {
                frames.pop();
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
        if nodes > MAX_NODES {
            problems.push(at_span(&span, "", format!("more than {MAX_NODES} values in one file")));
            return (index, problems);
        }
        if frames.len() > MAX_DEPTH {
            problems.push(at_span(&span, "", format!("nested deeper than {MAX_DEPTH} levels")));
            return (index, problems);
        }
        if problems.len() >= MAX_PROBLEMS {
            return (index, problems);
        }
    }
    if documents == 0 {
        problems.push(Problem {
            line: 1,
            column: 1,
            path: String::new(),
            message: "the file is empty; it needs at least `pools` and `listeners`".into(),
            file: None,
        });
    }
    (index, problems)
}

fn at_span(span: &Span, path: &str, message: impl Into<String>) -> Problem {
    Problem {
        line: span.start.line(),
        column: span.start.col() + 1,
        path: path.to_owned(),
        message: message.into(),
        file: None,
    }
}

/// Gives the node that begins here its path, notes its position, and moves the enclosing collection on.
///
/// `scalar` is the text when the node is a scalar; only such a node may be a key.
fn place(
    frames: &mut [Frame],
    scalar: Option<&str>,
    span: &Span,
    index: &mut Index,
    problems: &mut Vec<Problem>,
) -> String {
    let position = (span.start.line(), span.start.col() + 1);
    match frames.last_mut() {
        None => {
            index.0.insert(String::new(), position);
            String::new()
        }
        Some(Frame::List { path, next }) => {
            let own = format!("{path}[{next}]");
            *next += 1;
            index.0.insert(own.clone(), position);
            own
        }
        Some(Frame::Map { path, keys, key }) => match key.take() {
            // The position of an entry is that of its key, which is where a person looks for it.
            Some(name) => join(path, &name),
            None => {
                let Some(name) = scalar else {
                    problems.push(at_span(span, path, "a key must be plain text, not a list or a map"));
                    *key = Some(String::from("?"));
                    return join(path, "?");
                };
                let own = join(path, name);
                if !keys.insert(name.to_owned()) {
                    let first = index.position(&own).0;
                    problems.push(at_span(
                        span,
                        &own,
                        format!("this key stands here a second time (first on line {first})"),
                    ));
                } else {
                    index.0.insert(own.clone(), position);
                }
                *key = Some(name.to_owned());
                own
            }
        },
    }
}

pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
