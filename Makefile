# make demo       the main job, on data that needs no download
# make test       ruff, mypy, import-linter and the quick tests
# make test-slow  the tests marked slow
# make fuzz       many changed inputs for every parser (COUNT=2000 for each)
# make docs       the documentation, in site/; a broken link is an error
# make setup      only the virtual environment
.PHONY: setup demo test test-slow test-setup fuzz docs system-packages

PYTHON ?= python3
BIN := .venv/bin
# One process per core, the tests of a file in one of them; the slow ones are named at the end.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder --durations 10 --durations-min 5

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[search,prune]'
	touch $@

.venv/.test-installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/edgekd run pipelines/digits.yaml

test-setup: .venv/.test-installed system-packages

# The real Fashion-MNIST images, strace, which sees what commands connect to, and an SSH server for
# targets on this machine; tests that need them say why they skip where apt-get is not.
PACKAGES := dataset-fashion-mnist strace openssh-client openssh-server

system-packages:
	@{ test -d /usr/share/datasets/fashion-mnist && command -v strace ssh >/dev/null && test -x /usr/sbin/sshd; } \
	  || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	    && { apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null 2>&1 \
	         || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; }; }; } \
	  || echo "not all of $(PACKAGES) are installed: tests that need them are skipped"

test: test-setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow"

test-slow: test-setup
	$(PYTEST) -m slow

# Thousands of changed inputs for each parser; make test reads the first few of them.
COUNT ?= 2000

fuzz: test-setup
	EDGEKD_FUZZ=$(COUNT) $(BIN)/python -m pytest tests/fuzz

# The references are written from the code; then the pages are built.
docs: .venv/.test-installed
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
