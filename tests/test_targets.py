"""Which modules a method works on when nobody says so."""

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    EncodecConfig,
    EncodecModel,
    HGNetV2Config,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from helpers import stacked, target_modules
from hf_approx import MagnitudePruningConfig, SharingConfig, SmolConfig, SparsificationConfig, attach_packing
from hf_approx.cli import main
from hf_approx.report import kind_of
from models import ARCHITECTURES, build


def mixture():
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_is_every_linear_and_convolution_layer_of_the_blocks(name, caplog):
    model = build(name)
    caplog.clear()
    selected = target_modules(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    assert selected
    assert head not in selected.values()
    assert all(model.get_submodule(key) is module and module.weight.dim() > 1 for key, module in selected.items())
    assert caplog.messages == []


def test_experts_of_an_unknown_kind_are_not_passed_over_in_silence(caplog):
    model = mixture()
    target_modules(model)
    assert caplog.messages == []
    for module in model.modules():
        if type(module).__name__ == "MixtralExperts":
            module.__class__ = type("Mixed", (type(module),), {})
    selected = target_modules(model)
    assert {key.split(".")[-1] for key in selected} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = 2 * 4 * (128 * 32 + 32 * 64)
    routers, attention = 2 * 4 * 32, 2 * (2 * 32 * 32 + 2 * 16 * 32)
    share = round(100 * (experts + routers) / (experts + routers + attention))
    assert caplog.messages == [
        f"{share} % of the weights in the blocks of MixtralForCausalLM are in no linear or convolution layer and are "
        "not compressed, 'model.layers.0.mlp.experts.gate_up_proj' first."
    ]
    caplog.clear()
    target_modules(model, ["q_proj"])
    assert caplog.messages == []


def blocks(*layers):
    """A model whose blocks are these layers."""
    return nn.Sequential(*layers)


def tied_bert():
    model = build("bert")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    return model


UNFIT = {
    "tied": (tied_bert, "bert.encoder.layer.0.intermediate.dense", "is tied.*add .* to exclude"),
    "normed": (lambda: blocks(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4))), "1", "computes its weight from other"),
    "old norm": (lambda: blocks(nn.Linear(4, 4), old_weight_norm(nn.Linear(4, 4))), "1", "computes its weight from"),
    "empty": (lambda: blocks(nn.Linear(4, 4), nn.Linear(0, 4)), "1", "is empty; add '1' to exclude"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "name", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_a_target_is_left_out_of_the_default_and_refused_by_name(make, name, message, caplog):
    model = make()
    with pytest.raises(ValueError, match=f"'{name}' {message}" if name != "1" else message):
        target_modules(model, [name])
    selected = target_modules(model)
    assert selected
    assert name not in selected
    (told,) = [text for text in caplog.messages if "It is left as it is." in text]
    assert f"'{name}'" in told
    caplog.clear()
    assert list(target_modules(model, exclude=[f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]))
    assert ("It is left" in caplog.text) == (name == "1")


def test_a_model_of_nothing_else_is_refused():
    with pytest.raises(ValueError, match=r"No layer of Sequential can be compressed. '0' computes its weight"):
        target_modules(blocks(weight_norm(nn.Linear(4, 4))))


def test_a_codec_whose_layers_are_all_normalized_is_refused():
    config = EncodecConfig(num_filters=4, num_lstm_layers=1, hidden_size=16, codebook_dim=16, codebook_size=8)
    with pytest.raises(ValueError, match=r"No layer of EncodecModel can be compressed. 'encoder.*computes its weight"):
        stacked(EncodecModel(config), SparsificationConfig())


def test_a_detector_whose_heads_are_tied_is_packed_without_them(tmp_path, caplog):
    backbone = HGNetV2Config(
        embeddings_size=16,
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 16],
        stage_mid_channels=[8, 8],
        stage_out_channels=[16, 32],
        stage_num_blocks=[1, 1],
        stage_numb_of_layers=[1, 1],
        stage_downsample=[False, True],
        stage_light_block=[False, False],
        stage_kernel_size=[3, 3],
        hidden_sizes=[16, 32],
        depths=[1, 1],
        out_indices=[1, 2],
    )
    sizes = ("d_model", "encoder_hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")
    config = DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 32],
        decoder_in_channels=[32, 32],
        feat_strides=[8, 16],
        num_feature_levels=2,
        decoder_n_points=[4, 4],
        encode_proj_layers=[1],
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=8,
        num_labels=3,
        **dict.fromkeys(sizes, 32),
    )
    torch.manual_seed(0)
    model = DFineForObjectDetection(config).eval()
    caplog.clear()
    method = MagnitudePruningConfig(target_sparsity=0.5).build()
    method.attach(model)
    (told,) = [text for text in caplog.messages if "It is left as it is." in text]
    assert "'model.decoder.class_embed.0' is tied to another module's" in told
    method.on_step(1.0)
    names = method.finalize()
    assert len(names) > 20
    assert not [name for name in names if "class_embed" in name or "bbox_embed" in name]
    attach_packing(model, names)
    model.save_pretrained(tmp_path)
    loaded = DFineForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        before, after = (each(pixel_values=torch.ones(1, 3, 64, 64)) for each in (model, loaded))
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.pred_boxes, after.pred_boxes)


def test_layers_that_are_blocks_by_themselves_share_weights():
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    _, method = stacked(model, SharingConfig(templates=2))
    assert list(method.banks) == ["layers"]
    assert [kind_of(name) for name in ("0.weight", "a.b.0.weight", "a.0.b.1.c.weight")] == ["0", "a.b", "c"]


def marian():
    """Whose tables of positions transformers computes, and never saves."""
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in MARIAN.items()}
    torch.manual_seed(0)
    return MarianMTModel(MarianConfig(vocab_size=48, pad_token_id=0, d_model=32, max_position_embeddings=16, **sides))


MARIAN = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
TABLES = [f"model.{side}.embed_positions" for side in ("encoder", "decoder")]


def test_weights_that_are_never_saved_are_no_targets():
    model = marian()
    for targets in (["embed_positions"], [TABLES[1]], r".*embed_positions|.*fc1"):
        for config in (SparsificationConfig, MagnitudePruningConfig, SmolConfig):
            with pytest.raises(ValueError, match=r"computes the weight of 'model\.\w+\.embed_positions', and"):
                stacked(model, config(target_modules=targets))
    assert set(dict(model.named_parameters())) == set(dict(marian().named_parameters()))
    assert not set(TABLES) & set(target_modules(model))
    assert set(target_modules(model, r".*embed_positions|.*fc1", ["embed_positions"])) == {
        f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")
    }
    for name in (f"{table}.weight" for table in TABLES):
        with pytest.raises(ValueError, match=rf"attach_packing: transformers never saves '{name}'"):
            attach_packing(model, ["model.encoder.layers.0.fc1.weight", name])
    assert not hasattr(model.config, "quantization_config")


def test_compress_leaves_out_what_is_never_saved(tmp_path):
    model = marian()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1 and "embed_positions" not in name:
                param.mul_(torch.rand_like(param) > 0.9)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(SystemExit) as end:
        main(["compress", str(tmp_path / "dense"), str(tmp_path / "small"), "--store-dtype", "float32"])
    assert end.value.code == 0
    loaded = MarianMTModel.from_pretrained(tmp_path / "small")
    assert loaded.config.quantization_config.tensors.keys().isdisjoint(f"{table}.weight" for table in TABLES)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
