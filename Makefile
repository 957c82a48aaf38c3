# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Python and torch at both ends, and where the environment with the newest is kept between runs of CI.
OLDEST ?= 3.10 2.8.0
NEWEST ?= 3.13 2.15.0
# How long random models are tried, and from which seed on.
SECONDS ?= 60
SEED ?= 1
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/torch-secorder
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := $(VENV)/.bench
SWEEP := build/sweep/.ready

# The arrays here are small: threads cost more than they give.
export OMP_NUM_THREADS ?= 1
# Compiled files are kept, so that no second run compiles what all tests import, nor any of the programs that they start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check lint types doctest examples docs format fuzz test-gpu bench bench-check bench-growth bench-gpu bench-launches sweep versions newest clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## train on real digits, and see which layers carry the curvature
	$(BIN)/python examples/digits.py

test: $(READY)  ## run the tests but those of the examples, on all cores; what a file's tests share is made once
	$(BIN)/python -m pytest -n auto --dist loadfile --ignore tests/test_examples.py
	$(BIN)/python -m pytest -n auto --dist loadfile tests/pretend tests/traps --device pretend

test-gpu: $(READY)  ## run the tests that need a GPU, with a torch that was built for it: make test-gpu TORCH=torch
	$(BIN)/python -m pytest -n auto tests/on_gpu

check: lint types test doctest examples docs  ## everything that has to pass

lint: $(READY)  ## style and import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/mypy

doctest: $(READY)  ## the examples in the docstrings
	$(BIN)/python -m pytest --doctest-modules src

examples: $(READY)  ## run every example as a user would
	$(BIN)/python -m pytest -n auto tests/test_examples.py

docs: $(READY)  ## build the documentation, and run the code in it
	$(BIN)/sphinx-build -W --keep-going -q -b doctest docs docs/_build/doctest
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html."

format: $(READY)  ## let the formatter have its way
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(READY)  ## try random models and loops: make fuzz SECONDS=600 SEED=1
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(SECONDS) --seed $(SEED)

bench: $(BENCH)  ## measure time and memory beside other packages, and write docs/concepts/performance.rst
	PYTHONPATH=tests $(BIN)/python -m benchmarks.speed --save
	PYTHONPATH=tests $(BIN)/python -m benchmarks.memory --save
	PYTHONPATH=tests $(BIN)/python -m benchmarks.page

bench-check: $(READY)  ## fail on what became slower or larger than stored: make bench-check ARGUMENTS=--store
	PYTHONPATH=tests $(BIN)/python -m benchmarks.check $(ARGUMENTS)

bench-growth: $(READY)  ## measure growth with batch, positions, width and vocabulary, for the same page
	PYTHONPATH=tests $(BIN)/python -m benchmarks.growth --save
	PYTHONPATH=tests $(BIN)/python -m benchmarks.page

bench-gpu: $(BENCH)  ## measure on an accelerator beside other packages; without one, try the program on the pretend device
	PYTHONPATH=tests $(BIN)/python -m benchmarks.accelerator --save

bench-launches: $(READY)  ## count what a monitor adds on an accelerator, a pretend one: launches, waits of the host, bytes
	PYTHONPATH=tests $(BIN)/python -m benchmarks.launches --save

sweep: $(SWEEP)  ## run other people's architectures against a loop over samples, and write docs/concepts/architectures.rst: two hours
	PYTHONPATH=tests:build/sweep $(BIN)/python -m sweep $(ARGUMENTS)
	PYTHONPATH=tests:build/sweep $(BIN)/python -m sweep --cost $(ARGUMENTS)
	PYTHONPATH=tests:build/sweep $(BIN)/python -m sweep.page

versions:  ## run the tests with the oldest and the newest Python and torch, in environments of their own: takes GBs and an hour
	sh tests/versions.sh $(OLDEST)
	sh tests/versions.sh $(NEWEST)

newest:  ## run a short list of tests with the newest torch, if there is room for it
	ENVIRONMENTS="$(CACHE)" sh tests/versions.sh $(NEWEST) short

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build dist docs/_build report.csv report.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '*.egg-info' -o -name __pycache__ | xargs rm -rf

# Without their own requirements: torchvision, which is not used here, does not load beside every build of torch.
EXTRA = from importlib.metadata import requires; \
	print(*(r.partition(";")[0] for r in requires("torch-secorder") if "extra == \"$(1)\"" in r))
with_extra = $(BIN)/python -m pip install --quiet --no-deps $$($(BIN)/python -c '$(call EXTRA,$(1))')

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(call with_extra,peers)
	touch $@

$(BENCH): $(READY)
	$(call with_extra,bench)
	touch $@

# Into a folder of their own: what they require is not used here, and some of it does not load beside every build of torch.
$(SWEEP): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/sweep \
		timm==1.0.31 vit-pytorch==1.26.11 x-transformers==2.31.10 segmentation-models-pytorch==0.6.0 \
		einops==0.8.2 einx==0.4.3 frozendict==2.5.1 loguru==0.7.3 torch-einops-utils==0.2.0
	touch $@
