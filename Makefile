# `make demo` and `make test` set everything up in .venv first; a second run rebuilds nothing.
PYTHON ?= python3
VENV   ?= .venv
# torch goes in first, alone and by version: asked for through another package, pip may fetch another build of it.
# The default build carries CUDA (several GB). Without a GPU, the CPU build is enough:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.9.0
TORCH_INDEX ?=

RUN := $(VENV)/bin/python
# One thread each: torch's threads wait for one another for long where there are more of them than cores.
WORKERS := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.inl csrc/*/*.h)

.PHONY: demo test test-all kernels sanitize bench setup clean

# TEACHER=folder-or-hub-id distils another model; DEMO_ARGS="--minutes 4" shortens the work.
demo: $(VENV)/installed-demo
	@$(RUN) -m leafkern.demo $(if $(TEACHER),--teacher $(TEACHER)) $(DEMO_ARGS)

# Triton decides when it is imported whether kernels are interpreted or compiled: each in a process of its own.
test: $(VENV)/installed-test
	$(WORKERS) -m "not slow and not gpu and not interpreter and not compile"
	@if [ "$$(uname -s)" = Linux ]; then set -ex; \
		TRITON_INTERPRET=1 $(WORKERS) -m "interpreter and not slow"; \
		$(RUN) -m pytest -m "compile and not slow"; fi

# What `make test` leaves out for time; `-k stress` are kills of an index's writer and its hundred readers.
test-all: $(VENV)/installed-test
	$(RUN) -m pytest -m "slow and not gpu"

# Every shipped Triton kernel compiled for every architecture: registers, spills, shared memory.
kernels: $(VENV)/installed-test
	@$(RUN) -m leafkern.bench.kernels $(KERNELS_ARGS)

# The native kernels' tests under the compiler's sanitizers; also part of test-all.
sanitize: $(VENV)/installed-test
	$(RUN) -m pytest -m slow -k sanitizers tests/ops/test_native_build.py

bench: $(VENV)/installed-test
	$(RUN) -m leafkern bench --peers

setup: $(VENV)/installed-test

# One stamp per extra of pyproject.toml.
$(VENV)/installed-%: pyproject.toml setup.py $(SOURCES)
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "leafkern: setting up $(VENV) for '$*'; the first time this downloads torch and other packages" >&2
	@$(PIP) install "setuptools>=77" wheel "pybind11>=2.13"
	@$(RUN) -c "import torch" 2>/dev/null || $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@if [ "$$(uname -s)" = Linux ]; then $(PIP) install $(TRITON); fi
	@$(PIP) install --no-build-isolation -e ".[$*]"
	@touch $@

clean:
	rm -rf build dist *.egg-info leafkern/_C*.so demo
