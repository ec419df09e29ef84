# `make demo` and `make test` are the two commands to know; each builds `.venv` first if it is missing or out of date.
# PYTHON chooses the interpreter of a new `.venv`, RELEASE the release folder that hub, compat and gguf check.
PYTHON ?= python3
RELEASE ?= runs/demo/release

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
LLAMA := $(VENV)/llama
CLUSTER := $(VENV)/cluster
OLDEST := $(VENV)/oldest
SITE := $(VENV)/site
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/pytest -c tests/pytest.ini --rootdir tests
TESTS := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test slow lint docs hub compat peer gguf cluster clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: $(INSTALLED) ## train, evaluate and release two small models: 6 minutes on 2 cores
	$(BIN)/nanophi run demo demo-control --jobs 2

test: $(INSTALLED) lint ## lint, types and tests: 6 minutes on 2 cores
	$(TESTS) -m "not slow" tests

slow: $(INSTALLED) ## the tests that take longest
	$(TESTS) -m slow tests

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(SITE)/installed ## build the documentation's site in build/site; a dead link or anchor is an error
	PYTHONPATH=$(SITE) $(BIN)/python -m zensical build --strict --clean

hub: $(INSTALLED) ## push RELEASE to a loopback Hub, then load, verify and submit it from there
	$(BIN)/python tests/publish.py $(RELEASE)

peer: $(INSTALLED) ## run transformers' own model tests on NanoPhi and on stock Phi
	$(BIN)/python tests/peer/run.py $(VENV)/peer

compat: $(OLDEST)/installed ## load RELEASE with old and new transformers; train with the oldest that is allowed
	PYTHONPATH=$(OLDEST) $(TESTS) -m "not slow" $(addprefix tests/training/test_,trainer.py continuation.py receipt.py)
	$(BIN)/python tests/compat/run.py $(wildcard $(RELEASE))

gguf: $(LLAMA)/installed ## compare GGUF files of RELEASE with llama.cpp itself, built from source first
	PYTHONPATH=$(LLAMA) $(PYTEST) tests/model_card/test_gguf.py
	PYTHONPATH=$(LLAMA) $(BIN)/python benchmarks/gguf_check.py $(RELEASE)

cluster: $(CLUSTER)/installed ## run the data stages on two Ray workers and through Slurm's commands
	PYTHONPATH=$(CLUSTER) $(PYTEST) tests/data/test_parallel.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch --editable '.[dev]'
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/nanophi
	touch $@

$(OLDEST)/installed: pyproject.toml tests/compat/oldest.py | $(INSTALLED)
	$(PIP) --upgrade --no-deps --target $(OLDEST) $$($(BIN)/python tests/compat/oldest.py)
	touch $@

$(LLAMA)/installed: | $(INSTALLED)
	$(PIP) --upgrade --no-deps --target $(LLAMA) llama-cpp-python==0.3.36 diskcache==5.6.3
	touch $@

$(SITE)/installed: constraints.txt | $(INSTALLED)
	$(PIP) --upgrade --target $(SITE) --constraint constraints.txt zensical
	touch $@

# Without dependencies, so that nothing here hides a package of the environment.
$(CLUSTER)/installed: | $(INSTALLED)
	$(PIP) --upgrade --no-deps --target $(CLUSTER) datatrove==0.10.1 humanize==4.17.0 loguru==0.7.3 ray==2.60.0 \
		msgpack==1.2.4 protobuf==7.36.2 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 \
		rpds-py==2026.9.1
	touch $@

clean: ## delete what was built; runs/ stays
	rm -rf $(VENV) build *.egg-info
