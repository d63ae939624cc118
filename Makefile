# make test: from a fresh clone, makes .venv and runs everything CI runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test check clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: check
	$(BIN)/pytest

clean:
	rm -rf .venv build dist *.egg-info
