//! The one integration binary. Each module says what it is about; `support` holds the proxy as a child process,
//! the scripted bad backend, the open-loop client, and the network namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used)] // In a test a failed expectation is a failed test.

mod support;

/// How answers are passed on, and what ends an exchange that stands still.
mod answers;
/// Faults over veth, one declarative file each.
mod drills;
/// Every sub-command, by what it prints.
mod commands;
mod confine;
/// Files judged right and wrong, from the outside.
mod files;
/// What looks well, and is not.
mod gray;
mod h2;
/// What a client sends first: server names, PROXY headers.
mod hello;
/// HTTP: bodies, refusals, routes, headers, times, stickiness.
mod http;
/// Where HTTP is hard.
mod http_edge;
/// Every key of reference.yaml changes something.
mod keys;
/// The operator's side: status, reload, drain, stop.
mod operate;
mod overload;
/// What is measured over a longer time, and short versions of it.
mod show;
/// Years of health and choosing in seconds.
mod sim;
/// The normal path of bytes: half-close, large transfers, slow readers, many connections.
mod tcp;
/// TLS towards backends: what is refused, and by what name.
mod backend_tls;
/// TLS that ends here.
mod tls;
/// TLS at its edges: ends without a word, certificates that end, handshakes that fail for a client.
mod tls_edge;
/// Rules of the tree that no compiler checks.
mod tidy;
