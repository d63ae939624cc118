# make demo: from a fresh clone, makes .venv and runs the main job on the embedded default.
# make fast: the checks, and the tests that need neither Ray nor training; under four minutes.
# make test: from a fresh clone, makes .venv and runs everything CI runs.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo-out
# Tests of the training room that train nothing are named one by one.
FAST_TESTS = tests/captioning tests/services tests/infra tests/training/data \
	tests/training/scoring tests/training/test_checkpoints.py tests/training/test_events.py \
	tests/training/test_imports_of_training.py tests/training/test_losses.py \
	tests/training/test_recipe.py tests/training/test_schedule.py

.PHONY: demo fast test check starters clean

demo: .venv/installed
	$(BIN)/lorafarm demo --out $(OUT)

fast: check
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow" $(FAST_TESTS)

# Files of tests run side by side, the slow ones not left to the end; more than four at once, or than
# there are cores, would starve the servers in some of them.
test: check
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=25

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Rebuilds the starter models (hours on two cores; resumable). Needs node and npm.
starters: .venv/installed-test
	$(BIN)/pip install --quiet -c constraints.txt -e '.[starters]'
	$(BIN)/python infra/starter/build.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lorafarm needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
