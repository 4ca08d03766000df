# Every target sets up what it needs, once, in .venv; run it again after a change of the requirements.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= recipes/configs/words_sparse90.yaml
OUTPUT ?= outputs/words_sparse90

.PHONY: demo test slow lint smoke clean

demo: $(VENV)/demo.stamp  ## Fine-tune, sparsify, save, load back: about five minutes on two cores
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/text_classification.py \
		--config $(CONFIG) --output_dir $(OUTPUT)
	$(BIN)/hf-approx inspect $(OUTPUT)/compressed

test: $(VENV)/dev.stamp  ## The test suite, without the tests marked slow
	$(BIN)/python -m pytest -n auto --dist loadscope

slow: $(VENV)/dev.stamp  ## The tests marked slow
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/dev.stamp  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: $(VENV)/demo.stamp  ## The demo on a handful of examples
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/text_classification.py \
		--config $(CONFIG) --output_dir outputs/smoke --set max_train_samples=256 --set max_eval_samples=128 \
		--set training.num_train_epochs=1
	$(BIN)/hf-approx inspect outputs/smoke/compressed

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs
