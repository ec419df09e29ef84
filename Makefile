# `make demo` and `make test` are the two commands; both build `.venv` first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
LLAMA := $(VENV)/llama

.PHONY: demo test lint compat hub gguf clean

demo: $(INSTALLED)
	$(BIN)/nanophi run recipes/demo.yaml recipes/demo-control.yaml

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -c tests/pytest.ini --rootdir tests --numprocesses 2 --dist loadfile \
		--cov nanophi --cov-config tests/coverage.ini --cov-report term tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
