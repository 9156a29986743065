# make demo: from a bare clone to the quickstart's output.  make test: from a bare clone to the test result.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test zoo pass check lint lines site

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

# a worker that runs out of tests takes over half of what another has left; one thread each, as more would wait for one another
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# the model classes that `make test` leaves out
zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m zoo

# the tests of one pass: make pass NAME=insert_cache
pass: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist tests/passes/test_$(NAME).py

lint: $(STAMP)
	$(BIN)/ruff format --check bwcache_compile tests examples benchmarks
	$(BIN)/ruff check bwcache_compile tests examples benchmarks
	$(BIN)/mypy

# the documentation, to site/; warnings and broken links are errors
site: $(STAMP)
	$(BIN)/zensical build --strict

lines:
	@cat $$(git ls-files 'bwcache_compile/*.py' 'bwcache_compile/**/*.py' | sort -u) | grep -cv '^[[:space:]]*$$' | sed 's/$$/ lines in the package, blank ones left out/'

check: lint lines test
