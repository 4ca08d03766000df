"""A recipe's YAML file whose values are of another kind than its options: one sentence that names file and key."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import yaml

import image_classification
import image_generation
import language_modeling
import optimizer_sweep
import shortest_paths
import text_classification
import ticket_search
import translation
from common import RecipeConfig
from config_files import ConfigError, build, describe, fits, read_yaml
from gan_config import GanRecipe
from helpers import ROOT
from image_classification import ImageConfig
from language_modeling import LanguageModelConfig
from optimizer_sweep import SweepRecipe
from path_config import PathRecipe
from ticket_search import TicketRecipe
from translation import TranslationConfig

CONFIGS = ROOT / "recipes" / "configs"
RECIPES = {
    "words_shared50": (text_classification, RecipeConfig),
    "digits_vit_sparse80": (image_classification, ImageConfig),
    "lm_docs_shared50": (language_modeling, LanguageModelConfig),
    "gettext_marian_bits4": (translation, TranslationConfig),
    "digits_gan_bits4": (image_generation, GanRecipe),
    "sweep_digits": (optimizer_sweep, SweepRecipe),
    "tickets_digits": (ticket_search, TicketRecipe),
    "shortest_paths": (shortest_paths, PathRecipe),
}
VALUES = (None, 5, 0.5, True, "text", [7], [None], {"a": 7})
PHRASES = ("NoneType", "object is not", "not supported between", "positional argument", "has no attribute", "class '")
"""What Python says of a value of the wrong type."""


def broken(tmp_path, name, **changes):
    data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | changes
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_value_of_any_kind_is_taken_or_named(tmp_path, name):
    """Every option of every recipe."""
    cls = RECIPES[name][1]
    for field, value in itertools.product(dataclasses.fields(cls), VALUES):
        path = broken(tmp_path, name, **{field.name: value})
        try:
            read_yaml(cls, path)
        except ConfigError as error:
            message = str(error)
            assert re.fullmatch(rf"{re.escape(str(path))}: .*\.", message)
            assert not [phrase for phrase in PHRASES if phrase in message], message


@pytest.mark.parametrize("smoke", [[], ["--smoke"]], ids=["whole", "smoke"])
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("words_shared50", {"training": None}, "training must be a mapping of options, got None."),
        ("words_shared50", {"training": [3]}, "training must be a mapping of options, got [3]."),
        ("words_shared50", {"approx": None}, "approx must be a list of mappings, got None."),
        (
            "words_shared50",
            {"approx": {"method": "smol"}},
            "approx must be a list of mappings, got {'method': 'smol'}.",
        ),
        ("words_shared50", {"approx": [{"method": "smol"}, 4]}, "approx.1 must be a mapping of options, got 4."),
        (
            "words_shared50",
            {"approx": [{"method": "smol", "lr": None}]},
            "approx (smol): lr must be a number, got None.",
        ),
        ("words_shared50", {"approx": [{"method": ["smol"]}]}, "approx: method must be one of"),
        ("words_shared50", {"card": {"tags": "abc"}}, "card: tags must be a list of texts, got 'abc'."),
        ("words_shared50", {"dataset": None}, "dataset must be a mapping of options, got None."),
        ("words_shared50", {"dataset": 3}, "dataset must be a mapping of options, got 3."),
        ("words_shared50", {"fold": [1]}, "fold must be a mapping of options or null, got [1]."),
        ("words_shared50", {"fold": {"layers": "two"}}, "fold: layers must be an integer or null, got 'two'."),
        ("words_shared50", {"optimizer": 3}, "optimizer must be a mapping of options or null, got 3."),
        ("words_shared50", {"model": None}, "model must be text, got None."),
        ("words_shared50", {"baseline": "no"}, "baseline must be true or false, got 'no'."),
        ("words_shared50", {"text_columns": [3]}, "text_columns must be a list of texts or text, got [3]."),
        ("lm_docs_shared50", {"card": {"models": "x"}}, "card: unknown option 'models'"),
        ("digits_vit_sparse80", {"training": None}, "training must be a mapping of options, got None."),
        ("digits_vit_sparse80", {"model": None}, "model must be text or a mapping of options, got None."),
        ("lm_docs_shared50", {"dataset": [1]}, "dataset must be a mapping of options, got [1]."),
        ("gettext_marian_bits4", {"approx": 3}, "approx must be a list of mappings, got 3."),
        ("digits_gan_bits4", {"dataset": None}, "dataset must be a mapping of options, got None."),
        ("digits_gan_bits4", {"approx": None}, "approx must be a list of mappings, got None."),
        (
            "digits_gan_bits4",
            {"generator_optimizer": None},
            "generator_optimizer must be a mapping of options, got None.",
        ),
        ("sweep_digits", {"options": None}, "options must be a list of texts, got None."),
        ("sweep_digits", {"fixed_lr": {"adam": None}}, "fixed_lr.adam must be a number, got None."),
        ("tickets_digits", {"methods": None}, "methods must be a list of texts, got None."),
        ("tickets_digits", {"rounds": None}, "rounds must be an integer, got None."),
        ("shortest_paths", {"networks": {"one": 3}}, "networks.one must be a mapping of options, got 3."),
        ("shortest_paths", {"curriculum": [None]}, "curriculum.0 must be a mapping of options, got None."),
    ],
    ids=str,
)
def test_a_section_of_the_wrong_kind_is_named_with_its_file(tmp_path, capsys, name, changes, message, smoke):
    """Also where `--smoke` sets an option of that section."""
    path = broken(tmp_path, name, **changes)
    out = tmp_path / "out"
    assert RECIPES[name][0].main(["--config", str(path), "--output_dir", str(out), *smoke]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {message}")
    assert error.endswith(".\n") or not message.endswith(".")
    assert len(error.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1e3", 1000), ("2.5e3", 2500.0), ("1.0", 1.0), ("7", 7), (".inf", float("inf"))],
)
def test_numbers_are_what_everyone_means(tmp_path, text, value):
    path = tmp_path / "small.yaml"
    path.write_text(f"value: {text}")
    found = read_yaml(Number, path).value
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["3", "[a, b]", "null", ""])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml must hold a mapping of options"):
        read_yaml(RecipeConfig, path)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, True),
        (3.0, int, False),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        (None, int | None, True),
        ([1, 2], Sequence[int], True),
        ("12", Sequence[str], False),
        ([0.9, 1], tuple[float, float], True),
        ({"a": [1]}, dict[str, list[int]], True),
        ({"a": ["x"]}, dict[str, list[int]], False),
        ({1: 2}, dict[str, Any], False),
        ({1: 2}, dict, True),
        ("anything", Literal["a"], True),
    ],
)
def test_what_fits_a_type(value, hint, expected):
    assert fits(value, hint) is expected


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (list[dict[str, int]] | None, "a list of mappings or null"),
        (dict[str, float], "a mapping of numbers"),
        (tuple[float, float] | Sequence[float] | bool, "a list of numbers or true or false"),
    ],
)
def test_a_type_in_words(hint, words):
    assert describe(hint) == words


@dataclasses.dataclass
class Number:
    value: float


@dataclasses.dataclass
class Small:
    sizes: list[list[int]]


def test_the_innermost_entry_is_named():
    with pytest.raises(ConfigError, match=r"^here: sizes\.1\.0 must be an integer, got 'x'\.$"):
        build(Small, {"sizes": [[1], ["x", 2]]}, "here")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_of_one_recipe(path):
    options = set(yaml.safe_load(path.read_text()))
    classes = [cls for _, cls in RECIPES.values() if options <= {field.name for field in dataclasses.fields(cls)}]
    for cls in classes:
        try:
            read_yaml(cls, path)
            return
        except ConfigError:
            pass
    pytest.fail(f"no recipe takes {path.name}")
