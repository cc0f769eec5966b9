//! Any bytes are either a configuration or a list of problems with places inside the file; never a panic, and never
//! a table that cannot be built.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use sailover::{clock, config, table};

fuzz_target!(|bytes: &[u8]| {
    if std::env::var_os("SAILOVER_FUZZ_PLANT").is_some() {
        return planted(bytes);
    }
    match config::parse(bytes, 64 << 10) {
        Ok(loaded) => {
            let config = Arc::new(loaded.config);
            let (table, _) = table::build(config.clone(), loaded.hash.clone(), None, 1_000, clock::now());
            // The same again changes nothing.
            let (_, difference) = table::build(config, loaded.hash, Some(&table), 1_000, clock::now());
            assert_eq!(difference, table::Difference::default());
        }
        Err(problems) => {
            let lines = bytes.iter().filter(|b| **b == b'\n').count() + bytes.iter().filter(|b| **b == b'\r').count() + 2;
            assert!(!problems.is_empty());
            for problem in problems {
                assert!(problem.line <= lines && !problem.message.is_empty(), "{problem:?}");
            }
        }
    }
});

/// Reached only step by step, each step being new coverage: blind chance would need four billion tries.
fn planted(bytes: &[u8]) {
    let Some(&[a, b, c, d]) = bytes.first_chunk::<4>() else { return };
    if std::hint::black_box(a) == b'k' {
        if std::hint::black_box(b) == b'e' {
            if std::hint::black_box(c) == b'e' {
                if std::hint::black_box(d) == b'l' {
                    panic!("planted: the fuzzer works");
                }
            }
        }
    }
}
