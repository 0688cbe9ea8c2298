# Exact pins of what is tested; pyproject.toml holds the ranges that users install.
TORCH    := torch==2.13.0
PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: demo test check bench simulate crash proto clean

# torch first and pinned: indexes that offer a CPU build then do not pull CUDA.
$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e '.[demo,ckks]'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.runtime
	$(BIN)/secagg demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest tests -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=100

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only -p no:cacheprovider -W default

# Long runs; `make test` has a short profile of each.
simulate: $(VENV)/.dev
	$(BIN)/python -m tests.faults --seeds 20000 --replay

crash: $(VENV)/.dev
	$(BIN)/python -m tests.crash --coordinator 60 --silo 30 --recovery 30 --random 200

proto: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Isecagg/wire/_pb=proto/secagg/v1 --python_out=. --pyi_out=. \
	  proto/secagg/v1/masking.proto proto/secagg/v1/service.proto proto/secagg/v1/journal.proto

clean:
	rm -rf $(VENV) build *.egg-info .coverage* .hypothesis .mypy_cache .ruff_cache .pytest_cache
