# Every target makes the virtual environment it needs first: .venv, from pyproject.toml and constraints.txt.
VENV ?= .venv
# the first interpreter that runs and is new enough; override with `make PYTHON=... test`
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
FUZZERS := $(filter-out %/common.py,$(filter-out tests/fuzz/test_%,$(wildcard tests/fuzz/[a-z]*.py)))
SEED ?= 1
SECONDS ?= 60
BENCHMARKS := $(wildcard benchmarks/[a-z]*.py)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-distributed test-others test-slow test-durability fuzz test-gpu rehearse-gpu test-nemo test-servers test-vllm bench docs lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ?/  make \1\t/' | expand -t 20

venv: $(INSTALLED)  ## only the virtual environment (.venv)

demo: $(INSTALLED)  ## the skills experiment: build, FuseSFT, FusePO, export, evaluate (writes demo/)
	$(BIN)/fuserl demo --dir demo

test: $(INSTALLED)  ## lint and all tests but the slow and the GPU ones
	@$(MAKE) --no-print-directory --keep-going --jobs=3 lint test-distributed test-others

# the pure tests: no ranks, few processes
FAST := $(addprefix tests/unit/,objectives config util metrics data test_imports.py test_math_doc.py \
	records/test_formats.py records/test_records.py convert/test_layout.py)

test-fast: lint  ## what a change of one file needs: lint and the pure tests, in a minute
	$(PYTEST) -n 2 -m "not slow and not gpu" $(FAST)

# Side by side, for ranks of a test wait for each other half of the time. Its report comes in one piece, at its end.
test-distributed: $(INSTALLED)
	@report=$$(mktemp); $(PYTEST) -m "not slow and not gpu and not servers" tests/distributed > $$report 2>&1; code=$$?; \
	  cat $$report; rm -f $$report; exit $$code

test-others: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not gpu and not servers" --ignore=tests/distributed

test-slow: $(INSTALLED)  ## the long proofs
	$(PYTEST) -m "slow and not gpu and not servers"

test-durability: $(INSTALLED)  ## 200 runs killed at random instants and resumed, bit for bit (a quarter of an hour on 2 cores)
	$(BIN)/python tests/durability/crash.py --runs 200 --seed 1

fuzz: $(INSTALLED)  ## every fuzzer of tests/fuzz/, a minute each (make fuzz SEED=7 SECONDS=600)
	@set -e; for script in $(FUZZERS); do $(BIN)/python -W ignore $$script --seed $(SEED) --seconds $(SECONDS); done

test-gpu: $(INSTALLED)  ## what needs a CUDA device
	$(PYTEST) -m gpu

# megatron-core and the Transformer Engine that goes with it; the other pair: CORE=0.16.1 TE=2.11.0
CORE ?= 0.19.2
TE ?= 2.17.1
REHEARSAL = $(VENV)-rehearsal-$(CORE)
# this core wants 3.12
PYTHON312 ?= $(shell for p in python3.12 python3 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && echo $$p && break; done)
rehearse-gpu:  ## the GPU code on the CPU: the real Transformer Engine, its kernels replaced (.venv-rehearsal-*, 6 GB)
	@test -n "$(PYTHON312)" || { echo "make: no Python 3.12 or newer found: make PYTHON312=/path/to/python3.12 rehearse-gpu" >&2; exit 2; }
	@test -f $(REHEARSAL)/.installed || PYTHON=$(PYTHON312) sh tests/rehearsal/install.sh $(REHEARSAL) $(CORE) $(TE)
	FUSERL_REHEARSAL=1 LD_LIBRARY_PATH=$(abspath $(REHEARSAL))/stub PYTHONPATH=. OMP_NUM_THREADS=1 \
	  $(REHEARSAL)/bin/python -W ignore -m pytest tests/rehearsal

test-nemo:  ## the stages through nemo-run, in an environment of its own (.venv-nemo, 540 MB more)
	@$(MAKE) --no-print-directory VENV=$(VENV)-nemo venv
	@$(VENV)-nemo/bin/python -m pip install --quiet --disable-pip-version-check -e '.[nemo]'  # leptonai wants an older anyio than constraints.txt
	$(VENV)-nemo/bin/python -m pytest tests/slurm/test_nemo.py

test-servers:  ## sampling from a real server, `transformers serve`, in an environment of its own (.venv-servers)
	@$(MAKE) --no-print-directory VENV=$(VENV)-servers venv
	@$(VENV)-servers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt fastapi uvicorn openai
	$(VENV)-servers/bin/python -m pytest -m servers tests/servers -k transformers

test-vllm: $(INSTALLED)  ## sampling from a real vLLM on the CPU (.venv-vllm, 2 GB and 3 minutes more), whose engine is killed
	@test -x $(VENV)-vllm/bin/vllm || PYTHON=$(PYTHON) sh tests/servers/install_vllm.sh $(VENV)-vllm
	FUSERL_TEST_VLLM=$(VENV)-vllm/bin/vllm $(PYTEST) -m servers tests/servers -k vllm

bench: $(INSTALLED)  ## every script in benchmarks/, in short (its --help says how to get the figures of docs/performance.md)
	@test -n "$(BENCHMARKS)" || { echo "make bench: there are no scripts in benchmarks/ yet" >&2; exit 2; }
	@set -e; for script in $(BENCHMARKS); do echo "$$script --quick"; $(BIN)/python $$script --quick; done

lint: $(INSTALLED)  ## ruff, its format, and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

docs:  ## the documentation as a site (site/), in an environment of its own (.venv-docs)
	@test -x $(VENV)-docs/bin/mkdocs || { $(PYTHON) -m venv $(VENV)-docs && \
	  $(VENV)-docs/bin/pip install --quiet --disable-pip-version-check mkdocs-material==9.8.2; }
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet --site-dir site

clean:  ## remove the virtual environment
	rm -rf $(VENV) $(VENV)-rehearsal-* $(VENV)-nemo $(VENV)-docs site $(VENV)-servers $(VENV)-vllm

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found: install python3.11, or type make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or more, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
