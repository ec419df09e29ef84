# `make demo` and `make test` are the two commands; both build `.venv` first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/nanophi run recipes/demo.yaml recipes/demo-control.yaml

test: $(INSTALLED) lint
	$(BIN)/pytest -c tests/pytest.ini --rootdir tests tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch --editable '.[dev]'
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/nanophi
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
