# Thin aliases; the scripts hold the work.

.PHONY: run test fmt lint

run:
	sh examples/run.sh

test:
	sh tests/run.sh

fmt:
	cargo fmt --all

lint:
	ROCKSDB_LIB_DIR=target cargo clippy --locked --workspace --all-targets -- -D warnings
