# Needs python3 (3.10 or newer), make and git; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an installation that was interrupted is done again. The demos need the package alone.
INSTALLED := $(VENV)/.installed
INSTALLED_ALL := $(VENV)/.installed-all
# The lowest versions that pyproject.toml allows, in an environment of their own.
FLOORS := .venv-floors
INSTALLED_FLOORS := $(FLOORS)/.installed
# Processes of the suite; each uses one core.
JOBS ?= 2

.PHONY: help setup demo demo-srpo demo-vote miniature test floors campaigns docs lint format clean

help:
	@echo "make demo       align the small built-in FLUX on this machine and write the results to demo-chunk-grpo/"
	@echo "make demo-srpo  the same with SRPO, to demo-srpo/"
	@echo "make demo-vote  the same with your clicks on a page as the reward, to demo-vote/"
	@echo "make miniature  the papers' claims in small, with seeds and intervals, many hours; ARMS=\"step temporal\" for some arms"
	@echo "make test       run the whole test suite"
	@echo "make floors     run the suite, but for what needs DeepSpeed, with the lowest versions that pyproject.toml allows"
	@echo "make docs       build the documentation site into site/"
	@echo "make campaigns  kill runs, fill disks, draw random settings and start every configuration, some hours"
	@echo "make lint       check style and formatting"
	@echo "make format     repair style and formatting"
	@echo "make clean      remove .venv and build leftovers"

setup: $(INSTALLED_ALL)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, but $(PYTHON) is " + sys.version.split()[0] + ". Choose another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $(INSTALLED)

$(INSTALLED_ALL): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,test]"
	touch $(INSTALLED_ALL)

demo: $(INSTALLED)
	$(BIN)/trl-diffusion demo chunk_grpo $(DEMO_ARGS)

demo-vote: $(INSTALLED)
	$(BIN)/trl-diffusion demo vote $(DEMO_ARGS)

demo-srpo: $(INSTALLED)
	$(BIN)/trl-diffusion demo srpo $(DEMO_ARGS)

miniature: $(INSTALLED_ALL)
	OMP_NUM_THREADS=1 $(BIN)/python examples/miniature/run.py $(if $(ARMS),--arms $(ARMS))
	$(BIN)/python examples/miniature/page.py

test: $(INSTALLED_ALL)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TEST_ARGS)

# DeepSpeed stays out: it would be built against the torch of the day. Compiled here, as pip does: where Python may not
# write bytecode, each of the suite's processes would otherwise compile all that it imports, for a minute.
$(INSTALLED_FLOORS): pyproject.toml
	$(PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --disable-pip-version-check uv
	echo deepspeed > $(FLOORS)/excluded.txt
	$(FLOORS)/bin/uv pip install --python $(FLOORS)/bin/python --compile-bytecode --resolution lowest-direct --excludes $(FLOORS)/excluded.txt -e ".[quantization,test]"
	touch $(INSTALLED_FLOORS)

floors: $(INSTALLED_FLOORS)
	$(FLOORS)/bin/python -m pytest -n $(JOBS) --dist loadfile $(TEST_ARGS)

docs: $(INSTALLED_ALL)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

campaigns: $(INSTALLED_ALL)
	PYTHONPATH=tests $(BIN)/python tests/campaigns/kill.py --kills 20
	PYTHONPATH=tests $(BIN)/python tests/campaigns/configs.py --configs 2000
	PYTHONPATH=tests $(BIN)/python tests/campaigns/launchers.py
	PYTHONPATH=tests $(BIN)/python tests/campaigns/full_disk.py
	PYTHONPATH=tests $(BIN)/python tests/campaigns/exits.py --launches 100
	PYTHONPATH=tests $(BIN)/python tests/campaigns/resizing.py
	PYTHONPATH=tests $(BIN)/python tests/campaigns/plans.py
	PYTHONPATH=tests $(BIN)/python tests/campaigns/soak.py train
	PYTHONPATH=tests $(BIN)/python tests/campaigns/soak.py server
	PYTHONPATH=tests $(BIN)/python tests/campaigns/soak.py cache
	PYTHONPATH=tests $(BIN)/python tests/campaigns/full_width.py

lint: $(INSTALLED_ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_ALL)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOORS) build dist site .pytest_cache .ruff_cache
	find trl_diffusion tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
