"""Model cards: what a saved folder holds and what its training measured, as the README of a Hub repository."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from markupsafe import Markup

from hf_approx.checkpoint import ApproxConfig
from hf_approx.citations import CITATIONS
from hf_approx.files import write_text
from hf_approx.inspection import Inspection, inspect_checkpoint, read_packing
from hf_approx.json_files import read_json
from hf_approx.layout import CARD_FILE, MARKER, PICTURES, REPORT_FILE, is_ours
from hf_approx.links import own_file
from hf_approx.model_folder import weight_files
from hf_approx.packing import SharedSpec, SparseSpec
from hf_approx.report import kind_of
from hf_approx.sentence_parts import PARTS_FILE
from hf_approx.text import one_line

PLACEHOLDER = "PATH_OR_REPO"

# All that is neither a letter, a digit nor harmless; underscores that do not join two words; the point that makes a
# link of `www.`.
_UNSAFE = re.compile(r"[^\w /,;=%+().-]|(?<![^\W_])_|_(?![^\W_])|(?i:(?<=www)\.)")


def check_about(about: Mapping[str, str | None]) -> None:
    """Raise `ValueError` if a card cannot say this: `base_model`, `license`; None where there is nothing to say."""
    base, license_ = about.get("base_model"), about.get("license")
    if base is not None and _repo_id(base) is None:
        raise ValueError(f"'{base}' cannot be a base model: give the name of its repository on the Hub, USER/NAME.")
    if license_ is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license_):
        raise ValueError(f"'{license_}' is no name of a license on the Hub, as apache-2.0, mit or other are.")


def describe(folder: Path, about: Mapping[str, str | None]) -> None:
    """Note in a saved folder what its card is to say, as of `check_about`; what is None stays as it was."""
    given = {name: value for name, value in about.items() if value is not None}
    if given:
        report = read_json(folder / REPORT_FILE) if own_file(folder, REPORT_FILE) else {}
        report["about"] = {**report.get("about", {}), **given}
        write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")


def write_card(folder: Path, repo_id: str | None = None, about: Mapping[str, str | None] | None = None) -> bool:
    """Write `README.md` into a saved folder; False if there is one that was written by hand, which is left alone.

    Args:
        folder: A saved model.
        repo_id: As of `render_card`.
        about: To note before, see `describe`.
    """
    path = folder / CARD_FILE
    # An empty file is what a full disk left.
    if path.is_file() and path.stat().st_size and not is_ours(path):
        return False
    text = render_card(folder, repo_id, about)
    describe(folder, about or {})
    write_text(path, text)
    return True


def render_card(folder: Path, repo_id: str | None = None, about: Mapping[str, str | None] | None = None) -> str:
    """The model card of a saved folder, from its config, weight files, pictures and `approx_report.json`.

    Every value is escaped: none can add markup to the text, or fields to the metadata.

    Args:
        folder: A saved model.
        repo_id: Where it can be loaded from; by default what the report says, if it does.
        about: What to say instead of what the report says; see `check_about`.

    Raises:
        PackedFormatError: Config or weight files are damaged.
        FileNotFoundError: Config or weight files are missing.
        ValueError: `approx_report.json` is damaged.
    """
    inspection, packing = inspect_checkpoint(folder), read_packing(folder)
    config, report = _read_object(folder / "config.json"), _read_object(folder / REPORT_FILE)
    architecture = first_architecture(config) or ""
    given = {name: value for name, value in (about or {}).items() if value is not None}
    try:
        about = {
            "task": task_of(architecture),
            "model_name": one_line(folder.resolve().name),
            **report.get("about", {}),
            **given,
        }
        disk = sum(path.stat().st_size for path in weight_files(folder))
        metrics = report.get("evaluation", {}).get("metrics", {})
        data = _metadata(about, report, metrics)
        columns, kinds = _kinds(report.get("kinds") or _stored_kinds(inspection))
        values = {
            "metadata": Markup(data.to_yaml()),
            "marker": Markup(MARKER),
            "model_name": about["model_name"],
            "note": about.get("note"),
            "base_model": about.get("base_model"),
            "steps": about.get("steps"),
            "exported": bool(about.get("exported")),
            "labels": _label_names(config),
            "disk_bytes": f"{disk:,}",
            "dense_bytes": f"{inspection.dense_bytes:,}",
            "ratio": f"{inspection.dense_bytes / disk:.2f}" if inspection.dense_bytes / disk >= 1.005 else None,
            "totals": [f"{report['totals'][f'{name}_bytes']:,}" for name in ("dense", "packed") if "totals" in report],
            "packed": packing is not None,
            "format": inspection.format,
            "sentences": own_file(folder, PARTS_FILE),
            "stored": _stored(packing, inspection),
            "sparsity": f"{inspection.sparsity:.2%}",
            "bits": f"{inspection.bits:.2f}",
            "store_dtype": (packing and packing.store_dtype) or "the dtype each had in training",
            "kind_columns": columns,
            "kind_rows": kinds,
            "metrics": {name: _show(name, value) for name, value in metrics.items()},
            "samples": report.get("evaluation", {}).get("samples"),
            "dataset_name": about.get("dataset_name"),
            "dataset_split": about.get("dataset_split"),
            "methods": [row for entry in report.get("methods", ()) for row in _method(entry)],
            "optimizer": _settings(report["optimizer"]) if report.get("optimizer") else None,
            "pictures": {Markup(name): text for name, text in PICTURES.items() if (folder / name).is_file()},
            "auto_class": auto_class(architecture),
            "own_class": own_class(config) is not None,
            "repo_id": Markup(_repo_id(repo_id) or _repo_id(about.get("repo_id")) or PLACEHOLDER),
            "citations": Markup("\n".join(CITATIONS[name] for name in _used(report) if name in CITATIONS)),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / REPORT_FILE} is damaged ({type(error).__name__}: {error}).") from None
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, finalize=_escaped, trim_blocks=False, keep_trailing_newline=True
    )
    return str(ModelCard(environment.from_string(_template()).render(values)))


def escape(value: object) -> str:
    """One line of text that markdown, its tables and HTML show as it is, without links, emphasis or control codes."""
    return _UNSAFE.sub(lambda match: f"&#{ord(match[0])};", one_line(str(value)))


def task_of(architecture: str) -> str | None:
    """The Hub's name of the task that a class of transformers is for, as far as transformers knows."""
    # Only here: it imports what a Trainer is made of.
    from transformers.modelcard import TASK_MAPPING

    tasks: Mapping[str, Any] = TASK_MAPPING
    for task, classes in tasks.items():
        for names in classes.values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return task
    return None


def auto_class(architecture: str) -> str:
    """Name of the `AutoModel` class that loads an architecture."""
    ending = re.search(r"For[A-Za-z]+$|LMHeadModel$|MTModel$", architecture)
    name = "" if ending is None else ending[0]
    known = {
        "LMHeadModel": "ForCausalLM",
        "ForConditionalGeneration": "ForSeq2SeqLM",
        "MTModel": "ForSeq2SeqLM",
    }
    name = f"AutoModel{known.get(name, name)}"
    return name if hasattr(transformers, name) else "AutoModel"


def first_architecture(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that a `config.json` names first, if it names one."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def own_class(config: Mapping[str, Any]) -> str | None:
    """The class that a `config.json` names first, if transformers has it: that is whose code loads a packed model."""
    name = first_architecture(config)
    cls = None if name is None else getattr(transformers, name, None)
    return name if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def _escaped(value: object) -> object:
    return value if isinstance(value, Markup) else escape(value)


def _template() -> str:
    package = Path(__file__).parent
    folders = [package / "model_cards", package.parent / "model_cards"]
    path = next(folder / "template.md" for folder in folders if (folder / "template.md").is_file())
    return path.read_text(encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, every text in it in one line; empty if there is no such file."""
    return _in_lines(read_json(path)) if own_file(path.parent, path.name) else {}


def _in_lines(data: Any) -> Any:
    if isinstance(data, dict):
        return {one_line(key): _in_lines(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_in_lines(value) for value in data]
    return one_line(data) if isinstance(data, str) else data


def _stored(packing: ApproxConfig | None, inspection: Inspection) -> dict[str, str]:
    """How the card says in which ways a model is packed, empty for those in which it is not."""
    packing = packing or ApproxConfig()
    specs = packing.tensors.values()
    sparse = any(isinstance(spec, SparseSpec) and spec.sparsity > 0 for spec in specs)
    shared = any(isinstance(spec, SharedSpec) for spec in specs)
    return {
        "sparse": "without zero weights" if sparse else "",
        "quantized": "with quantized weights" if inspection.bits else "",
        "shared": "with weights mixed from shared templates" if shared else "",
        "structure": "with layers of other sizes than its architecture's config says" if packing.structure else "",
        "activations": "with quantized inputs of layers" if packing.activations else "",
    }


def _metadata(about: Mapping[str, Any], report: Mapping[str, Any], metrics: Mapping[str, Any]) -> ModelCardData:
    task, dataset = about["task"], about.get("dataset_type") or about.get("dataset_name")
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=about.get("dataset_name") or dataset,
            dataset_config=about.get("dataset_config"),
            dataset_split=about.get("dataset_split"),
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if task and dataset and isinstance(value, (int, float)) and math.isfinite(value)
    ]
    return ModelCardData(
        base_model=_repo_id(about.get("base_model")),
        library_name="transformers",
        license=about.get("license"),
        language=about.get("language"),
        datasets=about.get("datasets"),
        pipeline_tag=task,
        tags=["hf_approx", *filter(None, [*_used(report), *about.get("tags", ())])],
        eval_results=results or None,
        model_name=about["model_name"] if results else None,
    )


def _used(report: Mapping[str, Any]) -> list[str]:
    """Names of the methods and, if it is one of ours, the optimizer."""
    names = [str(entry["method"]) for entry in report.get("methods", ())]
    return list(dict.fromkeys([*names, *([report["optimizer"]["method"]] if report.get("optimizer") else [])]))


def _repo_id(name: object) -> str | None:
    """The name if it can be that of a repository, else None."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _label_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes, if someone gave them names."""
    labels = config.get("id2label")
    names = [str(name) for name in labels.values()] if isinstance(labels, dict) else []
    return [] if all(name.startswith("LABEL_") or name.isdecimal() for name in names) else names


def _method(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """The row of a method, and one for each of its banks of shared templates."""
    settings = entry.get("settings") or {k: v for k, v in entry.items() if k.startswith("target_")}
    outcome = {k: v for k, v in entry.items() if k not in ("label", "method", "settings", *settings)}
    row = {
        "method": str(entry["method"]),
        "name": str(entry["method"]),
        "settings": _short(settings),
        "outcome": _short(outcome),
    }
    banks = [
        {
            "method": row["method"],
            "name": f"{row['name']}, bank {name}",
            "settings": "-",
            "outcome": _settings({"layers": len(bank["layers"]), "templates": bank["templates"]}),
        }
        for name, bank in entry.get("banks", {}).items()
    ]
    return [row, *banks]


def _short(values: Mapping[str, Any]) -> str:
    """Those that fit a cell."""
    return _settings({name: value for name, value in values.items() if not isinstance(value, (dict, list))}) or "-"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {_show(name, value)}" for name, value in values.items() if value is not None)


def _show(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if name.endswith(("sparsity", "density")) else f"{value:.4g}"


def _kinds(kinds: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of the table of layers, whatever the methods reported of each kind."""
    keys = list(dict.fromkeys(key for values in kinds.values() for key in values))
    rows = [{"name": kind, "cells": [_show(k, v[k]) if k in v else "-" for k in keys]} for kind, v in kinds.items()]
    return [key.replace("_", " ") for key in keys], rows


def _stored_kinds(inspection: Inspection) -> dict[str, dict[str, Any]]:
    """The same table for a model without a report, from what is in the file."""
    kinds: dict[str, list[Any]] = {}
    for row in inspection.rows:
        if row.packed:
            kinds.setdefault(kind_of(row.name), []).append(row)
    return {kind: _totals(rows) for kind, rows in kinds.items()}


def _totals(rows: Iterable[Any]) -> dict[str, Any]:
    counts = [(math.prod(row.shape), row.sparsity, row.bytes) for row in rows]
    weights = sum(count for count, _, _ in counts)
    zeros = sum(count * sparsity for count, sparsity, _ in counts)
    return {"weights": weights, "sparsity": zeros / weights, "bytes": sum(size for _, _, size in counts)}
