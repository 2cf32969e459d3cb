# `make train` is all a newcomer needs: it makes .venv, installs this package there, and trains on digits.
# Needed beforehand: make, and a Python with pip. PYTHON=... picks another one, PIP_ARGS=... is handed to pip.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

help:
	@echo 'make train            install, and train on the digits; the results are in runs/digits'
	@echo 'make ui               show the runs in MLflow, at http://127.0.0.1:5000'
	@echo 'make test             install what tests need, and run all but the slow ones'
	@echo 'make test-all         the same and the slow ones: kills, clusters of several machines, browsers; installs gradio'
	@echo 'make test-oldest-ray  install the oldest Ray that is supported as well, and run the tests that depend on Ray most'
	@echo 'make test-lowest      install the lowest versions that pyproject.toml allows, and run the tests that use them all'
	@echo 'make test-nightly     on the oldest Ray too: lost and preempted nodes, elastic runs, submitted jobs'
	@echo 'make gpu              with a CUDA GPU: its tests, and the tables benchmarks/gpu.md and checkpoints-gpu.md'
	@echo 'make soak             train for half an hour through a fault a minute, and compare with an undisturbed run'
	@echo 'make nets             train and evaluate the built-in nets anew (ddpm/runs/nets): twenty to fifty minutes on two cores'
	@echo 'make check            format, lint, types, and which module may import which'
	@echo 'make reference        write the generated pages of docs/reference again'
	@echo 'make docs             the documentation, the API and the measurements as HTML, in build/pages'
	@echo 'make clean            remove $(VENV) and caches; runs/ stays'

train: $(VENV)/installed
	$(BIN)/ddpm train digits

ui: $(VENV)/installed
	@$(BIN)/python jobs/ui.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist worksteal

# For examples/demo alone, in a folder of its own: gradio allows only some versions of Pillow.
GRADIO_FOLDER := $(VENV)/gradio

# CI leaves some of them out: make test-all MARKS='not long'
MARKS :=
test-all: $(VENV)/installed-test $(GRADIO_FOLDER)/installed
	$(BIN)/python -m pytest -m '$(MARKS)' --numprocesses 2 --dist worksteal --durations 40

# Ray's processes inherit PYTHONPATH: programs, agents, drivers of submitted jobs and workers are all of that Ray.
OLDEST_RAY := $(shell sed -n 's/.*"ray\[.*\]>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLDEST_RAY_FOLDER := $(VENV)/ray-$(OLDEST_RAY)
ON_OLDEST_RAY = PYTHONPATH='$(CURDIR)/$(OLDEST_RAY_FOLDER)$(PYTHONPATH:%=:%)' $(BIN)/python
test-oldest-ray: MARK := oldest_ray
test-nightly: MARK := nightly
test-oldest-ray test-nightly: $(OLDEST_RAY_FOLDER)/installed
	$(ON_OLDEST_RAY) -c 'import ray; print(ray.__file__); assert f"{ray.__version__}.".startswith("$(OLDEST_RAY).")'
	$(ON_OLDEST_RAY) -m pytest -m $(MARK) --numprocesses 2 --dist load --durations 10

LOWEST := $(VENV)/lowest
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest -m lowest --numprocesses 2 --dist load --durations 10

# All that `check`, `docs` and the tests need, so that .ci/run can repeat a failed download.
install-all: $(VENV)/installed-check $(VENV)/installed-docs $(OLDEST_RAY_FOLDER)/installed $(GRADIO_FOLDER)/installed
install-all: $(LOWEST)/installed

gpu: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[benchmarks]'
	$(BIN)/python benchmarks/step.py --case cifar10 --device cuda
	$(BIN)/python benchmarks/checkpoints.py --base-width 184 --steps 2000 --every-steps 400

soak: $(VENV)/installed-test
	$(BIN)/python tests/soak.py

nets: $(VENV)/installed
	$(BIN)/python infra/builtin_nets.py

check: $(VENV)/installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

reference: $(VENV)/installed
	$(BIN)/python docs/write_reference.py

# Built from a copy: Zensical 0.0.73 looks into all folders of its docs_dir, and waits for ever with .venv among them.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md zensical.toml docs benchmarks
docs: $(VENV)/installed-docs
	rm -rf build/pages build/pages-source
	mkdir -p build/pages-source
	cp -R $(PAGES) build/pages-source
	cp --parents examples/*.md examples/*/*.md build/pages-source
	ln -s ../../ddpm build/pages-source/ddpm
	cd build/pages-source && PYTHONPATH=docs ../../$(BIN)/zensical build --strict
	mv build/pages-source/build/pages build/pages
	@echo 'file://$(CURDIR)/build/pages/index.html'
	@echo 'Its search needs a server: $(BIN)/python -m http.server --directory build/pages'

clean:
	rm -rf $(VENV) build *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

# An install is repeated when pyproject.toml has changed. [check] contains [test], which contains the package.
$(VENV)/installed: STAMPS := installed
$(VENV)/installed-test: EXTRA := [test]
$(VENV)/installed-test: STAMPS := installed installed-test
$(VENV)/installed-check: EXTRA := [check]
$(VENV)/installed-check: STAMPS := installed installed-test installed-check
$(VENV)/installed-docs: EXTRA := [docs]
$(VENV)/installed-docs: STAMPS := installed installed-docs
$(VENV)/installed $(VENV)/installed-test $(VENV)/installed-check $(VENV)/installed-docs: pyproject.toml | $(BIN)/pip
	@echo 'Installing into $(VENV); the first time takes some minutes, since PyTorch is large.'
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.$(EXTRA)'
	@touch $(STAMPS:%=$(VENV)/%)

$(GRADIO_FOLDER)/installed: examples/demo/requirements.txt | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_ARGS) --upgrade --target $(@D) --requirement $<
	@touch $@

$(OLDEST_RAY_FOLDER)/installed: $(VENV)/installed-test
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --upgrade --target $(@D) 'ray==$(OLDEST_RAY).*'
	@touch $@

# PyTorch is not tried at its lowest version: an older one is another download of gigabytes.
$(LOWEST)/installed: $(VENV)/installed-test
	$(BIN)/uv venv --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/python -m pip --python $(LOWEST)/bin/python install $(PIP_ARGS) torch torchvision
	$(BIN)/python -m pip --python $(LOWEST)/bin/python freeze | grep '^torch' > $(LOWEST)/torch.txt
	$(BIN)/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --override $(LOWEST)/torch.txt \
	    --editable '.[test]'
	@touch $@

# Debian keeps the pip of new environments in a package of its own (python3-venv). Where that is missing,
# the pip of the system brings one.
NO_PYTHON := Python 3.11 or newer is needed. If it is installed elsewhere: make PYTHON=/path/to/python
NO_PIP := has neither venv nor pip. On Debian and Ubuntu they come with: apt install python3-venv
$(BIN)/pip:
	@test -n '$(PYTHON)' || { echo '$(NO_PYTHON)' >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	    $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -m venv --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; \
	else \
	    echo '$(PYTHON) $(NO_PIP)' >&2; exit 1; \
	fi

.PHONY: help train ui test test-all test-oldest-ray test-lowest test-nightly install-all gpu soak nets check reference docs clean
