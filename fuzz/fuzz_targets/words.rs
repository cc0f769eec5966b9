//! What HTTP headers and targets say, in their one form: paths, hosts, `Forwarded`, cookies; and never a panic.
#![no_main]

mod planted;

use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use sailover::http::{forward, route};

fuzz_target!(|bytes: &[u8]| {
    if std::env::var_os("SAILOVER_FUZZ_PLANT").is_some() {
        return planted::planted(bytes);
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Some(path) = route::normalise(text) {
            assert!(path.starts_with('/') && path.is_ascii());
            assert!(!path.split('/').any(|segment| segment == "." || segment == ".."), "{path}");
            assert_eq!(route::normalise(&path).as_deref(), Some(&*path), "one form");
        }
        let host = route::host(text);
        assert!(!host.bytes().any(|byte| byte.is_ascii_uppercase()));
    }
    if forward::well_formed(bytes) {
        // What is taken for a list can be added to, and is one still.
        let mut longer = bytes.trim_ascii().to_vec();
        longer.extend_from_slice(b", for=192.0.2.1;proto=https");
        assert!(forward::well_formed(&longer));
    }
    if let Ok(value) = HeaderValue::from_bytes(bytes) {
        assert!(!forward::is_request_id(&value) || !bytes.contains(&b'"'));
        let mut headers = HeaderMap::new();
        headers.insert(http::header::COOKIE, value);
        if let Some(found) = forward::cookie(&headers, "place") {
            assert!(!found.contains(';') && bytes.windows(found.len() + 6).any(|part| part == [b"place=", found.as_bytes()].concat()));
        }
    }
});
