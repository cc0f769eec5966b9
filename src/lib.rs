//! sailover
pub mod config;
