# Every target sets itself up: on a fresh clone `make demo` and `make test` are all one needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready$(EXTRAS:%=-%)

.PHONY: install demo test chaos lint format bench bench-gpu bench-pipeline down secrets clean

install: $(READY)

# Exact versions come from one constraints file; pyproject.toml only says what would do.
$(READY): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hydraopt needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt --editable '.[local,production,test$(EXTRAS:%=,%)]'
	@touch $(READY)

demo: $(READY)  ## the whole pipeline on a small real example; KEEP=1 leaves the services running
	$(BIN)/hydraopt demo $(if $(KEEP),--keep)

test: lint  ## linters, types, import contracts, and all tests
	$(BIN)/python -m pytest $(ARGS)

# The short form, a seeded sample of it, is part of `make test`. The seed stands in pytest's header.
chaos: $(READY)  ## everything that tests/chaos can break, an hour; SEED=7 draws anew, ARGS= goes to pytest
	$(BIN)/python -m pytest tests/chaos --chaos-long --chaos-seed=$(or $(SEED),1) -s $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## merge time, memory and error on model shapes, beside PEFT's svd and a fit by Adam; prints tables
	$(BIN)/python tests/benchmarks/bench_merge.py
	$(BIN)/python tests/benchmarks/bench_baselines.py

bench-gpu: $(READY)  ## a merge on a CUDA GPU beside the same one on the CPU; 7 GB of adapters are written for it
	$(BIN)/python tests/benchmarks/bench_gpu.py

bench-pipeline: $(READY)  ## publishing, a device's update, a registration's way and recoveries on local services
	$(BIN)/python tests/benchmarks/bench_pipeline.py

down: $(READY)
	$(BIN)/hydraopt down

secrets:  ## fresh passwords and keys for docker-compose.yml in .env, mode 600; one that is there is kept
	@mkdir -p -m 700 .hydraopt && mkdir -p .hydraopt/bundles .hydraopt/approvers .hydraopt/services
	@$(PYTHON) -m infra.secret_values .env

clean:
	rm -rf $(VENV) .hydraopt build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
