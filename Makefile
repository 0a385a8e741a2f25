# Two commands to start: `make demo` and `make test`. Both need git, make and Python 3.11 or newer.
# While you work: `make quick`, the checks of the code and the tests that take no more than half a second each.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo chromium test quick lint clean

$(BIN)/keyhole: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("keyhole needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dev: $(BIN)/keyhole
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(BIN)/keyhole
	$(BIN)/keyhole demo

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

quick: lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not cuda and not long'

# The tests of the viewer need a browser. It is installed only for root on Debian; elsewhere they are skipped.
chromium:
	@command -v chromium >/dev/null || { test -f /etc/debian_version && test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; } >/dev/null 2>&1; } || \
	  echo "no chromium: the tests of the viewer in a browser are skipped"

test: lint chromium
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/selection.py --quick --no-write  # to look at; no time is a failure
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile  # threads that spin while they wait slow each other on few cores

clean:
	rm -rf $(VENV)
