"""The recipe of the shortest paths: its grids against plain searches, its network, and the whole as a process."""

import json
from collections import deque

import pytest
import torch
from torch import nn

import shortest_paths
from config_files import read_yaml
from grid_paths import GridPaths, distances_from, on_shortest_path
from helpers import ROOT, launch
from path_config import SMOKE, PathRecipe
from path_network import PathNetwork
from path_results import scores, steps_to, summarize

CONFIG = ROOT / "recipes" / "configs" / "shortest_paths.yaml"


def neighbours(cell, free):
    row, column = cell
    around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [(r, c) for r, c in around if 0 <= r < len(free) and 0 <= c < len(free[0]) and free[r][c]]


def search(free, start):
    """Steps to every cell that can be reached: breadth first, cell by cell."""
    steps, queue = {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        for other in neighbours(cell, free):
            if other not in steps:
                steps[other] = steps[cell] + 1
                queue.append(other)
    return steps


def all_shortest_paths(free, start, end):
    """Every shortest path, followed from one point to the other."""
    steps = search(free, start)
    paths = [[end]]
    for _ in range(steps[end]):
        paths = [[*p, n] for p in paths for n in neighbours(p[-1], free) if steps[n] == steps[p[-1]] - 1]
    return paths


def draw(size, count, distances, seed=0):
    return GridPaths(size).draw(count, distances, torch.Generator().manual_seed(seed))


def points(image):
    return [tuple(cell) for cell in image.nonzero().tolist()]


def test_targets_are_the_cells_of_all_shortest_paths():
    several = 0
    for (obstacles, ends), target in zip(*draw(7, 60, (2, 9)), strict=True):
        start, end = points(ends)
        free = (obstacles == 0).tolist()
        assert free[start[0]][start[1]]
        assert free[end[0]][end[1]]
        paths = all_shortest_paths(free, start, end)
        several += len(paths) > 1
        assert 2 <= len(paths[0]) - 1 <= 9
        assert all(path[-1] == start for path in paths)
        assert set(points(target[0])) == {cell for path in paths for cell in path}
    assert several > 10


def test_distances_are_those_of_a_plain_search():
    generator = torch.Generator().manual_seed(1)
    free = torch.rand(30, 8, 6, generator=generator) > 0.35
    free[:, 2, 3] = True
    start = torch.zeros_like(free)
    start[:, 2, 3] = True
    for limit in (5, 48):
        for grid, distance in zip(free, distances_from(free, start, limit), strict=True):
            steps = search(grid.tolist(), (2, 3))
            expected = [[steps.get((r, c), -1) for c in range(6)] for r in range(8)]
            assert distance.tolist() == [[s if s <= limit else -1 for s in row] for row in expected]


def test_a_wall_with_one_gate():
    """By hand: the one path of a 3 x 4 grid goes around the wall."""
    free = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)[None]
    start, end = torch.zeros_like(free), torch.zeros_like(free)
    start[0, 0, 0] = end[0, 0, 3] = True
    path = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)[None]
    assert torch.equal(on_shortest_path(free, start, end, 12), path)


def test_draws_are_what_was_asked_for():
    inputs, targets = draw(12, 2000, (3, 8))
    assert inputs.shape == (2000, 2, 12, 12)
    assert targets.shape == (2000, 1, 12, 12)
    assert set(inputs.unique().tolist()) == set(targets.unique().tolist()) == {0.0, 1.0}
    assert (inputs[:, 1].sum((1, 2)) == 2).all()
    # Grids with many obstacles are refused more often: the rate is a little below 0.25.
    assert 0.2 < inputs[:, 0].mean() < 0.26
    lengths = []
    for (obstacles, ends), target in zip(inputs[:600], targets[:600], strict=True):
        start, end = points(ends)
        lengths.append(search((obstacles == 0).tolist(), start)[end])
        assert target[0][start] == target[0][end] == 1
    shares = torch.bincount(torch.tensor(lengths), minlength=9) / 600
    assert shares[:3].sum() == 0
    assert (shares[3:] - 1 / 6).abs().max() < 0.06


def test_a_seed_decides_everything():
    first, again, other = (draw(8, 5, (2, 6), seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("distances", [(0, 3), (4, 3), (1, 15), (3,)], ids=str)
def test_impossible_distances_are_refused(distances):
    with pytest.raises(ValueError, match="two rising numbers from 1 to 14"):
        draw(8, 1, distances)


def test_too_rare_distances_are_refused():
    grids = GridPaths(6, (0.9, 0.95))
    with pytest.raises(ValueError, match="too few paths of 10 steps"):
        grids.draw(1, (10, 10), torch.Generator().manual_seed(0))


class Fixed(nn.Module):
    """Marks what it was told to."""

    def __init__(self, marked):
        super().__init__()
        self.marked = marked

    def forward(self, x):
        return self.marked * 2.0 - 1


def test_scores():
    wanted = torch.zeros(2, 1, 2, 2)
    wanted[:, 0, 0] = 1
    marked = wanted.clone()
    marked[1, 0, 0, 0], marked[1, 0, 1, 1] = 0, 1
    inputs = torch.zeros(2, 2, 2, 2)
    assert scores(Fixed(wanted), inputs, wanted, torch.device("cpu")) == {"f1": 1.0, "exact": 1.0}
    # 3 hits, 1 cell too many, 1 too few.
    assert scores(Fixed(marked), inputs, wanted, torch.device("cpu")) == {"f1": 0.75, "exact": 0.5}


def curve(*values):
    scored = [{"f1": value, "exact": value / 2} for value in values]
    return [{"step": 10 * (i + 1), "trained": s, "longer": {"f1": 0.1, "exact": 0.0}} for i, s in enumerate(scored)]


def test_steps_to_a_target():
    found = curve(0.2, 0.6, 0.5, 0.9)
    assert [steps_to(found, target) for target in (0.1, 0.2, 0.55, 0.61, 0.9, 0.91)] == [10, 10, 20, 40, 40, None]
    assert steps_to(found, 0.2, "longer") is None


def test_the_summary_has_the_last_scores_of_every_seed():
    runs = {"0": {"parameters": 7, "curve": curve(0.5, 0.8)}, "1": {"parameters": 7, "curve": curve(0.9, 0.6)}}
    row = summarize({"a": runs}, 0.8)["a"]
    assert row["steps"] == [20, 10]
    assert row["trained_f1"] == [0.8, 0.6]
    assert row["longer_exact"] == [0.0, 0.0]
    assert row["parameters"] == 7


def test_the_shared_network_is_the_independent_one_with_a_bank():
    config = read_yaml(PathRecipe, CONFIG, SMOKE)
    independent, sharing = config.network("independent"), config.network("shared")
    plain, shared = independent.model, sharing.model
    assert independent.methods == []
    assert type(plain) is type(shared) is PathNetwork
    x = draw(6, 3, (1, 4))[0]
    with torch.no_grad():
        trained = shared.eval()(x)
    sharing.bake()
    weight = plain.layers[0].conv.weight.numel()
    templates = config.competitors["shared"].sharing["templates"]
    fewer = (config.layers - templates) * weight - config.layers * templates
    assert sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in shared.parameters()) == fewer
    plain.load_state_dict({n: t for n, t in shared.state_dict().items() if n in plain.state_dict()}, strict=False)
    for own, mixed in zip(plain.layers, shared.layers, strict=True):
        own.conv.weight.data.copy_(mixed.conv.weight)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), shared(x))
        torch.testing.assert_close(trained, shared(x))


def test_a_network_may_have_a_width_of_its_own():
    config = read_yaml(PathRecipe, CONFIG, [*SMOKE, "networks.narrow={lr: 0.1, width: 3}"])
    assert config.network("narrow").model.layers[1].conv.weight.shape == (3, 3, 3, 3)
    assert config.network("independent").model.layers[1].conv.weight.shape == (4, 4, 3, 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_recipe_in_seconds(tmp_path, processes):
    recipe = ROOT / "recipes" / "shortest_paths.py"
    result = launch(recipe, "--config", CONFIG, "--output_dir", tmp_path, "--smoke", processes=processes)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["runs"]) == list(read_yaml(PathRecipe, CONFIG).networks)
    for name, runs in found["runs"].items():
        assert list(runs) == ["0", "1"]
        assert f"| {name}" in result.stdout
        assert all([entry["step"] for entry in run["curve"]] == [2, 4] for run in runs.values())
        assert f"{runs['0']['parameters']:,}" in result.stdout
    assert "similarity" not in found["runs"]["independent"]["0"]
    for run in found["runs"]["shared"].values():
        similarity = torch.tensor(run["similarity"])
        assert similarity.shape == (4, 4)
        assert torch.equal(similarity.diagonal(), torch.ones(4))
        assert run["folded"]["loops"] in result.stdout
    for picture in ("curves.png", "similarity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sise=8", "unknown option 'sise'"),
        ("layers=5", "layers must be even, got 5"),
        ("width=wide", "width must be an integer, got 'wide'"),
        ("longer=[9, 99]", "two rising numbers from 1 to"),
        ("obstacles=[0.3, 0.2]", "obstacles must be two rising probabilities"),
        ("obstacles=none", "obstacles must be a list of numbers, got 'none'"),
        ("size=1", "size must be an integer >= 2"),
        ("curriculum=[]", "curriculum must be a list of stages"),
        ("curriculum.0.steps=0", "curriculum 0: steps must be a whole number above 0, got 0"),
        ("curriculum.0.distances=null", "curriculum 0: distances must be a list of integers, got None"),
        ("networks={}", "networks must map names to options"),
        ("networks.shared.lr=-1", "networks.shared: lr must be a number above 0, got -1"),
        ("networks.shared.avagrad={lr: 0.1}", "networks.shared: give lr or avagrad, and not both"),
        ("networks.shared.sharing.templates=99", "templates=99 is more than the 4 layers"),
        ("networks.shared.sharing.tempates=2", "networks.shared: sharing: unknown option 'tempates'"),
        ("networks.shared.sharing.groups={a: x}", "networks.shared: sharing: all layers have one bank"),
        ("networks.independent=dense", "networks.independent must be a mapping of options, got 'dense'"),
        ("seeds=[a]", "seeds.0 must be an integer, got 'a'"),
        ("seeds=[-1]", "seeds must be whole numbers"),
        ("target_f1=2", "target_f1 is out of range: 2"),
        ("evaluate_every=0", "evaluate_every must be a whole number above 0, got 0"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, capsys, override, message):
    options = ["--config", str(CONFIG), "--smoke", "--output_dir", str(tmp_path / "out"), "--set", override]
    assert shortest_paths.main(options) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
