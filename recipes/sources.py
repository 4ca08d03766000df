"""Where the model and the data of a recipe come from; a place that cannot be is named in one sentence."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from config_files import ConfigError
from hf_approx.loops.calibration_data import READERS
from hf_approx.text import one_line


def load_part(auto: Any, name: str, option: str = "model", **options: Any) -> Any:
    """What is saved beside the weights of a model: its config, tokenizer or image processor.

    Args:
        auto: The class of transformers that loads it.
        name: As recipes name models.
        option: Of the recipe, that says the name.
        options: Of `from_pretrained`.

    Raises:
        ConfigError: It is not there, or the Hub cannot be reached for it.
    """
    place = resolve_model(name, option)
    try:
        return auto.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        if Path(place).is_dir():
            raise ConfigError(f"{option}: cannot load {name!r}: {one_line(str(error))}") from None
        raise ConfigError(
            f"{option}: {name!r} is no folder in {Path.cwd()}, and cannot be loaded from the Hub: "
            f"{one_line(str(error))}"
        ) from None


def resolve_model(name: str, option: str = "model") -> str:
    """A Hub id or folder; `package:NAME/FOLDER` becomes the folder inside that package.

    Args:
        name: Of the model or, with another option of a recipe, of what is in a folder of its own.
        option: That one.

    Raises:
        ConfigError: There is no such folder or package, or no model in the folder.
    """
    if not name.startswith("package:"):
        # A Hub id is NAME or USER/NAME.
        if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).is_dir():
            raise ConfigError(
                f"{option}: the folder {name!r} does not exist; give the folder of a saved model, or a Hub id."
            )
        if option == "model" and Path(name).is_dir():
            _check_folder(name, Path(name))
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    try:
        place = Path(str(files(package).joinpath(folder)))
    except ModuleNotFoundError:
        raise ConfigError(f"{option}: the package {package!r} is not installed; install hf-approx[demo].") from None
    if not place.is_dir():
        raise ConfigError(f"{option}: the package {package!r} has no folder {folder!r}.")
    if option == "model":
        _check_folder(name, place)
    return str(place)


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; {', '.join(repr(f'{name}/{part}') for part in inner)} would be" if inner else ""
        raise ConfigError(f"model: {name!r} has no config.json, so it is no saved model{hint}.")


def check_data_path(path: str, train_split: str, eval_split: str) -> None:
    """Raise `ConfigError` for a `path` of `load_dataset` that is itself a file of data."""
    loader = READERS.get(Path(path).suffix)
    if loader is not None and Path(path).is_file():
        raise ConfigError(
            f"dataset: {path!r} is a file; write {{path: {loader}, data_files: {{{train_split}: {path}, "
            f"{eval_split}: ...}}}}."
        )
