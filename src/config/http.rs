//! The resolved configuration of an `http` listener.

use std::time::Duration;

use serde::{Serialize, Serializer};

use super::Network;

/// Routes, and what holds for all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Http {
    /// In the order of the file.
    pub routes: Vec<Route>,
    /// Whether a client on a plain connection may begin with HTTP/2 at once.
    pub h2c: bool,
    /// What tells a backend about the client.
    pub forwarded: Forwarded,
    /// Bodies of answers of our own, by status.
    pub errors: Vec<(u16, Page)>,
}

/// Headers that tell a backend about the client.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forwarded {
    /// Which.
    pub send: Send,
    /// Peers whose own headers of this kind are believed, and added to.
    pub trust: Vec<Network>,
}

impl Default for Forwarded {
    fn default() -> Self {
        Forwarded { send: Send::Both, trust: Vec::new() }
    }
}

/// Forms of the headers about the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Send {
    /// `X-Forwarded-For`, `-Proto` and `-Host`, and `Forwarded`.
    Both,
    /// `X-Forwarded-For`, `-Proto` and `-Host`.
    XForwarded,
    /// `Forwarded` (RFC 7239).
    Forwarded,
    /// None; what a client sends of them is taken out all the same.
    Off,
}

/// A body of our own.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Page {
    pub body: String,
    pub content_type: String,
}

/// A rule by which a request finds its pool, or its answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Route {
    /// In lower case, exact or `*.suffix`; `None`: every host.
    pub host: Option<String>,
    /// Prefix of the path, without a slash at its end; empty: every path.
    pub path: String,
    /// Empty: every method.
    pub methods: Vec<String>,
    /// Names in lower case, and the values they must have.
    pub headers: Vec<(String, String)>,
    /// Where it ends.
    pub action: Action,
    /// Whether the prefix is taken off before the request goes on.
    pub strip_prefix: bool,
    /// From the whole request to the head of the answer; `None`: the pool's.
    #[serde(serialize_with = "super::as_optional_text")]
    pub timeout: Option<Duration>,
    /// Who gives way when the pool is nearly full.
    pub priority: Priority,
    /// Changes to the request.
    pub request: Changes,
    /// Changes to the answer.
    pub response: Changes,
    /// A request with this header may be sent twice, whatever its method.
    pub idempotency_key: Option<String>,
}

/// Where a route ends.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// At a pool, by its name.
    Pool(String),
    /// At another address.
    Redirect {
        /// `None`: that of the request.
        scheme: Option<String>,
        /// `None`: that of the request.
        host: Option<String>,
        /// `None`: that of the request.
        path: Option<String>,
        /// 301, 302, 303, 307 or 308.
        status: u16,
    },
    /// At an answer of our own.
    Respond {
        /// 200 to 599.
        status: u16,
        /// What it says.
        #[serde(flatten)]
        page: Page,
    },
}

impl Action {
    /// The pool it names, if it ends at one.
    pub fn pool(&self) -> Option<&str> {
        match self {
            Action::Pool(pool) => Some(pool),
            Action::Redirect { .. } | Action::Respond { .. } => None,
        }
    }
}

/// Who gives way when a pool is nearly full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// May use all of the pool's `limits.max_connections`.
    High,
    /// May use nine tenths of it where another route to the pool is `high`, and all of it otherwise.
    Normal,
    /// May use seven tenths of it.
    Low,
}

/// Changes to a header section: what is taken out first, then what is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Changes {
    pub add: Vec<(String, String)>,
    pub remove: Vec<String>,
}

/// A cookie that keeps a client where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cookie {
    /// Its name.
    pub name: String,
    /// Its `Path`.
    pub path: String,
    /// Its `Domain`; `None`: the host of the request alone.
    pub domain: Option<String>,
    /// Its `Max-Age`; `None`: until the browser is closed.
    #[serde(serialize_with = "optional")]
    pub max_age: Option<Duration>,
    /// `Secure`; `None`: where the client came by TLS.
    pub secure: Option<bool>,
    /// `HttpOnly`.
    pub http_only: bool,
    /// `SameSite`: `Strict`, `Lax` or `None`; `None`: left out.
    pub same_site: Option<String>,
}

fn optional<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    super::as_optional_text(duration, serializer)
}
