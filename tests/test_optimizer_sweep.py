"""The sweep recipe in its smallest form, on digits; on the trainings of the text recipe, see test_recipes.py."""

import json

import pytest
from transformers import TrainingArguments

import optimizer_sweep
from helpers import ROOT, python
from hf_approx import AvaGradConfig

DIGITS = ROOT / "recipes" / "configs" / "sweep_digits.yaml"
SMALL = [
    "--set",
    "seeds=[0,1]",
    "--set",
    "eps_decades=[0,2]",
    "--set",
    "lrs_per_decade=1",
    "--set",
    "epochs=1",
    "--set",
    "batch_size=256",
]


def test_sweep_of_digits(tmp_path, capsys):
    options = ["--config", str(DIGITS), "--output_dir", str(tmp_path), *SMALL, "--set", "lr_decades=[0,2]"]
    assert optimizer_sweep.main([*options, "--set", "fixed_lr={adam: 1, avagrad: 1}"]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["grid"]["adam"]["pairs"] == data["grid"]["avagrad"]["pairs"] == 9
    assert data["searches"]["avagrad"]["pairs"] == 5
    # Adam's scaled rates are mostly not on the grid.
    assert len(data["trainings"]) >= 2 * 9 * 2
    assert data["gradient"] > 0
    for name in ("adam", "avagrad"):
        runs = [run for run in data["trainings"] if run["optimizer"] == name and run["loss"] is not None]
        pairs = {(run["lr"], run["eps"]) for run in runs}
        means = {p: sum(r["accuracy"] for r in runs if (r["lr"], r["eps"]) == p) / 2 for p in pairs}
        on_grid = {p: mean for p, mean in means.items() if p[0] in (1, 10, 100)}
        assert data["grid"][name]["score"] == pytest.approx(max(on_grid.values()))
    assert (tmp_path / "planes.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    found = data["searches"]["avagrad"]
    assert f"AvaGradConfig(lr={found['lr']:g}, eps={found['eps']:g}), from 5 pairs" in printed
    adam, adamw = data["grid"]["adam"], printed.splitlines()[-3].strip()
    args = eval(adamw, {"TrainingArguments": TrainingArguments})
    assert (args.learning_rate, args.adam_epsilon) == (adam["lr"], adam["eps"])
    avagrad = printed.splitlines()[-2].strip()
    assert eval(avagrad, {"ApproxTrainer": dict, "AvaGradConfig": AvaGradConfig}) == {
        "optimizer": AvaGradConfig(lr=found["lr"], eps=found["eps"])
    }


def test_smoke_ends_soon_and_says_what_to_use(tmp_path, capsys):
    options = ["--config", str(DIGITS), "--output_dir", str(tmp_path), "--smoke"]
    assert optimizer_sweep.main([*options, "--set", "eps_decades=[0,0]", "--set", "lr_decades=[0,0]"]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["trainings"]) <= 4
    assert "TrainingArguments(learning_rate=1, adam_epsilon=1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eps_decades=[2,-8]", "eps_decades must be two powers of ten, the smaller first"),
        ("lr_decades=[0.5,1]", "lr_decades.0 must be an integer, got 0.5"),
        ("lr_decades=[1]", "lr_decades must be two powers of ten"),
        ("lrs_per_decade=0", "lrs_per_decade must be a positive integer"),
        ("seeds=[]", "seeds must be integers, at least one"),
        ("task=chess", "task must be digits or text_classification, got 'chess'"),
        ("config=words_bits4.yaml", "config must be given for text_classification, and only for it"),
        ("fixed_lr={adam: 0.1}", "fixed_lr needs a positive number for adam and for avagrad"),
        ("fixed_lr.adam=0", "fixed_lr needs a positive number for adam and for avagrad"),
        ("metric=bleu", "the task measures accuracy, gradient, loss, not 'bleu'"),
        ("sedes=[1]", "unknown option 'sedes'"),
    ],
)
def test_a_wrong_sweep_config_is_one_line(tmp_path, capsys, override, message):
    options = ["--config", str(DIGITS), "--output_dir", str(tmp_path), *SMALL, "--set", "lr_decades=[-1,-1]"]
    assert optimizer_sweep.main([*options, "--set", "eps_decades=[0,0]", "--set", override]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_digits_are_refused_in_fp16(tmp_path):
    """As `accelerate launch --mixed_precision fp16` says it to the script."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import optimizer_sweep as s; sys.exit(s.main(sys.argv[2:]))"
    options = ["--config", DIGITS, "--output_dir", tmp_path / "out", "--smoke"]
    result = python(code, ROOT / "recipes", *options, check=False, ACCELERATE_MIXED_PRECISION="fp16")
    assert result.returncode == 2
    assert "error: task: digits cannot train in fp16, whose scaled gradients" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_text_config_that_is_nowhere_is_one_line(tmp_path, capsys):
    options = ["--config", str(DIGITS), "--output_dir", str(tmp_path), "--set", "task=text_classification"]
    assert optimizer_sweep.main([*options, "--set", "config=nowhere.yaml"]) == 2
    assert "there is no nowhere.yaml, here or in recipes/configs" in capsys.readouterr().err
