# `make demo` and `make test` do all the set-up that they need; see README.md.

PYTHON ?= python3
VENV ?= .venv
# The versions that are tested. PyPI's torch for Linux pulls gigabytes of CUDA packages in: where there is
# no GPU, set PIP_EXTRA_INDEX_URL to the index of PyTorch's CPU builds, whose versions pip prefers.
CONSTRAINTS := constraints.txt
# Threads that spin while they wait starve each other on few cores.
RUN := OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# An environment of its own: what is installed is the text.
REPRODUCTION := .venv-reproduction
LABORATORY := OMP_WAIT_POLICY=PASSIVE $(REPRODUCTION)/bin/python -m reproduction
# Of the shell's $preset: "smollm2-experts" shares the folder of "smollm2".
FOLDER_OF = --folder outputs/reproduction/$${preset%%-*}

# docs/versions.md says what these are.
ROW ?= oldest transformer-lens-2

.PHONY: install demo test test-slow test-matrix test-ecosystem lint docs notebooks bench bench-training bench-caching bench-gpu reproduce release clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

# Nothing that the list lacks, and so no CUDA packages: torch must be a CPU build, or `pip check`
# says what is missing.
$(REPRODUCTION)/.installed: pyproject.toml constraints/reproduction.txt
	$(PYTHON) -m venv --clear $(REPRODUCTION)
	$(REPRODUCTION)/bin/python -m pip install --quiet --no-deps --requirement constraints/reproduction.txt
	$(REPRODUCTION)/bin/python -m pip install --quiet --no-deps --editable .
	$(REPRODUCTION)/bin/python -m pip check
	touch $@

demo: $(INSTALLED)
	$(RUN) examples/train_scale_smollm2.py $(ARGS)

# Whole files to one process, with the models and the SAEs that their tests share, in the order of
# tests/conftest.py.
TEST_PROCESSES ?= 2

test: $(INSTALLED)
	$(RUN) -m pytest -m "not slow" --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

# Groups of processes, which wait for each other much of the time.
test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow --numprocesses $(TEST_PROCESSES) --dist loadfile $(ARGS)

# Each row has its own environment, made once, and the constraints of its name.
test-matrix:
	for row in $(ROW); do \
		$(MAKE) test VENV=.venv-matrix/$$row CONSTRAINTS=constraints/$$row.txt || exit; \
	done

# Tools of others have requirements that no other environment has: see docs/ecosystem.md.
ECOSYSTEM := .venv-ecosystem

test-ecosystem: $(ECOSYSTEM)/.installed
	OMP_WAIT_POLICY=PASSIVE $(ECOSYSTEM)/bin/python -m pytest tests/ecosystem $(ARGS)

# torchaudio and torchvision come with them, built for CUDA: beside a CPU build of torch, transformers
# fails to import them, and nothing here uses them.
$(ECOSYSTEM)/.installed: pyproject.toml $(CONSTRAINTS) constraints/ecosystem.txt
	$(PYTHON) -m venv --clear $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(ECOSYSTEM)/bin/python -m pip install --quiet --requirement constraints/ecosystem.txt --editable ".[demo,score]"
	$(ECOSYSTEM)/bin/python -m pip uninstall --quiet --yes torchaudio torchvision
	touch $@

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Into site/, offline.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "the site begins at site/index.html"

$(VENV)/.docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[docs]"
	touch $@

# Renews their outputs, without progress bars and warnings.
notebooks: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE TQDM_DISABLE=1 PYTHONWARNINGS=ignore $(VENV)/bin/jupyter execute --inplace \
		examples/train_and_compare.ipynb examples/explore.ipynb

bench: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[bench]"
	$(RUN) benchmarks/speed.py $(ARGS)

bench-training: $(INSTALLED)
	$(RUN) benchmarks/training.py $(ARGS)

bench-caching: $(INSTALLED)
	$(RUN) benchmarks/caching.py $(ARGS)

# Without $(INSTALLED), whose torch has no CUDA: with a PYTHON that has torch for the GPU, and what
# the package and its extra "bench" require.
bench-gpu:
	OMP_WAIT_POLICY=PASSIVE PYTHONPATH=".:$$PYTHONPATH" $(PYTHON) benchmarks/gpu.py $(ARGS)

# Hours; goes on where it stopped. An ablation: PRESETS=smollm2-experts, see docs/ablations.md.
# The report is of the folder of the first.
PRESETS ?= smollm2
WORKERS ?= 2

reproduce: $(REPRODUCTION)/.installed
	for preset in $(PRESETS); do \
		$(LABORATORY) cache --preset $$preset $(FOLDER_OF) && \
		$(LABORATORY) run --preset $$preset $(FOLDER_OF) --workers $(WORKERS) --keep_weights && \
		$(LABORATORY) evaluate --preset $$preset $(FOLDER_OF) --contexts 16 || exit; \
	done
	preset=$(firstword $(PRESETS)); $(LABORATORY) report --preset $$preset $(FOLDER_OF) \
		--images outputs/reproduction/$${preset%%-*}/figures $(ARGS)

# The checklist is in CONTRIBUTING.md. With -I Python sees nothing of the checkout but the smoke test.
RELEASE := .venv-release

release:
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) build twine
	$(RELEASE)/tools/bin/python -m build
	$(RELEASE)/tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)/clean
	$(RELEASE)/clean/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	OMP_WAIT_POLICY=PASSIVE $(RELEASE)/clean/bin/python -I tests/smoke.py

clean:
	rm -rf $(VENV) .venv-matrix $(ECOSYSTEM) $(RELEASE) $(REPRODUCTION) dist outputs site
