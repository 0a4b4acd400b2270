# `make demo` and `make test` set up .venv themselves; a machine needs Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint clean

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Train a small byte model on real text, let it write, and run the first ablation.
demo: .venv/installed
	rm -rf runs/text/demo
	$(BIN)/layerzoo fit --config text --trainer.logger.init_args.version demo
	$(BIN)/layerzoo generate runs/text/demo/checkpoints/last.ckpt --prompt 'def ' --seed 1
	$(BIN)/layerzoo ablate run quickstart

test: .venv/installed
	$(BIN)/pytest

# The slow tests too, and those of the Ray executor: about 25 minutes.
test-all: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/pytest -m ''

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build *.egg-info
