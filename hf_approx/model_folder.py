"""Which files of a folder belong to the model in it; and finding that folder, here or on the Hub."""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_approx.headers import weight_map
from hf_approx.json_files import read_json
from hf_approx.layout import variant_of
from hf_approx.links import own_file
from hf_approx.sentence_parts import APART, PARTS_FILE, part_files, part_folders
from hf_approx.text import listed, one_line

CONFIG, INDEX, WEIGHTS = constants.CONFIG_NAME, constants.SAFETENSORS_INDEX_FILE, constants.SAFETENSORS_SINGLE_FILE
DECODER = "language_model/attrs.json"
"""The language model that some models of speech decode with."""
PIPELINE = "model_index.json"
"""Lists the parts of a pipeline of diffusers."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "bpe.codes",
    "byte_maps.json",
    "chat_template.jinja",
    "chat_template.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.json",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
)
"""What the tokenizers of transformers save, and have saved."""
PART_FILES = (
    CONFIG,
    "cnn_config.json",
    "idf.json",
    "lstm_config.json",
    "phrasetokenizer_config.json",
    "router_config.json",
    "sentence_albert_config.json",
    "sentence_bert_config.json",
    "sentence_camembert_config.json",
    "sentence_distilbert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
    "whitespacetokenizer_config.json",
    "wordembedding_config.json",
)
"""What parts of a model of sentence-transformers save, beside weights and tokenizers."""
FILES = (
    *TOKENIZER_FILES,
    *PART_FILES,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
    "audio_tokenizer_config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    PARTS_FILE,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
INNER_FILES = (*TOKENIZER_FILES, *PART_FILES, WEIGHTS, INDEX, "LICENSE", "generation_config.json")
"""What is looked for in the folder of a part."""
VERSIONED = re.compile(r"(config|tokenizer)(\.\d+)+\.json|tokenizer\.model\.v\d+(m\d+)?")
"""The same for some versions of transformers, or of Mistral's tokenizers, only."""
PICKLES = r"(pytorch_model|tf_model|flax_model|consolidated)[\w.-]*\.(bin|pth|pt|h5|msgpack)(\.index\.json)?"
"""Weights in other formats than safetensors."""
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT saves of an adapter, the first one in the folder itself and others in folders of their names."""
TEMPLATES = "additional_chat_templates"
"""The folder with chat templates other than the first."""


@dataclass(frozen=True)
class ModelFiles:
    """What is in a folder.

    Attributes:
        weights: Names of the weight files, and of their index if there is one.
        others: Paths of what belongs to the model beside them, relative to the folder.
        left_out: What else is there that is not hidden, folders with a slash at their end.
    """

    weights: tuple[str, ...]
    others: tuple[str, ...]
    left_out: tuple[str, ...]


def find_checkpoint(
    path_or_repo: str, everything: bool = False, revision: str | None = None, token: str | None = None
) -> Path:
    """A folder, or the local copy of a Hub repository.

    Args:
        path_or_repo: Path or repository id.
        everything: Download all that belongs to the model, not only config and weights; and refuse a folder that has
            such files elsewhere, see `model_files`.
        revision: Branch, tag or commit of the repository; default `main`.
        token: Default: that of `HF_TOKEN` or `hf auth login`.

    Raises:
        FileNotFoundError: It is neither, may not be read, or holds no `config.json`.
        ConnectionError: It is no folder, and the Hub cannot be reached.
        ValueError: A revision of a folder is asked for, or as of `model_files`.
    """
    folder = Path(path_or_repo)
    if folder.is_file():
        raise FileNotFoundError(f"'{path_or_repo}' is a file: give the folder of the model.")
    if folder.is_dir() and revision is not None:
        raise ValueError(f"'{path_or_repo}' is a folder: only repositories have revisions.")
    if not folder.is_dir():
        files = [CONFIG, INDEX, "*.safetensors", PARTS_FILE, PIPELINE]
        if everything:
            files += [*FILES, "tokenizer.*.json", "tokenizer.model.v*", f"{TEMPLATES}/*.jinja", DECODER]
            files += [f"*tokenizer*/{name}" for name in TOKENIZER_FILES]
        folder = _download(path_or_repo, files, ["*/*.safetensors", "*/*/*"], revision, token)
        if parts := part_folders(folder) if everything else {}:
            # Which these are is known only now; the name of the folder is that of the commit.
            files = [f"{part}/{inner}{name}" for part in parts for inner in ("", "*/") for name in INNER_FILES]
            folder = _download(path_or_repo, files, [], folder.name, token)
    check_kind(path_or_repo, {path.name for path in folder.iterdir()}, _models_in(folder))
    if everything:
        model_files(folder)
    return folder


def _models_in(folder: Path) -> list[str]:
    """The folders in a folder that have a config, as those of a recipe's outputs have."""
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))


def check_kind(source: str, names: Collection[str], inner: Sequence[str] = ()) -> None:
    """Raise `FileNotFoundError` unless there is a model of transformers among these files of a folder's top.

    Args:
        source: The folder or repository.
        names: Of the files.
        inner: Names of folders in it that may be meant.
    """
    if PIPELINE in names:
        raise FileNotFoundError(
            f"'{source}' is a pipeline of diffusers: give one of its folders that holds a model of transformers, as "
            "'text_encoder' does in most."
        )
    if CONFIG not in names:
        if PARTS_FILE in names:
            raise FileNotFoundError(f"'{source}' is a model of sentence-transformers: {APART}")
        if ADAPTERS[0] in names:
            raise FileNotFoundError(
                f"'{source}' holds adapters of PEFT, not a model: load them on their base, and save what "
                "merge_and_unload() returns."
            )
        hint = f" There are models in its folders {listed(inner)}." if inner else ""
        raise FileNotFoundError(f"'{source}' has no {CONFIG}: it is not a saved model.{hint}")


def model_files(folder: Path, also: Collection[str] = ()) -> ModelFiles:
    """The files that belong to the model in a folder: those with names that transformers gives to files of models.

    Endings do not decide, because tokens and keys of their owner end as vocabularies do. Files of the same names in
    folders belong to it if the folder is a part that sentence-transformers has listed, a second tokenizer of a
    processor, or that of chat templates; copies of a model for other engines do not.

    Args:
        folder: A saved model.
        also: Names of other files at its top that belong to it.

    Raises:
        ValueError: One is a link to another place or no file; or a part of the model cannot come along: it needs code
            of its own, is pickled, or is missing.
        PackedFormatError: What lists the parts or the weight files is damaged.
        FileNotFoundError: A weight file is missing.
    """
    adapters = not own_file(folder, CONFIG) and own_file(folder, ADAPTERS[0])
    index = set() if adapters or weight_index(folder) is None else {INDEX}
    weights = set(ADAPTERS) if adapters else {path.name for path in weight_files(folder)} | index
    weights = {name for name in weights if own_file(folder, name)}
    if own_file(folder, DECODER):
        raise ValueError(
            f"'{folder}' decodes with a language model of another kind, in 'language_model', which does not come "
            "along: move it away, and back into the folder that is written."
        )
    parts = part_folders(folder)
    names = {name for name in {*FILES, *also} if own_file(folder, name)}
    left_out = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name
        if name in names | weights or name.startswith("."):
            continue
        if VERSIONED.fullmatch(name) and own_file(folder, name):
            names.add(name)
        elif any(part.split("/")[0] == name for part in parts):
            continue
        elif not entry.is_dir(follow_symlinks=False):
            if name == TEMPLATES:
                own_file(folder, name)
            left_out.append(name)
        elif inner := _templates(folder, name) or _tokenizer(folder, name) or (adapters and _adapter(folder, name)):
            names.update(inner)
        else:
            left_out.append(f"{name}/")
    for part, kind in parts.items():
        inner, unknown = part_files(folder, part, kind, frozenset(INNER_FILES))
        names.update(inner)
        left_out += unknown
    return ModelFiles(tuple(sorted(weights)), tuple(sorted(names)), tuple(left_out))


def weight_files(folder: Path) -> list[Path]:
    """The files transformers would read: other safetensors files in the folder are none of the model's.

    Raises:
        PackedFormatError: Their index is damaged.
        FileNotFoundError: One is missing.
    """
    index = weight_index(folder)
    if index is None and not (folder / WEIGHTS).is_file():
        raise no_weights(str(folder), {path.name for path in folder.iterdir()})
    names = [WEIGHTS] if index is None else sorted(set(index.values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"'{folder}' has no file '{one_line(name)}', which its {INDEX} lists.")
    return [folder / name for name in names]


def weight_index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor of a model in several files.

    None where all is in one file: transformers prefers that to an index that was left beside it.

    Raises:
        PackedFormatError: It is damaged.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not own_file(folder, INDEX):
        return None
    return weight_map(read_json(index), str(index))


def no_weights(source: str, names: Collection[str]) -> FileNotFoundError:
    """What to raise where a folder or repository with these files at its top has none that transformers would read."""
    variants = sorted({variant for name in names if (variant := variant_of(name))})
    if variants:
        variant = one_line(variants[0])
        return FileNotFoundError(
            f"'{source}' has weights of the variant '{variant}' only: rename them to '{WEIGHTS}', or load it with "
            f"from_pretrained(..., variant='{variant}') and save_pretrained to another folder."
        )
    pickles = sorted(name for name in names if re.fullmatch(PICKLES, name))
    if pickles:
        return FileNotFoundError(
            f"'{source}' has its weights in '{one_line(pickles[0])}', not in safetensors: load it with "
            "from_pretrained, and save_pretrained to another folder."
        )
    return FileNotFoundError(f"'{source}' has no file '{WEIGHTS}'.")


def not_found(source: str, revision: str | None, error: Exception) -> OSError:
    """What to raise where there is no folder of a name, and the Hub's client raised this for the repository."""
    if isinstance(error, HFValidationError):
        return FileNotFoundError(f"'{source}' is neither a folder nor the name of a repository.")
    if isinstance(error, GatedRepoError):
        return FileNotFoundError(
            f"'{source}' is open only to those who accept its terms, on its page on the Hub, and log in "
            "(`hf auth login`) or give a token."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"'{source}' is neither a folder nor a repository you may read; for a private one log in "
            "(`hf auth login`) or give a token."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"'{source}' has no branch, tag or commit '{revision}'.")
    if isinstance(error, HfHubHTTPError):
        return FileNotFoundError(one_line(str(error)))
    if not isinstance(error, (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)):  # a full disk, say
        return OSError(f"'{source}' cannot be downloaded: {one_line(str(error))}")
    why = "HF_HUB_OFFLINE is set" if is_offline_mode() else one_line(str(error.__cause__ or error))
    return ConnectionError(
        f"'{source}' is no folder, and the Hub cannot be reached for a repository of that name ({why})."
    )


def _download(repo_id: str, patterns: list[str], ignored: list[str], revision: str | None, token: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ignored
            )
        )
    except (HFValidationError, HTTPError, OSError) as error:
        raise not_found(repo_id, revision, error) from None


def _templates(folder: Path, name: str) -> list[str]:
    """Other chat templates, if that is what the folder of this name has."""
    found = [f"{name}/{path.name}" for path in (folder / name).glob("[!.]*.jinja")] if name == TEMPLATES else []
    return [path for path in found if own_file(folder, path)]


def _tokenizer(folder: Path, name: str) -> list[str]:
    """The tokenizer in a folder in which processors with more than one save it, if it is such a folder."""
    if "tokenizer" not in name or not own_file(folder, f"{name}/tokenizer_config.json"):
        return []
    return [f"{name}/{file}" for file in TOKENIZER_FILES if own_file(folder, f"{name}/{file}")]


def _adapter(folder: Path, name: str) -> list[str]:
    """Another adapter in a folder, which is no checkpoint of a training."""
    found = [f"{name}/{file}" for file in ADAPTERS if own_file(folder, f"{name}/{file}")]
    return found if len(found) == len(ADAPTERS) and not name.startswith("checkpoint-") else []
