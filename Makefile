# `make demo` and `make test` are the two commands; both build `.venv` first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
LLAMA := $(VENV)/llama
CLUSTER := $(VENV)/cluster

.PHONY: demo test lint cluster compat hub gguf clean

demo: $(INSTALLED)
	$(BIN)/nanophi run recipes/demo.yaml recipes/demo-control.yaml

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -c tests/pytest.ini --rootdir tests --numprocesses 2 --dist loadfile \
		--cov nanophi --cov-config tests/coverage.ini --cov-report term tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The data stages on two Ray workers and through Slurm's commands, beside the local engine
cluster: $(CLUSTER)/installed
	PYTHONPATH=$(CLUSTER) $(BIN)/pytest -c tests/pytest.ini --rootdir tests tests/data/test_parallel.py

# Without dependencies, so that nothing here hides a package of the environment.
$(CLUSTER)/installed: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(CLUSTER) \
		datatrove==0.10.1 humanize==4.17.0 loguru==0.7.3 ray==2.60.0 msgpack==1.2.4 protobuf==7.36.2 \
		jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1
	touch $@

# A release under transformers 4.37.2, 4.57.6 and the newest: make compat RELEASE=runs/demo/release
compat: $(INSTALLED)
	$(BIN)/python tests/compat/run.py $(RELEASE)

# A release pushed to a loopback Hub, used by a stranger, verified, submitted: make hub RELEASE=runs/demo/release
hub: $(INSTALLED)
	$(BIN)/python tests/publish.py $(RELEASE)

# GGUF files against llama.cpp itself, which is built from source first: make gguf RELEASE=runs/demo/release
gguf: $(LLAMA)/installed
	PYTHONPATH=$(LLAMA) $(BIN)/pytest -c tests/pytest.ini --rootdir tests tests/model_card/test_gguf.py
	$(if $(RELEASE),PYTHONPATH=$(LLAMA) $(BIN)/python benchmarks/gguf_check.py $(RELEASE))

$(LLAMA)/installed: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(LLAMA) llama-cpp-python==0.3.36 diskcache==5.6.3
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch --editable '.[dev]'
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/nanophi
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
