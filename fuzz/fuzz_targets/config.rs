//! Any bytes are either a configuration or a list of problems with places inside the file; never a panic, and never
//! a table that cannot be built.
#![no_main]

mod planted;

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use sailover::{clock, config, table};

fuzz_target!(|bytes: &[u8]| {
    if std::env::var_os("SAILOVER_FUZZ_PLANT").is_some() {
        return planted::planted(bytes);
    }
    match config::parse(bytes, 64 << 10) {
        Ok(loaded) => {
            let config = Arc::new(loaded.config);
            let (table, _) = table::build(config.clone(), loaded.hash.clone(), None, 1_000, clock::now()).expect("no TLS without files");
            // The same again changes nothing.
            let (_, difference) = table::build(config, loaded.hash, Some(&table), 1_000, clock::now()).expect("the same again");
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
