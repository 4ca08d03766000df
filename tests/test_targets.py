"""Which modules a method works on when nobody says so."""

import pytest
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

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
