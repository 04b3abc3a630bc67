# Thin aliases; the scripts hold the work.

.PHONY: run test fmt lint bench

run:
	sh examples/run.sh

test:
	sh tests/run.sh

# By the profile that the server is built with: nothing heavy is compiled a second time.
bench:
	cargo bench --locked --workspace --profile dev --bench sql

fmt:
	cargo fmt --all

lint:
	cargo clippy --locked --workspace --all-targets -- -D warnings
