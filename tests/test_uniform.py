"""The baselines of quantization: the same bits for every weight."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import assert_resumes_after_crash, make_trainer, stacked
from hf_approx import UniformQuantizationConfig
from hf_approx.packing.grid import round_to_grid
from hf_approx.trainer_checkpoint import LATENT_PREFIX
from models import build, dataset
from test_trainer import assert_close_weights, no_dropout


def assert_on_grids(trainer):
    params = dict(trainer.model.named_parameters())
    grids = trainer.methods[-1].grids
    assert grids
    for name, grid in grids.items():
        assert torch.equal(round_to_grid(params[name], grid), params[name])
        levels = (params[name] / grid.scale.float()).reshape(-1)
        assert len((levels * 2**6).round().unique()) <= 2 ** int(grid.bits.max())


@pytest.mark.parametrize("mode", ["qat", "round"])
@pytest.mark.parametrize("bits", [1, 4])
def test_weights_end_on_the_grid(tmp_path, mode, bits):
    trainer = make_trainer("bert", tmp_path, approx=UniformQuantizationConfig(bits=bits, mode=mode), max_steps=3)
    trainer.train()
    assert_on_grids(trainer)
    assert trainer.approx_report["totals"]["bits"] == bits


def test_rounding_after_training_does_not_touch_training(tmp_path):
    plain = make_trainer("bert", tmp_path / "a", model=no_dropout(), max_steps=4)
    plain.train()
    rounded = make_trainer(
        "bert", tmp_path / "b", approx=UniformQuantizationConfig(bits=8, mode="round"), model=no_dropout(), max_steps=4
    )
    rounded.train()
    # Eight bits move a weight by less than a hundredth of the largest of its row; float16 moves the others.
    for name, before in plain.model.state_dict().items():
        after = rounded.model.state_dict()[name]
        slack = 0.02 * before.abs().max() if name in rounded.methods[0].grids else 1e-3
        assert (after - before).abs().max() <= slack


def test_rounding_after_training_rounds_the_best_model(tmp_path, caplog):
    """It is not final before it has rounded, and yet any checkpoint may be the best; there is nothing to warn of."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = make_trainer(
        "bert",
        tmp_path,
        approx=UniformQuantizationConfig(bits=4, mode="round"),
        eval_dataset=dataset("bert", 8, seed=1),
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **options,
    )
    worsening = iter(range(100, 0, -1))
    trainer.compute_metrics = lambda prediction: {"score": float(next(worsening))}
    method = trainer.methods[0]
    assert not method.is_final
    trainer.train()
    assert method.is_final
    assert trainer.state.best_global_step == 2
    assert "Training ended before" not in caplog.text
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, grid in method.grids.items():
        assert best[name].numel() == 0
        trained = best[f"{LATENT_PREFIX}{name}"]
        assert torch.equal(trainer.model.get_parameter(name), round_to_grid(trained, grid)), name


def test_training_rounded_weights_lowers_the_loss_that_rounding_leaves():
    """On a regression with correlated inputs, where the nearest weight is not the best one."""
    torch.manual_seed(0)
    x = torch.randn(200, 16) @ torch.randn(16, 16)
    target = x @ torch.randn(16, 8)
    losses = {}
    for mode in ("round", "qat"):
        torch.manual_seed(1)
        layer = nn.Linear(16, 8, bias=False)
        layer.weight.data.copy_(torch.linalg.lstsq(x, target).solution.T)
        config = UniformQuantizationConfig(bits=2, mode=mode, target_modules=["0"], scale_lr=1e-2)
        stack, method = stacked(nn.ModuleList([layer]), config)
        groups = [{"params": stack.parameters(), "lr": 5e-3}, *method.param_groups()]
        optimizer = torch.optim.Adam(groups)
        # Rounded weights jump between neighbours until the steps are small.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 300)
        for step in range(300 if mode == "qat" else 0):
            stack.advance(step / 299)
            (layer(x) - target).square().mean().backward()
            stack.before_step()
            optimizer.step()
            stack.after_step()
            schedule.step()
        stack.finalize()
        losses[mode] = float((layer(x) - target).detach().square().mean())
    assert losses["qat"] < 0.8 * losses["round"]


def test_a_crashed_run_resumes_to_the_same_weights(tmp_path):
    def trainer(folder):
        return make_trainer(
            "gpt2", folder, approx=UniformQuantizationConfig(bits=2), save_strategy="steps", save_steps=1
        )

    assert_resumes_after_crash(trainer, tmp_path, 3)


def test_compiled_training_equals_eager(tmp_path):
    def train(folder, **options):
        approx = UniformQuantizationConfig(bits=4)
        trainer = make_trainer("bert", folder, approx=approx, model=no_dropout(), max_steps=3, **options)
        trainer.train()
        return trainer

    eager = train(tmp_path / "a")
    compiled = train(tmp_path / "b", torch_compile=True, torch_compile_backend="aot_eager")
    assert_close_weights(eager, compiled, rtol=1e-3, atol=1e-4)


def test_bfloat16_models_keep_their_dtype(tmp_path):
    model = build("llama").to(torch.bfloat16)
    trainer = make_trainer("llama", tmp_path, approx=UniformQuantizationConfig(bits=3), model=model, max_steps=2)
    trainer.train()
    assert trainer.model.dtype == torch.bfloat16
    assert_on_grids(trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must be"),
        ({"bits": 9}, "bits must be"),
        ({"bits": 2.5}, "bits must be"),
        ({"mode": "ptq"}, "mode must be"),
        ({"scale_granularity": "row"}, "scale_granularity must be"),
        ({"scale_lr": -1.0}, "scale_lr must be"),
        ({"group_size": 0}, "group_size must be"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UniformQuantizationConfig(**options)
