"""Batches to calibrate on, from a file of texts or a folder of images.

Models of pairs of texts, translation say, are calibrated on what they make of the texts themselves.
"""

import glob
import inspect
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import tqdm
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel

from hf_approx.remote_code import without_questions

READERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""What `datasets` calls the kind of a file, by its ending."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
"""Files of which a tokenizer has at least one."""
ANSWER_TOKENS = (
    "decoder_start_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
)
HELD_OUT = 4
"""One in so many examples is held out."""

Loader = DataLoader[Any]


def calibration_batches(
    model: PreTrainedModel,
    folder: Path,
    source: Path,
    column: str = "text",
    samples: int = 256,
    batch_size: int = 8,
    max_length: int = 128,
    seed: int = 0,
) -> tuple[Loader, Loader]:
    """Batches for `calibrate`: three quarters of the examples to train on, and a quarter held out.

    Args:
        model: A model of text, of text to text, or of images.
        folder: Where its tokenizer or image processor is saved.
        source: A .txt file, a text a line; a .csv, .json, .jsonl or .parquet file; or a folder with images in it or
            in folders in it.
        column: Of the texts, in files that have columns.
        samples: How many examples to take, at random; all if there are fewer.
        batch_size: Examples in a batch.
        max_length: Tokens of a text, at most.
        seed: Which examples, and their order.

    Returns:
        The batches to train on, in a new order each time, and those held out.

    Raises:
        ValueError: The model, the file or the folder is of no use.
        ModuleNotFoundError: What reads the file is not installed.
    """
    for name, value, least in (("samples", samples, 2), ("batch_size", batch_size, 1), ("max_length", max_length, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not source.exists():
        raise ValueError(f"'{source}' does not exist.")
    kind, pairs = model.main_input_name, model.config.is_encoder_decoder
    if kind not in ("input_ids", "pixel_values") or (pairs and not (kind == "input_ids" and model.can_generate())):
        raise ValueError(
            f"{type(model).__name__} is no model of text, of text to text or of images: call "
            "hf_approx.loops.calibrate with batches of your own."
        )
    collate: Callable[[Any], Any]
    examples: Sequence[Any]
    if kind == "input_ids":
        collate, examples = _tokenizing(model, folder, max_length), read_texts(source, column)
    else:
        collate, examples = _processing(model, folder), find_images(source)
    if len(examples) < 2:
        raise ValueError(f"'{source}' has one example only; calibration needs at least two.")
    examples = random.Random(seed).sample(examples, min(samples, len(examples)))
    if pairs:
        examples, collate = _answered(model, examples, collate, batch_size, max_length)
    held_out = max(len(examples) // HELD_OUT, 1)
    order = torch.Generator().manual_seed(seed)
    train: Any = examples[held_out:]
    rest: Any = examples[:held_out]
    return (
        DataLoader(train, batch_size, shuffle=True, collate_fn=collate, generator=order),
        DataLoader(rest, batch_size, collate_fn=collate),
    )


def read_texts(source: Path, column: str) -> list[str]:
    """The texts of a file that are not empty.

    Args:
        source: As of `calibration_batches`.
        column: As of `calibration_batches`.

    Raises:
        ValueError: The file cannot be read, or has no such column of texts.
        ModuleNotFoundError: `datasets` is not installed.
    """
    kind = READERS.get(source.suffix.lower())
    if kind is None or not source.is_file():
        raise ValueError(f"'{source}' is no file of texts; its name must end in {', '.join(READERS)}.")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Reading texts needs `datasets`; install hf-approx[demo].") from None
    # A cache of its own: one that outlives the command could hand out an older file's texts.
    with tempfile.TemporaryDirectory() as cache:
        try:
            # As it is: `datasets` would take brackets and stars in a name for a pattern.
            table = load_dataset(kind, data_files=glob.escape(str(source)), split="train", cache_dir=cache)
        except Exception as error:  # every reader has errors of its own
            raise ValueError(f"'{source}' cannot be read as {kind}: {error.__cause__ or error}") from None
        name = "text" if kind == "text" else column
        if name not in table.column_names:
            raise ValueError(f"'{source}' has no column '{name}'; it has {', '.join(table.column_names)}.")
        values = list(table[name])
        table.cleanup_cache_files()
    wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(f"Column '{name}' of '{source}' holds {type(wrong).__name__}, not texts.")
    texts = [value for value in values if value and not value.isspace()]
    if not texts:
        raise ValueError(f"'{source}' holds no text.")
    return texts


def find_images(source: Path) -> list[Path]:
    """The images in a folder and the folders in it, in the order of their names.

    Raises:
        ValueError: It is no folder, or has none.
    """
    if not source.is_dir():
        raise ValueError(f"'{source}' is no folder; a model of images is calibrated on a folder of them.")
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGES)
    if not images:
        raise ValueError(f"'{source}' has no images; their names must end in {', '.join(IMAGES)}.")
    return images


def positions_of(model: PreTrainedModel) -> int:
    """How many tokens a model has positions for, at most."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # Where any number will do, some configs say -1.
    return positions if isinstance(positions, int) and positions > 0 else sys.maxsize


def _tokenizing(model: PreTrainedModel, folder: Path, max_length: int) -> Callable[[list[str]], Any]:
    # Without any file transformers makes up a tokenizer that knows no word.
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise ValueError(f"'{folder}' has no tokenizer; save it there with tokenizer.save_pretrained.")
    tokenizer = without_questions(AutoTokenizer.from_pretrained, folder)
    if tokenizer.pad_token is None:
        # Padding is masked and not compared, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    longest = min(max_length, positions_of(model), tokenizer.model_max_length)
    # A tokenizer may be that of another model, and make more than this one takes.
    unknown = set(tokenizer.model_input_names) - set(inspect.signature(model.forward).parameters)

    def collate(texts: list[str]) -> Any:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        for name in unknown & set(batch):
            del batch[name]
        return batch

    return collate


def _answered(
    model: PreTrainedModel, texts: Sequence[str], tokenize: Callable[[Any], Any], batch_size: int, max_length: int
) -> tuple[list[tuple[str, Tensor]], Callable[[Any], Any]]:
    """Texts with what the model generates for each, greedily, and the function that makes batches of them."""
    generator, theirs, training = cast(Any, model), model.generation_config, model.training
    # Of the model's own settings those that say what an answer is, and none that say how to search for one.
    tokens = {name: getattr(theirs, name, None) for name in ANSWER_TOKENS}
    longest = min(max_length, positions_of(model) - 1)
    config = GenerationConfig(num_beams=1, do_sample=False, max_new_tokens=longest, **tokens)
    ends = torch.tensor([] if config.eos_token_id is None else config.eos_token_id).reshape(-1)
    pairs = []
    bar = tqdm(total=len(texts), desc="generation")
    generator.eval().generation_config = config
    try:
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            answers = generator.generate(**tokenize(part).to(model.device)).cpu()
            for text, answer in zip(part, answers, strict=True):
                # The first token starts every answer; after the first end there is padding.
                over = torch.isin(answer[1:], ends).nonzero()
                pairs.append((text, answer[: int(over[0]) + 1] if len(over) else answer))
            bar.update(len(part))
    finally:
        generator.train(training).generation_config = theirs
        bar.close()
    filler = 0 if config.pad_token_id is None else int(config.pad_token_id)

    def collate(examples: list[tuple[str, Tensor]]) -> Any:
        answers = [answer for _, answer in examples]
        masks = [torch.ones_like(answer) for answer in answers]
        return {
            **tokenize([text for text, _ in examples]),
            "decoder_input_ids": pad_sequence(answers, batch_first=True, padding_value=filler),
            "decoder_attention_mask": pad_sequence(masks, batch_first=True),
        }

    return pairs, collate


def _processing(model: PreTrainedModel, folder: Path) -> Callable[[list[Path]], Any]:
    try:
        processor = without_questions(AutoImageProcessor.from_pretrained, folder)
    except (OSError, ValueError, KeyError):
        raise ValueError(f"'{folder}' has no image processor; save it there with its save_pretrained.") from None
    from PIL import Image, UnidentifiedImageError

    def collate(paths: list[Path]) -> Any:
        images = []
        for path in paths:
            try:
                images.append(Image.open(path).convert("RGB"))
            except (UnidentifiedImageError, OSError):
                raise ValueError(f"'{path}' is damaged or no image.") from None
        return processor(images, return_tensors="pt").to(model.dtype)

    return collate
