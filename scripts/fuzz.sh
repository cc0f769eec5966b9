#!/bin/sh
# Runs each fuzz target for some seconds from its kept seeds, after proving that a planted panic is found.
#     fuzz.sh [SECONDS [SEED]]
# The gate uses one seed, so that a failure can be had again; hunts use others.
set -eu
seconds="${1:-60}"
seed="${2:-1}"
cd "$(dirname "$0")/../fuzz"
../scripts/packages.sh fuzz
# What `cargo fuzz` passes with no sanitizer; all of it is accepted by a stable compiler.
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
target="$(rustc -vV | sed -n 's/^host: //p')"
cargo build --quiet --release --locked --target "$target"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for name in config sniff framer words; do
    binary="target/$target/release/$name"
    seeds="$(find "seeds/$name" -type f | wc -l)"
    [ "$seeds" -ge 50 ] || { echo "only $seeds seeds for $name; 50 are wanted" >&2; exit 1; }
    mkdir -p "$work/$name" "$work/plant"
    printf 'pools: {}' > "$work/plant/seed"
    if SAILOVER_FUZZ_PLANT=1 "$binary" -max_total_time=60 -max_len=64 -artifact_prefix="$work/" "$work/plant" >"$work/log" 2>&1; then
        echo "the planted panic in $name was not found" >&2
        tail -5 "$work/log" >&2
        exit 1
    fi
    grep -q 'planted: the fuzzer works' "$work/log" || { tail -40 "$work/log"; exit 1; }
    "$binary" -seed="$seed" -max_total_time="$seconds" -max_len=4096 -timeout=5 -rss_limit_mb=1024 -print_final_stats=1 \
        -artifact_prefix="$work/" "$work/$name" "seeds/$name" >"$work/log" 2>&1 || { tail -40 "$work/log"; exit 1; }
    grep -E 'stat::number_of_executed_units|stat::peak_rss_mb' "$work/log"
    echo "fuzz target $name: ${seconds}s from $seeds seeds, no finding; the planted panic was found"
done
