"""What is said of settings and calls that do less than they seem to."""

import pytest
from transformers import AutoModelForSequenceClassification

from helpers import make_trainer
from hf_approx import ApproxConfig, AvaGradConfig, SmolConfig, SparsificationConfig, attach_packing
from hf_approx.loops import round_weights
from models import build


@pytest.fixture
def said(caplog):
    """Warnings of hf_approx since the last call."""

    def messages():
        found = [record.message for record in caplog.records if record.name.startswith("hf_approx")]
        caplog.clear()
        return found

    return messages


def test_the_learning_rate_of_the_arguments_is_not_avagrads(tmp_path, said):
    optimizer = AvaGradConfig(lr=0.5)
    make_trainer("bert", tmp_path, optimizer=optimizer, learning_rate=7e-5)
    assert said() == ["AvaGrad trains with the lr of its own config, 0.5, and not with learning_rate=7e-05."]
    make_trainer("bert", tmp_path, optimizer=optimizer, learning_rate=5e-5)
    make_trainer("bert", tmp_path, learning_rate=7e-5)
    assert said() == []
    make_trainer("bert", tmp_path, optimizer=optimizer, learning_rate=5e-5, weight_decay=0.1, adam_beta1=0.8)
    assert said() == [
        "AvaGrad trains with the settings of its own config, and not with weight_decay=0.1, adam_beta1=0.8."
    ]


def test_a_model_that_is_saved_before_its_training_ends(tmp_path, said):
    trainer = make_trainer("bert", tmp_path, SparsificationConfig(target_sparsity=0.5), max_steps=2)
    trainer.save_model(tmp_path / "early")
    assert said() == ["Training has not ended: what is saved is no model yet, and nothing can load it as one."]
    trainer.train()
    trainer.save_model(tmp_path / "late")
    assert said() == []


def test_packed_weights_that_the_packed_runtime_does_not_keep(tmp_path, said):
    model = build("bert")
    result = round_weights(model, SmolConfig(target_bits=3))
    attach_packing(model, result.names, grids=result.grids)
    model.save_pretrained(tmp_path)
    packed = ApproxConfig(runtime="packed")
    AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=packed)
    (message,) = said()
    assert message.startswith("runtime='packed' keeps no weight of this BertForSequenceClassification packed")
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert said() == []
