//! The keys of a listener.

use serde_yaml::Value;

use super::super::Network;
use super::{DAY, FileListener, FileSni, FileTls, MAX_CONNECTIONS, Node, Reader, describe, join};
use crate::sniff;

impl Reader<'_> {
    pub(super) fn listener(&mut self, node: &Node<'_>) -> FileListener {
        let mut listener = FileListener { path: node.path.clone(), ..FileListener::default() };
        let known =
            ["name", "bind", "tcp", "sni", "http", "tls", "proxy_protocol", "allow", "deny", "limits", "timeouts"];
        let Some(fields) = self.fields(node, &known) else { return listener };
        listener.name = fields.get("name").and_then(|node| self.name(&node));
        match fields.get("bind") {
            Some(node) if node.value.is_sequence() => {
                for item in self.list(&node) {
                    let address = self.address(&item, true);
                    listener.bind.extend(address.map(|address| (item.path.clone(), address)));
                }
                if listener.bind.is_empty() && node.value.as_sequence().is_some_and(Vec::is_empty) {
                    self.error(&node.path, "the list is empty; a listener has at least one address");
                }
            }
            Some(node) => {
                let address = self.address(&node, true);
                listener.bind.extend(address.map(|address| (node.path.clone(), address)));
            }
            None => self.missing(&fields, "bind", "expected IP:PORT or a list of them"),
        }
        match (fields.get("tcp"), fields.get("sni"), fields.get("http")) {
            (Some(node), None, None) => listener.tcp = self.name(&node),
            (None, Some(node), None) => listener.sni = Some(self.sni(&node)),
            (None, None, Some(node)) => listener.http = Some(self.http(&node)),
            (None, None, None) => {
                let faces = "it names the pool that this listener carries its connections to (or `sni`, or `http`)";
                self.missing(&fields, "tcp", faces);
            }
            _ => self.error(&node.path, "a listener has one of `tcp`, `sni` and `http`; take the others out"),
        }
        if let Some(node) = fields.get("tls") {
            if listener.sni.is_some() {
                self.error(&node.path, "`tls` ends TLS here and `sni` passes it on; a listener has one of them");
            }
            listener.tls = Some(self.tls(&node));
        }
        if let Some(node) = fields.get("proxy_protocol")
            && let Some(fields) = self.fields(&node, &["accept_from"])
        {
            match fields.get("accept_from") {
                Some(node) => listener.proxy_from = Some(self.networks(&node)),
                None => self.missing(&fields, "accept_from", "it lists the networks whose PROXY header is believed"),
            }
        }
        listener.allow = fields.get("allow").map(|node| self.networks(&node));
        listener.deny = fields.get("deny").map(|node| self.networks(&node));
        if let Some(node) = fields.get("limits")
            && let Some(fields) = self.fields(&node, &["max_connections", "wait", "per_client"])
        {
            if let Some(node) = fields.get("per_client")
                && let Some(fields) = self.fields(&node, &["connections", "rate", "prefix"])
            {
                listener.client_connections =
                    fields.get("connections").and_then(|node| self.number(&node, 1, MAX_CONNECTIONS));
                listener.client_rate = fields.get("rate").and_then(|node| self.rate(&node));
                if let Some(node) = fields.get("prefix")
                    && let Some(fields) = self.fields(&node, &["ipv4", "ipv6"])
                {
                    listener.client_prefix.0 = fields.get("ipv4").and_then(|node| self.number(&node, 8, 32));
                    listener.client_prefix.1 = fields.get("ipv6").and_then(|node| self.number(&node, 16, 128));
                }
            }
            listener.max_connections =
                fields.get("max_connections").and_then(|node| self.number(&node, 1, MAX_CONNECTIONS));
            listener.wait = self.duration_at(&fields, "wait", 0, 60_000);
        }
        if let Some(node) = fields.get("timeouts")
            && let Some(fields) = self.fields(&node, &["handshake", "header", "keepalive", "idle"])
        {
            listener.handshake = self.duration_at(&fields, "handshake", 10, DAY);
            if listener.handshake.is_some()
                && listener.sni.is_none()
                && listener.tls.is_none()
                && listener.proxy_from.is_none()
            {
                let reason = "has no effect on a listener without tls, sni or proxy_protocol";
                self.warnings.push((join(&fields.path, "handshake"), reason.into()));
            }
            listener.header = self.duration_at(&fields, "header", 10, DAY);
            listener.keepalive = self.duration_at(&fields, "keepalive", 10, DAY);
            for (key, given) in [("header", listener.header), ("keepalive", listener.keepalive)] {
                if given.is_some() && listener.http.is_none() {
                    let reason = "has no effect on a listener that is not http";
                    self.warnings.push((join(&fields.path, key), reason.into()));
                }
            }
            listener.idle = self.duration_at(&fields, "idle", 10, 30 * DAY);
        }
        listener
    }

    pub(super) fn networks(&mut self, node: &Node<'_>) -> Vec<Network> {
        let mut networks = Vec::new();
        for item in self.list(node) {
            let found = self.text(&item).and_then(|text| match Network::parse(&text) {
                Some(network) => Some(network),
                None => {
                    self.refuse(&item, "an address or a network such as 10.0.0.0/8 or 2001:db8::/32 (no host bits set)")
                }
            });
            networks.extend(found);
        }
        networks
    }

    fn tls(&mut self, node: &Node<'_>) -> FileTls {
        let mut tls = FileTls::default();
        let Some(fields) = self.fields(node, &["certificates", "min_version", "client"]) else { return tls };
        match fields.get("certificates") {
            Some(node) => {
                let items = self.list(&node);
                if items.is_empty() && node.value.is_sequence() {
                    self.error(&node.path, "the list is empty; a listener that ends TLS has at least one certificate");
                }
                for item in items {
                    let Some(fields) = self.fields(&item, &["certificate", "key"]) else { continue };
                    let files = ["certificate", "key"].map(|key| match fields.get(key) {
                        Some(node) => self.text(&node),
                        None => {
                            self.missing(&fields, key, "it names a PEM file");
                            None
                        }
                    });
                    if let [Some(certificate), Some(key)] = files {
                        tls.certificates.push((item.path.clone(), certificate, key));
                    }
                }
            }
            None => self.missing(&fields, "certificates", "write at least one, as { certificate: c.pem, key: k.pem }"),
        }
        if let Some(node) = fields.get("min_version") {
            // Without quotes YAML takes a version for a number.
            let text = match node.value {
                Value::Number(number) => number.to_string(),
                Value::String(text) => text.clone(),
                _ => String::new(),
            };
            match text.as_str() {
                "1.2" => {}
                "1.3" => tls.only_1_3 = true,
                _ => drop(self.refuse::<()>(&node, "1.2 or 1.3")),
            }
        }
        if let Some(node) = fields.get("client")
            && let Some(fields) = self.fields(&node, &["ca", "require", "header"])
        {
            match fields.get("ca") {
                Some(node) => tls.client_ca = self.text(&node),
                None => self.missing(&fields, "ca", "it names the authorities that clients' certificates come from"),
            }
            tls.client_header = fields.get("header").and_then(|node| self.header_name(&node));
            tls.require = fields.get("require").and_then(|node| self.flag(&node)).unwrap_or(true);
        }
        tls
    }

    fn sni(&mut self, node: &Node<'_>) -> FileSni {
        let mut sni = FileSni::default();
        let Some(fields) = self.fields(node, &["routes", "default"]) else { return sni };
        sni.default = fields.get("default").and_then(|node| self.name(&node));
        let Some(routes) = fields.get("routes") else {
            self.missing(&fields, "routes", "a map from server name to pool, such as { shop.example: shop }");
            return sni;
        };
        let Value::Mapping(map) = routes.value else {
            self.refuse::<()>(&routes, "a map from server name to pool");
            return sni;
        };
        for (key, value) in map {
            let name = key.as_str().unwrap_or_default().to_ascii_lowercase();
            let path = join(&routes.path, key.as_str().unwrap_or_default());
            let host = name.strip_prefix("*.").unwrap_or(&name);
            if !sniff::is_host_name(host) {
                let wanted = "expected a host name such as shop.example, or *.example for all names under it";
                self.error(&path, format!("found {}; {wanted}", describe(key)));
                continue;
            }
            if sni.routes.iter().any(|(_, known, _)| *known == name) {
                self.error(
                    &path,
                    format!("the name {name} stands here a second time; upper and lower case are the same"),
                );
            }
            let pool = self.name(&Node { value, path: path.clone() });
            sni.routes.extend(pool.map(|pool| (path, name, pool)));
        }
        sni
    }
}
