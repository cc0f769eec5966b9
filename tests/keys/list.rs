//! Which test is about which key; it fails when a key has none.

use std::collections::BTreeSet;
use std::path::Path;

const KEYS: &[(&str, &str)] = &[
    ("version", "version_is_one"),
    ("include", "an_included_file_adds_its_pools_and_listeners"),
    ("workers", "workers_and_cell_facts_show_in_status"),
    ("cells", "workers_and_cell_facts_show_in_status"),
    ("cells.*.cloud", "workers_and_cell_facts_show_in_status"),
    ("cells.*.region", "workers_and_cell_facts_show_in_status"),
    ("pools", "names_show_in_status"),
    ("pools.*.cells", "names_show_in_status"),
    ("pools.*.cells.*.weight", "weights_and_tiers_make_shares"),
    ("pools.*.cells.*.tier", "weights_and_tiers_make_shares"),
    ("pools.*.cells.*.backends", "weights_and_tiers_make_shares"),
    ("pools.*.cells.*.backends.address", "names_show_in_status"),
    ("pools.*.cells.*.backends.name", "names_show_in_status"),
    ("pools.*.cells.*.backends.weight", "backend_weights_count_turns"),
    ("pools.*.cells.*.backends.max_connections", "caps_of_backend_and_pool_reset_what_is_beyond"),
    ("pools.*.cells.*.max_connections", "a_cell_has_a_cap_and_the_queue_its_time"),
    ("pools.*.cells.*.capacity", "a_capacity_is_kept"),
    ("pools.*.timeouts.first_byte", "silence_counts_when_an_answer_is_owed"),
    ("pools.*.first_byte", "silence_counts_when_an_answer_is_owed"),
    ("pools.*.replay", "what_a_client_said_is_said_again"),
    ("pools.*.replay.up_to", "what_a_client_said_is_said_again"),
    ("pools.*.replay.for", "what_a_client_said_is_said_again"),
    ("pools.*.hold.between_probe_removals", "probes_alone_take_out_one_cell_at_a_time"),
    ("pools.*.failback", "a_cell_comes_back_as_failback_says"),
    ("pools.*.rebalance", "long_sessions_go_back_to_a_cell_that_returned"),
    ("pools.*.limits.queue", "a_cell_has_a_cap_and_the_queue_its_time"),
    ("pools.*.limits.queue_timeout", "a_cell_has_a_cap_and_the_queue_its_time"),
    ("listeners.limits.per_client", "clients_have_bounds_of_their_own"),
    ("listeners.limits.per_client.connections", "clients_have_bounds_of_their_own"),
    ("listeners.limits.per_client.rate", "clients_have_bounds_of_their_own"),
    ("listeners.limits.per_client.prefix", "clients_have_bounds_of_their_own"),
    ("listeners.limits.per_client.ipv4", "clients_have_bounds_of_their_own"),
    ("listeners.limits.per_client.ipv6", "clients_have_bounds_of_their_own"),
    ("pools.*.balance", "balance_looks_at_connections_or_does_not"),
    ("pools.*.affinity", "affinity_pins_a_client"),
    ("pools.*.affinity.by", "affinity_pins_a_client"),
    ("pools.*.probe", "kinds_of_probe_see_different_things"),
    ("pools.*.probe.tcp", "kinds_of_probe_see_different_things"),
    ("pools.*.probe.http", "kinds_of_probe_see_different_things"),
    ("pools.*.probe.http.method", "an_http_probe_asks_what_it_is_told"),
    ("pools.*.probe.http.path", "an_http_probe_asks_what_it_is_told"),
    ("pools.*.probe.http.host", "an_http_probe_asks_what_it_is_told"),
    ("pools.*.probe.http.status", "an_http_probe_wants_its_status_and_its_body"),
    ("pools.*.probe.http.body", "an_http_probe_wants_its_status_and_its_body"),
    ("pools.*.probe.http.digest", "an_http_probe_wants_its_digest_and_its_version"),
    ("pools.*.data_version", "an_http_probe_wants_its_digest_and_its_version"),
    ("pools.*.data_version.header", "an_http_probe_wants_its_digest_and_its_version"),
    ("pools.*.data_version.at_least", "an_http_probe_wants_its_digest_and_its_version"),
    ("pools.*.probe.tls", "a_tls_probe_shakes_hands_and_reads_the_certificate"),
    ("pools.*.probe.tls.server_name", "a_tls_probe_shakes_hands_and_reads_the_certificate"),
    ("pools.*.probe.tls.verify", "a_tls_probe_shakes_hands_and_reads_the_certificate"),
    ("pools.*.probe.tls.ca", "a_tls_probe_shakes_hands_and_reads_the_certificate"),
    ("pools.*.probe.exchange", "an_exchange_sends_and_expects"),
    ("pools.*.probe.exchange.send", "an_exchange_sends_and_expects"),
    ("pools.*.probe.exchange.expect", "an_exchange_sends_and_expects"),
    ("pools.*.probe.interval", "interval_sets_the_number_of_probes"),
    ("pools.*.probe.timeout", "a_probe_waits_for_its_timeout"),
    ("pools.*.probe.fall", "fall_and_rise_count_in_a_row"),
    ("pools.*.probe.rise", "fall_and_rise_count_in_a_row"),
    ("pools.*.probe.port", "a_probe_may_go_to_another_port"),
    ("pools.*.connect", "a_client_waits_for_connect_timeout"),
    ("pools.*.connect.timeout", "a_client_waits_for_connect_timeout"),
    ("pools.*.connect.attempts", "attempts_bound_the_tries_of_one_client"),
    ("pools.*.connect.race", "race_goes_round_silence_or_waits"),
    ("pools.*.connect.source", "source_is_what_a_backend_sees"),
    ("pools.*.timeouts", "idle_ends_a_session_and_half_close_a_half"),
    ("pools.*.timeouts.request", "a_request_has_its_time_and_no_more"),
    ("pools.*.timeouts.idle", "idle_ends_a_session_and_half_close_a_half"),
    ("pools.*.timeouts.half_close", "idle_ends_a_session_and_half_close_a_half"),
    ("pools.*.timeouts.unacked", "sessions_over_veth"),
    ("pools.*.on_down", "on_down_resets_or_keeps"),
    ("pools.*.when_all_down", "when_all_are_down_try_or_refuse"),
    ("pools.*.hold", "hold_keeps_a_backend_out"),
    ("pools.*.hold.first", "hold_keeps_a_backend_out"),
    ("pools.*.hold.longest", "hold_keeps_a_backend_out"),
    ("pools.*.ramp", "ramp_is_the_time_of_return"),
    ("pools.*.limits", "caps_of_backend_and_pool_reset_what_is_beyond"),
    ("pools.*.limits.max_connections", "caps_of_backend_and_pool_reset_what_is_beyond"),
    ("listeners", "names_show_in_status"),
    ("listeners.name", "names_show_in_status"),
    ("listeners.bind", "names_show_in_status"),
    ("listeners.tcp", "names_show_in_status"),
    ("listeners.sni", "server_names_choose_the_pool"),
    ("listeners.sni.routes", "server_names_choose_the_pool"),
    ("listeners.sni.default", "other_names_and_none_go_to_the_default"),
    ("listeners.tls", "tls_ends_here_and_each_name_has_its_certificate"),
    ("listeners.tls.certificates", "tls_ends_here_and_each_name_has_its_certificate"),
    ("listeners.tls.certificate", "bad_pairs_are_told_apart_and_leave_the_old_one_serving"),
    ("listeners.tls.key", "bad_pairs_are_told_apart_and_leave_the_old_one_serving"),
    ("listeners.tls.min_version", "versions_and_certificates_of_clients_are_asked_for"),
    ("listeners.tls.client", "versions_and_certificates_of_clients_are_asked_for"),
    ("listeners.tls.ca", "versions_and_certificates_of_clients_are_asked_for"),
    ("listeners.tls.require", "versions_and_certificates_of_clients_are_asked_for"),
    ("listeners.proxy_protocol", "a_proxy_header_names_the_client_where_it_is_believed"),
    ("listeners.proxy_protocol.accept_from", "a_proxy_header_names_the_client_where_it_is_believed"),
    ("pools.*.send_proxy", "a_backend_is_told_who_its_client_is"),
    ("listeners.allow", "allow_and_deny_choose_clients"),
    ("listeners.deny", "allow_and_deny_choose_clients"),
    ("listeners.limits", "at_its_cap_a_listener_lets_wait_then_resets_and_is_not_ready"),
    ("listeners.limits.max_connections", "at_its_cap_a_listener_lets_wait_then_resets_and_is_not_ready"),
    ("listeners.limits.wait", "wait_is_the_time_at_a_cap"),
    ("listeners.timeouts", "idle_ends_a_session_and_half_close_a_half"),
    ("listeners.timeouts.handshake", "a_slow_hello_ends_at_its_deadline"),
    ("listeners.timeouts.header", "slow_heads_and_idle_connections_end_in_their_time"),
    ("listeners.timeouts.keepalive", "slow_heads_and_idle_connections_end_in_their_time"),
    ("listeners.timeouts.idle", "idle_ends_a_session_and_half_close_a_half"),
    ("pools.*.affinity.by.header", "a_cookie_and_a_header_keep_a_client_in_its_place"),
    ("pools.*.affinity.by.cookie", "a_cookie_and_a_header_keep_a_client_in_its_place"),
    ("pools.*.affinity.by.name", "a_cookie_and_a_header_keep_a_client_in_its_place"),
    ("pools.*.affinity.by.path", "the_attributes_of_the_cookie_are_as_configured"),
    ("pools.*.affinity.by.domain", "the_attributes_of_the_cookie_are_as_configured"),
    ("pools.*.affinity.by.max_age", "the_attributes_of_the_cookie_are_as_configured"),
    ("pools.*.affinity.by.secure", "the_attributes_of_the_cookie_are_as_configured"),
    ("pools.*.affinity.by.http_only", "the_attributes_of_the_cookie_are_as_configured"),
    ("pools.*.affinity.by.same_site", "the_attributes_of_the_cookie_are_as_configured"),
    ("pools.*.probe.grpc", "http_and_tcp_go_under_tls_with_a_certificate_of_ours_and_probes_verify_the_same_way"),
    ("pools.*.probe.grpc.service", "a_grpc_probe_asks_for_its_service"),
    ("pools.*.http", "bodies_pass_whole_in_both_versions_on_either_side"),
    ("pools.*.http.version", "bodies_pass_whole_in_both_versions_on_either_side"),
    ("pools.*.tls", "http_and_tcp_go_under_tls_with_a_certificate_of_ours_and_probes_verify_the_same_way"),
    ("pools.*.tls.server_name", "ten_kinds_of_bad_certificates_are_refused_by_their_name_and_cost_nobody_an_answer"),
    ("pools.*.tls.verify", "a_probe_under_tls_sees_the_certificate_that_traffic_would_see"),
    ("pools.*.tls.ca", "ten_kinds_of_bad_certificates_are_refused_by_their_name_and_cost_nobody_an_answer"),
    ("pools.*.tls.certificate", "http_and_tcp_go_under_tls_with_a_certificate_of_ours_and_probes_verify_the_same_way"),
    ("pools.*.tls.key", "http_and_tcp_go_under_tls_with_a_certificate_of_ours_and_probes_verify_the_same_way"),
    ("listeners.http", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.h2c", "h2c_is_served_where_it_is_allowed"),
    ("listeners.http.forwarded", "a_trusted_peers_own_words_are_kept"),
    ("listeners.http.send", "a_trusted_peers_own_words_are_kept"),
    ("listeners.http.trust", "a_trusted_peers_own_words_are_kept"),
    ("listeners.http.errors", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.routes", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.host", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.path", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.method", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.headers", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.pool", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.strip_prefix", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.add", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.remove", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.response", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.redirect", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.scheme", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.status", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.respond", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.body", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.type", "routes_and_headers_do_what_their_keys_say"),
    ("listeners.http.timeout", "a_request_has_its_time_and_no_more"),
    ("listeners.http.priority", "the_low_give_way_to_the_high"),
    ("listeners.http.idempotency_key", "a_post_is_sent_twice_only_with_its_key"),
    ("listeners.tls.header", "the_subject_of_a_client_is_told_and_cannot_be_claimed"),
    ("admin", "admin_http_is_off_or_read_only"),
    ("admin.socket", "a_stale_admin_socket_is_replaced_and_a_living_one_is_not"),
    ("admin.http", "admin_http_is_off_or_read_only"),
    ("admin.hosts", "admin_http_is_off_or_read_only"),
    ("log", "log_level_format_and_access"),
    ("log.level", "log_level_format_and_access"),
    ("log.format", "log_level_format_and_access"),
    ("log.access", "log_level_format_and_access"),
    ("shutdown", "a_stop_announces_serves_what_runs_and_ends"),
    ("shutdown.announce", "a_stop_announces_serves_what_runs_and_ends"),
    ("shutdown.drain", "drain_bounds_the_farewell"),
];

/// All keys of the reference, commented ones too, with names of pools and cells as `*` and list items as nothing.
fn reference_keys() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/reference.yaml");
    let mut keys = BTreeSet::new();
    let mut stack: Vec<(usize, String)> = Vec::new();
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let mut text = line.to_owned();
        let key_comment = line.trim_start().strip_prefix("# ").filter(|rest| {
            let word: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            !word.is_empty() && rest[word.len()..].starts_with(": ")
        });
        if key_comment.is_some() {
            text = line.replacen("# ", "", 1);
        }
        let text = text.replacen("- ", "  ", 1);
        let body = text.split(" #").next().unwrap().trim_end();
        let indent = body.len() - body.trim_start().len();
        let Some((key, rest)) = body.trim_start().split_once(':') else { continue };
        if !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            || key.is_empty()
            || body.trim_start().starts_with('#')
        {
            continue;
        }
        while stack.last().is_some_and(|(at, _)| *at >= indent) {
            stack.pop();
        }
        let parent: Vec<String> = stack.iter().map(|(_, key)| key.clone()).collect();
        let named = parent == ["pools"] || parent == ["cells"] || parent == ["pools", "*", "cells"];
        let key = if named { "*".to_owned() } else { key.to_owned() };
        let path = parent.iter().cloned().chain([key.clone()]).collect::<Vec<_>>().join(".");
        // Keys of a map written in one line.
        if let Some(inner) = rest.trim().strip_prefix('{') {
            for part in inner.split([',', '{']) {
                if let Some((inner_key, _)) = part.split_once(": ") {
                    let inner_key = inner_key.trim();
                    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
                    if inner_key.chars().all(plain) && inner_key.starts_with(|c: char| c.is_ascii_lowercase()) {
                        keys.insert(format!("{path}.{inner_key}"));
                    }
                }
            }
        }
        keys.insert(path);
        stack.push((indent, key));
    }
    keys.retain(|key| !key.ends_with('*'));
    keys
}

#[test]
fn every_key_of_the_reference_has_a_test() {
    let keys = reference_keys();
    assert!(keys.len() > 60, "{keys:#?}");
    let listed: BTreeSet<String> = KEYS.iter().map(|(key, _)| (*key).to_owned()).collect();
    let missing: Vec<_> = keys.difference(&listed).collect();
    let surplus: Vec<_> = listed.difference(&keys).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "without a test: {missing:?}; not in the reference: {surplus:?}");
    let tests = [
        "keys.rs",
        "operate.rs",
        "tcp.rs",
        "hello.rs",
        "tls.rs",
        "http.rs",
        "backend_tls.rs",
        "confine.rs",
        "drills/sessions.rs",
    ]
    .map(|file| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(file)).unwrap());
    for (key, test) in KEYS {
        let there = tests.iter().any(|text| text.contains(&format!("#[test]\nfn {test}()")));
        assert!(there, "{key}: there is no test {test}");
    }
}
