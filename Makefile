# `make` lists the targets, each with the text after its `##`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Some targets are steps of others, and must run in order.
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# The kernels under which vm-test runs the integration tests.
KERNELS ?= 5.10 6.1 6.12 6.18 7.2
# The kernels of vm-test-fast, and the tests that it skips because each takes minutes on an emulated machine: comparisons with strace
# on real programs, storms, all bad arguments, all forms of `audit`, Docker, agents killed at each step, builds that take over from
# each other, hundreds of sockets, the differential test, and tests of the agent rather than of its programs (hostile tenants, files,
# bad input, explanations). vm-test skips nothing, and makes over a million calls for the differential test
# (integration-tests/tests/integration/differential.rs).
FAST_KERNELS ?= 6.1 6.12
FAST := $(addprefix --skip ,strace_parity::programs pressure storm faults audit::command docker killed builds progress:: \
	differential:: foreign_programs:: isolation:: impostors:: output:: files:: bad_input:: journal:: explain:: \
	plan:: come_and_go start_at_once audit_judges hook_stays restarted_server events_md::)
# The number of virtual machines that run at the same time.
VM_JOBS ?= 2
# The parts of the benchmark; empty for all. `target/release/bench --help` lists them.
BENCH ?=
# The number of executions of each fuzz target.
FUZZ_RUNS ?= 1000000
# The duration of `make soak`, in minutes.
MINUTES ?= 10
# Arguments for each cargo command that builds. CI sets --locked.
CARGO_FLAGS ?=

# sudo and CI do not always set these.
export HOME ?= $(shell getent passwd "$$(id -u)" | cut -d: -f6)
export SOCKPOLICY_CACHE ?= $(HOME)/.cache/sockpolicy
CARGO_HOME_OR_DEFAULT := $(or $(CARGO_HOME),$(HOME)/.cargo)
export PATH := $(CARGO_HOME_OR_DEFAULT)/bin:$(or $(PATH),/usr/local/bin:/usr/bin:/bin):/usr/local/sbin:/usr/sbin:/sbin

# BPF requires root. Another user builds as that user, and runs tests through sudo.
comma := ,
quote := "
passed_by_sudo := PATH HOME SOCKPOLICY_CACHE RUST_BACKTRACE RUST_LOG
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo $(passed_by_sudo:%=--preserve-env=%))
# The option --config of cargo takes a program and its arguments as a TOML list.
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

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

build: ## Build target/release/sockpolicy, with its BPF programs
	@./bootstrap build
	@echo 'build: target/release/sockpolicy'
	@cargo build --quiet --release $(CARGO_FLAGS)

demo: ## Install dependencies, build, and run a Redis under a policy
	@./bootstrap build demo
	@$(MAKE) build
	@examples/redis-demo/run

check: lint unit doc ## Run lint, unit and doc. Needs no root; takes two minutes

test: bootstrap check integration vm-test-fast ## Install dependencies and run all checks

unit: ## Run the tests that need neither root nor BPF
	@echo 'unit: tests without a kernel'
	@cargo build --quiet --all-targets $(CARGO_FLAGS)
	@cargo test $(CARGO_FLAGS) $(UNIT)
	@cargo test $(CARGO_FLAGS) --package sockpolicy-integration-tests --bin bench

integration: debug-build ## Run the integration tests on this kernel, as root
	@echo "integration: tests on this kernel, $$(uname -r)"
	@cargo test $(CARGO_FLAGS) $(INTEGRATION) $(if $(SUDO),$(call run_tests_by,$(SUDO)))

vm-test: debug-build ## Run all integration tests on KERNELS in VMs. Takes hours
	@echo 'vm-test: integration tests on $(KERNELS), in virtual machines'
	@cargo test $(CARGO_FLAGS) $(INTEGRATION) $(call run_tests_by,$(call matrix,7200 -e SOCKPOLICY_DIFFERENTIAL=24,$(KERNELS)))

vm-test-fast: debug-build ## Run the faster integration tests on FAST_KERNELS in VMs
	@echo 'vm-test-fast: the faster integration tests on $(FAST_KERNELS), in virtual machines'
	@cargo test $(CARGO_FLAGS) $(INTEGRATION) $(call run_tests_by,$(call matrix,3600,$(FAST_KERNELS))) -- $(FAST)

fuzz: ## Run each fuzz target FUZZ_RUNS times. Takes minutes
	@fuzz/run -n $(FUZZ_RUNS)

soak: ## Run policies beside hostile tenants for MINUTES, as root
	@./bootstrap build
	@echo 'soak: $(MINUTES) minutes'
	@cargo build --quiet --release $(CARGO_FLAGS)
	@cargo build --quiet --release $(CARGO_FLAGS) --package sockpolicy-integration-tests --bin soak --bin sockprobe
	@$(SUDO) target/release/soak $(MINUTES)

bench: bench-build ## Measure the cost beside alternatives. BENCH selects parts
	@$(SUDO) target/release/bench $(BENCH)

bench-docs: bench-build ## Run bench and write docs/benchmarks.md
	@$(SUDO) target/release/bench --docs docs

lint: ## Check the format, and run Clippy, shellcheck and codespell
	@echo 'lint: format, then clippy, shellcheck and codespell'
	@{ cargo fmt --all --check && cargo fmt --manifest-path $(BPF) --check && cargo fmt --manifest-path $(FUZZ) --check; } || { echo '  help: make fmt' >&2; exit 1; }
	@cargo clippy --quiet --workspace --all-targets $(CARGO_FLAGS) -- -D warnings
	@$(lint_bpf)
	@shellcheck $(SCRIPTS)
	@codespell

fmt: ## Format the code
	@cargo fmt --all
	@cargo fmt --manifest-path $(BPF)
	@cargo fmt --manifest-path $(FUZZ)

doc: ## Write the documentation of the code to target/doc
	@echo 'doc: rustdoc'
	@RUSTDOCFLAGS='-D warnings' cargo doc --quiet --workspace --no-deps --document-private-items $(CARGO_FLAGS)

docs: ## Write docs/reference.md from the code
	@cargo run --quiet --package sockpolicy $(CARGO_FLAGS) -- options --output markdown >docs/reference.md.new
	@mv docs/reference.md.new docs/reference.md

clean: ## Remove the build. Fetched kernels stay
	@cargo clean

bootstrap: ## Install the dependencies of these targets
	@./bootstrap

# Builds the release binaries that are measured.
bench-build:
	@./bootstrap build
	@echo 'bench: target/release/bench measures target/release/sockpolicy, and writes to target/bench'
	@cargo build --quiet --release $(CARGO_FLAGS)
	@cargo build --quiet --release $(CARGO_FLAGS) --package sockpolicy-integration-tests --bin bench

# Builds the binaries of the integration tests, with target/debug/sockpolicy.
debug-build:
	@cargo build --quiet --workspace --all-targets $(CARGO_FLAGS)
