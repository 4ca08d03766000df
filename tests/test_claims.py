"""A saved config describes the files beside it, whatever model has it; other processes stop at a packed one."""

import copy
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    EncoderDecoderModel,
)

from helpers import assert_same_weights, python
from hf_approx import attach_packing
from models import build
from test_other_classes import bart, clip, llava, masked_bert, packed


def sections(config):
    found = [config["quantization_config"]] if "quantization_config" in config else []
    return found + [s for part in config.values() if isinstance(part, dict) for s in sections(part)]


def from_config(folder, model):
    return AutoModel.from_config(AutoConfig.from_pretrained(folder))


def with_the_same_config(folder, model):
    return type(model)(AutoModel.from_pretrained(folder).config)


def with_a_copy(folder, model):
    return type(model)(copy.deepcopy(model.config))


def encoder(folder, model):
    return AutoModel.from_pretrained(folder).get_encoder()


def head_of_a_packed_body(folder, model):
    whole = type(model)(model.config)
    whole.model = model.model
    return whole


@pytest.mark.parametrize("make", [from_config, with_the_same_config, with_a_copy, encoder, head_of_a_packed_body])
def test_a_model_that_is_saved_plain_says_so(tmp_path, make):
    model = packed(bart(), tmp_path)
    other = make(tmp_path / "packed", model)
    other.save_pretrained(tmp_path / "other")
    assert sections(json.loads((tmp_path / "other" / "config.json").read_text())) == []
    assert_same_weights(type(other).from_pretrained(tmp_path / "other").state_dict(), other.state_dict())
    model.save_pretrained(tmp_path / "again")  # and the packed one is what it was
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}


def test_models_made_of_packed_ones_are_saved_plain(tmp_path):
    packed(masked_bert(), tmp_path / "bert")
    pair = EncoderDecoderModel.from_encoder_decoder_pretrained(*2 * [str(tmp_path / "bert" / "packed")])
    pair.save_pretrained(tmp_path / "pair")
    assert sections(json.loads((tmp_path / "pair" / "config.json").read_text())) == []
    assert_same_weights(EncoderDecoderModel.from_pretrained(tmp_path / "pair").state_dict(), pair.state_dict())
    packed(llava(), tmp_path / "llava")
    part = AutoModel.from_pretrained(tmp_path / "llava" / "packed").language_model
    part.save_pretrained(tmp_path / "part")
    assert sections(json.loads((tmp_path / "part" / "config.json").read_text())) == []
    assert_same_weights(type(part).from_pretrained(tmp_path / "part").state_dict(), part.state_dict())


def test_each_of_two_models_with_one_config_describes_its_own_weights(tmp_path):
    first = build("bert")
    second = type(first)(first.config)
    for model, layer in ((first, 0), (second, 1)):
        name = f"bert.encoder.layer.{layer}.output.dense.weight"
        torch.nn.init.zeros_(model.get_parameter(name))
        attach_packing(model, [name])
    for model, folder in ((first, "first"), (second, "second")):
        model.save_pretrained(tmp_path / folder)
        assert_same_weights(type(model).from_pretrained(tmp_path / folder).state_dict(), model.state_dict())


def test_plain_weights_beside_the_config_of_packed_ones_load_as_they_are(tmp_path, caplog):
    model = packed(bart(), tmp_path)
    Accelerator(cpu=True).save_model(model, tmp_path / "other")
    shutil.copy(tmp_path / "packed" / "config.json", tmp_path / "other")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "other")
    assert "they are loaded as they are" in caplog.text
    assert_same_weights(loaded.state_dict(), model.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    assert sections(json.loads((tmp_path / "again" / "config.json").read_text())) == []


def test_a_part_loads_by_its_own_config(tmp_path):
    model = packed(clip(), tmp_path)
    for cls in (CLIPTextModel, CLIPVisionModelWithProjection):
        plain, part = (cls.from_pretrained(tmp_path / folder) for folder in ("plain", "packed"))
        assert_same_weights(part.state_dict(), plain.state_dict())
        part.save_pretrained(tmp_path / cls.__name__)
        assert_same_weights(cls.from_pretrained(tmp_path / cls.__name__).state_dict(), plain.state_dict())
    whole = CLIPModel.from_pretrained(tmp_path / "packed")
    assert len(sections(whole.config.to_dict())) == 1
    assert_same_weights(whole.state_dict(), model.state_dict())


def test_a_process_without_hf_approx_stops_whatever_it_is_told_to_ignore(tmp_path):
    packed(llava(), tmp_path)
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration
for cls in (AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration):
    for ignore in (False, True):
        try:
            cls.from_pretrained(sys.argv[1], ignore_mismatched_sizes=ignore)
            print("loaded")
        except ValueError as error:
            assert "import hf_approx before from_pretrained" in str(error)
AutoModel.from_config(AutoConfig.from_pretrained(sys.argv[1])).save_pretrained(sys.argv[2])
import hf_approx
AutoModel.from_pretrained(sys.argv[1], ignore_mismatched_sizes=True)
AutoModel.from_pretrained(sys.argv[2])
"""
    result = python(code, tmp_path / "packed", tmp_path / "other", check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loaded" not in result.stdout
