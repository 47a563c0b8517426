# `make help` lists what can be made. PYTHON chooses the Python (>= 3.11) that makes .venv: make venv PYTHON=python3.12

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
BENCH = rmd17_ethanol deepmd_water rmd17_aspirin
# threads of one process in the tests, which run in two processes
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.NOTPARALLEL:
.PHONY: help quickstart venv test lint format pytest wheel lammps bench accuracy pages clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: $(INSTALLED) ## install everything, then distil the default teacher for ethanol into runs/ethanol
	$(BIN)/mlff distill examples/ethanol.yaml

venv: $(INSTALLED) ## .venv with every extra, at the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) was not found; name a Python >= 3.11: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mlff-engines needs Python >= 3.11 and $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
			"name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[all,dev]'
	@touch $(INSTALLED)

# LAMMPS with ML-IAP takes 15 core minutes: built here only where its tests must not skip
test: $(INSTALLED) lint $(if $(findstring lammps-mliap,$(MLFF_REQUIRE)),lammps) pytest wheel ## lint, the test suite, and the wheel in an empty environment

lint: $(INSTALLED) ## style, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## mend what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pytest: $(INSTALLED) ## the test suite alone; choose tests with ARGS="-k cutoff"
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 $(ARGS)

wheel: $(INSTALLED) ## build the wheel and try it in an empty environment
	BUILD_PYTHON=$(BIN)/python .ci/wheel-smoke

lammps: $(INSTALLED) ## build LAMMPS with `pair_style mliap unified`, once: 15 core minutes; without apt: SOURCE=ARCHIVE
	$(BIN)/mlff lammps build $(if $(SOURCE),--source $(SOURCE))

pages: $(INSTALLED) ## write docs/faults.md and docs/conformance.md anew from the tests
	$(BIN)/python tests/faults.py --write
	PYTHONPATH=tests $(BIN)/python tests/conformance_page.py --write

bench: $(INSTALLED) ## the speed tables of docs/benchmarks.md, other packages included; run again to resume
	$(BIN)/mlff bench -o runs/bench --peers schnetpack,torchmdnet,mace,nequip,allegro,deepmd,so3krates --page docs/benchmarks.md
	$(BIN)/mlff bench --roofline -o runs/bench --page docs/benchmarks.md
	$(BIN)/python examples/benchmarks/same_accuracy.py examples/benchmarks/same_accuracy.yaml -o runs/same_accuracy \
		--page docs/benchmarks.md

accuracy: $(INSTALLED) ## the accuracy figures of docs/benchmarks.md: 90 minutes per data set; run again to resume
	for name in $(BENCH); do $(BIN)/mlff train examples/benchmarks/$$name.yaml -o runs/$$name || exit 1; done

clean: ## remove caches and build products, never .venv nor runs/
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
