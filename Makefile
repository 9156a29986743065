# make demo: from a bare clone to the quickstart's output.  make test: from a bare clone to the test result.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test check lint lines

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

# the files that take longest stand in tests/ itself and begin first: no worker is left alone with one of them at the end;
# one thread for each worker: more would wait for one another
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder tests/test_*.py tests/*/

lint: $(STAMP)
	$(BIN)/ruff format --check bwcache_compile tests examples benchmarks
	$(BIN)/ruff check bwcache_compile tests examples benchmarks
	$(BIN)/mypy

lines:
	@cat $$(git ls-files 'bwcache_compile/*.py' 'bwcache_compile/**/*.py' | sort -u) | grep -cv '^[[:space:]]*$$' | sed 's/$$/ lines in the package, blank ones left out/'

check: lint lines test
