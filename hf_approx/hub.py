"""Sharing saved models on the Hub: one commit a push, and a look at a repository without downloading it."""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version of the client is built on
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from hf_approx.cards import CARD_FILE, PICTURES, render_card
from hf_approx.inspection import (
    Inspection,
    companions,
    describe_tensors,
    find_checkpoint,
    inspect_checkpoint,
    read_packing,
    read_quantization,
    weight_files,
)
from hf_approx.packing import PackedFormatError
from hf_approx.remote_code import LOADER_FILE, loader_files
from hf_approx.report import REPORT_FILE

ARGUMENTS_FILE = "training_args.json"
ATTEMPTS = 10

# What an earlier push may have left that would be wrong, or unused, beside the files of this one.
STALE = (
    "model*.safetensors",
    "model.safetensors.index.json",
    REPORT_FILE,
    ARGUMENTS_FILE,
    LOADER_FILE,
    "training_args.bin",
    *PICTURES,
)


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        files: Names of the files the repository now has from it.
        bytes: Their size in all.
        commit: Its address and hash.
    """

    files: list[str]
    bytes: int
    commit: CommitInfo

    def __str__(self) -> str:
        return f"Pushed {len(self.files)} files, {self.bytes:,} bytes: {self.commit.commit_url}"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload model",
) -> Pushed:
    """Push a saved model to the Hub in one commit: weights, config, tokenizer or processor, card, report, pictures.

    Nothing else that is in the folder is pushed, no pickle above all. A folder without `README.md` gets a card in the
    repository, and a packed model the file that `trust_remote_code=True` loads it with (see `hf_approx.remote_code`).
    Weights that the repository has from earlier pushes and this one does not replace are deleted in the same commit;
    if another commit comes first, this one is made again on top of it. If the push fails, the branch stays as it was;
    a repository or branch made for it stays too, with what it started from.

    Args:
        folder: Written by `save_model` or `save_pretrained`.
        repo_id: `user/name`, or `name` for the user of the token. Created if it does not exist.
        private: Create the repository private; True refuses one that is public.
        revision: Branch to push to, created from `main` if it does not exist; default `main`.
        token: Default: that of `HF_TOKEN` or `hf auth login`.
        message: Title of the commit.

    Raises:
        FileNotFoundError: The folder holds no saved model.
        PackedFormatError: Its config or weight files are damaged, or are of unfinished training.
        ValueError: The repository exists and is public, or the token can be none.
        ConnectionError: The Hub cannot be reached or says no.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError("The token has characters that no token has; copy it again.")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder.")
    files = _files(find_checkpoint(str(folder)), repo_id)
    api = HfApi(token=token)
    try:
        return _push(api, files, repo_id, private, revision, message)
    except (HTTPError, RuntimeError) as error:
        # An upload that failed says which file it was of, and its cause says why.
        parts = [str(part) for part in (error, error.__cause__ if isinstance(error, RuntimeError) else None) if part]
        text = " ".join(" ".join(parts).split()).replace(token or "\0", "<token>")
        raise ConnectionError(f"Nothing was pushed to '{repo_id}': {text}") from None


def inspect_source(source: str | Path, revision: str | None = None, token: str | None = None) -> Inspection:
    """Inspect a folder or, if there is none of that name, a Hub repository; see `inspect_repo`."""
    if Path(source).exists():
        return inspect_checkpoint(find_checkpoint(str(source), revision=revision))
    return inspect_repo(str(source), revision, token)


def inspect_repo(repo_id: str, revision: str | None = None, token: str | None = None) -> Inspection:
    """Inspect a Hub repository by its config and the headers of its weight files, which are not downloaded.

    Raises:
        FileNotFoundError: The repository, or a config or safetensors files in it, do not exist or may not be read.
        PackedFormatError: They are damaged.
        ConnectionError: The Hub cannot be reached.
    """
    if is_offline_mode():
        return inspect_checkpoint(find_checkpoint(repo_id, revision=revision, token=token))
    api = HfApi(token=token)
    try:
        # One commit for all that is read: a push may come in between.
        commit = api.model_info(repo_id, revision=revision).sha
        config = hf_hub_download(repo_id, constants.CONFIG_NAME, revision=commit, token=token)
        files = api.get_safetensors_metadata(repo_id, revision=commit).files_metadata
    except HFValidationError:
        raise FileNotFoundError(f"'{repo_id}' is neither a folder nor the name of a repository.") from None
    except HfHubHTTPError as error:
        raise FileNotFoundError(" ".join(str(error).split())) from None
    except HTTPError as error:
        raise ConnectionError(f"'{repo_id}' cannot be reached: {error}") from None
    except NotASafetensorsRepoError:
        raise FileNotFoundError(f"'{repo_id}' has no safetensors files.") from None
    except SafetensorsParsingError as error:
        raise PackedFormatError(f"'{repo_id}' has a damaged weight file: {error}") from None
    tensors = {name: tensor for file in files.values() for name, tensor in file.tensors.items()}
    stored = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    return describe_tensors(stored, *read_quantization(Path(config).parent))


def license_of(repo_id: str, token: str | None = None) -> str | None:
    """The license a Hub model declares, if that can be found out."""
    try:
        data = HfApi(token=token).model_info(repo_id).card_data
    except (HTTPError, OSError, ValueError):
        return None
    license_ = None if data is None else data.get("license")
    return license_ if isinstance(license_, str) else None


def _files(folder: Path, repo_id: str) -> dict[str, str | bytes]:
    """Paths or contents of the files of a saved model, which is checked, by name."""
    packing = read_packing(folder)
    if packing is not None and packing.training:
        raise PackedFormatError(f"'{folder}' is a checkpoint of unfinished training: nobody could load it.")
    inspect_checkpoint(folder)
    weights = {path.name for path in weight_files(folder)}
    if len(weights) > 1:
        weights.add(constants.SAFETENSORS_INDEX_FILE)
    names = {*weights, CARD_FILE, *PICTURES, *(path.as_posix() for path in companions(folder))}
    files: dict[str, str | bytes] = {name: str(folder / name) for name in sorted(names) if (folder / name).is_file()}
    if CARD_FILE not in files:
        files[CARD_FILE] = render_card(folder, repo_id).encode()
    return files if packing is None else {**files, **loader_files(folder)}


def _push(
    api: HfApi, files: dict[str, str | bytes], repo_id: str, private: bool | None, revision: str | None, message: str
) -> Pushed:
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"'{repo_id}' exists and is public; nothing was pushed.")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    for attempt in range(ATTEMPTS):
        head = api.model_info(repo_id, revision=revision)
        there = [sibling.rfilename for sibling in head.siblings or ()]
        # Made anew each time: they remember which files the repository had.
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        stale = [CommitOperationDelete(name) for name in there if name not in files and _matches(name, STALE)]
        try:
            commit = api.create_commit(
                repo_id, [*additions, *stale], commit_message=message, revision=revision, parent_commit=head.sha
            )
            break
        except HfHubHTTPError:
            if attempt == ATTEMPTS - 1 or api.model_info(repo_id, revision=revision).sha == head.sha:
                raise
    return Pushed(list(files), sum(a.upload_info.size for a in additions), commit)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file at the top of a repository matches; `*` would match the folders of others too."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
