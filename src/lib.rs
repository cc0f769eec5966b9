//! sailover carries every client to a cell that works. This crate is the program; its modules stand here in the
//! order in which a reader meets them.
//!
//! **The life of a connection.** `server` has bound the listening sockets and given each `worker` its own. The
//! accept loop of `listen` takes permits (`limits`), takes the listener of the live `table`, and spawns `tcp`,
//! which asks `dial` for a backend. `dial` asks `pool` for a candidate, opens it, races another when it is silent,
//! and records what it saw in `backend`, where `health` decides. Then `relay` moves bytes (`splice` when there are
//! many), and `tcp` counts the end and writes the access line (`log`). A connection of an `http` listener goes to `http`
//! instead, which asks `pool` and `dial` in the same way for each of its requests.
//!
//! **The life of a configuration.** `config` reads and judges the file, `table` builds a generation that takes over
//! every unchanged backend, `reload` reports the difference, and `server` swaps one pointer. `probe` asks the
//! backends, `drain` takes some out, `admin` and `report` tell people, `cli` asks for them, `demo` shows it all.

pub mod cli;
pub mod server;

pub mod config;
pub mod table;

pub mod worker;
pub mod listen;
pub mod tcp;
pub mod http;
pub mod hello;
pub mod sniff;
pub mod dial;
pub mod pool;
pub mod backend;
pub mod health;
pub mod estimate;
pub mod silence;
pub mod error_ratio;
pub mod pace;
pub mod concurrency;
pub mod class;
pub mod blame;
pub mod tell;
pub mod uplink;
pub mod version;
pub mod first_byte;
pub mod speaks_first;
pub mod poison;
pub mod relay;
pub mod splice;
pub mod session;
pub mod stuck;
pub mod limits;
pub mod host;

pub mod tls;
pub mod govern;
pub mod probe;
pub mod reload;
pub mod drain;
pub mod admin;
pub mod report;
pub mod demo;

pub mod metrics;
pub mod log;
pub mod clock;
pub mod sys;
