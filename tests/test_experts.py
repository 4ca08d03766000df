"""Parameters as targets, and above all the experts of mixtures, which transformers holds as one parameter."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from helpers import arguments, python, stacked
from hf_approx import (
    ApproxTrainer,
    FixedPrecisionConfig,
    LayerDroppingConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach,
    export_model,
)
from hf_approx.folding import fold
from hf_approx.inspection import inspect_checkpoint
from hf_approx.methods.latent import latent_of
from hf_approx.modules.bank import banks_of, shared_layers
from hf_approx.packing import expand
from hf_approx.targets import Target, select_targets

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(1, 48, (4, 8), generator=torch.Generator().manual_seed(0))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4))


def qwen():
    config = Qwen3MoeConfig(
        **SIZES, intermediate_size=40, moe_intermediate_size=24, num_experts=4, mlp_only_layers=[0]
    )
    return Qwen3MoeForCausalLM(config)


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=4))


def deepseek():
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    sizes = {**SIZES, "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": 24}
    groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    sizes.pop("head_dim")
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **ranks, **groups))


MIXTURES = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}
PRUNED, SMOL = SparsificationConfig(target_sparsity=0.8), SmolConfig(target_bits=3.0, group_size=8)
RUNS = {"pruned": [PRUNED], "smol": [SMOL], "both": [PRUNED, SMOL]}


def build(make):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for param in model.parameters():
            # Some routers start as zeros, and then nobody knows which experts come first.
            if param.dim() > 1:
                param.normal_(std=0.1)
    return model


def trained(model, configs, steps=6):
    """The stack after a short loop."""
    stack = attach(model, configs)
    optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=1e-3), steps=steps)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return stack


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def experts(model):
    return [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "experts.down_proj"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every mixture after every run, and the folder it was saved to."""
    folder, models = tmp_path_factory.mktemp("mixtures"), {}
    for name, make in MIXTURES.items():
        for run, configs in RUNS.items():
            model, label = build(make), f"{name}-{run}"
            stack = trained(model, configs)
            names = stack.finalize()
            model.save_pretrained(folder / label)
            models[label] = (model, stack, names)
    save_file({label: logits(model) for label, (model, _, _) in models.items()}, folder / "logits.safetensors")
    return folder, models


LOADS = """
import sys
import torch, transformers, hf_approx
from pathlib import Path
from safetensors.torch import load_file
folder = Path(sys.argv[1])
ids = torch.tensor(eval(sys.argv[2]))
for label, wanted in load_file(folder / "logits.safetensors").items():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / label).eval()
    with torch.no_grad():
        print(label, torch.equal(model(ids).logits, wanted))
"""


def test_mixtures_are_equal_in_a_fresh_process(finished):
    folder, models = finished
    said = python(LOADS, folder, IDS.tolist()).stdout.split("\n")
    assert sorted(said)[1:] == sorted(f"{label} True" for label in models)


def test_the_experts_are_pruned_and_quantized(finished):
    folder, models = finished
    for label, (model, stack, names) in models.items():
        run = label.rpartition("-")[2]
        assert set(experts(model)) < set(names)
        rows = {row.name: row for row in inspect_checkpoint(folder / label, verify=True).rows}
        params = dict(model.named_parameters())
        assert all(rows[name].packed and rows[name].shape == params[name].shape for name in names)
        total = sum(params[name].numel() for name in names)
        if run != "smol":
            zeros = sum(int((params[name] == 0).sum()) for name in names)
            assert zeros / total == pytest.approx(0.8, abs=1e-3)
            assert all(rows[name].sparsity > 0.5 for name in experts(model))
        if run != "pruned":
            bits = {
                name: expand(grid.bits, params[name].shape)[params[name] != 0] for name, grid in stack.grids.items()
            }
            assert float(torch.cat(list(bits.values())).float().mean()) == pytest.approx(3.0, abs=0.03)
            assert all(sum(rows[name].counts) == params[name].numel() for name in experts(model))
        whole = sum(param.numel() for param in params.values())
        assert stack.share == pytest.approx(total / whole)
        assert stack.share > 0.75


def test_every_expert_has_scales_of_its_own(finished):
    _, models = finished
    for name, shapes in {
        "mixtral": ((4, 48, 4), (4, 32, 3)),
        "qwen": ((4, 48, 4), (4, 32, 3)),
        "gpt_oss": ((4, 4, 48), (4, 3, 32)),  # inputs before outputs
    }.items():
        grids = models[f"{name}-smol"][1].grids
        for parameter, shape in zip(("gate_up_proj", "down_proj"), shapes, strict=True):
            assert grids[f"model.layers.1.mlp.experts.{parameter}"].bits.shape == shape
    for make in MIXTURES.values():
        stack = attach(build(make), UniformQuantizationConfig(bits=4, scale_granularity="channel"))
        for key, stage in stack.methods[0].stages.items():
            target = stack.methods[0].targets[key]
            out, _, expert = target.axes
            kept = [target.value.shape[dim] if dim in (out, expert) else 1 for dim in range(target.value.dim())]
            assert list(stage.log_scale.shape) == kept


def test_packed_mixtures_go_on(finished, tmp_path, caplog):
    folder, models = finished
    for label, (model, _, names) in models.items():
        wanted = logits(model)
        loaded = type(model).from_pretrained(folder / label)
        loaded.save_pretrained(tmp_path / label)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / label)), wanted)
        base = AutoModel.from_pretrained(folder / label)
        assert torch.equal(base.state_dict()["layers.1.mlp.experts.down_proj"], model.get_parameter(names[-1]))
        # The plain model has one tensor for each expert in its file, as all others of its kind.
        export_model(folder / label, tmp_path / f"{label}-plain", "dense")
        plain = load_file(tmp_path / f"{label}-plain" / "model.safetensors")
        assert any(".experts.0." in name for name in plain) == (not label.startswith("gpt_oss"))
        again = type(model).from_pretrained(tmp_path / f"{label}-plain")
        assert not hasattr(again.config, "quantization_config")
        assert torch.equal(logits(again), wanted)
        # A config that says that these files are packed is not believed.
        caplog.clear()
        config = json.loads((folder / label / "config.json").read_text())
        (tmp_path / f"{label}-plain" / "config.json").write_text(json.dumps(config))
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / f"{label}-plain")), wanted)
        assert "they are loaded as they are" in caplog.text


def test_export_to_compressed_tensors_leaves_experts_dense(finished, tmp_path):
    folder, models = finished
    export = export_model(folder / "gpt_oss-smol", tmp_path / "out", "compressed-tensors")
    model = models["gpt_oss-smol"][0]
    assert set(experts(model)) == set(export.dense)
    assert torch.equal(logits(GptOssForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    # transformers takes every tensor of an expert for one that is quantized there.
    refusal = "cannot load a MixtralForCausalLM from compressed-tensors.*Choose the format dense"
    with pytest.raises(ValueError, match=refusal):
        export_model(folder / "mixtral-smol", tmp_path / "none", "compressed-tensors")
    assert not (tmp_path / "none").exists()


def test_quantized_experts_are_trained_on_their_grids(finished):
    folder, _ = finished
    model = MixtralForCausalLM.from_pretrained(folder / "mixtral-both")
    before = {name: model.get_parameter(name).detach() == 0 for name in experts(model)}
    stack = trained(model, FixedPrecisionConfig(target_parameters=["gate_up_proj"], exclude=["layers.0.mlp.experts"]))
    assert list(stack.methods[0].targets) == ["model.layers.1.mlp.experts.gate_up_proj"]
    stack.finalize()
    assert all(torch.equal(model.get_parameter(name) == 0, zeros) for name, zeros in before.items())


@pytest.mark.parametrize(
    "config",
    [
        SparsificationConfig(target_sparsity=0.5, granularity="row"),
        SparsificationConfig(target_sparsity=0.5, granularity="column"),
        SparsificationConfig(target_sparsity=0.5, granularity="2:4"),
        MagnitudePruningConfig(target_sparsity=0.5),
        MagnitudePruningConfig(target_sparsity=0.5, criterion="random"),
        MovementPruningConfig(target_sparsity=0.5),
        UniformQuantizationConfig(bits=4),
        UniformQuantizationConfig(bits=4, mode="round", group_size=8, scale_granularity="group"),
    ],
    ids=["row", "column", "2:4", "magnitude", "random", "movement", "uniform", "round"],
)
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_every_method_works_on_experts(make, config, tmp_path):
    model = build(make)
    trained(model, config, 4).finalize()
    for name in experts(model):
        target = Target.of(model, name)
        # (experts, outputs, inputs), whatever the model has
        kept = target.value.detach().movedim(target.axis("in"), -1) != 0
        if config == SparsificationConfig(target_sparsity=0.5, granularity="2:4"):
            assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        elif getattr(config, "granularity", None) in ("row", "column"):
            lines = kept.transpose(1, 2) if config.granularity == "column" else kept
            some, all_ = lines.any(-1), lines.all(-1)
            assert torch.equal(some, all_)
            assert len({tuple(row.tolist()) for row in some}) == 4  # each expert has lost others
            assert some.any()
            assert not some.all()
        else:
            assert kept.all() == isinstance(config, UniformQuantizationConfig)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("granularity", ["weight", "row", "column", "2:4"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_gradients_of_experts_are_those_of_the_formula(make, granularity):
    model = build(make).double()
    stack = attach(model, SparsificationConfig(granularity=granularity, target_sparsity=0.5))
    stack.advance(0.5)
    generator = torch.Generator().manual_seed(1)
    grads = {}
    for name in experts(model):
        param = model.get_parameter(name)
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        grads[name] = param.grad.clone()
    stack.before_step()
    for name, grad in grads.items():
        latent = latent_of(Target.of(model, name))
        (stage,) = latent.stages
        own = [latent.weight, stage.scores]
        # Written out for one expert after the other.
        mask = torch.sigmoid(stage.temperature * stage.scores) * stage.scale
        target = latent.target
        parts = []
        for e in range(4):
            part = mask[e]
            if granularity in ("row", "column"):
                line = target.axis("out" if granularity == "row" else "in") - 1
                part = part[:, None] if line == 0 else part[None]
            parts.append(latent.weight[e] * part)
        wanted = torch.autograd.grad(torch.stack(parts), own, grad)
        torch.testing.assert_close(latent.effective, torch.stack(parts))
        for tensor, found in zip(own, wanted, strict=True):
            torch.testing.assert_close(tensor.grad, found, rtol=1e-9, atol=1e-11)


def test_experts_are_shared_between_layers(tmp_path):
    for make in (mixtral, gpt_oss):
        model = build(make)
        dense = copy.deepcopy(model)
        stack = attach(model, SharingConfig(templates=2))
        banks = stack.methods[0].banks
        assert banks["layers-mlp-experts-gate_up_proj"] == [
            f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)
        ]
        # As many templates as layers lose nothing.
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-5)
        stack.detach()
        assert torch.equal(logits(model), logits(dense))
        stack = trained(
            model.train(), [SharingConfig(templates=1), SmolConfig(target_modules=r".*hf_approx_banks\..*")]
        )
        templates = stack.methods[1].targets
        (key,) = [key for key in templates if "gate_up_proj" in key]
        assert templates[key].axes == Target.of(model, experts(model)[0]).axes
        stack.finalize()
        assert len(stack.grids) == len(banks)
        again = copy.deepcopy(model)
        model.save_pretrained(tmp_path / make.__name__)
        loaded = type(model).from_pretrained(tmp_path / make.__name__)
        for other in (loaded, again):
            assert shared_layers(other).keys() == banks.keys()
            assert torch.equal(logits(other), logits(model))
        assert fold(again, layers=1).clusters == {}
        loaded.dequantize()
        assert not banks_of(loaded)
        assert torch.equal(logits(loaded), logits(model))
        assert shared_layers(model).keys() == banks.keys()
        loaded.save_pretrained(tmp_path / "plain")
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / "plain")), logits(model))


def test_groups_of_shared_weights_name_experts():
    model = build(mixtral)
    down = [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    for patterns in (["experts.down_proj"], r".*experts\.down_proj"):
        stack = attach(model, SharingConfig(groups={"down": patterns, "q": ["q_proj"]}, templates=1))
        assert stack.methods[0].banks["down"] == down
        stack.detach()
    with pytest.raises(ValueError, match="group 'all' has weights of different shapes"):
        attach(model, SharingConfig(groups={"all": ["experts"]}))
    with pytest.raises(ValueError, match="leave out target_parameters"):
        SharingConfig(groups={"down": ["down_proj"]}, target_parameters=["down_proj"])


def test_routers_are_no_default_targets(caplog):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "num_sparse_encoder_layers": 1}
    config = SwitchTransformersConfig(vocab_size=48, num_experts=4, **sizes)
    switch = SwitchTransformersForConditionalGeneration(config)
    sizes = {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2, "intermediate_size": 24}
    jetmoe = JetMoeForCausalLM(JetMoeConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, **sizes))
    for model in (build(mixtral), build(qwen), build(gpt_oss), build(deepseek), switch, jetmoe):
        caplog.clear()
        targets = select_targets(model)
        assert not [key for key in targets if {"gate", "router"} & set(key.split("."))]
        assert [key for key, target in targets.items() if target.axis("expert") == 0 or "expert_1" in key]
        assert caplog.messages == []
        assert list(targets) == [key for key in dict.fromkeys(_keys(model)) if key in targets]
    routers = [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    assert list(select_targets(build(mixtral), ["gate"])) == routers


def _keys(model):
    for name, _ in model.named_parameters():
        yield name.removesuffix(".weight")


def test_where_experts_inputs_and_outputs_lie():
    wanted = {mixtral: (1, 2, 0), qwen: (1, 2, 0), deepseek: (1, 2, 0), gpt_oss: (2, 1, 0)}
    for make, axes in wanted.items():
        model = build(make)
        for name in experts(model):
            target = Target.of(model, name)
            assert target.axes == axes
            inputs = 32 if "gate_up" in name else 24
            assert target.value.shape[target.axis("in")] == inputs
            assert target.value.shape[target.axis("out")] == (48 if "gate_up" in name else 32)
    llama = Llama4TextExperts(Llama4TextConfig(hidden_size=32, intermediate_size=24, num_local_experts=4))
    assert Target("", llama, "down_proj").axes == (2, 1, 0)
    assert llama.down_proj.shape == (4, 24, 32)
    assert Target("", nn.Linear(2, 3)).axes == (0, 1, None)
    assert Target("", nn.ConvTranspose2d(2, 3, 1)).axes == (1, 0, None)
    assert Target("", nn.Conv1d(2, 3, 1)).axes == (0, 1, None)


def test_parameters_by_name():
    model = build(gpt_oss)
    up = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]
    for patterns in (["gate_up_proj"], ["mlp.experts.gate_up_proj"], up, r".*\.gate_up_proj"):
        assert list(select_targets(model, target_parameters=patterns)) == up
    both = select_targets(model, ["q_proj"], target_parameters=[up[0], "layers.1.self_attn.q_proj.weight"])
    assert list(both) == ["model.layers.0.self_attn.q_proj", up[0], "model.layers.1.self_attn.q_proj"]
    assert up[0] not in select_targets(model, exclude=["layers.0.mlp.experts"])
    assert up[0] not in select_targets(model, exclude=["gate_up_proj"])
    assert list(select_targets(model, ["layers.0.mlp.experts"])) == [up[0], "model.layers.0.mlp.experts.down_proj"]
    for patterns in (["gate_up"], ["gate_up_proj", "gate_up"], "gate_up_proj"):
        with pytest.raises(ValueError, match=r"No parameter of GptOssForCausalLM matches 'gate_up.*target_parameters"):
            attach(model, SmolConfig(target_parameters=patterns))
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.sinks' is no parameter of two or more dimensions"
    ):
        select_targets(model, target_parameters=["sinks"])
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"The weight of 'model.embed_tokens' is tied to another module's; add"):
        select_targets(model, target_parameters=["embed_tokens.weight"])
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    with pytest.raises(ValueError, match=r"Parameter 'model.layers.0.mlp.experts.down_proj' is tied to another"):
        select_targets(model, target_parameters=["down_proj"])
    model._keys_to_ignore_on_save = [up[0]]
    with pytest.raises(ValueError, match=rf"computes parameter '{up[0]}', and transformers never saves it"):
        select_targets(model, target_parameters=["gate_up_proj"])
    for config in (SparsificationConfig(granularity="neuron"), LayerDroppingConfig()):
        config.target_parameters = ["gate_up_proj"]
        with pytest.raises(ValueError, match=r"s are no parameters; leave out target_parameters"):
            attach(model, config)


class Attending(nn.Module):
    """Attention of torch, whose projections are one parameter that is no layer's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])

    def forward(self, x):
        return self.layers[0](x, x, x)[0]


@pytest.mark.parametrize("config", [SparsificationConfig(target_sparsity=0.5), SmolConfig(target_bits=3.0)])
def test_a_parameter_that_is_no_layers_is_a_target(config):
    torch.manual_seed(0)
    model = Attending()
    config = copy.copy(config)
    config.target_parameters = ["in_proj_weight"]
    stack = attach(model, config)
    assert list(stack.methods[0].targets) == ["layers.0.in_proj_weight"]
    optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=1e-2), steps=6)
    before = model.layers[0].in_proj_weight.detach().clone()
    for _ in range(6):
        model(torch.randn(2, 3, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stack.finalize() == ["layers.0.in_proj_weight"]
    weight = model.layers[0].in_proj_weight.detach()
    assert not torch.equal(weight, before)
    if isinstance(config, SmolConfig):
        assert stack.grids["layers.0.in_proj_weight"].bits.shape == (24, 1)
    else:
        assert int((weight == 0).sum()) == weight.numel() // 2


def test_inputs_of_experts_are_left_as_they_are(caplog, tmp_path):
    model = build(mixtral)
    stack = trained(model, SmolConfig(target_bits=4.0, activations=True))
    assert "the inputs of 4 targets, 'model.layers.0.mlp.experts.gate_up_proj' first, are not" in caplog.text
    assert len(stack.methods[0].activations) == 8
    stack.finalize()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MixtralForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_report_says_how_much_was_compressed(tmp_path):
    model = build(mixtral)
    total = sum(param.numel() for param in model.parameters())
    chosen = sum(target.value.numel() for target in select_targets(model).values())
    data = [{"input_ids": row, "labels": row} for row in IDS]
    configs = [MagnitudePruningConfig(target_sparsity=0.5)]
    trainer = ApproxTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=data, approx=configs)
    trainer.train()
    assert trainer.approx_report["totals"]["share"] == pytest.approx(chosen / total)
    trainer.save_model(tmp_path / "saved")
    report = json.loads((tmp_path / "saved" / "approx_report.json").read_text())
    assert report["totals"]["share"] == pytest.approx(chosen / total)
    kinds = {layer["kind"] for layer in report["layers"]}
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} < kinds
    assert torch.equal(logits(MixtralForCausalLM.from_pretrained(tmp_path / "saved")), logits(trainer.model))
    # Of templates and layers that share them, it is the layers that were there.
    shared, method = stacked(build(mixtral), SharingConfig(templates=1))
    shared.bake()
    names = {name for bank in method.banks.values() for name in bank}
    assert shared.share == pytest.approx(chosen / total, abs=0.01)
    assert len(names) == 12
