# `make` lists what there is to make. Each target says so after its `##`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The targets are steps of one another, in their order.
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# The kernels that the integration tests run under, beside this machine's own.
KERNELS ?= 5.10 6.1 6.12 6.18 7.2
# Those of them that `make test` takes, and what it leaves out there because an emulated machine takes minutes for it: the
# comparisons with strace on real programs, storms, every bad argument, every way of calling `audit`, Docker, agents that are
# killed at each step, builds that take over from each other, bars and journals of hundreds of sockets, the differential test, and
# what concerns the agent rather than its programs (hostile tenants, files, bad input, explanations). `make vm-test` leaves out
# nothing, and makes over a million calls for the differential test (integration-tests/tests/integration/differential.rs).
FAST_KERNELS ?= 6.1 6.12
FAST := $(addprefix --skip ,strace_parity::programs pressure storm faults audit::command docker killed builds progress:: \
	differential:: foreign_programs:: isolation:: impostors:: output:: files:: bad_input:: journal:: explain:: \
	plan:: come_and_go start_at_once audit_judges hook_stays)
# How many virtual machines at a time.
VM_JOBS ?= 2
# Which parts of the benchmark, all if none: `target/release/bench --help` lists them.
BENCH ?=
# How many inputs each fuzz target is fed with.
FUZZ_RUNS ?= 1000000
# How long `make soak` takes.
MINUTES ?= 10
# More for every call of cargo that builds: CI says --locked.
CARGO_FLAGS ?=

# A login would set these; sudo and CI do not always.
export HOME ?= $(shell getent passwd "$$(id -u)" | cut -d: -f6)
export SOCKPOLICY_CACHE ?= $(HOME)/.cache/sockpolicy
CARGO_HOME_OR_DEFAULT := $(or $(CARGO_HOME),$(HOME)/.cargo)
export PATH := $(CARGO_HOME_OR_DEFAULT)/bin:$(or $(PATH),/usr/local/bin:/usr/bin:/bin):/usr/local/sbin:/usr/sbin:/sbin

# BPF takes root: where we are not, cargo builds as we are and sudo runs.
comma := ,
quote := "
passed_by_sudo := PATH HOME SOCKPOLICY_CACHE RUST_BACKTRACE RUST_LOG
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo $(passed_by_sudo:%=--preserve-env=%))
# cargo's --config takes a program with its arguments as a TOML list.
as_list = [$(foreach word,$(1),$(quote)$(word)$(quote)$(comma))]
run_tests_by = --config 'target."cfg(all())".runner=$(call as_list,$(1))'

BPF := bpf-programs/Cargo.toml
FUZZ := fuzz/Cargo.toml
SCRIPTS := bootstrap .ci/run fuzz/run $(wildcard examples/*/run) \
	$(addprefix integration-tests/vm/,fetch-kernel run-in-vm matrix guest/init guest/session)
UNIT := --workspace --exclude sockpolicy-integration-tests
INTEGRATION := --package sockpolicy-integration-tests --test integration
# Clippy checks the BPF programs for the host, because its toolchain has no `core` for the BPF target. Inline assembly for BPF
# is an unstable feature: hence RUSTC_BOOTSTRAP.
lint_bpf = RUSTC_BOOTSTRAP=1 cargo clippy --quiet --manifest-path $(BPF) --release --target-dir target/lint-bpf $(CARGO_FLAGS) \
	-- -D warnings
matrix = $(SUDO) $(CURDIR)/integration-tests/vm/matrix -j $(VM_JOBS) -t $(1) $(foreach kernel,$(2),-k $(kernel)) --

.PHONY: help build demo check test fuzz unit doc integration vm-test vm-test-fast soak bench bench-docs bench-build lint fmt docs clean \
	bootstrap debug-build

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

build: ## build the agent, its BPF programs inside, as target/release/sockpolicy
	@./bootstrap build
	@echo 'build: target/release/sockpolicy'
	@cargo build --quiet --release $(CARGO_FLAGS)

demo: ## install what is needed, build, and try it on a Redis
	@./bootstrap build demo
	@$(MAKE) build
	@examples/redis-demo/run

check: lint unit doc ## lint, the tests that need no kernel, and the documentation of the code: no root, two minutes

test: bootstrap check integration vm-test-fast ## install what is needed, then lint and run the tests

unit: ## the tests that need neither root nor BPF
	@echo 'unit: tests without a kernel'
	@cargo build --quiet --all-targets $(CARGO_FLAGS)
	@cargo test $(CARGO_FLAGS) $(UNIT)
	@cargo test $(CARGO_FLAGS) --package sockpolicy-integration-tests --bin bench

integration: debug-build ## the tests on this machine's kernel, as root
	@echo "integration: tests on this kernel, $$(uname -r)"
	@cargo test $(CARGO_FLAGS) $(INTEGRATION) $(if $(SUDO),$(call run_tests_by,$(SUDO)))

vm-test: debug-build ## the same tests on other kernels (KERNELS), in virtual machines: an hour and more
	@echo 'vm-test: the same on $(KERNELS), in virtual machines'
	@cargo test $(CARGO_FLAGS) $(INTEGRATION) $(call run_tests_by,$(call matrix,7200 -e SOCKPOLICY_DIFFERENTIAL=24,$(KERNELS)))

vm-test-fast: debug-build ## the quicker ones of them, on two kernels (FAST_KERNELS)
	@echo 'vm-test-fast: the same on $(FAST_KERNELS), in virtual machines, but for the slowest'
	@cargo test $(CARGO_FLAGS) $(INTEGRATION) $(call run_tests_by,$(call matrix,3600,$(FAST_KERNELS))) -- $(FAST)

fuzz: ## the fuzz targets, each for FUZZ_RUNS executions: some minutes; the unit tests run their corpus
	@fuzz/run -n $(FUZZ_RUNS)

soak: ## policies beside hostile tenants, all at once, for MINUTES (10), as root
	@./bootstrap build
	@echo 'soak: $(MINUTES) minutes'
	@cargo build --quiet --release $(CARGO_FLAGS)
	@cargo build --quiet --release $(CARGO_FLAGS) --package sockpolicy-integration-tests --bin soak --bin sockprobe
	@$(SUDO) target/release/soak $(MINUTES)

bench: bench-build ## what it costs, beside what people would use instead: one table; BENCH names parts of it
	@$(SUDO) target/release/bench $(BENCH)

bench-docs: bench-build ## the same, and publish it in docs/benchmarks.md
	@$(SUDO) target/release/bench --docs docs

lint: ## check the format and look for doubtful code
	@echo 'lint: format, then clippy, shellcheck and codespell'
	@{ cargo fmt --all --check && cargo fmt --manifest-path $(BPF) --check && cargo fmt --manifest-path $(FUZZ) --check; } || { echo '  help: make fmt' >&2; exit 1; }
	@cargo clippy --quiet --workspace --all-targets $(CARGO_FLAGS) -- -D warnings
	@$(lint_bpf)
	@shellcheck $(SCRIPTS)
	@codespell

fmt: ## format the code
	@cargo fmt --all
	@cargo fmt --manifest-path $(BPF)
	@cargo fmt --manifest-path $(FUZZ)

doc: ## the documentation of the code, in target/doc
	@echo 'doc: rustdoc'
	@RUSTDOCFLAGS='-D warnings' cargo doc --quiet --workspace --no-deps --document-private-items $(CARGO_FLAGS)

docs: ## write docs/reference.md anew, from the code
	@cargo run --quiet --package sockpolicy $(CARGO_FLAGS) -- options --output markdown >docs/reference.md.new
	@mv docs/reference.md.new docs/reference.md

clean: ## remove what was built; the fetched kernels stay
	@cargo clean

bootstrap: ## install what is missing for all of the above
	@./bootstrap

# Both as they are measured.
bench-build:
	@./bootstrap build
	@echo 'bench: target/release/bench measures target/release/sockpolicy, and writes to target/bench'
	@cargo build --quiet --release $(CARGO_FLAGS)
	@cargo build --quiet --release $(CARGO_FLAGS) --package sockpolicy-integration-tests --bin bench

# What the integration tests run: the agent, as target/debug/sockpolicy.
debug-build:
	@cargo build --quiet --workspace --all-targets $(CARGO_FLAGS)
