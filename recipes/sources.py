"""Where the model and the data of a recipe come from; a place that cannot be is named in one sentence."""

from importlib.resources import files
from pathlib import Path

from config_files import ConfigError
from hf_approx.loops.calibration_data import READERS


def resolve_model(name: str) -> str:
    """A Hub id or folder; `package:NAME/FOLDER` becomes the folder inside that package.

    Raises:
        ConfigError: There is no such folder or package.
    """
    if not name.startswith("package:"):
        # A Hub id is NAME or USER/NAME.
        if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).is_dir():
            raise ConfigError(
                f"model: the folder {name!r} does not exist; give the folder of a saved model, or a Hub id."
            )
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    try:
        return str(files(package).joinpath(folder))
    except ModuleNotFoundError:
        raise ConfigError(f"model: the package {package!r} is not installed; install hf-approx[demo].") from None


def check_data_path(path: str, train_split: str, eval_split: str) -> None:
    """Raise `ConfigError` for a `path` of `load_dataset` that is itself a file of data."""
    loader = READERS.get(Path(path).suffix)
    if loader is not None and Path(path).is_file():
        raise ConfigError(
            f"dataset: {path!r} is a file; write {{path: {loader}, data_files: {{{train_split}: {path}, "
            f"{eval_split}: ...}}}}."
        )
