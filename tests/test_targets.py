"""Which modules a method works on when nobody says so."""

import pytest
import torch
from transformers import MarianConfig, MarianMTModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hf_approx import MagnitudePruningConfig, SmolConfig, SparsificationConfig, attach_packing
from hf_approx.cli import main
from hf_approx.targets import select_modules
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
    selected = select_modules(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    assert selected
    assert head not in selected.values()
    assert all(model.get_submodule(key) is module and module.weight.dim() > 1 for key, module in selected.items())
    assert caplog.messages == []


def test_experts_that_share_a_parameter_are_not_passed_over_in_silence(caplog):
    model = mixture()
    selected = select_modules(model)
    assert {key.split(".")[-1] for key in selected} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = 2 * 4 * (128 * 32 + 32 * 64)
    routers, attention = 2 * 4 * 32, 2 * (2 * 32 * 32 + 2 * 16 * 32)
    share = round(100 * (experts + routers) / (experts + routers + attention))
    assert caplog.messages == [
        f"{share} % of the weights in the blocks of MixtralForCausalLM are in no linear or convolution layer and are "
        "not compressed, 'model.layers.0.mlp.experts.gate_up_proj' first."
    ]
    caplog.clear()
    select_modules(model, ["q_proj"])
    assert caplog.messages == []


def test_a_tied_weight_is_refused():
    model = build("bert")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.0.intermediate.dense' is tied.*add .* to exclude"):
        select_modules(model)
    both = [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    assert not set(both) & set(select_modules(model, exclude=both))


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
                config(target_modules=targets).build().attach(model)
    assert set(dict(model.named_parameters())) == set(dict(marian().named_parameters()))
    assert not set(TABLES) & set(select_modules(model))
    assert set(select_modules(model, r".*embed_positions|.*fc1", ["embed_positions"])) == {
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
