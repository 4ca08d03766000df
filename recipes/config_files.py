"""Reading a recipe's YAML file into a dataclass: overrides, types, and errors that name the file and the key."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe's config says something impossible."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text, for want of a point; here it is the number everyone means, `1e3` an integer."""

    def number(self, node: yaml.ScalarNode) -> float:
        """The number that a text stands for."""
        value = self.construct_yaml_float(node)
        return int(value) if "." not in node.value and value.is_integer() else value


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)

SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}
"""What YAML calls the types of single values."""

PLURALS = {int: "integers", float: "numbers", str: "texts", dict: "mappings", list: "lists"}
"""The same, of the entries of lists and mappings."""

LISTS = (list, tuple, Sequence)
"""Types of fields that a list of YAML is for."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of an annotated type; True for types that this module does not know."""
    kind, inner = _kind(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if kind is dict:
        key, entry = inner or (Any, Any)
        return isinstance(value, dict) and all(fits(k, key) and fits(v, entry) for k, v in value.items())
    if kind in LISTS:
        return isinstance(value, list) and all(fits(entry, inner[0] if inner else Any) for entry in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind not in SCALARS or isinstance(value, kind)


def describe(hint: Any) -> str:
    """An annotated type in words, such as "a list of integers or null"."""
    kind, inner = _kind(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in inner))
    if kind is dict:
        return "a mapping of " + PLURALS.get(_kind(inner[1]) if inner else Any, "options")
    if kind in LISTS:
        return "a list of " + PLURALS.get(_kind(inner[0]) if inner else Any, "values")
    return SCALARS.get(kind, str(kind))


def _kind(hint: Any) -> Any:
    return get_origin(hint) or hint


def _misfit(name: str, value: Any, hint: Any) -> tuple[str, Any, Any]:
    """The innermost entry that does not fit, its key as `--set` takes it, and its type."""
    kind, inner = _kind(hint), get_args(hint)
    entries: Iterable[tuple[Any, Any]] = ()
    if kind is dict and isinstance(value, dict):
        entries = value.items()
    elif kind in LISTS and isinstance(value, list):
        entries = enumerate(value)
    wrong = [(key, entry) for key, entry in entries if not fits(entry, inner[-1] if inner else Any)]
    return _misfit(f"{name}.{wrong[0][0]}", wrong[0][1], inner[-1]) if wrong else (name, value, hint)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """What to put behind an unknown name: the one it is close to, if there is one."""
    close = get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build(cls: type[T], options: dict[str, Any], where: str) -> T:
    """A dataclass from its options; `ConfigError`, beginning with `where`, if they do not fit."""
    if not isinstance(options, dict):
        raise ConfigError(f"{where} must be a mapping of options, got {options!r}.")
    known = {f.name: f for f in fields(cast(Any, cls))}
    for name in options:
        if name not in known:
            known_names = ", ".join(sorted(known))
            raise ConfigError(f"{where}: unknown option {name!r}{did_you_mean(name, known)}; known: {known_names}.")
    missing = [n for n, f in known.items() if f.default is f.default_factory is MISSING and n not in options]
    if missing:
        raise ConfigError(f"{where}: {', '.join(sorted(missing))} must be given.")
    _check_types(cls, options, where)
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_types(cls: type[Any], options: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` for a value of another type than its field has; unknown options are left alone."""
    hints = get_type_hints(cls)
    for name, value in options.items():
        if name in hints and not fits(value, hints[name]):
            key, wrong, hint = _misfit(name, value, hints[name])
            raise ConfigError(f"{where}: {key} must be {describe(hint)}, got {wrong!r}.")


def read_yaml(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into a dataclass; each override is `KEY=VALUE` or `KEY.SUBKEY=VALUE`, its value YAML.

    Raises:
        ConfigError: The file is missing, no YAML mapping, or has unknown, missing or impossible values.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"Cannot read {path}: {where}{error.problem or error.context}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of options.")
    # Before the overrides, which have no place in a section that is not one.
    _check_types(cls, data, str(path))
    for override in overrides:
        _override(data, override)
    return build(cls, data, str(path))


def _override(data: dict[str, Any], override: str) -> None:
    """Set one value of the config in place; numbers in the key are positions in a list."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set needs KEY=VALUE, got {override!r}.")
    *parents, last = key.split(".")
    place: Any = data
    try:
        for depth, part in enumerate(parents):
            _check_entry(place, parents[:depth], [*parents, last][depth:], value)
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        _check_entry(place, parents, [last], value)
        place[int(last) if isinstance(place, list) else last] = yaml.load(value, _Loader)
    except ConfigError:
        raise
    except (AttributeError, IndexError, TypeError, ValueError, yaml.YAMLError):
        raise ConfigError(f"--set: the config has no place {key!r} for {value!r}.") from None


def _check_entry(place: Any, above: Sequence[str], below: Sequence[str], value: str) -> None:
    """Raise `ConfigError` if the place is a list that has no such entry.

    Args:
        place: What the parts `above` of the key lead to.
        above: They.
        below: The rest of the key.
        value: That is to be set.
    """
    if not isinstance(place, list):
        return
    name, key = ".".join(above), ".".join([*above, *below])
    if not below[0].removeprefix("-").isdecimal():
        raise ConfigError(
            f"--set: {key!r}: {name} is a list; say which entry, counted from 0: {name}.0.{'.'.join(below)}={value}."
        )
    if not -len(place) <= int(below[0]) < len(place):
        raise ConfigError(
            f"--set: the config has no place {key!r}: {name} is a list of length {len(place)}, which --set cannot "
            f"make longer; set the whole list, {name}=[...], or write the entry into the file."
        )
