# Everything from a fresh clone: `make demo` or `make test`. Needs Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# [gpu] where an NVIDIA driver answers, else [cpu]; the two must not be installed together.
ENGINE := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: demo test check format stubs clean

demo: $(VENV)/.ready
	$(BIN)/mcdeploy demo

test: $(VENV)/.ready-dev check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# gRPC's messages, compiled from the .proto; committed, never edited.
stubs: $(VENV)/.ready-dev
	$(BIN)/python -m grpc_tools.protoc -Iexport/mcruntime/server/oip --descriptor_set_out=export/mcruntime/server/oip/open_inference.binpb open_inference.proto

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mcdeploy needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[train,serve,grpc,sign,$(ENGINE)]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[train,serve,grpc,trace,sign,$(ENGINE),dev]'
	touch $@

clean:
	rm -rf $(VENV) demo runs .mypy_cache .ruff_cache
