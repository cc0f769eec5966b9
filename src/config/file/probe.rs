//! The keys of a probe.

use serde_yaml::Value;

use super::super::{DataVersion, ProbeKind};
use super::{DAY, FileProbe, FileProbeKind, Node, Reader};

impl Reader<'_> {
    pub(super) fn probe(&mut self, node: &Node<'_>) -> FileProbe {
        let mut probe = FileProbe::default();
        if let Value::String(text) = node.value {
            if text == "off" {
                probe.off = true;
            } else {
                self.refuse::<()>(node, "off, or a map such as { http: { path: /healthz } }");
            }
            return probe;
        }
        let known = ["tcp", "http", "tls", "grpc", "exchange", "interval", "timeout", "fall", "rise", "port"];
        let Some(fields) = self.fields(node, &known) else { return probe };
        let kinds = ["tcp", "http", "tls", "grpc", "exchange"]
            .into_iter()
            .filter(|kind| fields.get(kind).is_some())
            .collect::<Vec<_>>();
        if kinds.len() > 1 {
            self.error(&node.path, format!("{} stand side by side; a pool has one kind of probe", kinds.join(" and ")));
        }
        if let Some(node) = fields.get("tcp") {
            self.fields(&node, &[]);
            probe.kind = Some(FileProbeKind::Whole(ProbeKind::Tcp));
        }
        if let Some(node) = fields.get("tls") {
            probe.kind = self.probe_tls(&node);
        }
        if let Some(node) = fields.get("http") {
            probe.kind = self.probe_http(&node).map(FileProbeKind::Whole);
        }
        if let Some(node) = fields.get("grpc")
            && let Some(fields) = self.fields(&node, &["service"])
        {
            let service = fields.get("service").and_then(|node| self.text(&node));
            if service.as_ref().is_some_and(|name| name.len() > 256) {
                self.refuse::<()>(&node, "the name of a service, at most 256 bytes");
            }
            probe.kind = Some(FileProbeKind::Whole(ProbeKind::Grpc { service: service.unwrap_or_default() }));
        }
        if let Some(node) = fields.get("exchange") {
            probe.kind = self.probe_exchange(&node).map(FileProbeKind::Whole);
        }
        probe.interval = self.duration_at(&fields, "interval", 10, DAY);
        probe.timeout = self.duration_at(&fields, "timeout", 1, 60_000);
        probe.fall = fields.get("fall").and_then(|node| self.number(&node, 1, 100));
        probe.rise = fields.get("rise").and_then(|node| self.number(&node, 1, 100));
        probe.port = fields.get("port").and_then(|node| self.number(&node, 1, 65_535));
        probe
    }

    fn probe_http(&mut self, node: &Node<'_>) -> Option<ProbeKind> {
        let fields = self.fields(node, &["method", "path", "host", "status", "body", "digest"])?;
        let method = fields
            .get("method")
            .and_then(|node| self.word(&node, &[("GET", "GET"), ("HEAD", "HEAD"), ("OPTIONS", "OPTIONS")]));
        let path = fields.get("path").and_then(|node| {
            let text = self.text(&node)?;
            if text.starts_with('/') && text.bytes().all(|b| (0x21..0x7f).contains(&b)) && text.len() <= 2_048 {
                Some(text)
            } else {
                self.refuse(&node, "a path that begins with / and holds no spaces, at most 2048 bytes")
            }
        });
        let host = fields.get("host").and_then(|node| self.host(&node));
        let status = fields.get("status").and_then(|node| self.statuses(&node));
        let body = fields.get("body").and_then(|node| self.fragment(&node));
        let digest = fields.get("digest").and_then(|node| self.flag(&node));
        if let (Some(method @ ("HEAD" | "OPTIONS")), Some(true)) = (method, digest) {
            self.error(
                &format!("{}.digest", node.path),
                format!("an answer to {method} has no body to check; probe by GET"),
            );
        }
        Some(ProbeKind::Http {
            method: method.unwrap_or("GET").to_owned(),
            path: path.unwrap_or_else(|| "/".to_owned()),
            host,
            status: status.unwrap_or_else(|| vec![(200, 299)]),
            body,
            digest: digest.unwrap_or(false),
        })
    }

    fn probe_tls(&mut self, node: &Node<'_>) -> Option<FileProbeKind> {
        let fields = self.fields(node, &["server_name", "verify", "ca"])?;
        let server_name = fields.get("server_name").and_then(|node| {
            let text = self.text(&node)?;
            match rustls::pki_types::ServerName::try_from(text.as_str()) {
                Ok(_) => Some(text),
                Err(_) => self.refuse(&node, "a host name, such as shop.internal"),
            }
        });
        let verify = fields.get("verify").and_then(|node| self.flag(&node)).unwrap_or(false);
        let ca = fields.get("ca").and_then(|node| self.text(&node).map(|text| (node.path, text)));
        if let (Some((path, _)), false) = (&ca, verify) {
            self.error(path, "has no effect without `verify: true`; add that, or take `ca` out");
        }
        Some(FileProbeKind::Tls { server_name, verify, ca: ca.map(|(_, text)| text) })
    }

    fn probe_exchange(&mut self, node: &Node<'_>) -> Option<ProbeKind> {
        let fields = self.fields(node, &["send", "expect"])?;
        let send = fields.get("send").and_then(|node| self.fragment(&node));
        let Some(expect) = fields.get("expect") else {
            self.missing(&fields, "expect", "it names the bytes the backend must answer with");
            return None;
        };
        let expect = self.fragment(&expect)?;
        Some(ProbeKind::Exchange { send: send.unwrap_or_default(), expect })
    }

    /// `200`, `200-299`, or a list of both.
    fn statuses(&mut self, node: &Node<'_>) -> Option<Vec<(u16, u16)>> {
        let wanted = "a status such as 200, a range such as 200-299, or a list of both, within 100 and 599";
        let items = if node.value.is_sequence() {
            self.list(node)
        } else {
            vec![Node { value: node.value, path: node.path.clone() }]
        };
        let mut ranges = Vec::new();
        for item in &items {
            let text = match item.value {
                Value::Number(number) => number.to_string(),
                Value::String(text) => text.clone(),
                _ => return self.refuse(item, wanted),
            };
            let (low, high) = text.split_once('-').unwrap_or((&text, &text));
            match (low.trim().parse::<u16>(), high.trim().parse::<u16>()) {
                (Ok(low), Ok(high)) if (100..=599).contains(&low) && low <= high && high <= 599 => {
                    ranges.push((low, high))
                }
                _ => return self.refuse(item, wanted),
            }
        }
        if ranges.is_empty() { self.refuse(node, wanted) } else { Some(ranges) }
    }

    /// `data_version`, which its pool's probe reads.
    pub(super) fn data_version(&mut self, node: &Node<'_>) -> Option<DataVersion> {
        let fields = self.fields(node, &["header", "at_least"])?;
        let header = match fields.get("header") {
            Some(node) => self.text(&node).and_then(|text| match http::HeaderName::try_from(text) {
                Ok(name) => Some(name.as_str().to_owned()),
                Err(_) => self.refuse(&node, "the name of a header, such as x-data-version"),
            }),
            None => {
                self.missing(&fields, "header", "it names the header of answers that carries the version");
                None
            }
        };
        let at_least = match fields.get("at_least") {
            Some(node) => self.number(&node, 0, u64::MAX - 1),
            None => {
                self.missing(&fields, "at_least", "it is the oldest version that gets clients");
                None
            }
        };
        Some(DataVersion { header: header?, at_least: at_least? })
    }

    fn fragment(&mut self, node: &Node<'_>) -> Option<String> {
        let text = self.text(node)?;
        if text.is_empty() || text.len() > 4_096 {
            return self.refuse(node, "1 to 4096 bytes of text");
        }
        Some(text)
    }
}
