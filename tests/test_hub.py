"""Pushing and loading through the real client, in processes of their own, against a Hub on this machine."""

import json
import os
import shutil
import struct
import threading

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from fresh import BASE, Forks, job
from helpers import ROOT, checked, edit_packing, make_trainer
from hf_approx import MagnitudePruningConfig, attach_packing
from hf_approx.hub import inspect_repo
from hf_approx.inspection import inspect_checkpoint
from hf_approx.remote_code import LOADER_FILE
from hf_approx.targets import select_targets
from hub_server import Blob, Hub, Repo
from models import batch, build

FORKS = Forks(BASE)
"""What the Hub's client reads of the environment differs from process to process."""

TOKEN = "hf_secretOfMe"
WEIGHTS = "model.safetensors"
TEMPLATE = "additional_chat_templates/tools.jinja"

CLI = """
import contextlib, io, json, sys
from hf_approx.cli import main

results = []
for args in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as exit_:
            code = exit_.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""

TRAIN = """
import json, sys, torch
from pathlib import Path
from helpers import make_trainer
from hf_approx import AvaGradConfig, SparsificationConfig
from models import batch, dataset
from transformers import BertTokenizerFast

folder = Path(sys.argv[1])
(folder / "vocabulary").write_text("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good"]))
trainer = make_trainer(
    "bert",
    folder / "model",
    approx=SparsificationConfig(target_sparsity=0.8),
    optimizer=AvaGradConfig(lr=0.1),
    eval_dataset=dataset("bert", 8),
    hub_token=sys.argv[2],
    hub_model_id="me/tiny",
    hub_private_repo=True,
    hub_strategy="every_save",
    save_strategy="steps",
    save_steps=4,
)
trainer.processing_class = BertTokenizerFast(vocab=str(folder / "vocabulary"))
trainer.about["dataset_name"] = "noise"
trainer.train()
trainer.evaluate()
commit = trainer.push_to_hub(license="mit", tags="small")
trainer.model.push_to_hub("me/plain", token=sys.argv[2])
model = trainer.model.eval()
with torch.no_grad():
    torch.save(model(**batch("bert")).logits, folder / "logits.pt")
print(json.dumps({"oid": commit.oid, "accuracy": trainer.approx_report["evaluation"]["metrics"]}))
"""

ADAPTERS = """
import sys, torch
from helpers import make_trainer
from hf_approx import SparsificationConfig
from models import batch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

folder, token = sys.argv[1:]
base = make_trainer("bert", folder + "/base", approx=SparsificationConfig(target_sparsity=0.8), max_steps=2)
base.train()
base.model.push_to_hub("me/base", token=token)
base = AutoModelForSequenceClassification.from_pretrained("me/base")
model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
trainer = make_trainer(
    "bert", folder + "/adapters", model=model, max_steps=2, hub_token=token, hub_model_id="me/adapters"
)
trainer.train()
trainer.push_to_hub()
loaded = AutoPeftModelForSequenceClassification.from_pretrained("me/adapters").eval()
with torch.no_grad():
    assert torch.equal(loaded(**batch("bert")).logits, model.eval()(**batch("bert")).logits)
"""

LOAD = """
import sys, torch
import hf_approx
from models import batch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

assert AutoTokenizer.from_pretrained(sys.argv[2]).tokenize("good") == ["good"]
for name in sys.argv[2:]:
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch("bert")).logits, torch.load(sys.argv[1])), name
    assert (model.bert.encoder.layer[0].output.dense.weight == 0).float().mean() > 0.5
"""


TRUST = """
import sys, torch
from models import batch
from transformers import AutoModelForSequenceClassification

assert "hf_approx" not in sys.modules
model = AutoModelForSequenceClassification.from_pretrained("me/trusted", trust_remote_code=True).eval()
assert "hf_approx" in sys.modules
with torch.no_grad():
    assert torch.equal(model(**batch("bert")).logits, torch.load(sys.argv[1]))
model.save_pretrained(sys.argv[2])
again = AutoModelForSequenceClassification.from_pretrained(sys.argv[2]).eval()
with torch.no_grad():
    assert torch.equal(again(**batch("bert")).logits, torch.load(sys.argv[1]))
assert type(again).__module__.startswith("transformers.models")
assert not hasattr(again.config, "auto_map")
"""

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "hf_approx":
            raise ModuleNotFoundError("No module named 'hf_approx'", name=name)

sys.meta_path.insert(0, Missing())
from transformers import AutoModelForSequenceClassification

for trust, message in ((True, "Run `pip install hf_approx`"), (None, "import hf_approx before from_pretrained")):
    try:
        AutoModelForSequenceClassification.from_pretrained("me/trusted", trust_remote_code=trust)
    except (ImportError, ValueError) as error:
        assert message in str(error), error
    else:
        raise AssertionError("loaded")
"""


@pytest.fixture(scope="module")
def hub():
    with Hub({TOKEN: "me", "hf_other": "you"}) as hub:
        yield hub


@pytest.fixture
def run_all(hub, tmp_path):
    """Run code with each of several lists of arguments, at the same time, in processes with an empty HF_HOME.

    They know this Hub and, by default, no token; returns what each printed.
    """

    def run(code, *arguments, token=None):
        jobs = []
        for args in arguments:
            home = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
            home.mkdir()
            env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE")}
            env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
            jobs.append(job(code, *args, env={**env, **({"HF_TOKEN": token} if token else {})}, cwd=ROOT))
        return [(checked(ended).stdout, ended.stderr) for ended in FORKS.run(jobs)]

    return run


@pytest.fixture
def run(run_all):
    """Run such a process; returns what it printed."""
    return lambda code, *args, token=None: run_all(code, args, token=token)[0]


@pytest.fixture
def cli(run):
    """Call the command line in one process, once for each list of arguments."""

    def calls(*commands, token=None):
        out, _ = run(CLI, json.dumps([[str(arg) for arg in args] for args in commands]), token=token)
        return json.loads(out.splitlines()[-1])

    return calls


def zeroed(model, seed):
    torch.manual_seed(seed)
    names = [target.name for target in select_targets(model).values()]
    with torch.no_grad():
        for name in names:
            param = model.get_parameter(name)
            param.mul_(torch.rand_like(param) >= 0.8)
    attach_packing(model, names)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed model as `compress` leaves it: without card, report or pictures."""
    path = tmp_path_factory.mktemp("hub") / "packed"
    zeroed(build("bert"), 0).save_pretrained(path)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files(hub, repo, revision="main"):
    return {name: blob.data for name, blob in hub.repos[repo].at(revision).files.items()}


def without_loader(files):
    """The config as it was saved, and not the file that it names."""
    config = json.loads(files["config.json"])
    config.pop("auto_map", None)
    return {**{n: d for n, d in files.items() if n != LOADER_FILE}, "config.json": config}


def test_trained_pushed_loaded_elsewhere(hub, run, tmp_path):
    out, err = run(TRAIN, tmp_path, TOKEN)
    told = json.loads(out.splitlines()[-1])
    repo, model = hub.repos["me/tiny"], files(hub, "me/tiny")
    assert repo.private
    assert [commit.title for commit in repo.history()] == ["End of training", "initial commit"]
    assert repo.branches["main"] == told["oid"]
    expected = {".gitattributes", "README.md", "approx_report.json", "config.json", "layers.png", WEIGHTS}
    expected |= {"tokenizer.json", "tokenizer_config.json", "training.png", "training_args.json", LOADER_FILE}
    assert set(model) == expected
    assert json.loads(model["config.json"])["quantization_config"]["tensors"]
    size = sum(len(data) for name, data in model.items() if name != ".gitattributes")
    (line,) = [line for line in out.splitlines() if line.startswith("Pushed")]
    assert line == f"Pushed 10 files, {size:,} bytes: {hub.url}/me/tiny/commit/{told['oid']}"

    card = ModelCard(model["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.tags == ["hf_approx", "sparsification", "avagrad", "small"]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == told["accuracy"]
    assert 'from_pretrained("me/tiny")' in card.text
    assert json.loads(model["training_args.json"])["max_steps"] == 8

    # transformers' own way pushes the same weights, packed, in one commit.
    assert len(hub.repos["me/plain"].history()) == 2
    assert files(hub, "me/plain")[WEIGHTS] == model[WEIGHTS]
    assert set(files(hub, "me/plain")) == {".gitattributes", "README.md", "config.json", WEIGHTS}

    # The token is nowhere: not printed, not in any file here or there, checkpoints and logs included.
    assert TOKEN not in out + err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("checkpoint-4" in path.parts for path in written)
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert [
        name for r in hub.repos.values() for n, d in files(hub, r.id).items() if TOKEN.encode() in d for name in [n]
    ] == []

    run(LOAD, tmp_path / "logits.pt", "me/tiny", "me/plain", token=TOKEN)


def test_trusted_code_imports_the_library_or_says_what_to_install(hub, run, cli, tmp_path):
    # Weights of its own: what one test has uploaded is not uploaded again by another.
    folder = tmp_path / "packed"
    zeroed(build("bert", seed=2), 2).save_pretrained(folder)
    assert cli(["push", folder, "me/trusted"], token=TOKEN)[0][0] == 0
    pushed = files(hub, "me/trusted")
    assert json.loads(pushed["config.json"])["auto_map"] == {
        "AutoModelForSequenceClassification": "hf_approx_model.BertForSequenceClassification"
    }
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(**batch("bert")).logits, tmp_path / "logits.pt")
    assert b'.from_pretrained("me/trusted", trust_remote_code=True)' in pushed["README.md"]
    run(TRUST, tmp_path / "logits.pt", tmp_path / "saved")
    run(WITHOUT)
    plain = tmp_path / "plain"
    build("bert").save_pretrained(plain)
    assert cli(["push", plain, "me/trusted"], token=TOKEN)[0][0] == 0
    assert LOADER_FILE not in files(hub, "me/trusted")


def test_a_cut_connection_and_a_retry(hub, cli, folder):
    hub.cuts = {"PUT /lfs/": 1, "POST .*/commit/": 1}
    puts = len([path for method, path in hub.requests if method == "PUT"])
    (refused, pushed) = cli(["push", folder, "me/cut"], ["push", folder, "me/cut"], token=TOKEN)
    assert refused[0] == 1
    assert refused[2].splitlines()[-1].startswith("error: Nothing was pushed to 'me/cut': ")
    assert pushed[0] == 0, pushed[2]
    assert hub.cuts == {"PUT /lfs/": 0, "POST .*/commit/": 0}
    # The client repeats an upload that was cut; what was uploaded once is not uploaded again.
    assert len([path for method, path in hub.requests if method == "PUT"]) == puts + 2
    assert len(hub.repos["me/cut"].history()) == 2
    there = without_loader(files(hub, "me/cut"))
    assert {name: there[name] for name in contents(folder)} == without_loader(contents(folder))
    assert "import hf_approx" in there["README.md"].decode()
    assert not (folder / "README.md").exists()


def test_two_pushes_at_once_leave_one_of_them(hub, run_all, folder, tmp_path):
    other = tmp_path / "other"
    zeroed(build("bert", seed=1), 1).save_pretrained(other, max_shard_size="8KB")
    assert not (other / WEIGHTS).exists()
    repo = hub.repos["me/both"] = Repo("me/both", False)
    repo.add("main", "old", {"model-00009-of-00009.safetensors": Blob(b"old", True), "notes.md": Blob(b"kept", False)})
    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / "notes.txt").write_text("changed")
    barrier = threading.Barrier(2)
    hub.barriers = [barrier, barrier]
    sources = [other, tmp_path / "changed"]
    commands = ([json.dumps([["push", str(source), "me/both"]])] for source in sources)
    for out, err in run_all(CLI, *commands, token=TOKEN):
        assert json.loads(out.splitlines()[-1])[0][0] == 0, out + err
    assert hub.barriers == []
    history = repo.history()
    assert len(history) == 3
    assert all(commit.files["notes.md"].data == b"kept" for commit in history)
    weights = [{n: b.data for n, b in c.files.items() if "safetensors" in n or n == "config.json"} for c in history]
    saved = [{n: d for n, d in contents(source).items() if n != "notes.txt"} for source in sources]
    for commit in weights[:2]:
        assert without_loader(commit) in [without_loader(each) for each in saved]
    assert weights[0] != weights[1]


def test_refusals_are_one_line_and_write_nothing(hub, cli, folder, tmp_path):
    for name, private in (("me/secret", True), ("me/public", False)):
        hub.repos[name] = Repo(name, private)
        hub.repos[name].add("main", "initial commit", {})
    before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
    (tmp_path / "unfinished").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "unfinished")
    edit_packing(tmp_path / "unfinished", lambda q: q.update({"training": True, "tensors": {}}))
    wrong = "hf_wrongToken"
    commands = {
        "'me/secret' is neither a folder nor a repository you may read": ["inspect", "me/secret"],
        "Invalid credentials": ["inspect", "me/public", "--token", wrong],
        "Nothing was pushed to 'me/new': log in with `hf auth login`": ["push", folder, "me/new"],
        "Is the token still valid? If not, log in": ["push", folder, "me/new", "--token", wrong],
        "don't have the rights": ["push", folder, "you/new", "--token", TOKEN],
        "exists and is public": ["push", folder, "me/public", "--private", "--token", TOKEN],
        "characters that no token has": ["push", folder, "me/new", "--token", f"{TOKEN}\n"],
        "is no folder": ["push", tmp_path / "nowhere", "me/new", "--token", TOKEN],
        "unfinished training": ["push", tmp_path / "unfinished", "me/new", "--token", TOKEN],
        "that is no name of a repository": ["push", folder, "me/../new", "--token", TOKEN],
        "neither a folder nor": ["inspect", "../nowhere/x"],
        "for a private one log in (`hf auth login`)": ["decompress", "me/secret", tmp_path / "out"],
        "Invalid credentials  ": ["export", "me/public", tmp_path / "out", "--token", wrong],
        "has no config.json": ["inspect", "me/public", "--token", TOKEN],
    }
    for expected, (code, out, err) in zip(commands, cli(*commands.values()), strict=True):
        assert (code, out) == (1, ""), (expected, out, err)
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        assert expected.strip() in err
        assert TOKEN not in err
        assert wrong not in err
    assert {name: repo.branches for name, repo in hub.repos.items()} == before


def test_revisions_and_headers_over_the_network(hub, cli, folder, tmp_path):
    shape = {"hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 640}
    model = BertForSequenceClassification(BertConfig(vocab_size=48, max_position_embeddings=32, **shape))
    zeroed(model, 0).save_pretrained(tmp_path / "big")
    hub.sent.clear()
    results = cli(
        ["push", folder, "me/branches"],
        ["push", tmp_path / "big", "me/branches", "--revision", "big"],
        ["inspect", "me/branches", "--json", "--revision", "big"],
        token=TOKEN,
    )
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert files(hub, "me/branches")[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert files(hub, "me/branches", "big")[WEIGHTS] == (tmp_path / "big" / WEIGHTS).read_bytes()
    seen = json.loads(results[2][1])
    here = json.loads(json.dumps(inspect_checkpoint(tmp_path / "big").to_dict()))
    assert seen["totals"] == here["totals"]
    assert sorted(seen["tensors"], key=str) == sorted(here["tensors"], key=str)
    assert 0 < hub.sent[WEIGHTS] <= 100_001 < (tmp_path / "big" / WEIGHTS).stat().st_size / 2
    assert set(hub.sent) == {"config.json", WEIGHTS}


def test_revisions_offline(folder, tmp_path, monkeypatch):
    """Of what an earlier download has left in the cache."""
    repo = tmp_path / "models--me--offline"
    build("bert").save_pretrained(repo / "snapshots" / ("b" * 40))
    shutil.copytree(folder, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "dense").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert inspect_repo("me/offline") == inspect_checkpoint(folder)
    assert not any(row.packed for row in inspect_repo("me/offline", revision="dense").rows)
    with pytest.raises(ConnectionError, match=r"is no folder, and the Hub cannot .* \(HF_HUB_OFFLINE is set\)"):
        inspect_repo("me/offline", revision="other")


def test_a_repository_is_read_without_the_models_in_its_folders_and_never_written_to(hub, cli, folder, tmp_path):
    folders = ("checkpoint-8", "a", "add", "adapter", "additional_chat_templates_2")
    names = [*(f"{name}/{WEIGHTS}" for name in folders), "checkpoint-8/config.json", TEMPLATE, f"{TEMPLATE}/a/b.json"]
    other = {name: Blob(b"{}", large=False) for name in names}
    assert cli(["push", folder, "me/nested"], token=TOKEN)[0][0] == 0
    repo = hub.repos["me/nested"]
    repo.add("old", "A branch", repo.at("main").files)
    repo.add("main", "A checkpoint", {**repo.at("main").files, **other})
    hub.sent.clear()
    read, card, old, none = cli(
        ["decompress", "me/nested", tmp_path / "plain"],
        ["card", "me/nested"],
        ["export", "me/nested", tmp_path / "old", "--revision", "old"],
        ["compress", "me/nested", tmp_path / "none", "--revision", "no-branch"],
        token=TOKEN,
    )
    assert read[0] == old[0] == 0, (read, old)
    assert set(hub.sent) == {"config.json", WEIGHTS, TEMPLATE}
    assert (tmp_path / "plain" / TEMPLATE).is_file()
    assert not (tmp_path / "old" / TEMPLATE).exists()
    assert none[0] == 1
    assert "'me/nested' has no branch, tag or commit 'no-branch'" in none[2]
    assert card[0] == 1
    assert "'me/nested' is no folder" in card[2]


def test_adapters_are_pushed_without_their_base(hub, run, tmp_path):
    run(ADAPTERS, tmp_path, TOKEN)
    pushed = files(hub, "me/adapters")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(pushed)
    assert not {"config.json", WEIGHTS, "training_args.bin"} & set(pushed)
    assert all(TOKEN.encode() not in data for data in pushed.values())


def test_only_a_finished_model_is_pushed(tmp_path):
    trainer = make_trainer("bert", tmp_path, approx=MagnitudePruningConfig(target_sparsity=0.5))
    with pytest.raises(ValueError, match="train first"):
        trainer.push_to_hub()
    assert list(tmp_path.iterdir()) == []


EVIL = "\x1b]0;owned\x07[bold red]x[/]"


def header(entry, size, name="a"):
    data = json.dumps({name: entry}).encode()
    return struct.pack("<Q", len(data)) + data + bytes(size)


def test_a_repository_may_say_anything_of_itself(hub, cli):
    good = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    config = json.dumps({"model_type": "bert", "quantization_config": {"quant_method": EVIL}}).encode()
    index = json.dumps({"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}).encode()
    repos = {
        "good": {WEIGHTS: header(good, 24, EVIL)},
        "dtype": {WEIGHTS: header({**good, "dtype": EVIL}, 24)},
        "shape": {WEIGHTS: header({**good, "shape": [-2, -3]}, 24)},
        "texts": {WEIGHTS: header({**good, "shape": [1 << 40, "x" * 99]}, 24)},
        "large": {WEIGHTS: header({**good, "shape": [1 << 62, 1 << 62]}, 24)},
        "short": {WEIGHTS: header(good, 20)},
        "list": {WEIGHTS: header([], 0)},
        "empty": {WEIGHTS: b""},
        "nested": {WEIGHTS: struct.pack("<Q", 100_000) + b"[" * 100_000},
        "index": {f"{WEIGHTS}.index.json": index},
        "indexes": {f"{WEIGHTS}.index.json": b"[" * 100_000},
        "pickle": {"pytorch_model.bin": b""},
        "pipeline": {"model_index.json": b"{}"},
    }
    for name, contents_ in repos.items():
        repo = hub.repos[f"me/{name}"] = Repo(f"me/{name}", False)
        repo.add(
            "main", name, {"config.json": Blob(config, False), **{n: Blob(d, True) for n, d in contents_.items()}}
        )
    good, as_json, *bad = cli(
        ["inspect", "me/good"],
        ["inspect", "me/good", "--json"],
        *(["inspect", f"me/{name}"] for name in list(repos)[1:]),
    )
    assert good[0] == as_json[0] == 0, good
    assert json.loads(as_json[1])["tensors"][0]["name"] == EVIL
    assert "[bold red]x[/]" in good[1]
    for code, out, err in bad:
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    for _, out, err in (good, as_json, *bad):
        assert all(line.isprintable() for line in (out + err).splitlines())


def test_parts_travel_and_secrets_stay(hub, cli, folder, tmp_path):
    secrets = ("credentials.json", "secrets.json", ".env.json", "token.json", "id_rsa.txt")
    parts = {"1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}', "2_Dense/config.json": b"{}"}
    shutil.copytree(folder, tmp_path / "model")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    parts["modules.json"] = json.dumps(listed).encode()
    for name, data in {**parts, **dict.fromkeys(secrets, b"{}")}.items():
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    save_file({"linear.weight": torch.ones(2, 2)}, tmp_path / "model" / "2_Dense" / WEIGHTS)
    parts[f"2_Dense/{WEIGHTS}"] = (tmp_path / "model" / "2_Dense" / WEIGHTS).read_bytes()
    key = tmp_path / "key"
    key.write_text("secret")
    shutil.copytree(tmp_path / "model", tmp_path / "linked")
    (tmp_path / "linked" / "vocab.txt").symlink_to(key)
    pushed, linked, read = cli(
        ["push", tmp_path / "model", "me/parts"],
        ["push", tmp_path / "linked", "me/linked"],
        ["decompress", "me/parts", tmp_path / "plain"],
        token=TOKEN,
    )
    assert pushed[0] == read[0] == 0, (pushed, read)
    there = files(hub, "me/parts")
    assert set(there) == {".gitattributes", "README.md", "config.json", WEIGHTS, LOADER_FILE, *parts}
    assert pushed[1].splitlines()[-1] == "Left out: credentials.json, id_rsa.txt, secrets.json, token.json."
    assert {name: (tmp_path / "plain" / name).read_bytes() for name in parts} == parts
    assert linked[0] == 1
    assert "vocab.txt' is a link to another place" in linked[2]
    assert "me/linked" not in hub.repos
