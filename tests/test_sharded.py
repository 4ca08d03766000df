"""Methods on parameters that FSDP2 splits over two processes, and on two processes in parallel."""

import json
from typing import ClassVar

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from helpers import ROOT, arguments, assert_same_weights, launch, make_trainer, weights
from hf_approx import ApproxTrainer, LayerDroppingConfig, SharingConfig, SparsificationConfig
from hf_approx.methods.budget import global_top_k
from models import build, dataset
from scripts import methods_fsdp, train_sharded

RUNS = [
    ("sharded", "sparse"),
    ("sharded", "smol"),
    ("sharded", "shared"),
    ("sharded", "best"),
    ("parallel", "smol"),
    ("parallel", "shared"),
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(ROOT / "tests" / "scripts" / "train_sharded.py", folder, processes=2, timeout=600)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for kind in train_sharded.METHODS:
        train_sharded.run(ApproxTrainer, kind, folder / kind, 1, resume=False)
    return folder


def loaded(folder):
    return weights(AutoModelForSequenceClassification.from_pretrained(folder))


@pytest.mark.parametrize(("way", "kind"), RUNS)
def test_two_processes_equal_one(two_processes, one_process, way, kind):
    two, one = loaded(two_processes / way / kind / "model"), loaded(one_process / kind / "model")
    assert two.keys() == one.keys()
    for name in one:
        assert torch.equal(one[name] == 0, two[name] == 0), name
        if kind in ("smol", "best"):  # float32 sums in another order move a few weights to the next code
            close = torch.isclose(one[name], two[name], rtol=1e-2, atol=1e-4)
            assert close.double().mean() > 0.99, name
        else:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7, msg=name)
    folders = (two_processes / way / kind, one_process / kind)
    reports = [json.loads((folder / "rank0.json").read_text()) for folder in folders]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)
    for name, value in reports[1]["totals"].items():
        assert reports[0]["totals"][name] == pytest.approx(value, rel=1e-2), name


@pytest.mark.parametrize(("way", "kind"), RUNS)
def test_both_processes_report_the_same(two_processes, way, kind):
    reports = [json.loads((two_processes / way / kind / f"rank{i}.json").read_text()) for i in range(2)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(("way", "kind"), RUNS)
def test_two_processes_resume_to_the_same_file(two_processes, way, kind):
    straight, resumed = (two_processes / way / kind / name / "model.safetensors" for name in ("model", "resumed"))
    assert straight.read_bytes() == resumed.read_bytes()


def test_a_checkpoint_of_a_sharded_model_is_no_model(two_processes):
    with pytest.raises(ValueError, match="unfinished training"):
        AutoModelForSequenceClassification.from_pretrained(
            two_processes / "sharded" / "sparse" / "run" / "checkpoint-4"
        )


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    path = tmp_path_factory.mktemp("methods") / "ended.pt"
    launch(ROOT / "tests" / "scripts" / "methods_fsdp.py", path, processes=2, timeout=600)
    return torch.load(path)


@pytest.mark.parametrize("kind", methods_fsdp.METHODS)
def test_a_method_on_a_sharded_model_equals_that_on_a_whole_one(methods, kind):
    sharded, whole = methods[kind]
    assert sharded.keys() == whole.keys()
    # Their sums over rows, or over processes, are in another order.
    torch.testing.assert_close(sharded.pop("logged"), whole.pop("logged"), rtol=1e-5, atol=1e-9)
    if kind not in methods_fsdp.SUMMED:
        assert_same_weights(sharded, whole)
    for name, weight in whole.items():
        assert torch.equal(sharded[name] == 0, weight == 0), name
        rounded = kind in (*methods_fsdp.ROUNDED, "shared")
        # Of rounded weights a few may come to the next code; and Adam makes much of gradients next to zero.
        close = torch.isclose(sharded[name], weight, rtol=1e-3 if rounded else 1e-5, atol=2e-4 if rounded else 1e-6)
        assert close.double().mean() >= (0.99 if kind in methods_fsdp.ROUNDED else 1.0), name


@pytest.mark.parametrize("act", ["finalize", "bake", "detach", "copy", "attach"])
def test_what_cannot_be_done_with_a_sharded_model_says_what_to_do(methods, act):
    advice = {"copy": "make the copy before fully_shard", "attach": "attach methods before fully_shard"}
    assert advice.get(act, f"twin.stack.{act}()") in methods["refused"][act]


class Launched(ApproxTrainer):
    """As if launched with FSDP or DeepSpeed."""

    plugin: ClassVar[dict] = {}
    zero = False

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.zero:
            self.is_deepspeed_enabled = True
        else:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.plugin)
            self.is_fsdp_enabled = True


@pytest.mark.parametrize(
    ("plugin", "approx", "options", "message"),
    [
        ({"fsdp_version": 1}, SparsificationConfig(), {}, "set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, SparsificationConfig(), {}, "cpu_ram_efficient_loading: false"),
        ({"cpu_offload": True}, SharingConfig(), {}, "fsdp_offload_params: false"),
        ({}, SparsificationConfig(granularity="layer"), {}, "masks whole layers"),
        ({}, LayerDroppingConfig(), {}, "masks whole layers"),
        ({}, SparsificationConfig(), {"torch_compile": True}, "torch_compile=False"),
        (None, SparsificationConfig(), {}, "DeepSpeed.*shard with FSDP2"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch, plugin, approx, options, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    model = build("bert")
    before = weights(model)
    monkeypatch.setattr(Launched, "plugin", {"fsdp_version": 2, **(plugin or {})})
    monkeypatch.setattr(Launched, "zero", plugin is None)
    with pytest.raises(ValueError, match=message):
        Launched(model=model, args=arguments(tmp_path, **options), train_dataset=dataset("bert"), approx=approx)
    assert_same_weights(weights(model), before)


def test_a_sparse_model_is_not_sharded(tmp_path, monkeypatch):
    trainer = make_trainer("bert", tmp_path / "run", SparsificationConfig(), max_steps=2)
    trainer.train()
    model: PreTrainedModel = trainer.model
    monkeypatch.setattr(Launched, "plugin", {"fsdp_version": 2})
    with pytest.raises(ValueError, match="would lose the zeros"):
        Launched(model=model, args=arguments(tmp_path), train_dataset=dataset("bert"))


@pytest.mark.parametrize("keep", [0, 1, 7, 20, 39, 40])
def test_the_largest_entries_are_those_that_sorting_finds(keep):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(-3, 4, shape, generator=generator) / 2.0 for shape in ((4, 5), (20,))]
    tensors[0][0, 0], tensors[1][3], tensors[1][4] = torch.inf, -torch.inf, -0.0
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    wanted = torch.zeros(40, dtype=torch.bool)
    wanted[flat.sort(descending=True, stable=True).indices[:keep]] = True
    found = torch.cat([mask.reshape(-1) for mask in global_top_k(tensors, keep)])
    assert torch.equal(found, wanted)
