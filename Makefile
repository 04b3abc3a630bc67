# Thin aliases; the scripts hold the work.

.PHONY: run test torture clients fmt lint bench

run:
	sh examples/run.sh

test:
	sh tests/run.sh

# The limits in full size, then the random runs for long, from new seeds, with restarts and kills. MINUTES=60 make torture
torture:
	sh tests/torture.sh

# Live queries as npm's eventsource, Python's httpx-sse and Chromium see them, also through nginx.
clients:
	sh tests/clients/run.sh

bench:
	sh host/benches/run.sh

fmt:
	cargo fmt --all

lint:
	cargo clippy --locked --workspace --all-targets -- -D warnings
