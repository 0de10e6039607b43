# make setup   .venv with everything (EXTRA=gpu on a CUDA machine; cpu otherwise)
# make run     train the embedded model with GRPO, one command, no downloads beyond the package registry
# make test    unit tests of every module and one real run, in 4 minutes: proves the installation
# make test-nodes  runs on three nodes in namespaces, as root; the rest of what docs/cluster.md claims of several nodes
# make test-rest   what `make test` leaves out, small campaigns included, but for what only `make test-long` runs
# make test-all    all of these, without test-nodes
# make check-gpu   prove the CUDA path on one GPU, in less than ten minutes; writes docs/gpu_measurements.md
# make check   ruff and pyright
PYTHON ?= python3.11
EXTRA  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
VENV   := .venv
STAMP  := $(VENV)/.setup-$(EXTRA)
BIN    := $(VENV)/bin

# uv does not read pip's configuration: hand it the wheel folders that pip would search. Where those hold the CPU build of
# torch it is taken from there; elsewhere uv's --torch-backend picks the build for this machine.
FIND_LINKS    := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS)
TORCH_VERSION := 2.13.0
ifeq ($(EXTRA),cpu)
TORCH_WHEEL := $(firstword $(foreach dir,$(FIND_LINKS),$(wildcard $(dir)/torch-$(TORCH_VERSION)+cpu-cp311-*.whl)))
TORCH_SOURCE := $(if $(TORCH_WHEEL),torch==$(TORCH_VERSION)+cpu,torch==$(TORCH_VERSION) --torch-backend cpu)
else
TORCH_SOURCE := torch==$(TORCH_VERSION) --torch-backend auto
endif

.PHONY: setup run test test-rest test-long test-all test-nodes check check-gpu docs clean
setup: $(STAMP)

# --no-config: the overrides that keep torch out of the lock would keep it out of this command as well.
# The stamp makes a second `make setup` free: it is redone only when what to install, or how, has changed.
# --compile-bytecode: a run starts a dozen processes that import torch and its company. uv leaves compiling to the first import,
# whose result is lost where Python may not write it (PYTHONDONTWRITEBYTECODE, a read-only image): then each start compiles anew
# and takes two to three times as long.
$(STAMP): pyproject.toml uv.lock Makefile
	$(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet "uv>=0.9"
	test -x $(BIN)/python || $(PYTHON) -m uv venv --quiet --python $(PYTHON) $(VENV)
	$(PYTHON) -m uv pip install --quiet --no-config --python $(BIN)/python $(addprefix --find-links ,$(FIND_LINKS)) $(TORCH_SOURCE)
	$(PYTHON) -m uv sync --quiet --frozen --inexact --compile-bytecode --extra $(EXTRA) --extra dev
	rm -f $(VENV)/.setup-*; touch $@

run: setup
	$(BIN)/python -m recipes.grpo_math $(ARGS)

# The markers `slow` and `nodes` divide the tests. ARGS instead: make test ARGS="tests/unit -k grpo"
test: setup
	$(BIN)/python -m pytest $(or $(ARGS),-m "not slow and not nodes")

test-rest: setup
	$(BIN)/python -m pytest $(or $(ARGS),-m "slow and not long")

test-long: setup
	$(BIN)/python -m pytest $(or $(ARGS),-m long)

test-all: setup
	$(BIN)/python -m pytest $(or $(ARGS),-m "not nodes")

test-nodes: setup
	$(BIN)/python -m pytest $(or $(ARGS),-m nodes)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# On a machine that has torch and transformers only: python -m benchmarks.gpu_check
check-gpu: setup
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

docs: setup
	$(BIN)/python -m docs.generate.configuration docs/configuration.md
	$(BIN)/python -m docs.generate.algorithms docs/algorithms.md
	$(BIN)/python -m docs.generate.metrics docs/metrics.md
	$(BIN)/python -m benchmarks.campaigns.models_page

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
