# Two commands: `make demo` shows the main job on the embedded model, `make test` passes the tests.
# Both work in a fresh clone with Python 3.10+ and make; they install into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The GPU set where a GPU is; `make ... SET=cpu` forces the small one.
SET ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Conflicts are expected: SGLang's own metadata asks for CUDA packages that a CPU never imports.
INSTALL := $(PIP) install --no-warn-conflicts

export OMP_NUM_THREADS ?= 1
export PIP_NO_WARN_SCRIPT_LOCATION = 1
# Where this is set, each of the tests' processes compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo serve dashboard test tests style types test-unit test-versions test-gpu mutants overlays lint docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(STAMP)  ## make .venv with everything (SET=cpu or gpu)

$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; set PYTHON=...")'
	@echo "installing the $(SET) set into $(VENV) (1 to 4 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) 'setuptools>=77' wheel
ifeq ($(SET),cpu)
	@$(INSTALL) -r requirements/cpu.txt
	@$(INSTALL) --no-deps -r requirements/cpu-nodeps.txt
	@$(INSTALL) --no-build-isolation -e '.[dashboard,dev]'
else
	@$(INSTALL) --no-build-isolation -e '.[gpu,dashboard,dev]'
endif
	@# Without .pyc files every server start takes twice as long.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib/python3*/site-packages/sglang $(VENV)/lib/python3*/site-packages/torch >/dev/null 2>&1 || true
	@touch $@

demo: install  ## serve the embedded model, show its flips, open the dashboard (DEMO_ONCE=1 ends by itself)
	@$(BIN)/python -m sglang_margingate.bench.demo $(if $(DEMO_ONCE),--once)

serve: install  ## serve the embedded model with the gate; prompts and texts go into its trace
	@$(BIN)/python -m sglang_margingate.launch_server --margingate-trace-text on

dashboard: install  ## open the dashboard on traces/
	@$(BIN)/python -m sglang_margingate.dashboard

lint: style types  ## ruff and mypy

style: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install
	@$(BIN)/mypy

docs: install  ## the documentation as a site, in out/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q && echo "out/site/index.html"

# The serving environment has no Triton on a CPU (SGLang brings a stand-in); its interpreter runs in an environment beside it.
TRITON_VENV := $(VENV)-triton
TRITON_STAMP := $(TRITON_VENV)/.installed

$(TRITON_STAMP): $(STAMP)
ifeq ($(SET),cpu)
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(PYTHON) -m venv $(TRITON_VENV) && \
	  $(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	    > "$$($(TRITON_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth" && \
	  $(TRITON_VENV)/bin/python -m pip --disable-pip-version-check -q install --no-deps triton==3.6.0 && touch $@; \
	else echo "no Triton for $$(uname -sm): its interpreter tests will skip"; fi
endif

# Tests that share a server run in one process (tests/conftest.py). Three processes: one more than the two cores of CI, since
# servers and browsers are waited for; WORKERS=0 runs all in one.
WORKERS ?= 3
SPREAD = -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# Rooms that need no server are measured line by line while their tests run; pyproject.toml names them and the least share.
COVER = --cov --cov-report=term:skip-covered

test: style $(TRITON_STAMP)  ## everything that needs no GPU; of other SGLang versions the contract
	@# mypy beside the tests: servers that are waited for leave it room.
	@$(MAKE) --no-print-directory -j2 types tests

tests: install $(TRITON_STAMP)
	@env $$(test -f $(TRITON_STAMP) && echo MARGINGATE_TRITON_PYTHON=$(TRITON_VENV)/bin/python) $(BIN)/python -m pytest $(SPREAD) $(COVER) -m 'not versions and not gpu'

test-unit: install  ## the fast tests alone
	@$(BIN)/python -m pytest $(SPREAD) -m 'not server and not browser and not gpu and not versions'

overlays: install  ## SGLang 0.5.20 and 0.5.23 beside the installed one, in .compat/ (600 MB)
	@$(BIN)/python tests/support/overlays.py

test-versions: overlays  ## serve every tested SGLang on the CPU (10 minutes a version)
	@$(BIN)/python -m pytest -m versions -rP tests/versions

# Hours on one core: ROOMS=gate takes a part. tests/MUTANTS.md has the last numbers and says why survivors may live.
ROOMS ?= gate trace runtime
mutants: install  ## break the code of pure rooms on purpose, line by line, and count what no test notices
	@$(INSTALL) 'mutmut>=3.8,<4'
	@mkdir -p mutants && rm -rf mutants/tests mutants/traces mutants/kernels
	@env PYTHONPATH=$(CURDIR)/mutants:$(CURDIR)/mutants/kernels $(BIN)/mutmut run --max-children 1 $(ROOMS:%='sglang_margingate.%.*')
	@$(BIN)/python tests/support/mutation_table.py

test-gpu:  ## the GPU suite, on a machine with one
	@$(PYTHON) -m pytest tests/gpu -m gpu

clean:  ## remove what the tests and builds leave (keeps .venv and traces)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage out mutants
