# `make` lists the targets. The first one that needs it makes $(VENV) and installs the project there.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# of reproduce-...: only so many pictures; LONG=1 starts what takes more than an hour on a CPU; other settings, such as device=cuda
LIMIT ?=
SEQUENCES ?= 200
LONG ?=
ARGS ?=

RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) ## Make the virtual environment and install the project (others do so when they need it)

# torch goes first, so that TORCH can choose another build: make install TORCH="torch==2.13.0 --index-url ..."
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "keyanon needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install $(TORCH)
	$(RUN) pip install -c constraints.txt -e ".[dev]"
	@touch $@

.PHONY: quickstart
quickstart: $(INSTALLED) ## Anonymize, recover, attack and score with the bundled model: CPU, minutes (LIMIT=8 for fewer pictures)
	-$(RUN) keyanon.weights fetch mobilefacenet
	$(RUN) experiments.run experiment=quickstart $(if $(LIMIT),limit=$(LIMIT))

# One target for each file of the paper's numbers that has an experiment. An experiment with a command's name is that command's.
PAPER := $(patsubst results/paper/%.yaml,%,$(wildcard results/paper/*.yaml))
PUBLISHED := $(filter $(PAPER),$(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/*.yaml)))
REPRODUCE := $(addprefix reproduce-,$(PUBLISHED))
COMMAND = experiments.$(if $(wildcard experiments/$1.py),$1,run) experiment=$1 $(ASKED)
ASKED := $(if $(LIMIT),limit=$(LIMIT)) $(if $(LONG),long=true) $(ARGS)

.PHONY: reproduce-all brought-all fetched-all estimated-all $(REPRODUCE) $(PUBLISHED:%=brought-%) $(PUBLISHED:%=fetched-%)
.NOTPARALLEL: # each target takes the whole machine, and these come in order: pictures, installation, weights, run, table
reproduce-table1: ## Reproduce the paper's Table 1 in results/tables (needs CelebA-HQ and LFW; weights are fetched; LIMIT=, LONG=1, ARGS=)
reproduce-table2: ## Reproduce verification on LFW (needs LFW; weights are fetched; LIMIT=, LONG=1, ARGS=)
reproduce-all: brought-all $(INSTALLED) fetched-all estimated-all $(REPRODUCE) ## Reproduce all that the paper has a number for, after saying how long each takes

$(REPRODUCE): reproduce-%: brought-% $(INSTALLED) fetched-%
	$(RUN) $(call COMMAND,$*) || [ $$? -eq 3 ]  # 3: pictures were skipped, which the table counts
	$(RUN) experiments.tables $* --runs results/runs/$*

# what only a person can bring, told before anything is installed
brought-all $(PUBLISHED:%=brought-%): brought-%:
	@$(PYTHON) -m experiments.brought $(if $(filter all,$*),$(PUBLISHED),$*)

# once for all where all are asked for
fetched-all $(PUBLISHED:%=fetched-%): FETCHED = $(and $(filter-out all,$*),$(filter reproduce-all,$(MAKECMDGOALS)))
fetched-all $(PUBLISHED:%=fetched-%): fetched-%: $(INSTALLED)
	$(if $(FETCHED),@true,$(RUN) keyanon.weights fetch --all $(if $(filter all,$*),$(PUBLISHED),$*) $(ARGS))

estimated-all: $(INSTALLED) ## Say how long each target that reproduces takes on this machine
	$(foreach name,$(PUBLISHED),$(RUN) $(call COMMAND,$(name)) estimate_only=true &&) true

.PHONY: histories
histories: $(INSTALLED) ## Compare 200 random histories of a run's folders with runs in empty ones (KEYANON_SEED=... repeats)
	KEYANON_SEQUENCES=$(SEQUENCES) $(RUN) pytest tests/test_identity.py -q -p no:cacheprovider

.PHONY: tables
tables: $(INSTALLED) ## Rebuild every committed table from the committed scores
	$(RUN) experiments.tables

.PHONY: test
test: $(INSTALLED) ## Run the tests on all cores; the library has to be covered to 95 %
	$(RUN) pytest -n logical --dist loadfile --cov=keyanon --cov-fail-under=95

.PHONY: rehearsal
rehearsal: $(INSTALLED) ## Go from nothing to all tables on tiny weights from a hub on this machine, killed on the way
	PYTHONPATH=$(CURDIR) $(RUN) tests.rehearsal

.PHONY: check
check: $(INSTALLED) shapes ## Lint, formatting, types, shapes at run time, and the documents' claims beside the tables
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) experiments.claims

# Files whose tests call most of what has shapes; to check every call of every test would take twice the time of the tests.
SHAPED := solvers transforms pixels headers seams residuals scorers block_dct signflip refinement leakage learned parsing classical \
	scrambling encrypted_crop ldfa nullface salar controlnet model runner

.PHONY: shapes
shapes: $(INSTALLED) ## Tests again with the shapes and types of annotations checked at every call (jaxtyping, beartype)
	KEYANON_SHAPES=1 $(RUN) pytest -q -n logical -k "not compiled" $(SHAPED:%=tests/test_%.py)

.PHONY: bench
bench: $(INSTALLED) ## Measure throughput on this machine
	$(RUN) benchmarks.throughput

.PHONY: clean
clean: ## Remove caches and the virtual environment; runs and results stay
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
