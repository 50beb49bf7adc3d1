# make help lists the targets. Everything runs in .venv, which `make setup` builds from requirements/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# On Linux, PyPI's torch is the CUDA build (several GB). For the CPU build (200 MB) set this to the address of PyTorch's
# CPU wheel index ("Get started" on pytorch.org names it).
TORCH_INDEX ?=
LAYOUT ?= tp2
SEED ?= 0
RUN_DIR ?= runs/minipipe-$(LAYOUT)-seed$(SEED)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements/torch.txt requirements/cpu.txt
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
QUICK := not slow and not gpu and not slurm and not nemo
NEMO := .venv-nemo
NEMO_STAMP := $(NEMO)/.installed
# byte code is compiled at the first import instead: most modules of these packages are never imported here
INSTALL := $(BIN)/python -m pip install --no-compile --disable-pip-version-check --quiet
# a name alone is not enough: version managers leave shims that fail, and Debian splits venv off
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))

# Byte code is kept, whatever the shell says: a run starts a dozen processes, and each would compile torch and SGLang anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo ladder test test-gpu test-slow test-slurm test-nemo nemo-setup gpu-lock lint bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP) ## build .venv from the lock (once, and again when the lock changes)

# a new environment in the directory of the target
define MAKE_VENV
	@python=; for name in $(or $(PYTHON),python3.11 python3.12 python3); do \
	    if "$$name" -c '$(USABLE)' 2>/dev/null; then python="$$name"; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "setup: no usable Python 3.11 or 3.12 (with venv) was found; install one, or pass PYTHON=/path/to/python3.11" >&2; \
	    exit 1; fi; \
	echo "setup: building $(@D) with $$("$$python" --version); this takes a few minutes"; \
	"$$python" -m venv --clear $(@D)
endef

$(STAMP): $(LOCK) pyproject.toml
	$(MAKE_VENV)
	@$(INSTALL) $(INDEX) --constraint requirements/cpu.txt --requirement requirements/torch.txt
	@$(INSTALL) --no-deps --requirement requirements/cpu.txt
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

nemo-setup: setup $(NEMO_STAMP) ## build .venv-nemo, from which NeMo-Run launches recipes (540 MB)

$(NEMO_STAMP): requirements/nemo.txt
	$(MAKE_VENV)
	@$(NEMO)/bin/python -m pip install --no-compile --disable-pip-version-check --quiet --no-deps --requirement $<
	@$(NEMO)/bin/python -m pip install --no-compile --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The CUDA 12 core is what the source package of Transformer Engine's PyTorch part asks for, whatever its CUDA is; beside
# the CUDA 13 core it would be the one that is loaded.
gpu-lock: ## resolve requirements/gpu.txt for the container anew (needs uv), and what tests/test_container.py reads
	uv pip compile --python-version 3.12 --python-platform x86_64-manylinux_2_39 --extra engine --extra gpu \
	    --no-emit-package transformer-engine-cu12 --no-annotate --custom-compile-command "make gpu-lock" \
	    --output-file requirements/gpu.txt pyproject.toml requirements/gpu.in
	$(BIN)/python tools/container_metadata.py

demo: setup ## train MiniPipe on this CPU, LAYOUT=tp2|pp2|tp1, SEED=0 (another seed is another machine to learn)
	$(BIN)/megatron-sdpo train minipipe --layout $(LAYOUT) --run-dir $(RUN_DIR) seed=$(SEED) task.options.machine_seed=$(SEED)

lint: setup ## formatting, lint rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

LADDER := $(foreach width,48 64 144 208,models/minipipe-w$(width)/model.safetensors)

ladder: $(LADDER) ## make the models of MiniPipe's scaling study, models/minipipe-w*: minutes each, on one core

models/minipipe-w%/model.safetensors: | setup
	$(BIN)/python tools/pretrain_minipipe.py --width $* --out models/minipipe-w$*

test: lint ## lint, then every test that needs no GPU and no long time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(QUICK)" --numprocesses 2 --dist loadfile

test-slow: setup ## the long tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu and not slurm and not nemo"

test-gpu: ## on a machine with one Hopper GPU and Transformer Engine: the tests that need it, then what is right there
	python3 -m pytest -m gpu
	python3 tools/gpu_check.py

test-nemo: nemo-setup ## NeMo-Run, and NeMo-Run on a real Slurm where one can be started
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nemo -rs

# As root on Debian it installs what is missing; elsewhere, or where that fails, the tests say why they are skipped.
test-slurm: setup ## whole jobs on a real Slurm with several nodes on this machine; ONLY=EXPRESSION: some of them
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then \
	    PYXIS=1 tools/slurm_sandbox.sh install || echo "test-slurm: Slurm could not be installed" >&2; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm -rs $(if $(ONLY),-k "$(ONLY)")

bench: setup ## time trainer, saves and generation against their baselines (results belong in tools/BENCHMARKS.md)
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_trainer.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_trainer.py --size 1m --sequences 16 --length 256
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_trainer.py --size 10m --sequences 16 --length 256 --steps 1
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_batch_sizes.py
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tools/bench_checkpoint.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_generation.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_graders.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_sandbox.py

clean: ## remove environments, caches and build output (runs/ is kept)
	rm -rf $(VENV) $(NEMO) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
