# Exact pins of what is tested; pyproject.toml holds the ranges that users install.
TORCH    := torch==2.13.0
PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: demo test test-gpu check bench bench-peers attacks mutants scan storm soak simulate crash \
  fuzz fuzz-rpc fuzz-native catalogue proto clean

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

# The GPU's kernel without a GPU, in Triton's interpreter; Triton is large, so `make test` goes without.
test-gpu: $(VENV)/.dev
	$(PIP) -c constraints.txt -e '.[gpu-dev]'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ring/test_gpu*.py -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	mkdir -p build
	$(BIN)/secagg bench --output build/bench.json --plot build/rounds.svg

# Peers have an environment of their own: Flower pins packages below ours, and FedML wants NumPy 1 and
# protobuf 3. The one module of FedML that is measured needs NumPy and torch alone.
.venv-peers/.ready: pyproject.toml
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	echo '*' > .venv-peers/.gitignore
	.venv-peers/bin/python -m pip --disable-pip-version-check install -q $(TORCH)
	.venv-peers/bin/python -m pip --disable-pip-version-check install -q flwr==1.41.0 -e '.[peers]'
	.venv-peers/bin/python -m pip --disable-pip-version-check install -q --no-deps fedml==0.9.6
	touch $@

bench-peers: .venv-peers/.ready
	.venv-peers/bin/python -m pytest benchmarks/test_peers.py --benchmark-only -W default -s

# What tries to break it. `make test` has a short profile of each.

# Every attack, on the SDK's and the coordinator's processes; or those named.
ATTACKS ?= --all
attacks: $(VENV)/.dev
	$(BIN)/python -m threat_model.attacks $(ATTACKS)

# Each marked security check, left out in memory: does a test fail?
mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutants

# Real sessions, and a search for every secret that was drawn in them.
scan: $(VENV)/.dev
	$(BIN)/python -m threat_model.scan

# Refusal of service; a figure for the latency needs a machine that does nothing else.
storm: $(VENV)/.dev
	mkdir -p build
	$(BIN)/python -m tests.storm --json build/storm.json

MINUTES ?= 60
soak: $(VENV)/.dev
	mkdir -p build
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --json build/soak.json

simulate: $(VENV)/.dev
	$(BIN)/python -m tests.faults --seeds 20000 --replay

crash: $(VENV)/.dev
	$(BIN)/python -m tests.crash --coordinator 60 --silo 30 --recovery 30 --random 200

# Every decoder under Atheris; FUZZ=--keep chooses the corpus in the tree anew.
SECONDS ?= 60
fuzz: $(VENV)/.dev
	$(PIP) -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz.decoders --seconds $(SECONDS) $(FUZZ)

# Mutated calls at a real coordinator that honest silos aggregate with.
CALLS ?= 50000
fuzz-rpc: $(VENV)/.dev
	mkdir -p build
	$(BIN)/python -m tests.fuzz.rpc --calls $(CALLS) --json build/fuzz-rpc.json

# The kernel under AddressSanitizer and UndefinedBehaviorSanitizer; FUZZ=--large takes 9 GB.
SANITISED := build/sanitised
fuzz-native: $(VENV)/.dev
	SECAGG_CFLAGS="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover -g -O1" \
	  $(BIN)/python setup.py -q build_ext --force --build-lib $(SANITISED) --build-temp $(SANITISED)
	LD_PRELOAD=$$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  $(BIN)/python -m tests.fuzz.native --seconds $(SECONDS) $(FUZZ) \
	  --kernel $(SANITISED)/secagg/ring/_native/kernel.abi3.so

# What is generated.

catalogue: $(VENV)/.dev
	$(BIN)/python -m threat_model.catalogue

proto: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Isecagg/wire/_pb=proto/secagg/v1 --python_out=. --pyi_out=. \
	  proto/secagg/v1/masking.proto proto/secagg/v1/service.proto proto/secagg/v1/journal.proto

clean:
	rm -rf $(VENV) build *.egg-info .coverage* .hypothesis .mypy_cache .ruff_cache .pytest_cache
