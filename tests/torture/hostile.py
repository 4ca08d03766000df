"""Folders that someone made to do harm, or that went wrong, given to every command.

Each command does what it does for a good folder, or refuses in one line, in time. Whatever it does, nothing that lies
outside of the folder is read into what it writes, changed or added, nothing is executed, and a terminal shows no
control code.
"""

import contextlib
import io
import json
import tempfile
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import hf_approx.hub
from hf_approx.cards import CARD_FILE
from torture.actions import add_tokenizer, cli
from torture.engine import Case, WrongError, problem, theirs
from torture.folders import (
    CODECS,
    Files,
    Truth,
    difference,
    gpt2,
    grids_of,
    logits_of,
    read,
    same,
    truth_of,
    write,
    zero,
)
from torture.hostile_folders import ARCHITECTURE, CONFIG, SECRET, Build, folders

CHOSEN = {
    "dense": ("", ""),
    "packed": ("quantized", "sparse-channel"),
    "active": ("activations", "signed"),
    "shared": ("shared", "dense"),
}


@cache
def _bases() -> dict[str, tuple[Files, Truth]]:
    """A dense model with zeros and packed ones, with all that lies beside weights."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, (codec, variant) in CHOSEN.items():
            torch.manual_seed(0)
            folder = Path(name) / kind
            if codec:
                model = CODECS[codec][variant]()
            else:
                model = gpt2()
                zero(model, 0.8)
            model.save_pretrained(folder)
            add_tokenizer(folder)
            with contextlib.redirect_stdout(io.StringIO()):
                cli("card", folder)
            truth = truth_of(model)
            if codec:  # a grid is not told apart where no weight has a code
                truth["grids"] = grids_of(type(model).from_pretrained(folder))
            found[kind] = (read(folder), truth)
    return found


def cases(count: int | None = None, seed: int = 0) -> list[Case]:
    """Every hostile folder with every command that makes sense for it, or `count` of them."""
    _bases()
    found = []
    for name, (kind, base, build) in folders().items():
        for command in COMMANDS[base]:
            if command == "load" and kind == ARCHITECTURE:
                continue  # transformers builds that before it asks hf_approx
            run = partial(_try, base, build, command)
            found.append(Case(f"hostile/{name}/{base}/{command}", f"hostile, {kind}", run, f"{name}, {command}"))
    return found if count is None else Random(seed).sample(found, count)


COMMANDS = {
    "dense": ("inspect", "compress", "card", "push"),
    "packed": ("load", "inspect", "json", "export", "card", "push"),
    "active": ("load", "inspect", "export"),
    "shared": ("load", "inspect", "json", "export", "card", "push"),
}


def _try(base: str, build: Build, command: str, root: Path) -> None:
    files, truth = _bases()[base]
    folder, outside, output = root / "model", root / "outside", root / "output"
    write(files, folder)
    write({"secret.txt": SECRET, "theirs.md": b"Not yours.\n"}, outside)
    with contextlib.suppress(FileExistsError):
        build(folder, outside)
    before = read(folder, hidden=True) if folder.is_dir() else {}
    beyond = read(outside, hidden=True)
    shown, refusal = io.StringIO(), None
    sent: dict[str, bytes] = {}
    with contextlib.chdir(root), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        try:
            _RUN[command](folder, output, base, truth, sent)
        except Exception as error:
            refusal = error
            if isinstance(error, WrongError) or problem(error) is not None:
                raise
    text = shown.getvalue() + ("" if refusal is None else str(refusal))
    _check(folder, outside, before, beyond, text, command)
    made = read(output, hidden=True) if output.is_dir() else {}
    for name, data in {**made, **sent, "the terminal": text.encode("utf-8", "surrogatepass")}.items():
        if SECRET in data:
            raise WrongError(f"the secret is in {name}")
        if name.endswith((".bin", ".pkl", ".py")) and "hf_approx" not in name:
            raise WrongError(f"{name} came along")
    if refusal is not None:
        raise refusal


def _check(folder: Path, outside: Path, before: Files, beyond: Files, text: str, command: str) -> None:
    now = read(outside, hidden=True)
    if now != beyond:
        changed = sorted(n for n in {*now, *beyond} if now.get(n) != beyond.get(n))
        raise WrongError(f"outside of the folder {changed[0]} is another or new")
    codes = [char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs") and char != "\n"]
    if codes:
        raise WrongError(f"the terminal gets {codes[0]!r}")
    after = read(folder, hidden=True) if folder.is_dir() else {}
    changed = [n for n in {*after, *before} if after.get(n) != before.get(n)]
    if set(changed) - ({CARD_FILE} if command == "card" else set()):
        raise WrongError(f"{sorted(changed)[0]} of the folder was changed")


def _auto(base: str) -> Any:
    return AutoModelForSequenceClassification if base == "shared" else AutoModelForCausalLM


def _load(folder: Path, output: Path, base: str, truth: Truth, sent: Files) -> None:
    try:
        model = _auto(base).from_pretrained(folder)
    except Exception as error:
        if theirs(error) or b'"quant_method": "hf_approx"' not in (folder / CONFIG).read_bytes():
            raise ValueError("transformers stops before it asks hf_approx.") from None
        raise
    found = difference(truth, model)
    if found is not None:
        raise WrongError(f"loaded as something else: {found}")


def _written(command: str, *options: str) -> Callable[..., None]:
    def run(folder: Path, output: Path, base: str, truth: Truth, sent: Files) -> None:
        cli(command, folder, output, *options)
        model: PreTrainedModel = _auto(base).from_pretrained(output)
        if base == "shared":  # the weights have no templates any more
            whole = same(logits_of(model), truth["logits"])
        else:  # and not what they compute, for the number of heads may be nonsense
            tensors = model.state_dict()
            whole = tensors.keys() == truth["tensors"].keys()
            whole = whole and all(same(tensor, tensors[name]) for name, tensor in truth["tensors"].items())
        if not whole:
            raise WrongError("what it wrote is another model")

    return run


def _push(folder: Path, output: Path, base: str, truth: Truth, sent: Files) -> None:
    class Api:
        """Keeps what is uploaded, read as the client reads it."""

        def __init__(self, **options: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def model_info(self, *args: Any, **options: Any) -> Any:
            return type("Info", (), {"sha": "0" * 40, "siblings": [], "private": True})

        def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> Any:
            for operation in operations:
                if isinstance(operation, CommitOperationAdd):
                    with operation.as_file() as file:
                        sent[operation.path_in_repo] = file.read()
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    before = hf_approx.hub.HfApi
    hf_approx.hub.HfApi = Api  # type: ignore[misc,assignment]
    try:
        cli("push", folder, "me/model", "--private")
    finally:
        hf_approx.hub.HfApi = before  # type: ignore[misc]
    config = json.loads(sent[CONFIG])
    foreign = [str(ref) for ref in (config.get("auto_map") or {}).values() if "hf_approx" not in str(ref)]
    if foreign:
        raise WrongError(f"auto_map names {foreign[0]} in the repository")


_RUN: dict[str, Callable[..., None]] = {
    "load": _load,
    "inspect": lambda folder, *_: cli("inspect", folder),
    "json": lambda folder, *_: cli("inspect", folder, "--json"),
    "card": lambda folder, *_: cli("card", folder),
    "compress": _written("compress", "--store-dtype", "float32"),
    "export": _written("export"),
    "push": _push,
}
