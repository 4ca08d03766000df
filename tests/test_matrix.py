"""Every method on every architecture: train, save, load in a fresh process, equal logits bit for bit."""

import json

import pytest
import torch

from helpers import make_trainer, python
from hf_approx import AvaGradConfig, MagnitudePruningConfig, MovementPruningConfig, SparsificationConfig
from models import ARCHITECTURES, batch

METHODS = {
    "sparsification": SparsificationConfig(target_sparsity=0.8),
    "sparsification-paper": SparsificationConfig(target_sparsity=0.8, preset="paper"),
    "movement": MovementPruningConfig(target_sparsity=0.8),
    "magnitude": MagnitudePruningConfig(target_sparsity=0.8, update_every=1),
}

LOAD = """
import json, sys, torch, transformers, hf_approx
from models import batch
for line in json.loads(sys.argv[1]):
    model = getattr(transformers, line["class"]).from_pretrained(line["folder"]).eval()
    with torch.no_grad():
        torch.save(model(**batch(line["name"])).logits, line["folder"] + "/logits.pt")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train all pairs here, then compute the logits of all saved models in one fresh process."""
    results, lines = {}, []
    for method, config in METHODS.items():
        for name in ARCHITECTURES:
            folder = tmp_path_factory.mktemp(f"{method}-{name}")
            optimizer = AvaGradConfig(lr=0.01) if method == "sparsification" else None
            trainer = make_trainer(name, folder, approx=config, optimizer=optimizer)
            trainer.train()
            trainer.save_model(str(folder / "model"))
            with torch.no_grad():
                logits = trainer.model.eval()(**batch(name)).logits
            results[method, name] = (trainer, folder / "model", logits)
            lines.append({"class": type(trainer.model).__name__, "folder": str(folder / "model"), "name": name})
    python(LOAD, json.dumps(lines))
    return results


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_train_save_and_load_in_a_fresh_process(trained, method, name):
    trainer, folder, logits = trained[method, name]
    assert torch.equal(torch.load(folder / "logits.pt"), logits)
    totals = trainer.approx_report["totals"]
    assert totals["sparsity"] == pytest.approx(0.8, abs=1e-3)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(config["tensors"]) > 0
    stored = sum(spec["nbytes"] for spec in config["tensors"].values())
    assert stored < 0.3 * totals["dense_bytes"] / 2
    report = json.loads((folder / "approx_report.json").read_text())
    assert report["totals"] == totals
