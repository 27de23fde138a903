# make venv   an environment with everything, in .venv
# make demo   a Diffusion Transformer trained on digits: plan, calibrate, compile, validate, bench,
#             evaluate, report; ends with runs/digits/report.html
# make engines  TensorRT-RTX engines of the demo's run, verified; no GPU needed
# make triton-env  an environment with a Triton server, in .triton, for make serve and the tests
# make foreign-env  an environment with OpenVINO, onnxruntime-web and -node, in .foreign, for the tests
# make serve  the demo's run on a real Triton server: images, health, a load test; no GPU needed
# make test   every rule of the product in minutes: all tests but those of the long tier
# make test-all  all tests, with branch coverage
# make apt    Debian packages for the tests of the long tier: compilers, emulators and a browser, where
#             root can install them
# make check  format, lint, types, import order, then make test: the one gate
# make docs   the pages of docs/ as a site, in build/site
# make wheel  build the wheel and try it in an empty environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch has to be named in the same command: the constraint alone may pick a CUDA build.
TORCH := $(shell grep '^torch==' constraints.txt)
KERNELS := kernels/CMakeLists.txt $(wildcard kernels/*/*.[ch]* kernels/*/*.inl kernels/*/*/*.h)
DEMO_OUT ?= runs/digits
ENGINE_GPUS ?= sm_80,sm_89,sm_120
WHEEL_ENV ?= build/wheel-env
TRITON_ENV ?= .triton
FOREIGN_ENV := .foreign
LOAD_SECONDS ?= 120
SWEEP_SECONDS ?= 5
TEST_CPU_S ?= 5

.PHONY: apt venv triton-env foreign-env demo engines serve test test-all check docs wheel clean

# What the long tier needs beside Python: compilers, a disassembler, emulators, a browser.
apt:
	@missing=; for tool in g++ objdump aarch64-linux-gnu-g++ qemu-aarch64 qemu-x86_64 chromium; do \
	  command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update -qq && \
	  apt-get install -y -qq g++ binutils g++-aarch64-linux-gnu qemu-user chromium; } >/dev/null || \
	echo "apt: missing:$$missing; the tests that need them are skipped"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH) -e '.[dev]'
	touch $@

triton-env: $(TRITON_ENV)/.installed

$(TRITON_ENV)/.installed: samples/local_triton/requirements.txt
	$(PYTHON) -m venv $(TRITON_ENV)
	$(TRITON_ENV)/bin/python -m pip install --quiet --requirement $<
	touch $@

foreign-env: $(FOREIGN_ENV)/.installed

$(FOREIGN_ENV)/.installed: tests/foreign/requirements.txt tests/foreign/package.json
	$(PYTHON) -m venv $(FOREIGN_ENV)
	$(FOREIGN_ENV)/bin/python -m pip install --quiet --requirement $<
	mkdir -p $(FOREIGN_ENV)/node && cp tests/foreign/package.json $(FOREIGN_ENV)/node/
	command -v npm >/dev/null && npm --prefix $(FOREIGN_ENV)/node install --ignore-scripts --silent || \
	  echo "foreign-env: no npm; the tests of onnxruntime-web and -node are skipped"
	touch $@

demo: venv
	$(BIN)/treeq-export run samples/digits/recipe.yaml --out $(DEMO_OUT)

engines: venv
	$(BIN)/treeq-export build --run $(DEMO_OUT) --runtime tensorrt-rtx --gpu $(ENGINE_GPUS)
	$(BIN)/treeq-export report --run $(DEMO_OUT)

serve: venv triton-env
	$(BIN)/treeq-export serve --run $(DEMO_OUT) --backend python
	$(BIN)/treeq-export lint $(DEMO_OUT)/triton
	$(BIN)/python samples/local_triton/loadtests.py $(DEMO_OUT) \
	  --python $(TRITON_ENV)/bin/python --out $(DEMO_OUT)/serving \
	  --duration $(LOAD_SECONDS) --sweep-duration $(SWEEP_SECONDS)

# Files in the order of their names: the cheapest, doctests, come last and fill the gaps.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --durations=10

test: venv
	TREEQ_TEST_CPU_S=$(TEST_CPU_S) $(PYTEST) -m "not slow and not triton"

test-all: venv triton-env foreign-env
	$(PYTEST) --cov --cov-report=term

check: apt venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(MAKE) test

docs: venv
	$(BIN)/python docs/recipe_reference.py
	$(BIN)/python -m mkdocs build --strict --quiet -f .mkdocs.yml

wheel: venv
	rm -rf dist $(WHEEL_ENV)
	$(BIN)/python -m build --quiet --wheel .
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH) dist/*.whl
	cd $(WHEEL_ENV) && bin/treeq-export doctor
	cd $(WHEEL_ENV) && bin/treeq-export run $(CURDIR)/samples/digits/recipe.yaml --out run \
	  --set search.strategy=uniform --set search.branch_budget=null --set finetune.mode=none \
	  --set evaluate.num_samples=50 --set evaluate.gates.max_frechet_ratio=null --set bench.rounds=3

clean:
	rm -rf build dist runs $(VENV) $(TRITON_ENV) $(FOREIGN_ENV)
