//! The keys under `http` of a listener.

use http::{HeaderName, HeaderValue, Method, Uri};
use rustls::pki_types::ServerName;
use serde_yaml::Value;

use super::super::HttpVersion;
use super::super::http::{Action, Changes, Cookie, Forwarded, Http, Page, Priority, Route, Send};
use super::{DAY, Fields, FileBackendTls, Node, Reader, describe, join};
use crate::http::framer::is_token;
use crate::http::route;
use crate::sniff;

/// Headers that the program sets by itself, or that frame a message.
const OURS: [&str; 9] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// Largest body of our own.
const LARGEST_BODY: usize = 64 * 1024;

/// What stands under `http`; routes with their paths.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct FileHttp {
    pub http: Http,
    pub paths: Vec<String>,
}

impl Reader<'_> {
    pub(super) fn http(&mut self, node: &Node<'_>) -> FileHttp {
        let mut found = FileHttp::default();
        let Some(fields) = self.fields(node, &["routes", "h2c", "forwarded", "errors"]) else { return found };
        match fields.get("routes") {
            Some(routes) => {
                let items = self.list(&routes);
                if items.is_empty() && routes.value.is_sequence() {
                    self.error(&routes.path, "the list is empty; a listener has at least one route");
                }
                for item in items {
                    if let Some(route) = self.route(&item) {
                        found.http.routes.push(route);
                        found.paths.push(item.path);
                    }
                }
            }
            None => self.missing(&fields, "routes", "write at least one, such as { pool: shop }"),
        }
        found.http.h2c = fields.get("h2c").and_then(|node| self.flag(&node)).unwrap_or(false);
        if let Some(node) = fields.get("forwarded") {
            found.http.forwarded = self.forwarded(&node);
        }
        if let Some(node) = fields.get("errors") {
            found.http.errors = self.errors(&node);
        }
        found
    }

    fn route(&mut self, node: &Node<'_>) -> Option<Route> {
        let known = [
            "host",
            "path",
            "method",
            "headers",
            "pool",
            "redirect",
            "respond",
            "strip_prefix",
            "timeout",
            "priority",
            "add",
            "remove",
            "response",
            "idempotency_key",
        ];
        let fields = self.fields(node, &known)?;
        let actions = ["pool", "redirect", "respond"].into_iter().filter(|key| fields.get(key).is_some());
        let actions = actions.collect::<Vec<_>>();
        let action = match actions[..] {
            ["pool"] => fields.get("pool").and_then(|node| self.name(&node)).map(Action::Pool),
            ["redirect"] => fields.get("redirect").and_then(|node| self.redirect(&node)),
            ["respond"] => fields.get("respond").and_then(|node| self.respond(&node)),
            [] => {
                self.missing(&fields, "pool", "a route ends in `pool`, `redirect` or `respond`");
                None
            }
            _ => {
                let message = format!("{} stand side by side; a route ends in one of them", actions.join(" and "));
                self.error(&node.path, message);
                None
            }
        };
        let to_pool = matches!(action, Some(Action::Pool(_)));
        let host = fields.get("host").and_then(|node| {
            let text = self.text(&node)?.to_ascii_lowercase();
            let name = text.strip_prefix("*.").unwrap_or(&text);
            let host = sniff::is_host_name(name) || name.parse::<std::net::IpAddr>().is_ok();
            if host { Some(text) } else { self.refuse(&node, "a host name such as shop.example, or *.example") }
        });
        let path = fields.get("path").and_then(|node| {
            let text = self.text(&node)?;
            match route::normalise(&text) {
                Some(path) if path == text && !text.contains('?') => Some(text.trim_end_matches('/').to_owned()),
                Some(path) if !text.contains('?') => {
                    self.refuse(&node, &format!("the path as it is compared, which is {path}"))
                }
                _ => self.refuse(&node, "a path such as /v1"),
            }
        });
        let methods = fields.get("method").map(|node| self.one_or_more(&node)).unwrap_or_default();
        let mut read = Vec::new();
        for method in methods {
            let text = self.text(&method)?;
            match Method::from_bytes(text.as_bytes()) {
                Ok(_) if text.bytes().all(|byte| !byte.is_ascii_lowercase()) => read.push(text),
                _ => drop(self.refuse::<()>(&method, "a method in capitals, such as GET")),
            }
        }
        let headers = fields.get("headers").map(|node| self.header_values(&node, &[])).unwrap_or_default();
        if let Some(Action::Redirect { scheme: None, host: to_host, path: to_path, .. }) = &action {
            let same_host = to_host.is_none() || *to_host == host;
            let below = |to: &String| to.trim_end_matches('/') == path.as_deref().unwrap_or_default();
            // After another method, or without a header, a client may come to another route.
            let all = read.is_empty() && headers.is_empty();
            if all && same_host && to_path.as_ref().is_none_or(below) {
                self.error(&join(&fields.path, "redirect"), "leads back to this route, without end");
            }
        }
        let priorities = [("high", Priority::High), ("normal", Priority::Normal), ("low", Priority::Low)];
        let timeout = self.duration_at(&fields, "timeout", 10, DAY);
        let strip_prefix = fields.get("strip_prefix").and_then(|node| self.flag(&node)).unwrap_or(false);
        let priority = fields.get("priority").and_then(|node| self.word(&node, &priorities));
        let idempotency_key = fields.get("idempotency_key").and_then(|node| self.header_name(&node));
        if actions.len() == 1 && !to_pool {
            for key in ["strip_prefix", "timeout", "priority", "add", "remove", "idempotency_key"] {
                if fields.get(key).is_some() {
                    let path = join(&fields.path, key);
                    self.error(&path, "belongs to a route that ends in a pool; this one answers by itself");
                }
            }
        }
        let request = self.changes(&fields);
        let response = fields.get("response").and_then(|node| {
            let fields = self.fields(&node, &["add", "remove"])?;
            Some(self.changes(&fields))
        });
        Some(Route {
            host,
            path: path.unwrap_or_default(),
            methods: read,
            headers,
            action: action?,
            strip_prefix,
            timeout,
            priority: priority.unwrap_or(Priority::Normal),
            request,
            response: response.unwrap_or_default(),
            idempotency_key,
        })
    }

    fn redirect(&mut self, node: &Node<'_>) -> Option<Action> {
        let fields = self.fields(node, &["scheme", "host", "path", "status"])?;
        let scheme = fields.get("scheme").and_then(|node| self.word(&node, &[("http", "http"), ("https", "https")]));
        let host = fields.get("host").and_then(|node| {
            let text = self.text(&node)?;
            let good = !text.is_empty() && crate::http::framer::is_authority(text.as_bytes());
            if good { Some(text) } else { self.refuse(&node, "a host name, perhaps with a port") }
        });
        let path = fields.get("path").and_then(|node| {
            let text = self.text(&node)?;
            let good = text.starts_with('/') && text.parse::<Uri>().is_ok();
            if good { Some(text) } else { self.refuse(&node, "a path such as /new") }
        });
        let status = match fields.get("status") {
            Some(node) => self.number(&node, 301, 308).map_or(308, |status| status as u16),
            None => 308,
        };
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            self.error(&join(&fields.path, "status"), format!("found {status}; expected 301, 302, 303, 307 or 308"));
        }
        if scheme.is_none() && host.is_none() && path.is_none() {
            self.error(&node.path, "leads back to where it came from; give it a scheme, a host or a path");
        }
        Some(Action::Redirect { scheme: scheme.map(str::to_owned), host, path, status })
    }

    fn respond(&mut self, node: &Node<'_>) -> Option<Action> {
        let fields = self.fields(node, &["status", "body", "type"])?;
        let status = fields.get("status").and_then(|node| self.number(&node, 200, 599)).unwrap_or(200);
        Some(Action::Respond { status: status as u16, page: self.page(&fields) })
    }

    fn page(&mut self, fields: &Fields<'_>) -> Page {
        let body = fields.get("body").and_then(|node| {
            let text = self.text(&node)?;
            if text.len() <= LARGEST_BODY { Some(text) } else { self.refuse(&node, "at most 64 KiB of text") }
        });
        let content_type = fields.get("type").and_then(|node| {
            let text = self.text(&node)?;
            let good = HeaderValue::from_str(&text).is_ok() && text.contains('/');
            if good { Some(text) } else { self.refuse(&node, "a media type such as text/html") }
        });
        Page {
            body: body.unwrap_or_default(),
            content_type: content_type.unwrap_or_else(|| "text/plain; charset=utf-8".to_owned()),
        }
    }

    fn errors(&mut self, node: &Node<'_>) -> Vec<(u16, Page)> {
        let Value::Mapping(map) = node.value else {
            self.refuse::<()>(node, "a map from status to { body, type }");
            return Vec::new();
        };
        let mut pages = Vec::new();
        for (key, value) in map {
            let text = match key {
                Value::Number(number) => number.to_string(),
                Value::String(text) => text.clone(),
                _ => String::new(),
            };
            let path = join(&node.path, &text);
            let Some(status) = text.parse::<u16>().ok().filter(|status| (400..600).contains(status)) else {
                self.error(&path, format!("found {}; expected a status from 400 to 599", describe(key)));
                continue;
            };
            if let Some(fields) = self.fields(&Node { value, path }, &["body", "type"]) {
                pages.push((status, self.page(&fields)));
            }
        }
        pages
    }

    fn forwarded(&mut self, node: &Node<'_>) -> Forwarded {
        let mut forwarded = Forwarded::default();
        let Some(fields) = self.fields(node, &["send", "trust"]) else { return forwarded };
        let words = [
            ("both", Send::Both),
            ("x_forwarded", Send::XForwarded),
            ("forwarded", Send::Forwarded),
            ("off", Send::Off),
        ];
        if let Some(send) = fields.get("send").and_then(|node| self.word(&node, &words)) {
            forwarded.send = send;
        }
        forwarded.trust = fields.get("trust").map(|node| self.networks(&node)).unwrap_or_default();
        forwarded
    }

    fn changes(&mut self, fields: &Fields<'_>) -> Changes {
        let add = fields.get("add").map(|node| self.header_values(&node, &OURS)).unwrap_or_default();
        let mut remove = Vec::new();
        for item in fields.get("remove").map(|node| self.list(&node)).unwrap_or_default() {
            match self.header_name(&item) {
                Some(name) if OURS.contains(&name.as_str()) => {
                    self.error(&item.path, format!("{name} belongs to the connection; it cannot be taken out"));
                }
                name => remove.extend(name),
            }
        }
        Changes { add, remove }
    }

    /// A map from header names, given back in lower case, to values.
    fn header_values(&mut self, node: &Node<'_>, refused: &[&str]) -> Vec<(String, String)> {
        let Value::Mapping(map) = node.value else {
            self.refuse::<()>(node, "a map from header names to values");
            return Vec::new();
        };
        let mut headers = Vec::new();
        for (key, value) in map {
            let path = join(&node.path, key.as_str().unwrap_or_default());
            let name = self.header_name(&Node { value: key, path: path.clone() });
            let node = Node { value, path };
            let text = match value {
                Value::Number(number) => Some(number.to_string()),
                Value::Bool(flag) => Some(flag.to_string()),
                _ => self.text(&node),
            };
            let (Some(name), Some(text)) = (name, text) else { continue };
            if refused.contains(&name.as_str()) {
                self.error(&node.path, format!("{name} belongs to the connection; it cannot be set"));
            } else if HeaderValue::from_str(&text).is_err() {
                self.refuse::<()>(&node, "text without control characters");
            } else {
                headers.push((name, text));
            }
        }
        headers
    }

    pub(super) fn header_name(&mut self, node: &Node<'_>) -> Option<String> {
        let text = self.text(node)?;
        match HeaderName::from_bytes(text.as_bytes()) {
            Ok(name) => Some(name.as_str().to_owned()),
            Err(_) => self.refuse(node, "a header name such as X-Request-Id"),
        }
    }

    fn one_or_more<'v>(&mut self, node: &Node<'v>) -> Vec<Node<'v>> {
        match node.value {
            Value::Sequence(_) => self.list(node),
            value => vec![Node { value, path: node.path.clone() }],
        }
    }

    /// TLS towards a pool's backends.
    pub(super) fn backend_tls(&mut self, node: &Node<'_>) -> FileBackendTls {
        let mut tls = FileBackendTls { verify: true, ..FileBackendTls::default() };
        let known = ["server_name", "verify", "ca", "certificate", "key"];
        let Some(fields) = self.fields(node, &known) else { return tls };
        match fields.get("server_name") {
            Some(node) => {
                tls.server_name = self.text(&node).and_then(|text| match ServerName::try_from(text.as_str()) {
                    Ok(_) => Some(text),
                    Err(_) => self.refuse(&node, "a host name, such as shop.internal"),
                });
            }
            // Backends are addresses, and a certificate is for a name.
            None => self.missing(&fields, "server_name", "it is the name that the backends' certificates are for"),
        }
        tls.verify = fields.get("verify").and_then(|node| self.flag(&node)).unwrap_or(true);
        tls.ca = fields.get("ca").and_then(|node| self.text(&node));
        if let (Some(node), false) = (fields.get("ca"), tls.verify) {
            self.error(&node.path, "has no effect with `verify: false`; take one of them out");
        }
        let mut files = ["certificate", "key"].map(|key| fields.get(key).and_then(|node| self.text(&node)));
        if files.iter().flatten().count() == 1 {
            self.error(&node.path, "`certificate` and `key` belong together; one of them is missing");
        } else if let [Some(certificate), Some(key)] = [files[0].take(), files[1].take()] {
            tls.identity = Some((certificate, key));
        }
        tls
    }

    /// The version that a pool's backends speak; without quotes YAML takes 1 and 2 for numbers.
    pub(super) fn http_version(&mut self, node: &Node<'_>) -> Option<HttpVersion> {
        let text = match node.value {
            Value::Number(number) => number.to_string(),
            Value::String(text) => text.clone(),
            _ => String::new(),
        };
        match text.as_str() {
            "auto" => Some(HttpVersion::Auto),
            "1" => Some(HttpVersion::One),
            "2" => Some(HttpVersion::Two),
            _ => self.refuse(node, "auto, 1 or 2"),
        }
    }

    /// The header that affinity goes by.
    pub(super) fn affinity_header(&mut self, node: &Node<'_>) -> Option<String> {
        self.header_name(node)
    }

    /// The cookie that affinity goes by: its name, or a map.
    pub(super) fn affinity_cookie(&mut self, node: &Node<'_>) -> Option<Cookie> {
        let plain = |name| Cookie {
            name,
            path: "/".to_owned(),
            domain: None,
            max_age: None,
            secure: None,
            http_only: true,
            same_site: Some("Lax".to_owned()),
        };
        if !node.value.is_mapping() {
            return self.cookie_name(node).map(plain);
        }
        let known = ["name", "path", "domain", "max_age", "secure", "http_only", "same_site"];
        let fields = self.fields(node, &known)?;
        let Some(name) = fields.get("name") else {
            self.missing(&fields, "name", "it names the cookie");
            return None;
        };
        let mut cookie = plain(self.cookie_name(&name)?);
        if let Some(node) = fields.get("path") {
            let text = self.text(&node)?;
            if !text.starts_with('/') || !text.bytes().all(is_cookie_text) {
                return self.refuse(&node, "a path such as /");
            }
            cookie.path = text;
        }
        cookie.domain = fields.get("domain").and_then(|node| {
            let text = self.text(&node)?;
            if sniff::is_host_name(&text) { Some(text) } else { self.refuse(&node, "a host name such as shop.example") }
        });
        cookie.max_age = self.duration_at(&fields, "max_age", 1_000, 400 * DAY);
        cookie.secure = fields.get("secure").and_then(|node| self.flag(&node));
        cookie.http_only = fields.get("http_only").and_then(|node| self.flag(&node)).unwrap_or(true);
        let words = [("strict", Some("Strict")), ("lax", Some("Lax")), ("none", Some("None")), ("off", None)];
        if let Some(word) = fields.get("same_site").and_then(|node| self.word(&node, &words)) {
            cookie.same_site = word.map(str::to_owned);
        }
        Some(cookie)
    }

    fn cookie_name(&mut self, node: &Node<'_>) -> Option<String> {
        let text = self.text(node)?;
        let good = !text.is_empty() && text.len() <= 64 && text.bytes().all(is_token);
        if good { Some(text) } else { self.refuse(node, "the name of a cookie, at most 64 letters, digits and -_.") }
    }
}

fn is_cookie_text(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~') && byte != b';' && byte != b','
}
