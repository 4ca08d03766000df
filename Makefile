# Every target sets up what it needs, once, in .venv; run it again after a change of the requirements.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= recipes/configs/words_sparse90.yaml
OUTPUT ?= outputs/words_sparse90
# Of torture: damaged folders of each codec, kills and full disks in all, and what all of them are drawn from.
CASES ?= 10000
KILLS ?= 200
DISKS ?= 200
SEED ?= 0
# Each recipe with the config that is its default.
RECIPES := text_classification:words_sparse90 language_modeling:lm_docs_sparse80_bits4 \
	image_classification:digits_vit_sparse80 optimizer_sweep:sweep_digits ticket_search:tickets_digits \
	translation:gettext_marian_bits4 image_generation:digits_gan_bits4 \
	shortest_paths:shortest_paths

# Those that save a model; their cards and pictures are in model_cards.
CARDS := text_classification language_modeling image_classification translation image_generation

.PHONY: demo test slow torture lint smoke cards clean

demo: $(VENV)/demo.stamp  ## Fine-tune, sparsify, save, load back: about five minutes on two cores
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/text_classification.py \
		--config $(CONFIG) --output_dir $(OUTPUT)
	$(BIN)/hf-approx inspect $(OUTPUT)/compressed

test: $(VENV)/dev.stamp  ## The test suite, without the tests marked slow
	$(BIN)/python -m pytest -n auto --dist loadscope

slow: $(VENV)/dev.stamp  ## The tests marked slow
	$(BIN)/python -m pytest -m slow

torture: $(VENV)/dev.stamp  ## Damaged and hostile folders, kills, full disks: nothing may be lost or wrong
	PYTHONPATH=tests $(BIN)/python -m torture --cases $(CASES) --kills $(KILLS) --disks $(DISKS) --seed $(SEED) $(PARTS)

lint: $(VENV)/dev.stamp  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: $(VENV)/dev.stamp  ## Every recipe on a handful of examples; the demo's as the demo runs it
	rm -rf outputs/smoke
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/text_classification.py \
		--config recipes/configs/words_sparse90.yaml --output_dir outputs/smoke/text_classification --smoke
	$(BIN)/python tests/smoke.py outputs/smoke $(filter-out text_classification:%,$(RECIPES))
	$(BIN)/hf-approx inspect outputs/smoke/text_classification/compressed

cards: $(VENV)/dev.stamp  ## The cards in model_cards, from the default configs: half an hour on two cores
	set -e; for recipe in $(CARDS); do run=$$(echo "$(RECIPES)" | tr ' ' '\n' | grep "^$$recipe:"); \
		$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/$$recipe.py \
			--config recipes/configs/$${run##*:}.yaml --output_dir outputs/cards/$$recipe; \
		mkdir -p model_cards/$$recipe; rm -f model_cards/$$recipe/*; \
		cp outputs/cards/$$recipe/compressed/README.md outputs/cards/$$recipe/compressed/*.png model_cards/$$recipe; done

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
