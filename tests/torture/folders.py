"""Good folders of every codec, and the truth about the models in them."""

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_approx import SharingConfig, SparsificationConfig, attach_packing
from hf_approx.modules.activation import ActivationQuantizer, install
from hf_approx.packing import Grid
from hf_approx.targets import select_targets

VOCAB = 32
Files = dict[str, bytes]
Truth = dict[str, Any]
IDS = torch.tensor([[5, 9, 2, 30, 7], [1, 1, 28, 3, 11]])


def llama(layers: int = 1) -> PreTrainedModel:
    """All its projections of attention have one shape, and both of the feed-forward part: they can be exchanged."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


def gpt2(layers: int = 1) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=layers, n_head=2, n_positions=16))


def bert(layers: int = 1, heads: int = 2) -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def zero(model: PreTrainedModel, sparsity: float) -> list[str]:
    """Zero random weights of the default targets; returns the names of all of these."""
    names = [target.name for target in select_targets(model).values()]
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand_like(weight) < sparsity, 0.0)
    return names


def grids(model: PreTrainedModel, granularity: str) -> dict[str, Grid]:
    """A random grid of 1 to 5 bits for every default target."""
    found = {}
    for name in (target.name for target in select_targets(model).values()):
        weight = model.get_parameter(name).detach()
        rows, columns = weight.shape
        shape = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, columns // 8), "weight": (rows, columns)}
        channel = (1, 1) if granularity == "tensor" else (rows, columns // 8) if granularity == "group" else (rows, 1)
        scale = 0.02 + 0.02 * torch.rand(channel)
        found[name] = Grid(torch.randint(1, 6, shape[granularity], dtype=torch.uint8), scale.to(torch.float16))
    return found


def _sparse(make: Callable[[], PreTrainedModel], dtype: str | None) -> PreTrainedModel:
    model = make()
    attach_packing(model, zero(model, 0.8), dtype)
    return model


def _quantized(granularity: str, sparsity: float) -> PreTrainedModel:
    model = llama()
    zero(model, sparsity)
    attach_packing(model, [], grids=grids(model, granularity))
    return model


def _activations(channels: bool, signed: bool) -> PreTrainedModel:
    model = llama()
    made = grids(model, "channel")
    for layer in (target.module for target in select_targets(model).values()):
        quantizer = ActivationQuantizer(layer.in_features if channels else 1, signed)
        quantizer.bits.copy_(torch.randint(2, 6, quantizer.bits.shape))
        quantizer.limit.copy_(0.5 + torch.rand(quantizer.limit.shape))
        install(layer, quantizer)
    attach_packing(model, [], grids=made)
    return model


def _shared(sparsity: float) -> PreTrainedModel:
    model = bert(layers=3)
    method = SharingConfig(templates=2).build()
    method.attach(model)
    names = method.finalize()
    if sparsity:
        with torch.no_grad():
            for name in names:
                weight = model.get_parameter(name)
                weight.masked_fill_(torch.rand_like(weight) < sparsity, 0.0)
    attach_packing(model, names if sparsity else [])
    return model


def _structure(granularity: str, make: Callable[[], PreTrainedModel], sparsity: float) -> PreTrainedModel:
    model = make()
    options = {"scope": "global"} if granularity == "neuron" else {}
    method = SparsificationConfig(granularity=granularity, target_sparsity=0.5, **options).build()
    method.attach(model)
    method.on_step(1.0)
    method.settle()
    method.finalize()
    attach_packing(model, zero(model, sparsity) if sparsity else [])
    return model


CODECS: dict[str, dict[str, Callable[[], PreTrainedModel]]] = {
    "sparse": {
        "half": lambda: _sparse(llama, "float16"),
        "tied": lambda: _sparse(gpt2, "bfloat16"),
        "own": lambda: _sparse(bert, None),
        "shards": lambda: _sparse(llama, "float16"),
    },
    "quantized": {
        "weight": lambda: _quantized("weight", 0.0),
        "group": lambda: _quantized("group", 0.0),
        "channel": lambda: _quantized("channel", 0.0),
        "tensor": lambda: _quantized("tensor", 0.0),
        "sparse-weight": lambda: _quantized("weight", 0.7),
        "sparse-channel": lambda: _quantized("channel", 0.7),
    },
    "shared": {"dense": lambda: _shared(0.0), "sparse": lambda: _shared(0.7)},
    "activations": {
        "signed": lambda: _activations(False, True),
        "unsigned": lambda: _activations(False, False),
        "channels": lambda: _activations(True, True),
    },
    "structure": {
        "heads": lambda: _structure("head", lambda: bert(heads=4), 0.0),
        "neurons": lambda: _structure("neuron", lambda: bert(layers=2), 0.0),
        "sparse": lambda: _structure("head", lambda: gpt2(layers=1), 0.8),
    },
}


@dataclass(frozen=True)
class Good:
    """A saved model.

    Attributes:
        files: Contents by name.
        cls: Class of the model.
        truth: See `truth_of`.
    """

    name: str
    files: Files
    cls: type[PreTrainedModel]
    truth: Truth


def good(codec: str, variant: str) -> Good:
    """Make, save and load back one of `CODECS`; the truth is that of the model before it was saved."""
    torch.manual_seed(0)
    model = CODECS[codec][variant]().eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **({"max_shard_size": "2KB"} if variant == "shards" else {}))
        loaded = type(model).from_pretrained(folder)
        truth = truth_of(model)
        # A grid is not told apart where no weight has a code: what was saved is less than what there was.
        truth["grids"] = grids_of(loaded)
        found = difference(truth, loaded)
        if found is not None:
            raise AssertionError(f"{codec} {variant} does not load as what was saved: {found}")
        return Good(f"{codec} {variant}", read(Path(folder)), type(model), truth)


def read(folder: Path, hidden: bool = False) -> Files:
    """All files in a folder and those below it, by relative path; links and special files by what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not hidden and any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name.as_posix()] = f"{path.lstat().st_mode:o}".encode()
        elif path.is_file():
            found[name.as_posix()] = path.read_bytes()
    return found


def write(files: Files, folder: Path) -> None:
    """Undo `read`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def truth_of(model: PreTrainedModel) -> Truth:
    """All that makes a model compute what it does: tensors, sizes, quantizers, and what comes out of it."""
    return {**_parts_of(model), "logits": logits_of(model)}


def _parts_of(model: nn.Module) -> Truth:
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    return {"tensors": tensors, "buffers": buffers, "grids": grids_of(model)}


def logits_of(model: nn.Module) -> Tensor:
    """What comes out, for one batch."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def grids_of(model: nn.Module) -> dict[str, Any]:
    quantizer = getattr(model, "hf_quantizer", None)
    return {name: (grid.bits, grid.scale) for name, grid in getattr(quantizer, "grids", {}).items()}


def difference(truth: Truth, model: nn.Module) -> str | None:
    """What is not bit for bit as it was, if anything is."""
    parts = {name: value for name, value in truth.items() if name != "logits"}
    return _differ("", parts, _parts_of(model)) or _differ("logits", truth["logits"], logits_of(model))


def _differ(path: str, a: Any, b: Any) -> str | None:
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{path}: {sorted(a.keys() ^ b.keys())[0]} is in one only"
        found = (_differ(f"{path}/{key}", value, b[key]) for key, value in a.items())
        return next((each for each in found if each is not None), None)
    if isinstance(a, tuple):
        found = (_differ(path, x, y) for x, y in zip(a, b, strict=True))
        return next((each for each in found if each is not None), None)
    return None if same(a, b) else f"{path} differs"


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype and shape and the same bits, signs of zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


Stored = dict[str, tuple[str, list[int], bytes]]
"""Dtype, shape and bytes of the tensors of a safetensors file, by name."""


def read_tensors(data: bytes) -> tuple[Stored, dict[str, Any]]:
    """What is in a safetensors file, and its metadata, by nothing but its specification."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    body = data[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }, metadata


def write_tensors(stored: Stored, metadata: dict[str, Any]) -> bytes:
    """Undo `read_tensors`."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape, data) in stored.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in stored.values())
