//! What a client sends before its backend can be chosen: a PROXY header, a ClientHello. Read within bounds of time and
//! memory, and kept for whichever backend is chosen.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::blame;
use crate::clock;
use crate::limits::ClientPermit;
use crate::sniff::{self, HelloReader, Proxied, Verdict};
use crate::table::{End, Face, Listener};

/// Read at once.
const PART: usize = 4 << 10;
/// Most bytes that one worker holds for the clients of one prefix.
const OF_PREFIX: usize = 1 << 20;
/// "The server name is not known here" (RFC 6066 §3): a fatal alert in a record of its own.
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

thread_local! {
    static HELD: RefCell<HashMap<u32, usize>> = RefCell::default();
}

/// What is known of a client before it gets a backend.
#[derive(Debug)]
pub struct Greeting {
    /// Who connected, or on whose behalf.
    pub client: SocketAddr,
    /// The address that the client meant, where a PROXY header told.
    pub destination: Option<SocketAddr>,
    /// What else a PROXY header carried.
    pub tlvs: Vec<u8>,
    /// The server name of its ClientHello.
    pub name: Option<String>,
    /// Bytes that were read and belong to the backend.
    pub bytes: Vec<u8>,
    /// One of its network's connections, where a PROXY header told of it.
    pub of_client: Option<ClientPermit>,
}

impl Greeting {
    /// Of a client that is not listened to first.
    pub fn unread(client: SocketAddr) -> Greeting {
        Greeting { client, destination: None, tlvs: Vec::new(), name: None, bytes: Vec::new(), of_client: None }
    }
}

/// Reads what this listener has to know. `client` is who connected, and becomes the one that a PROXY header names.
///
/// # Errors
/// How the connection ends, and why where that is about what it said.
pub async fn read(
    stream: &TcpStream,
    client: &mut SocketAddr,
    listener: &Listener,
    deadline: Instant,
) -> Result<Greeting, (End, Option<&'static str>)> {
    let peer = *client;
    let mut greeting = Greeting::unread(peer);
    let mut expects_header = listener.expects_header(peer.ip());
    if !expects_header && !matches!(listener.face, Face::Sni(_)) {
        return Ok(greeting);
    }
    let mut held = Held { prefix: blame::prefix(peer.ip()), bytes: 0 };
    let mut hello = HelloReader::default();
    loop {
        if expects_header {
            match sniff::proxied(&greeting.bytes) {
                Verdict::More => {}
                Verdict::Wrong(why) => return Err(refuse(listener, peer, why)),
                Verdict::Done(header) => {
                    let for_itself = header.addresses.is_none();
                    take_header(&mut greeting, header);
                    *client = greeting.client;
                    expects_header = false;
                    // From here on the client counts, and not the balancer before us.
                    held = Held { prefix: blame::prefix(greeting.client.ip()), bytes: 0 };
                    // One that speaks for itself is among those who may.
                    if for_itself {
                        continue;
                    }
                    match listener.count_client(greeting.client.ip(), clock::now()) {
                        Some(of_client) => greeting.of_client = of_client,
                        None => return Err((End::Limited, None)),
                    }
                    if !listener.admits(greeting.client.ip()) {
                        return Err((End::Denied, None));
                    }
                }
            }
        }
        if !expects_header {
            if !matches!(listener.face, Face::Sni(_)) {
                return Ok(greeting);
            }
            match hello.read(&greeting.bytes) {
                Verdict::More => {}
                Verdict::Wrong(why) => return Err(refuse(listener, peer, why)),
                Verdict::Done(name) => {
                    greeting.name = name;
                    return Ok(greeting);
                }
            }
        }
        if !held.grow(greeting.bytes.capacity() + hello.memory()) {
            return Err(refuse(listener, peer, "its network holds too many unfinished beginnings"));
        }
        // What follows the header is the handshake's, where TLS ends here.
        let most = if listener.tls.is_some() { sniff::header_lacks(&greeting.bytes) } else { PART };
        match timeout_at(deadline, more(stream, &mut greeting.bytes, most)).await {
            Err(_) => return Err((End::Handshake, None)),
            Ok(Ok(0)) => return Err((End::ClientGone, None)),
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err((End::ClientReset, None)),
        }
    }
}

/// Tells a client of TLS that nobody here has the name it asked for.
pub async fn name_is_unknown(stream: &TcpStream) {
    // Seven bytes into the empty buffer of a new connection; a client that is gone needs no word.
    let _ = stream.try_write(&UNRECOGNIZED_NAME);
}

fn take_header(greeting: &mut Greeting, header: Proxied) {
    greeting.bytes.drain(..header.length);
    greeting.tlvs = header.tlvs;
    if let Some((client, destination)) = header.addresses {
        greeting.client = client;
        greeting.destination = Some(destination);
    }
}

fn refuse(listener: &Listener, peer: SocketAddr, why: &'static str) -> (End, Option<&'static str>) {
    tracing::debug!(listener = &*listener.name, %peer, why, "refused for its first bytes");
    (End::Malformed, Some(why))
}

async fn more(stream: &TcpStream, bytes: &mut Vec<u8>, most: usize) -> io::Result<usize> {
    let mut part = [0; PART];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut part[..most.min(PART)]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(n) => {
                bytes.extend_from_slice(&part[..n]);
                return Ok(n);
            }
        }
    }
}

/// Memory that a worker holds for one prefix; given back when dropped.
struct Held {
    prefix: u32,
    bytes: usize,
}

impl Held {
    /// Counts the memory as it is now; false when it is too much for the prefix.
    fn grow(&mut self, bytes: usize) -> bool {
        HELD.with_borrow_mut(|held| {
            let all = held.entry(self.prefix).or_default();
            *all = *all - self.bytes + bytes;
            self.bytes = bytes;
            *all <= OF_PREFIX
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // At the end of the thread the map may be gone before the last task.
        let _ = HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            if let Some(all) = held.get_mut(&self.prefix) {
                *all = all.saturating_sub(self.bytes);
                if *all == 0 {
                    held.remove(&self.prefix);
                }
            }
        });
    }
}
