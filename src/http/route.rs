//! Which route a request takes. Pure; built with the table.
//!
//! The most specific route wins, in this order: its host (exact, then the longest `*.suffix`, then none), its path (the
//! longest prefix), its methods (some, then any), its headers (the most), and its place in the file. A host whose routes all
//! fail leaves the request to the less specific hosts.
//!
//! Host and path are compared in one form, and the path goes to the backend in that form too: the host in lower case,
//! without its port and a dot at its end; the path without `.` and `..`, with letters, digits and `-._~` as themselves and
//! not as `%41`, and with the other escapes in capitals (RFC 3986, 6.2.2). An escaped slash stays escaped, and two
//! slashes stay two. A path that climbs above its root is refused.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::http::{self as config, Page, Priority};
use crate::pool::Pool;

/// A route, ready to serve.
#[derive(Debug)]
pub struct Route {
    /// For logs: `host/path`, each as the file has it.
    pub name: Arc<str>,
    path: String,
    methods: Vec<String>,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Where it ends.
    pub action: Action,
    /// Whether the prefix is taken off.
    pub strip_prefix: bool,
    /// From the whole request to the head of its answer; `None`: the pool's.
    pub timeout: Option<Duration>,
    /// How much of the pool's bound on connections it may use, in percent.
    pub share: u32,
    /// Its priority in the pool's queue, 0 first.
    pub lane: usize,
    /// Changes to the request.
    pub request: Changes,
    /// Changes to the answer.
    pub response: Changes,
    /// A request with this header may be sent twice.
    pub idempotency_key: Option<HeaderName>,
}

/// Where a route ends.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Action {
    Pool(Arc<Pool>),
    Redirect { scheme: Option<String>, host: Option<String>, path: Option<String>, status: u16 },
    Respond { status: u16, page: Page },
}

/// Changes to a header section.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Changes {
    pub add: Vec<(HeaderName, HeaderValue)>,
    pub remove: Vec<HeaderName>,
}

/// All routes of a listener.
#[derive(Debug, Default)]
pub struct Routes {
    exact: HashMap<String, Vec<Arc<Route>>>,
    /// By what follows `*.`; any number of labels may stand before it.
    suffixes: HashMap<String, Vec<Arc<Route>>>,
    any: Vec<Arc<Route>>,
}

/// What became of the search.
#[derive(Debug)]
pub enum Found<'a> {
    /// This route.
    Route(&'a Arc<Route>),
    /// No route has the host.
    NoHost,
    /// Routes have the host, but none the rest.
    NoRoute,
}

impl Routes {
    /// Routes in order of precedence; `None` when a pool does not exist, which the reader has made sure of.
    pub fn new(routes: &[config::Route], pools: &[Arc<Pool>]) -> Option<Routes> {
        let high = |pool: &str| {
            routes.iter().any(|other| {
                other.priority == Priority::High && matches!(&other.action, config::Action::Pool(name) if name == pool)
            })
        };
        let mut found = Routes::default();
        for route in routes {
            let share = match (&route.action, route.priority) {
                (_, Priority::Low) => 70,
                (config::Action::Pool(pool), Priority::Normal) if high(pool) => 90,
                _ => 100,
            };
            let lane = match route.priority {
                Priority::High => 0,
                Priority::Normal => 1,
                Priority::Low => 2,
            };
            let ready = Arc::new(ready(route, pools, share, lane)?);
            let list = match route.host.as_deref().map(|host| (host.strip_prefix("*."), host)) {
                None => &mut found.any,
                Some((Some(suffix), _)) => found.suffixes.entry(suffix.to_owned()).or_default(),
                Some((None, host)) => found.exact.entry(host.to_owned()).or_default(),
            };
            list.push(ready);
        }
        for list in found.exact.values_mut().chain(found.suffixes.values_mut()).chain([&mut found.any]) {
            // The sort is stable: what is equal keeps the order of the file.
            list.sort_by_key(|route| {
                (std::cmp::Reverse(route.path.len()), route.methods.is_empty(), std::cmp::Reverse(route.headers.len()))
            });
        }
        Some(found)
    }

    /// The route of a request; `host` and `path` in the form of this module, the path without its query.
    pub fn find(&self, host: &str, path: &str, method: &str, headers: &HeaderMap) -> Found<'_> {
        let suffixes = host.match_indices('.').filter_map(|(dot, _)| self.suffixes.get(&host[dot + 1..]));
        let lists = self.exact.get(host).into_iter().chain(suffixes).chain([&self.any]);
        let mut hosts = 0;
        for list in lists {
            hosts += list.len();
            if let Some(route) = list.iter().find(|route| route.takes(path, method, headers)) {
                return Found::Route(route);
            }
        }
        if hosts == 0 { Found::NoHost } else { Found::NoRoute }
    }

    /// All pools that they lead to.
    pub fn pools(&self) -> Vec<&Arc<Pool>> {
        let lists = self.any.iter().chain(self.exact.values().flatten()).chain(self.suffixes.values().flatten());
        let pools = lists.filter_map(|route| match &route.action {
            Action::Pool(pool) => Some(pool),
            _ => None,
        });
        pools.collect()
    }
}

impl Route {
    fn takes(&self, path: &str, method: &str, headers: &HeaderMap) -> bool {
        under(&self.path, path).is_some()
            && (self.methods.is_empty() || self.methods.iter().any(|known| known == method))
            && self.headers.iter().all(|(name, value)| headers.get_all(name).iter().any(|found| found == value))
    }

    /// The path that goes to the backend.
    pub fn path_to_send<'a>(&self, path: &'a str) -> Cow<'a, str> {
        match under(&self.path, path) {
            Some("") if self.strip_prefix => Cow::Borrowed("/"),
            // Two slashes would make a host of what follows them.
            Some(rest) if self.strip_prefix => {
                Cow::Borrowed(&rest[rest.bytes().take_while(|byte| *byte == b'/').count() - 1..])
            }
            _ => Cow::Borrowed(path),
        }
    }
}

/// What stands behind a prefix that ends on the border of a segment.
fn under<'a>(prefix: &str, path: &'a str) -> Option<&'a str> {
    let rest = path.strip_prefix(prefix)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

fn ready(route: &config::Route, pools: &[Arc<Pool>], share: u32, lane: usize) -> Option<Route> {
    // The reader has judged all names and values.
    let header = |(name, value): &(String, String)| {
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_str(value).ok()?))
    };
    let changes = |changes: &config::Changes| Changes {
        add: changes.add.iter().filter_map(header).collect(),
        remove: changes.remove.iter().filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok()).collect(),
    };
    let action = match &route.action {
        config::Action::Pool(name) => Action::Pool(pools.iter().find(|pool| *pool.name == **name)?.clone()),
        config::Action::Redirect { scheme, host, path, status } => {
            Action::Redirect { scheme: scheme.clone(), host: host.clone(), path: path.clone(), status: *status }
        }
        config::Action::Respond { status, page } => Action::Respond { status: *status, page: page.clone() },
    };
    let path = if route.path.is_empty() { "/" } else { &route.path };
    Some(Route {
        name: format!("{}{path}", route.host.as_deref().unwrap_or("*")).into(),
        path: route.path.clone(),
        methods: route.methods.clone(),
        headers: route.headers.iter().filter_map(header).collect(),
        action,
        strip_prefix: route.strip_prefix,
        timeout: route.timeout,
        share,
        lane,
        request: changes(&route.request),
        response: changes(&route.response),
        idempotency_key: route.idempotency_key.as_ref().and_then(|name| HeaderName::from_bytes(name.as_bytes()).ok()),
    })
}

/// A host as it came, but for its port.
pub fn without_port(authority: &str) -> &str {
    match authority.rfind(':') {
        Some(colon) if !authority.ends_with(']') => &authority[..colon],
        _ => authority,
    }
}

/// A host as it is compared.
pub fn host(authority: &str) -> Cow<'_, str> {
    let name = without_port(authority);
    let name = name.strip_suffix('.').unwrap_or(name);
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(name.to_ascii_lowercase())
    } else {
        Cow::Borrowed(name)
    }
}

/// A path, without a query, as it is compared and sent; `None` when it climbs above its root, is not a path, or holds an
/// escape that is none.
pub fn normalise(path: &str) -> Option<Cow<'_, str>> {
    if !path.starts_with('/') || !path.is_ascii() {
        return None;
    }
    if !path.contains('%') && !path.contains("/.") {
        return Some(Cow::Borrowed(path));
    }
    let mut plain = String::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            plain.push(byte as char);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| (byte as char).to_digit(16));
        let value = (digit(rest.next())? << 4 | digit(rest.next())?) as u8;
        if value.is_ascii_alphanumeric() || b"-._~".contains(&value) {
            plain.push(value as char);
        } else {
            plain.push_str(&format!("%{value:02X}"));
        }
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = plain[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." if last => kept.push(""),
            "." => {}
            ".." => {
                kept.pop()?;
                if last {
                    kept.push("");
                }
            }
            segment => kept.push(segment),
        }
    }
    Some(Cow::Owned(format!("/{}", kept.join("/"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(host: Option<&str>, path: &str) -> config::Route {
        config::Route {
            host: host.map(str::to_owned),
            path: path.to_owned(),
            methods: Vec::new(),
            headers: Vec::new(),
            action: config::Action::Respond {
                status: 200,
                page: Page { body: String::new(), content_type: String::new() },
            },
            strip_prefix: false,
            timeout: None,
            priority: Priority::Normal,
            request: config::Changes::default(),
            response: config::Changes::default(),
            idempotency_key: None,
        }
    }

    #[test]
    fn the_most_specific_route_wins() {
        let mut post = route(Some("a.example"), "/v1");
        post.methods = vec!["POST".into()];
        let mut beta = route(Some("a.example"), "/v1");
        beta.headers = vec![("x-beta".into(), "1".into())];
        let list = [
            route(None, ""),
            route(Some("*.example"), ""),
            route(Some("*.b.example"), "/deep"),
            route(Some("a.example"), "/v1"),
            beta,
            post,
            route(Some("a.example"), "/v1/users"),
        ];
        let routes = Routes::new(&list, &[]).expect("no pools are named");
        let mut headers = HeaderMap::new();
        let name = |host: &str, path: &str, method: &str, headers: &HeaderMap| match routes
            .find(host, path, method, headers)
        {
            Found::Route(route) => format!("{} {} {}", route.name, route.methods.len(), route.headers.len()),
            other => format!("{other:?}"),
        };
        assert_eq!(name("a.example", "/v1/users/7", "GET", &headers), "a.example/v1/users 0 0");
        assert_eq!(name("a.example", "/v1", "POST", &headers), "a.example/v1 1 0");
        assert_eq!(name("a.example", "/v1x", "GET", &headers), "*.example/ 0 0");
        assert_eq!(name("x.b.example", "/deep", "GET", &headers), "*.b.example/deep 0 0");
        assert_eq!(name("x.b.example", "/", "GET", &headers), "*.example/ 0 0");
        assert_eq!(name("example", "/", "GET", &headers), "*/ 0 0");
        headers.insert("x-beta", HeaderValue::from_static("1"));
        assert_eq!(name("a.example", "/v1", "GET", &headers), "a.example/v1 0 1");
    }

    #[test]
    fn a_missing_host_is_told_from_a_missing_path() {
        let routes = Routes::new(&[route(Some("a.example"), "/v1")], &[]).expect("no pools");
        assert!(matches!(routes.find("a.example", "/", "GET", &HeaderMap::new()), Found::NoRoute));
        assert!(matches!(routes.find("b.example", "/v1", "GET", &HeaderMap::new()), Found::NoHost));
    }

    #[test]
    fn a_path_has_one_form() {
        for (path, wanted) in [
            ("/", Some("/")),
            ("/a//b", Some("/a//b")),
            ("/a/./b/../c", Some("/a/c")),
            ("/a/..", Some("/")),
            ("/a/.", Some("/a/")),
            ("/%61%2f%2E%2e/b", Some("/a%2F../b")),
            ("/a/%2e%2E/b", Some("/b")),
            ("/a%3b", Some("/a%3B")),
            ("/..", None),
            ("/a/../../b", None),
            ("/%2e%2e/b", None),
            ("/%zz", None),
            ("/%6", None),
            ("a", None),
        ] {
            assert_eq!(normalise(path).as_deref(), wanted, "{path}");
            if let Some(once) = normalise(path) {
                assert_eq!(normalise(&once).as_deref(), Some(&*once), "{path} twice");
            }
        }
    }

    #[test]
    fn a_host_has_one_form() {
        for (authority, wanted) in [
            ("Shop.Example:8080", "shop.example"),
            ("shop.example.", "shop.example"),
            ("[2001:DB8::1]:80", "2001:db8::1"),
            ("[::1]", "::1"),
        ] {
            assert_eq!(host(authority), wanted);
        }
    }

    #[test]
    fn a_prefix_comes_off_on_the_border_of_a_segment() {
        let mut config = route(None, "/v1");
        config.strip_prefix = true;
        let stripped = ready(&config, &[], 100, 1).expect("no pool");
        assert_eq!(stripped.path_to_send("/v1"), "/");
        assert_eq!(stripped.path_to_send("/v1/a"), "/a");
    }
}
