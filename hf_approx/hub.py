"""Sharing saved models on the Hub: one commit a push, and a look at a repository without downloading it."""

import fnmatch
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version of the client is built on
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from hf_approx.cards import render_card
from hf_approx.headers import PREFIX, Header, header_length, parse_header, weight_map
from hf_approx.inspection import Inspection, describe_files, inspect_checkpoint, read_packing, read_quantization
from hf_approx.json_files import read_json
from hf_approx.layout import ARGUMENTS_FILE, CARD_FILE, PICKLED_ARGUMENTS_FILE, PICTURES, REPORT_FILE, is_ours
from hf_approx.model_folder import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_kind,
    find_checkpoint,
    model_files,
    no_weights,
    not_found,
)
from hf_approx.packing import PackedFormatError
from hf_approx.remote_code import LOADER_FILE, loader_files, without_code
from hf_approx.text import listed, one_line

ATTEMPTS = 10
FIRST_BYTES = 100_000
"""Most headers are shorter."""
REQUESTS, TIMEOUT = 8, 10
NOT_SATISFIABLE = 416
"""The status of a range beyond the end of a file."""
UNAUTHORIZED = 401
LOGIN = "log in with `hf auth login`, or give a token that may write (--token, HF_TOKEN)"

# What an earlier push may have left that would be wrong, or unused, beside the files of this one.
STALE = (
    "model*.safetensors",
    "model.safetensors.index.json",
    REPORT_FILE,
    ARGUMENTS_FILE,
    LOADER_FILE,
    PICKLED_ARGUMENTS_FILE,
    *PICTURES,
)


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        files: Names of the files the repository now has from it.
        bytes: Their size in all.
        commit: Its address and hash.
        left_out: What else is in the folder that was pushed, but for hidden files.
    """

    files: list[str]
    bytes: int
    commit: CommitInfo
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = f"Pushed {len(self.files)} files, {self.bytes:,} bytes: {self.commit.commit_url}"
        return f"{done}\nLeft out: {listed(self.left_out)}." if self.left_out else done


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload model",
    is_model: bool = True,
    about: Mapping[str, str | None] | None = None,
) -> Pushed:
    """Push a saved model to the Hub in one commit: weights, config, tokenizer or processor, card, report, pictures.

    What is pushed is what has the name of such a file (see `hf_approx.model_folder.model_files`) and is a file of the
    folder itself, or of the Hub's cache if it is a snapshot there. Nothing else that is in the folder is pushed, no
    pickle, key or code above all; it is listed in what is returned. A config that names files of code (`auto_map`) is
    pushed without these names. A folder without `README.md` gets a card in the repository, and a packed model the file
    that `trust_remote_code=True` loads it with (see `hf_approx.remote_code`).

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
        about: What its card is to say, see `hf_approx.cards.check_about`; the folder's own is left as it is.
        is_model: Whether it is a model of transformers. Something else, adapters say, is not checked and gets no card.

    Raises:
        FileNotFoundError: The folder holds no saved model.
        PackedFormatError: Its config or weight files are damaged, or are of unfinished training.
        ValueError: There is no token, or it can be none; or the repository exists and is public; or the folder
            has a link in the place of a file, a part that cannot come along, or a model that needs code of its own.
        ConnectionError: The Hub cannot be reached or says no.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError("The token has characters that no token has; copy it again.")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder.")
    folder = Path(folder)
    files, left_out = _model(find_checkpoint(str(folder)), repo_id, about) if is_model else _files(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"Nothing was pushed to '{repo_id}': that is no name of a repository, as USER/NAME is."
        ) from None
    if token is None and get_token() is None:
        raise ValueError(f"Nothing was pushed to '{repo_id}': {LOGIN}.")
    api = HfApi(token=token)
    try:
        return _push(api, files, left_out, repo_id, private, revision, message)
    except (HTTPError, RuntimeError) as error:
        # An upload that failed says which file it was of, and its cause says why.
        parts = [str(part) for part in (error, error.__cause__ if isinstance(error, RuntimeError) else None) if part]
        text = one_line(" ".join(parts)).replace(token or "\0", "<token>")
        status = getattr(getattr(error, "response", None), "status_code", None)
        again = f" Is the token still valid? If not, {LOGIN}." if status == UNAUTHORIZED else ""
        raise ConnectionError(f"Nothing was pushed to '{repo_id}': {text}{again}") from None


def inspect_source(source: str | Path, revision: str | None = None, token: str | None = None) -> Inspection:
    """Inspect a folder or, if there is none of that name, a Hub repository; see `inspect_repo`."""
    if Path(source).exists():
        return inspect_checkpoint(find_checkpoint(str(source), revision=revision), verify=True)
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
        about = api.model_info(repo_id, revision=revision)
        names, commit = {sibling.rfilename for sibling in about.siblings or ()}, str(about.sha)
        check_kind(repo_id, names)
        if not names & {WEIGHTS, INDEX}:
            raise no_weights(repo_id, names)
        config = hf_hub_download(repo_id, CONFIG, revision=commit, token=token)
        index: dict[str, str] | None = None
        if WEIGHTS not in names:
            path = Path(hf_hub_download(repo_id, INDEX, revision=commit, token=token))
            index = weight_map(read_json(path), f"{INDEX} of '{repo_id}'")
        files = sorted(set(index.values())) if index else [WEIGHTS]
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = pool.map(lambda name: _remote_header(repo_id, name, commit, token), files)
            headers = dict(zip(files, found, strict=True))
    except (HFValidationError, HTTPError) as error:
        raise not_found(repo_id, revision, error) from None
    return describe_files(headers, index, *read_quantization(Path(config).parent))


def _remote_header(repo_id: str, name: str, commit: str, token: str | None) -> dict[str, Header]:
    """The header of a weight file in a repository, with a request or two for a range of bytes."""
    url, what = hf_hub_url(repo_id, name, revision=commit), f"{name} of '{repo_id}'"
    first, size = _range(url, 0, FIRST_BYTES, token)
    length = header_length(first, size, what)
    data = first[PREFIX : PREFIX + length]
    if len(data) < length:
        data, _ = _range(url, PREFIX, length, token)
    return parse_header(data, size, what)


def _range(url: str, start: int, length: int, token: str | None) -> tuple[bytes, int]:
    """A range of the bytes of a file, and the size of the whole file."""
    headers = {**build_hf_headers(token=token), "Range": f"bytes={start}-{start + length - 1}"}
    response = get_session().get(url, headers=headers, timeout=TIMEOUT)
    if response.status_code == NOT_SATISFIABLE:
        return b"", 0
    hf_raise_for_status(response)
    total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if total is None:  # the whole file
        return response.content[start : start + length], len(response.content)
    return response.content[:length], int(total[1])


def license_of(repo_id: str, token: str | None = None) -> str | None:
    """The license a Hub model declares, if that can be found out."""
    try:
        data = HfApi(token=token).model_info(repo_id).card_data
    except (HTTPError, OSError, ValueError):
        return None
    license_ = None if data is None else data.get("license")
    return license_ if isinstance(license_, str) else None


def _model(
    folder: Path, repo_id: str, about: Mapping[str, str | None] | None = None
) -> tuple[dict[str, str | bytes], tuple[str, ...]]:
    """As `_files` of a saved model, which is checked, with a card."""
    packing = read_packing(folder)
    if packing is not None and packing.training:
        raise PackedFormatError(f"'{folder}' is a checkpoint of unfinished training: nobody could load it.")
    inspect_checkpoint(folder, verify=True)
    files, left_out = _files(folder)
    given = any(value is not None for value in (about or {}).values())
    if given and CARD_FILE in files and not is_ours(folder / CARD_FILE):
        raise ValueError(f"'{folder / CARD_FILE}' was written by hand: say there what its base and license are.")
    if given or CARD_FILE not in files:
        files[CARD_FILE] = render_card(folder, repo_id, about).encode()
    if packing is not None:
        files.update(loader_files(folder))
    return files, tuple(name for name in left_out if name not in files)


def _files(folder: Path) -> tuple[dict[str, str | bytes], tuple[str, ...]]:
    """Paths or contents of the files to push by name, and what is left out."""
    found = model_files(folder, (CARD_FILE, ARGUMENTS_FILE, REPORT_FILE, *PICTURES))
    names = sorted([*found.weights, *found.others])
    return {name: without_code(folder / name) or str(folder / name) for name in names}, found.left_out


def _push(
    api: HfApi,
    files: dict[str, str | bytes],
    left_out: tuple[str, ...],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    message: str,
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
    return Pushed(list(files), sum(a.upload_info.size for a in additions), commit, left_out)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file at the top of a repository matches; `*` would match the folders of others too."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
