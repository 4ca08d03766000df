"""Training on streams, which have no length."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from helpers import arguments, assert_resumes_after_crash
from hf_approx import ApproxTrainer, AvaGradConfig, SmolConfig, SparsificationConfig
from models import VOCAB, build


def endless(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, VOCAB, (8,), generator=generator)
        yield {"input_ids": ids.tolist(), "labels": ids.tolist()}


def stream():
    """Never ends, and is shuffled as it comes."""
    return IterableDataset.from_generator(endless, gen_kwargs={"seed": 0}).shuffle(seed=1, buffer_size=8)


def finite():
    """Shorter than the training: it starts again, in another order."""
    rows = [row for row, _ in zip(endless(2), range(24), strict=False)]
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=8)


def trainer_of(folder, approx, data, **options):
    args = arguments(folder, per_device_train_batch_size=4, **options)
    return ApproxTrainer(
        model=build("llama"), args=args, train_dataset=data, approx=approx, optimizer=AvaGradConfig(lr=0.01)
    )


@pytest.mark.parametrize("data", [stream, finite])
def test_a_crashed_run_on_a_stream_resumes_to_the_same_sparse_and_quantized_weights(tmp_path, data):
    approx = [SparsificationConfig(target_sparsity=0.8, soft_fraction=0.5), SmolConfig(target_bits=4)]

    def trainer(folder):
        return trainer_of(folder, approx, data(), save_strategy="steps", save_steps=1)

    straight = assert_resumes_after_crash(trainer, tmp_path, crash=3)
    totals = straight.approx_report["totals"]
    assert totals["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert totals["bits"] == pytest.approx(4, abs=0.02)


def test_a_stream_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        trainer_of(tmp_path, SparsificationConfig(), stream(), max_steps=-1)
