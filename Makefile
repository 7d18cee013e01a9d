# Everything a developer runs. `make` alone lists it. Needs GNU make, a POSIX shell, and Python 3.11 or newer with venv.

PYTHON ?= python3
VENV ?= .venv
# torch goes in first and alone: left to the resolver, a plain `torch` may bring gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
# Comes with torch's CUDA wheels; beside a CPU torch it is there to run the GPU kernels' tests in its interpreter.
TRITON ?= triton==3.9.0
# Commit that the protos must stay compatible with.
BASE ?= HEAD~1
# Servers that `bench-engine` measures beside.
PEERS ?= vllm
# JSON Lines of questions with documents (title, text), for `bench-store` and `proof`.
QUESTIONS ?= ../shared/data/hotpotqa-100.jsonl
# More arguments for `serve`, `demo`, `check` and the benchmarks, and for pytest.
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# protoc finds its plugins there.
export PATH := $(abspath $(BIN)):$(PATH)
STAMP := $(VENV)/.drystone-installed
# -qq: errors alone. Some machines have package sources that pip warns about once a package.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env protos protos-check docs lint test demo serve check proof bench-store bench-engine bench-transport clean

help: ## List the targets
	@echo 'make TARGET [PYTHON=python3] [VENV=.venv] [ARGS=...] [PYTEST_ARGS=...]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

env: $(STAMP) ## Create the virtual environment with everything, once

$(STAMP): pyproject.toml client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'env: $(PYTHON) is older than Python 3.11; choose another: make PYTHON=python3.12 ...' >&2; exit 1; }
	@test -x $(BIN)/python || { echo 'env: creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'env: installing $(TORCH) (about 200 MB)'
	@$(PIP) install '$(TORCH)'
	@echo 'env: installing drystone, its client and the development tools'
	@$(PIP) install -e client -e '.[dev]'
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' || { \
		echo 'env: installing $(TRITON) for the tests of the GPU kernels (1 GB on disk)'; \
		$(PIP) install --no-deps '$(TRITON)' || echo 'env: none for this machine; those tests are skipped' >&2; }
	@touch $@

protos: env ## Make the Python stubs from the protos
	@$(BIN)/python protos/generate.py

protos-check: env ## Check stubs, comments and compatibility of the protos
	@echo 'protos-check: stubs, comments, compatibility with $(BASE)'
	@said=$$($(BIN)/python protos/generate.py --check 2>&1) || { echo "$$said" >&2; exit 1; }
	@$(BIN)/buf lint protos
	@if ! git rev-parse --git-dir >/dev/null 2>&1; then \
		echo 'protos-check: compatibility not checked: this is no git checkout'; \
	elif ! git rev-parse --quiet --verify '$(BASE)^{commit}' >/dev/null; then \
		echo 'protos-check: compatibility not checked: no $(BASE) here (a first commit or a shallow clone)'; \
	elif ! git cat-file -e '$(BASE):protos/buf.yaml' 2>/dev/null; then \
		echo 'protos-check: compatibility not checked: $(BASE) has no protos'; \
	else \
		old=$$(mktemp -d) && trap 'rm -rf "$$old"' EXIT && \
		git archive --format=tar '$(BASE)' protos | tar -xf - -C "$$old" && \
		$(BIN)/buf breaking protos --against "$$old/protos"; \
	fi

docs: env ## Write the tables of docs/errors.md, docs/status.md and docs/settings.md
	@$(BIN)/python docs/tables.py

lint: env ## Run ruff and mypy
	@echo 'lint: ruff, mypy'
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy

test: env protos-check lint ## Run every check, the tests last
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

demo: env ## Start everything here, ask three questions, show what is reused
	@$(BIN)/drystone demo $(ARGS)

serve: env ## Run a gateway with a prefill and a decode worker until Ctrl-C
	@$(BIN)/drystone serve $(ARGS)

check: env ## Compare served answers with the reference
	@$(BIN)/drystone check $(ARGS)

proof: env ## Long proofs, about two hours: soak, kills, fuzzing, a bad wire, warming interrupted, 50 prompts checked
	@$(BIN)/python -m tests.load.soak
	@DRYSTONE_CRASHES=100 $(BIN)/python -m pytest -q tests/prefill_worker -k 'crash or kill'
	@DRYSTONE_KILLS=100 $(BIN)/python -m pytest -q tests/transfer/test_proof_kills.py tests/transfer/test_proof_tcp.py
	@DRYSTONE_CRASHES=20 $(BIN)/python -m pytest -q tests/transfer/test_group_process.py
	@DRYSTONE_FUZZ_SECONDS=600 $(BIN)/python -m pytest -q tests/transfer/test_fuzz_headers.py tests/transfer/test_pair_machine.py
	@DRYSTONE_CHAOS=2000 $(BIN)/python -m pytest -q -s tests/e2e/test_chaos_served.py
	@if [ -f '$(QUESTIONS)' ]; then $(BIN)/python -m tests.load.warm_interrupted --questions '$(QUESTIONS)'; \
		else echo 'proof: warming not interrupted: no $(QUESTIONS); name a file with QUESTIONS=' >&2; fi
	@$(BIN)/drystone check --prompts 50 --full $(ARGS)

bench-store: env ## Time encoding beside transformers, a restart from disk, and block against full attention
	@$(BIN)/python -m tests.load.store_figures --questions '$(QUESTIONS)' $(ARGS)

bench-engine: env ## Time Drystone beside other servers, installed where absent: PEERS="vllm llama.cpp"
	@$(BIN)/python -m tests.load.peers install $(PEERS) || echo 'bench-engine: going on without it' >&2
	@$(BIN)/python -m tests.load.engine_figures --peers '$(PEERS)' $(ARGS)

bench-transport: env ## Time shipping KV beside plain sockets and bare pyzmq
	@$(BIN)/python -m tests.load.transport_figures $(ARGS)

clean: ## Remove the virtual environment, caches and build outputs
	@rm -rf $(VENV) build dist client/build client/dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
