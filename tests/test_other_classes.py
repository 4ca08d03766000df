"""A packed checkpoint in classes other than the one that saved it, and in those whose initialization reads shapes."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_approx import ApproxConfig, PackedFormatError, attach_packing
from models import VOCAB, build

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {**VISION, "image_size": 16, "patch_size": 8}


def qwen():
    kinds = ["linear_attention", "full_attention"]
    linear = {f"linear_{part}": 2 for part in ("num_key_heads", "num_value_heads")}
    linear |= {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim")}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3_5Config(
        text_config={**TEXT, **linear, "layer_types": kinds}, vision_config={**vision, "num_position_embeddings": 16}
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def gemma():
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 8}, vision_config=IMAGES, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**IMAGES), text_config=text)
    return transformers.LlavaForConditionalGeneration(config)


def mllama():
    vision = {**IMAGES, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": rope, "pad_token_id": 0}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text)
    return transformers.MllamaForConditionalGeneration(config)


def clip():
    text = {**VISION, "vocab_size": VOCAB, "max_position_embeddings": 32, "projection_dim": 8}
    vision = {**IMAGES, "projection_dim": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def bart():
    sizes = {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    sizes |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    config = transformers.BartConfig(vocab_size=VOCAB, d_model=16, max_position_embeddings=32, **sizes)
    return transformers.BartForConditionalGeneration(config)


def masked_bert():
    return transformers.BertForMaskedLM(build("bert").config)


def funnel():
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1]}
    return transformers.FunnelModel(transformers.FunnelConfig(vocab_size=VOCAB, **sizes))


def xlstm():
    return transformers.xLSTMModel(transformers.xLSTMConfig(vocab_size=VOCAB, hidden_size=32, num_blocks=2))


def mask2former():
    swin = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32}
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_queries=4, **sizes)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def packed(model, folder, **options):
    """Save a model plain and, with every matrix packed, once more."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
            if param.dim() > 1:
                param.mul_(torch.rand(param.shape, generator=generator) > 0.9)
    model.eval().save_pretrained(folder / "plain")
    names = [name for name, param in model.named_parameters() if param.dim() > 1]
    assert attach_packing(model, names, None)
    model.save_pretrained(folder / "packed", **options)
    return model


@pytest.mark.parametrize("build_model", [funnel, xlstm, mask2former, llava])
def test_every_matrix_comes_back_where_initialization_reads_shapes(tmp_path, build_model):
    model = packed(build_model(), tmp_path)
    loaded = type(model).from_pretrained(tmp_path / "packed").state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(loaded[name], tensor)] == []


@pytest.mark.parametrize(
    ("build_model", "classes"),
    [
        (qwen, [AutoModelForCausalLM, AutoModel]),
        (gemma, [AutoModelForCausalLM, transformers.Gemma3ForSequenceClassification]),
        (llava, [AutoModel]),
        (mllama, [transformers.MllamaVisionModel, transformers.MllamaTextModel, AutoModelForCausalLM]),
        (bart, [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification]),
        (lambda: build("t5"), [transformers.T5EncoderModel, transformers.T5ForSequenceClassification, AutoModel]),
        (masked_bert, [AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM]),
        (lambda: build("gpt2").transformer, [AutoModelForCausalLM, AutoModelForSequenceClassification]),
    ],
    ids=["qwen3_5", "gemma3", "llava", "mllama", "bart", "t5", "bert", "gpt2"],
)
def test_a_class_reads_from_a_packed_file_what_it_reads_from_a_plain_one(tmp_path, build_model, classes):
    packed(build_model(), tmp_path)
    for cls in classes:
        plain, info = cls.from_pretrained(tmp_path / "plain", output_loading_info=True)
        loaded, packed_info = cls.from_pretrained(tmp_path / "packed", output_loading_info=True)
        assert packed_info["missing_keys"] == info["missing_keys"]
        read = [name for name in plain.state_dict() if name not in info["missing_keys"]]
        assert len(read) > len(plain.state_dict()) / 2
        assert [name for name in read if not torch.equal(loaded.state_dict()[name], plain.state_dict()[name])] == []


def rename(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {change(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    section = ApproxConfig.from_dict(config["quantization_config"])
    section.tensors, section.plain = {change(name): spec for name, spec in section.tensors.items()}, {}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section.to_dict()}))


@pytest.mark.parametrize(
    ("old", "new"),
    [("encoder.layer", "blocks"), ("embeddings.", "elsewhere.embeddings."), ("bert.encoder", "elsewhere.encoder")],
)
def test_names_that_nothing_explains_stop_the_loading(tmp_path, old, new):
    packed(masked_bert(), tmp_path)
    rename(tmp_path / "packed", lambda name: name.replace(old, new))
    with pytest.raises(PackedFormatError, match=r"nothing says where they belong. Load BertForMaskedLM"):
        AutoModel.from_pretrained(tmp_path / "packed")
    with pytest.raises(PackedFormatError, match="does not exist in BertForMaskedLM"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
