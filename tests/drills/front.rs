//! What stands in front of the cells: sailover, or a peer with the best settings known to us for what the drills show.
//!
//! The settings of peers are for somebody who knows the network (connects give up after twice the longest way) and who has
//! one slow answer of three seconds that must live, so that no read may give up before five.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::scene::{Drill, Probe, Through};
use crate::support::backend;
use crate::support::eventually;
use crate::support::netns;
use crate::support::proxy::{Directory, Proxy};

/// Where every front listens, in the edge's namespace.
pub const ADDRESS: &str = "10.99.1.1:8080";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sailover,
    Haproxy,
    Nginx,
    Envoy,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Sailover, Kind::Haproxy, Kind::Nginx, Kind::Envoy];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Sailover => "sailover",
            Kind::Haproxy => "haproxy",
            Kind::Nginx => "nginx",
            Kind::Envoy => "envoy",
        }
    }

    /// What `PEERS` names, in that order.
    pub fn peers(names: &str) -> Vec<Kind> {
        let known = |name: &str| Kind::ALL.into_iter().find(|kind| kind.name() == name);
        let names = names.split(',').map(str::trim).filter(|name| !name.is_empty());
        names.map(|name| known(name).unwrap_or_else(|| panic!("PEERS: there is no peer {name}"))).collect()
    }
}

/// One that runs in the edge's namespace; ended when dropped.
pub enum Front {
    Sailover(Proxy),
    Peer { child: Child, _directory: Directory },
}

impl Front {
    /// Starts it over `cells`, and waits until it serves from all of them.
    pub fn start(kind: Kind, edge: &str, drill: &Drill, cells: &[(String, SocketAddr)]) -> Front {
        if kind == Kind::Sailover {
            let proxy = Proxy::start_in(Some(edge.to_owned()), &sailover(drill, cells));
            for (_, address) in cells {
                proxy.wait_health(&address.to_string(), "up", Duration::from_secs(5));
            }
            return Front::Sailover(proxy);
        }
        let directory = Directory::new();
        let path = directory.0.join("config");
        let text = settings(kind, drill, cells).replace("DIRECTORY", &directory.0.display().to_string());
        std::fs::write(&path, text).unwrap();
        let path = path.display().to_string();
        let envoy = std::env::var("ENVOY").unwrap_or_else(|_| "envoy".to_owned());
        let arguments: Vec<&str> = match kind {
            Kind::Haproxy => vec!["haproxy", "-db", "-f", &path],
            Kind::Nginx => vec!["nginx", "-e", "/dev/null", "-c", &path],
            _ => vec![&envoy, "-c", &path, "--concurrency", "2", "--use-dynamic-base-id", "-l", "error"],
        };
        let log = std::fs::File::create(directory.0.join("log")).unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", edge])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("the peer starts");
        let front = Front::Peer { child, _directory: directory };
        let (edge, names) = (edge.to_owned(), cells.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        let seen = std::thread::spawn(move || {
            netns::enter(&edge);
            let mut missing = names;
            eventually("the peer serves from every cell", Duration::from_secs(20), || {
                let answer = backend::get(ADDRESS.parse().unwrap()).unwrap_or_default();
                missing.retain(|name| *name != answer);
                missing.is_empty().then_some(())
            });
        });
        seen.join().expect("the peer serves");
        front
    }

    /// sailover, which can be asked more than its clients see.
    pub fn sailover(&self) -> Option<&Proxy> {
        match self {
            Front::Sailover(proxy) => Some(proxy),
            Front::Peer { .. } => None,
        }
    }

    fn pid(&self) -> u32 {
        match self {
            Front::Sailover(proxy) => proxy.pid(),
            Front::Peer { child, .. } => child.id(),
        }
    }

    /// Its processes: itself, and what it started.
    fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.pid()];
        let mut at = 0;
        while let Some(pid) = pids.get(at).copied() {
            at += 1;
            for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                pids.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
            }
        }
        pids
    }

    /// Its private memory in bytes.
    pub fn memory(&self) -> u64 {
        let of = |pid: u32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            let private = text.lines().filter(|line| line.starts_with("Private_"));
            private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>() * 1024
        };
        self.pids().into_iter().map(of).sum()
    }

    /// Seconds of processor time it has used.
    pub fn processor(&self) -> f64 {
        let of = |pid: u32| {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok());
            texts.filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok()).sum::<u64>()
        };
        self.pids().into_iter().map(of).sum::<u64>() as f64 / 1e9
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        for pid in self.pids() {
            let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process has an id");
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if let Front::Peer { .. } = self {
            self.signal(rustix::process::Signal::KILL);
        }
        if let Front::Peer { child, .. } = self {
            let _ = child.wait();
        }
    }
}

/// The file that a front of this kind is started with.
pub fn settings(kind: Kind, drill: &Drill, cells: &[(String, SocketAddr)]) -> String {
    match kind {
        Kind::Sailover => sailover(drill, cells),
        Kind::Haproxy => haproxy(drill, cells),
        Kind::Nginx => nginx(drill, cells),
        Kind::Envoy => envoy(drill, cells),
    }
}

fn sailover(drill: &Drill, cells: &[(String, SocketAddr)]) -> String {
    let probe = match drill.probe {
        Probe::Tcp => "",
        Probe::Http => "    probe: { http: { path: /healthz }, interval: 1s, fall: 2, rise: 2 }\n",
    };
    let list: String = cells.iter().map(|(name, address)| format!("      {name}: [ '{address}' ]\n")).collect();
    let face = if drill.is_http() { "http: { h2c: true, routes: [ { pool: shop } ] }" } else { "tcp: shop" };
    let pool = if drill.pool.is_empty() { String::new() } else { format!("    {}\n", drill.pool) };
    format!(
        "pools:\n  shop:\n    cells:\n{list}{probe}{pool}listeners: [ {{ bind: {ADDRESS}, {face} }} ]\nlog: {{ level: info }}"
    )
}

/// Twice the longest way, and at least 100 ms: whoever knows his network would say so.
fn connect_ms(drill: &Drill) -> u32 {
    drill.away_ms.iter().map(|away| away * 2.0).fold(100.0, f64::max) as u32
}

fn haproxy(drill: &Drill, cells: &[(String, SocketAddr)]) -> String {
    let http = drill.is_http();
    let mode = if http {
        "  mode http
  # As long as the slowest honest answer and a margin; a shorter one would cut it.
  timeout server 5s
  timeout client 60s
  timeout http-request 10s
  timeout http-keep-alive 60s
  # Every failure that HAProxy can repeat, on another server; POST only where nothing was sent.
  retry-on conn-failure empty-response junk-response response-timeout 0rtt-rejected 502 503 504
  http-reuse safe"
    } else {
        "  mode tcp
  timeout server 1h
  timeout client 1h
  option clitcpka
  option srvtcpka"
    };
    let repeat = if http { "  http-request disable-l7-retry if METH_POST\n" } else { "" };
    let check = match drill.probe {
        Probe::Tcp => "",
        Probe::Http => "  option httpchk GET /healthz\n",
    };
    let observe = if http { "layer7" } else { "layer4" };
    let servers: String = cells
        .iter()
        .map(|(name, address)| {
            format!(
                "  server {name} {address} check inter 1s fall 2 rise 2 observe {observe} error-limit 2 \
                 on-error mark-down on-marked-down shutdown-sessions\n"
            )
        })
        .collect();
    format!(
        "global
  nbthread 2
  maxconn 8000

defaults
{mode}
  # Twice the longest way: HAProxy repeats after it, on another server each time (redispatch 1).
  timeout connect {connect}ms
  timeout check 800ms
  option redispatch 1
  retries 3
  # The only rule of its that sees a slow server.
  balance leastconn

frontend f
  bind {ADDRESS} backlog 4096
{repeat}  default_backend shop

backend shop
{check}{servers}",
        connect = connect_ms(drill),
    )
}

fn nginx(drill: &Drill, cells: &[(String, SocketAddr)]) -> String {
    let servers: String =
        cells.iter().map(|(_, address)| format!("server {address} max_fails=2 fail_timeout=10s; ")).collect();
    let connect = connect_ms(drill);
    let head =
        "worker_processes 2; daemon off; pid DIRECTORY/pid; error_log DIRECTORY/errors; worker_rlimit_nofile 16000;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events { worker_connections 7900; }";
    if drill.is_http() {
        return format!(
            "{head}
http {{
  access_log off; client_body_temp_path DIRECTORY/t1; proxy_temp_path DIRECTORY/t2; fastcgi_temp_path DIRECTORY/t3;
  uwsgi_temp_path DIRECTORY/t4; scgi_temp_path DIRECTORY/t5;
  upstream shop {{ zone shop 256k; least_conn; keepalive 64; {servers}}}
  server {{ listen {ADDRESS} reuseport backlog=4096;
    location / {{ proxy_pass http://shop; proxy_http_version 1.1; proxy_set_header Connection \"\";
      # Errors go to the next server; a POST only where nothing was sent. As long as the slowest honest answer and a margin.
      proxy_next_upstream error timeout invalid_header http_502 http_503 http_504; proxy_next_upstream_tries 3;
      proxy_connect_timeout {connect}ms; proxy_read_timeout 5s; }} }}
}}
"
        );
    }
    format!(
        "{head}
stream {{
  upstream shop {{ zone shop 256k; least_conn; {servers}}}
  server {{ listen {ADDRESS} reuseport backlog=4096; proxy_pass shop; proxy_connect_timeout {connect}ms;
    proxy_next_upstream on; proxy_timeout 1h; proxy_socket_keepalive on; }}
}}
"
    )
}

fn envoy(drill: &Drill, cells: &[(String, SocketAddr)]) -> String {
    let address =
        |at: SocketAddr| json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } });
    let typed = |name: &str, mut rest: serde_json::Value| {
        rest["@type"] = format!("type.googleapis.com/envoy.extensions.{name}").into();
        rest
    };
    // A GET that has no answer after half a second is asked a second time elsewhere, and the first is left alone: the only
    // setting of Envoy's that neither waits for a silent cell nor cuts a slow one. POST is repeated where nothing was sent.
    let elsewhere = json!([{ "name": "previous", "typed_config": typed("retry.host.previous_hosts.v3.PreviousHostsPredicate", json!({})) }]);
    let get = json!({
        "match": { "prefix": "/", "headers": [{ "name": ":method", "string_match": { "exact": "GET" } }] },
        "route": {
            "cluster": "shop", "timeout": "8s",
            "retry_policy": { "retry_on": "5xx,connect-failure,refused-stream,reset", "num_retries": 2, "per_try_timeout": "0.5s",
                "retry_host_predicate": elsewhere, "host_selection_retry_max_attempts": 5,
                "retry_back_off": { "base_interval": "0.005s", "max_interval": "0.02s" } },
            "hedge_policy": { "hedge_on_per_try_timeout": true } } });
    let other = json!({
        "match": { "prefix": "/" },
        "route": {
            "cluster": "shop", "timeout": "8s",
            "retry_policy": { "retry_on": "connect-failure,refused-stream", "num_retries": 2,
                "retry_host_predicate": elsewhere, "host_selection_retry_max_attempts": 5,
                "retry_back_off": { "base_interval": "0.005s", "max_interval": "0.02s" } } } });
    let filter = match drill.through {
        Through::Tcp => json!({ "name": "t", "typed_config": typed("filters.network.tcp_proxy.v3.TcpProxy",
            json!({ "stat_prefix": "t", "cluster": "shop", "max_connect_attempts": 3 })) }),
        _ => {
            json!({ "name": "h", "typed_config": typed("filters.network.http_connection_manager.v3.HttpConnectionManager", json!({
            "stat_prefix": "h", "use_remote_address": true, "request_headers_timeout": "10s",
            "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": typed("filters.http.router.v3.Router", json!({})) }],
            "route_config": { "virtual_hosts": [{ "name": "v", "domains": ["*"], "routes": [get, other] }] } })) })
        }
    };
    let mut check = json!({ "timeout": "0.8s", "interval": "1s", "no_traffic_interval": "1s", "unhealthy_threshold": 2, "healthy_threshold": 2 });
    match drill.probe {
        Probe::Tcp => check["tcp_health_check"] = json!({}),
        Probe::Http => check["http_health_check"] = json!({ "path": "/healthz" }),
    }
    let endpoints: Vec<_> = cells.iter().map(|(_, at)| json!({ "endpoint": { "address": address(*at) } })).collect();
    // Ejection by ratio, which its defaults leave off below five hosts, besides five errors in a row.
    let outliers = json!({
        "interval": "0.5s", "base_ejection_time": "5s", "max_ejection_percent": 50, "split_external_local_origin_errors": true,
        "consecutive_5xx": 5, "consecutive_local_origin_failure": 3, "enforcing_consecutive_5xx": 100,
        "failure_percentage_threshold": 15, "enforcing_failure_percentage": 100, "enforcing_failure_percentage_local_origin": 100,
        "failure_percentage_minimum_hosts": 2, "failure_percentage_request_volume": 20 });
    let config = json!({
        "static_resources": {
            "listeners": [{ "address": address(ADDRESS.parse().unwrap()), "enable_reuse_port": true, "filter_chains": [{ "filters": [filter] }] }],
            "clusters": [{ "name": "shop", "connect_timeout": format!("{}s", f64::from(connect_ms(drill)) / 1e3), "lb_policy": "LEAST_REQUEST",
                "health_checks": [check], "outlier_detection": outliers,
                "circuit_breakers": { "thresholds": [{ "max_connections": 8000, "max_pending_requests": 8000, "max_requests": 8000,
                    "retry_budget": { "budget_percent": { "value": 20 }, "min_retry_concurrency": 10 } }] },
                "load_assignment": { "cluster_name": "shop", "endpoints": [{ "lb_endpoints": endpoints }] } }] } });
    format!("{}\n", serde_json::to_string_pretty(&config).unwrap())
}
