# Medes. On a fresh Debian 12 or 13 or Ubuntu 24.04, as root:
#
#   make demo      installs what is needed, builds, and shows it all
#   make test      installs what is needed and runs all tests
#   make evaluate  simulates the policies on 20 nodes, plays a trace on real
#                  functions beside its simulation, and writes a page about it
#
# Settings, as in `make demo ARGS=--all PYTHON=/usr/bin/python3.12`:
#
#   PYTHON   the interpreter that the example functions run on: 3.11, 3.12 or
#            3.13, with pip; the first of python3.13, python3.12, python3.11
#            and python3 that is one of these
#   ARGS     arguments for `medes demo`: --all, --functions a,b, --json FILE...
#   TRACE    the arrivals for `make evaluate`: a file or directory of the Azure
#            Functions data sets; without it, some are made like them
#   LIVE     `no` leaves the real functions out of `make evaluate`
#   PREFIX   where `make install` puts the command

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
export PATH := $(HOME)/.cargo/bin:$(PATH)

PREFIX ?= /usr/local
ARGS ?=
TRACE ?=
LIVE ?= yes
# Evaluated where it is used, not here: `setup` may have to install it first.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { command -v "$$p"; break; }; done)
# The four functions of the plain demo need only these layers.
DEMO_LAYERS = $(if $(findstring --all,$(ARGS))$(findstring --functions,$(ARGS)),,numpy pillow web)

.PHONY: demo test evaluate build lint install clean setup layers runtime boto3

demo: build
	@python="$(PYTHON)"; scripts/build-layers --python "$$python" $(DEMO_LAYERS); \
	target/release/medes demo --python "$$python" $(ARGS)

# The runner comes last, so that its summary does.
test: setup layers runtime boto3
	cd examples/functions && "$(PYTHON)" -m unittest
	@if cargo nextest --version >/dev/null 2>&1; then \
		MEDES_TEST_PYTHON="$(PYTHON)" cargo nextest run --workspace --locked; \
	else \
		MEDES_TEST_PYTHON="$(PYTHON)" cargo test --workspace --locked; \
	fi

# The live part plays an hour of another made trace at twelve times its speed, with periods shorter
# by as much, once under fixed keep-alive and once under Medes with a latency target.
evaluate: build $(if $(filter no,$(LIVE)),,layers)
	@dir=.cache/evaluation; trace="$(TRACE)"; rm -rf "$$dir/runs"; mkdir -p "$$dir"; \
	if [ -z "$$trace" ]; then \
		trace="$$dir/trace"; \
		target/release/medes trace make "$$trace" --functions 2300 --requests 6000000 --seed 1; \
	fi; \
	target/release/medes simulate "$$trace" --evaluation --out "$$dir/runs"; \
	if [ "$(LIVE)" != no ]; then \
		target/release/medes trace make "$$dir/live" --functions 60 --length 1h --requests 1000 \
			--seed 2; \
		for policy in fixed latency; do \
			target/release/medes replay "$$dir/live" --private --python "$(PYTHON)" --speed 12 \
				--policy "$$policy" --idle 5s --keep-alive 50s --keep-dedup 75s \
				--out "$$dir/live-$$policy.csv"; \
			target/release/medes simulate "$$dir/live" --compare "$$dir/live-$$policy.csv" \
				--calibrate --out "$$dir/runs"; \
		done; \
	fi; \
	target/release/medes report "$$dir/runs" --out "$$dir/report.html" \
		--origin "make evaluate TRACE=$(TRACE)"

build: setup
	cargo build --release --locked --package medes

lint: setup
	@cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	@cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

install: build
	install -D -m 755 target/release/medes "$(DESTDIR)$(PREFIX)/bin/medes"

clean:
	cargo clean
	rm -rf .cache

setup:
	@scripts/setup

layers: setup
	@scripts/build-layers --python "$(PYTHON)"

# AWS's client for Python, which the tests speak Lambda's API with.
boto3: setup .cache/boto3

.cache/boto3: crates/cli/tests/e2e/requirements.txt | setup
	@rm -rf $@ $@.new
	@"$(PYTHON)" -m pip install --quiet --disable-pip-version-check --root-user-action ignore \
		--no-deps --target $@.new --requirement $<
	@mv $@.new $@ && touch $@

# What tests start functions with; the demo finds it there too.
runtime: setup
	@python="$(PYTHON)"; cargo run --quiet --locked --package medes -- runtime --dir .cache/runtimes \
		install "$$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')" \
		--python "$$python"
