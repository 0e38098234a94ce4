# One command each: `make demo`, `make test`. Everything is set up in .venv; a second run rebuilds nothing.
PYTHON ?= python3
VENV   ?= .venv
# torch goes in first, alone and by version: asked for through another package, pip may fetch several GB for GPUs.
# Where there is no GPU, a CPU build is smaller: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.9.0
TORCH_INDEX ?=
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
RUN    := $(VENV)/bin/python
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.inl csrc/*/*.h)

.PHONY: demo test test-all setup bench clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "leafkern: setting up $(VENV) (first run: downloads about 1 GB)" >&2
	$(PIP) install "setuptools>=77" wheel "pybind11>=2.13"
	$(RUN) -c "import torch" 2>/dev/null || $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	if [ "$$(uname -s)" = Linux ]; then $(PIP) install $(TRITON); fi
	$(PIP) install --no-build-isolation -e ".[test]"
	touch $@

# TEACHER=folder-or-hub-id distils another model; DEMO_ARGS="--minutes 3" shortens it.
demo: setup
	$(RUN) -m leafkern.demo $(if $(TEACHER),--teacher $(TEACHER)) $(DEMO_ARGS)

test: setup
	$(RUN) -m pytest -m "not slow and not gpu"

test-all: setup
	$(RUN) -m pytest -m "slow and not gpu"

bench: setup
	$(RUN) -m leafkern bench --peers

clean:
	rm -rf build dist *.egg-info leafkern/_C*.so demo
