//! A panic that only a fuzzer that works can find.

/// Reached only step by step, each step being new coverage: blind chance would need four billion tries.
pub fn planted(bytes: &[u8]) {
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
