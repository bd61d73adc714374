# Two commands matter: `make demo` and `make test`. Both make .venv first.
TORCH  := torch==2.13.0
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/demo

# Threads that wait give their core back. On an idle machine this costs some ten per cent; without it
# a second busy process on the same cores slows small models down twentyfold.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test test-faults test-wheel test-triton lint bench clean
.DELETE_ON_ERROR:

install: $(VENV)/installed

# torch comes first and by name: a plain dependency on torch could bring a build for another device.
# DeepSpeed is built without its own compiled ops, which nothing here uses.
$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[demo,test,lint]'
	@touch $@

demo: install
	rm -rf $(RUN) && mkdir -p $(RUN) && date +%s > $(RUN)/started
	$(BIN)/python -m speed_engine encode --images digits --out data/digits
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --quiet --num_accelerators 1 speed_engine/train.py --config digits_dit_tiny run_dir=$(RUN)
	$(BIN)/python -m speed_engine sample --run $(RUN) --num 500 --sampler ddim --steps 50 --guidance 1.5 --out $(RUN)/samples
	$(BIN)/python -m speed_engine score --samples $(RUN)/samples --reference digits > /dev/null
	$(BIN)/python -m speed_engine plot --run $(RUN)
	$(BIN)/python -m speed_engine summary --run $(RUN) --started $$(cat $(RUN)/started)

# Two processes of pytest, each with the files that it took, in order: small files come last, and both end together.
# One thread each: small tensors on more threads than there are cores would spend six sevenths of the time at barriers.
test: export OMP_NUM_THREADS ?= 1
test: install
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

# Some fifty kills and two thousand damaged files, two nodes that lose each other, methods that learn resumed elsewhere:
# half an hour on two cores. What is found goes to FAULTS as JSON and as a page; started again, it goes on.
FAULTS ?= runs/faults
test-faults: export OMP_NUM_THREADS ?= 1
test-faults: install
	PYTHONPATH=".:kernels$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python -m tests.sweeps --out $(FAULTS)

# The wheel, installed in a folder of its own: it trains from there, its C++ kernels compiled anew.
test-wheel: export OMP_NUM_THREADS ?= 1
test-wheel: install
	$(BIN)/python -m pytest -q tests/sweeps/wheel.py

# The code that another Triton makes of the GPU kernels, as `make test-triton VERSION=3.6.0`, that of torch 2.11: no GPU
# is needed. It lies beside the environment, not in it, since torch brings its own.
VERSION ?= 3.6.0
TRITON  := .venv-triton-$(VERSION)
$(TRITON)/installed: | install
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(TRITON) triton==$(VERSION)
	@touch $@

test-triton: $(TRITON)/installed
	PYTHONPATH="$(TRITON)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python -c \
	  'import sys, triton; v = triton.__version__; sys.exit(None if v == "$(VERSION)" else f"Triton {v} was imported")'
	PYTHONPATH="$(TRITON)$${PYTHONPATH:+:$$PYTHONPATH}" TRITON_CACHE_DIR=$(TRITON)/cache \
	  $(BIN)/python -m pytest -q tests/kernels -k "ahead_of_time"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Freed memory stays with the process, for all that are compared: in a virtual machine a fresh page can cost as much as
# the arithmetic on it, and whoever frees its gradients in every step would pay for the machine. DiT-XL/2 under DeepSpeed
# would then not fit 24 GB beside the reference, so it goes without. pytest says 5 where there is no such case, as on GPUs.
bench: SHOWN := --benchmark-columns=median,iqr,rounds
bench: export MALLOC_MMAP_MAX_ ?= 0
bench: export MALLOC_TRIM_THRESHOLD_ ?= 1000000000000
bench: install
	$(BIN)/python -m pytest benchmarks -k 'not XL2-b4-ours-deepspeed' $(SHOWN)
	env -u MALLOC_MMAP_MAX_ -u MALLOC_TRIM_THRESHOLD_ \
	  $(BIN)/python -m pytest benchmarks/train_step/test_train_step.py -k XL2-b4-ours-deepspeed $(SHOWN) || [ $$? = 5 ]

clean:
	rm -rf $(VENV) .venv-triton-* runs data .pytest_cache .ruff_cache
