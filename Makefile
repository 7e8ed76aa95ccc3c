# Each target sets up what it needs. Tests run on one thread per worker, so that times and numbers repeat.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test check bench stress tiny parity-table

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	OMP_NUM_THREADS=2 $(BIN)/lalm-lens demo --out demo_out

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -q tests/test_imports.py

test: check
	$(BIN)/pytest -n 2 --dist loadfile -m "not stress and not numbers"
	$(BIN)/pytest -n 2 --dist loadfile -m "numbers and not stress" -o addopts=--strict-markers

stress: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/pytest -m stress

parity-table: setup
	HF_HUB_OFFLINE=1 $(BIN)/python tests/parity_table.py

bench: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench,ray]'
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python -m benchmarks.lens
	$(BIN)/python -m benchmarks.tracing
	$(BIN)/python -m benchmarks.cluster

tiny: setup
	$(BIN)/python -m lalm_lens.assets.train tiny_lalm
	$(BIN)/python -m lalm_lens.assets.train tiny_lalm_planted
	$(BIN)/python -m lalm_lens.assets.train tiny_lalm_relay
	$(BIN)/python -m lalm_lens.assets.train tiny_lalm_suppress
	$(BIN)/python -m lalm_lens.assets.train tiny_lalm_erase
	$(BIN)/python -m lalm_lens.assets.audio_visual.train
