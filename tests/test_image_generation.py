"""The image generation recipe: its distance against closed forms, its training, and what it writes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from scipy.linalg import sqrtm
from transformers import AutoModel

import image_generation
from config_files import read_yaml
from frechet import Normal, fit, squared_distance
from gan_config import SMOKE, GanRecipe
from gan_game import Game, from_pixels, generate, random, to_pixels
from gan_networks import Discriminator, Generator, GeneratorConfig
from gan_results import finalize
from helpers import ROOT, SimulatedCrashError, assert_same_weights, launch, weights
from image_features import train_features
from image_generation import Measure, pixels

CONFIGS = ROOT / "recipes" / "configs"
CONFIG = CONFIGS / "digits_gan_bits4.yaml"


def covariance(size, generator, rank=None):
    factor = torch.randn(size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return factor @ factor.T / size


def test_distance_of_normals_whose_covariances_commute():
    """|m - n|^2 + sum (sqrt(a) - sqrt(b))^2 over the common axes, whatever their directions."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    a, b = torch.tensor([4.0, 9.0, 1.0, 0.0, 2.0]).double(), torch.tensor([1.0, 1.0, 1.0, 4.0, 0.0]).double()
    m, n = torch.zeros(5).double(), torch.tensor([1.0, 2.0, 0.0, 0.0, 2.0]).double()
    first, second = Normal(m, (axes * a) @ axes.T), Normal(n, (axes * b) @ axes.T)
    expected = 9 + 1 + 4 + 0 + 4 + 2
    assert squared_distance(first, second) == pytest.approx(expected, abs=1e-6)
    assert squared_distance(second, first) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rank", [None, 3], ids=["full", "singular"])
def test_distance_is_that_of_a_general_matrix_root(rank):
    generator = torch.Generator().manual_seed(1)
    a, b = covariance(6, generator), covariance(6, generator, rank)
    m, n = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    root = sqrtm((a @ b).numpy()).real
    expected = float((m - n).square().sum() + a.trace() + b.trace()) - 2 * np.trace(root)
    assert squared_distance(Normal(m, a), Normal(n, b)) == pytest.approx(expected, rel=1e-5)


def test_the_same_features_have_no_distance():
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert squared_distance(fit(features), fit(features.flip(0))) == pytest.approx(0, abs=1e-9)
    shifted = squared_distance(fit(features), fit(features + 0.5))
    assert shifted == pytest.approx(8 * 0.25, rel=1e-5)


def test_a_fitted_normal_has_mean_and_covariance_of_the_features():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    found = fit(features)
    assert np.allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False))
    assert np.allclose(found.mean, features.double().numpy().mean(0))
    assert fit(features[:, :1]).covariance.shape == (1, 1)
    for wrong, message in ((features[:1], "two or more rows"), (features / 0, "not finite")):
        with pytest.raises(ValueError, match=message):
            fit(wrong)


def test_the_features_are_the_same_every_time_and_know_the_classes():
    """Two classes, bright on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (200,), generator=generator)
    images = torch.randn(200, 1, 8, 8, generator=generator) / 4
    images[labels == 0, :, :, :4] += 1
    images[labels == 1, :, :, 4:] += 1
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_features(images[:100], labels[:100], 6, 10, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = train_features(images[:100], labels[:100], 6, 10, torch.device("cpu"))
    assert torch.equal(first.features(images), again.features(images))
    assert first.features(images).shape == (200, 6)
    assert first.accuracy(images[100:], labels[100:]) > 0.9


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 3), (32, 3)])
def test_networks_fit_each_other(size, channels):
    generator = Generator(GeneratorConfig(latent_size=5, width=4, image_size=size, num_channels=channels))
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, channels, size, size)
    assert 0 < images.abs().max() <= 1
    discriminator = Discriminator(4, size, channels)
    discriminator.normalize()
    assert discriminator(images).shape == (3,)


def test_no_layer_of_a_normalized_discriminator_stretches():
    discriminator = Discriminator(4, 8, 1)
    discriminator.normalize()
    with torch.no_grad():
        for _ in range(50):
            discriminator(torch.zeros(1, 1, 8, 8))
    found = [m for m in discriminator.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(found) == 8
    for module in found:
        assert float(torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-3)


def test_bytes_and_numbers_are_each_others_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    assert from_pixels(every)[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(to_pixels(from_pixels(every)), every)
    assert to_pixels(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_images_of_any_size_and_colour_become_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    features = Features({"picture": Image(), "kind": Value("int64")})
    data = Dataset.from_dict({"picture": [Pictures.fromarray(n) for n in noise], "kind": [3, 1]}, features=features)
    config = replace(read_yaml(GanRecipe, CONFIG, SMOKE), image_column="picture", label_column="kind", image_size=16)
    for channels, mode in ((1, "L"), (3, "RGB")):
        images, labels = pixels(data, replace(config, num_channels=channels))
        assert labels.tolist() == [3, 1]
        assert images.shape == (2, channels, 16, 16)
        expected = np.asarray(Pictures.fromarray(noise[1]).convert(mode).resize((16, 16))).reshape(16, 16, channels)
        assert np.array_equal(images[1].permute(1, 2, 0), expected)


def tiles(path, side, count):
    """The images of a picture of samples, read back from its pixels."""
    picture = np.asarray(Pictures.open(path))
    step = picture.shape[1] / (10 * (side + 1) + 1)
    assert step == int(step) >= 1
    small = torch.from_numpy(picture[:: int(step), :: int(step)].copy())
    places = [(1 + i // 10 * (side + 1), 1 + i % 10 * (side + 1)) for i in range(count)]
    return torch.stack([small[top : top + side, left : left + side] for top, left in places])


def test_the_recipe_in_seconds(tmp_path, capsys):
    assert image_generation.main(["--config", str(CONFIG), "--output_dir", str(tmp_path), "--smoke"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    runs, printed = found["runs"], capsys.readouterr().out
    assert list(runs) == ["dense", "compressed"]
    assert runs["compressed"]["bits"] == pytest.approx(4, abs=0.02)
    assert runs["compressed"]["bits"] < runs["compressed"]["bits_with_metadata"]
    assert runs["compressed"]["bytes"] < runs["compressed"]["dense_bytes"] < runs["dense"]["bytes"]
    assert runs["dense"]["bits"] is None
    config = read_yaml(GanRecipe, CONFIG, SMOKE)
    data = image_generation.Experiment(config, tmp_path)
    for name, row in runs.items():
        assert row["reloaded_equal"] is True
        assert [entry["step"] for entry in row["curve"]] == [0, 4, 8]
        assert f"{row['bytes']:,}" in printed
        assert row["bytes"] == (tmp_path / name / "model.safetensors").stat().st_size
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert type(loaded) is Generator
        images = generate(loaded, config.samples)
        assert data.measure(images) == row["distance"]
        assert torch.equal(tiles(tmp_path / f"samples_{name}.png", 8, 64), images[:, 0])
    assert torch.equal(tiles(tmp_path / "samples_real.png", 8, 100), data.images[:100, 0])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "compressed" / "README.md").read_text()
    assert f"| frechet_distance | {runs['compressed']['distance']:.4g} |" in card
    assert "gan_networks" in card
    assert "| smol | " in card


def tiny(tmp_path, *overrides):
    """A config in which everything happens within a few steps."""
    options = ["steps=8", "n_critic=2", "num_channels=3", "image_size=16", "discriminator_approx=[{method: smol, "]
    options[-1] += "target_modules: ['conv1', 'conv2'], target_bits: 6, granularity: channel}]"
    return read_yaml(GanRecipe, CONFIG, [*SMOKE, *options, *overrides])


def images(config, count=32):
    size = (count, config.num_channels, config.image_size, config.image_size)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def brightness(found):
    return float(found.float().mean())


def test_each_network_learns_in_its_own_steps_only(tmp_path):
    config = tiny(tmp_path)
    game = Game(config, "dense", images(config), False, brightness)
    players = {"discriminator": game.discriminator, "generator": game.generator}
    losses = {"discriminator": game._discriminator_loss, "generator": game._generator_loss}
    for turn in range(2):  # AvaGrad's first call only fills its state
        for name, other in (("discriminator", "generator"), ("generator", "discriminator")):
            before = {n: [p.detach().clone() for p in player.plain.parameters()] for n, player in players.items()}
            players[name].step(turn, losses[name])
            moved = {
                n: any(not torch.equal(a, b) for a, b in zip(before[n], player.plain.parameters(), strict=True))
                for n, player in players.items()
            }
            assert moved == {name: turn == 1, other: False}
            assert all(p.grad is None and p.requires_grad for each in players.values() for p in each.trained)


def test_the_losses_are_hinges():
    config = tiny(None)
    game = Game(config, "dense", images(config), False, brightness)
    discriminator = game.discriminator.plain.eval()  # whose norms stay as they are then
    real, latents = game.batch(5)
    with torch.no_grad():
        game.generator.plain.train()
        fake = game.generator.plain(latents)
        scores = discriminator(real), discriminator(fake)
    expected = sum((1 - s).clamp_min(0).mean() for s in (scores[0], -scores[1]))
    torch.testing.assert_close(game._discriminator_loss(5), expected)
    drawn = torch.randn(config.batch_size, config.latent_size, generator=game._random(1, 5))
    torch.testing.assert_close(game._generator_loss(5), -discriminator(game.generator.plain(drawn)).mean())


def test_batches_differ_from_step_to_step_and_are_the_same_again():
    config = tiny(None)
    game, again = (Game(config, "dense", images(config), False, brightness) for _ in range(2))
    for mine, other in zip(game.batch(3), again.batch(3), strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(game.batch(3)[1], game.batch(4)[1])
    keys = [(0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2), (0, 1, 2)]
    assert len({float(torch.rand((), generator=random(*key))) for key in keys}) == len(keys)


def test_a_game_that_diverges_is_stopped_and_keeps_its_last_good_state(tmp_path):
    """At the end of the noise, where precisions would be chosen by limits that are NaN."""
    config = tiny(tmp_path, "save_every=3", "evaluate_every=5")
    game = Game(config, "compressed", images(config), True, brightness, tmp_path)
    own = game._generator_loss
    game._generator_loss = lambda index: own(index) * (float("nan") if index == 3 else 1.0)
    with pytest.raises(ValueError, match=r"compressed: training diverged by step 4: .* other tensors hold NaN"):
        game.train()
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_training_that_crashed_goes_on_to_the_same_end(tmp_path):
    """Across the end of the noise, at step 4 of both networks."""
    config = tiny(tmp_path, "save_every=3", "evaluate_every=5")
    straight = Game(config, "compressed", images(config), True, brightness)
    straight.train()

    def crash(found):
        if game.step == 5:
            raise SimulatedCrashError
        return brightness(found)

    game = Game(config, "compressed", images(config), True, crash, tmp_path)
    with pytest.raises(SimulatedCrashError):
        game.train()
    resumed = Game(config, "compressed", images(config), True, brightness, tmp_path, resume=True)
    assert resumed.step == 3
    assert not resumed.generator.stack.methods[0].is_final
    model = resumed.train()
    assert resumed.curve == straight.curve
    for network in ("generator", "discriminator"):
        mine, other = (weights(getattr(each, network).plain) for each in (resumed, straight))
        assert_same_weights(mine, other)
    assert resumed.discriminator.stack.methods[0].metrics()["bits"] == pytest.approx(6, abs=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]
    finalize(resumed.generator.stack, config)
    finalize(straight.generator.stack, config)
    for name, saved in (("a", model), ("b", straight.generator.plain)):
        saved.save_pretrained(tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"}) == 1


def test_resuming_through_the_recipe(tmp_path, capsys):
    options = ["--config", str(CONFIG), "--output_dir", str(tmp_path), "--smoke", "--set", "approx=[]"]
    assert image_generation.main([*options, "--resume"]) == 2
    assert "there is no checkpoint; set save_every" in capsys.readouterr().err
    assert image_generation.main([*options, "--set", "save_every=5"]) == 0
    first = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").unlink()
    assert image_generation.main([*options, "--set", "save_every=5", "--resume"]) == 0
    assert (tmp_path / "results.json").read_text() == first
    capsys.readouterr()
    assert image_generation.main([*options, "--set", "seed=1", "--resume"]) == 2
    assert "is of another config or version" in capsys.readouterr().err


def test_two_processes_end_with_the_same_networks(tmp_path):
    launch(ROOT / "tests" / "scripts" / "gan_ddp.py", tmp_path, processes=2)
    found = {(n, rank): torch.load(tmp_path / f"{n}-{rank}.pt") for n in ("straight", "resumed") for rank in range(2)}
    first = found["straight", 0]
    for state in found.values():
        for network in ("generator", "discriminator"):
            assert_same_weights(state[network], first[network])
        assert state["bits"] == first["bits"] == pytest.approx(4, abs=0.02)
        assert state["discriminator_bits"] == first["discriminator_bits"] == pytest.approx(6, abs=0.02)
    config = read_yaml(GanRecipe, CONFIG, SMOKE)
    alone = Game(replace(config), "dense", images(config), False, brightness).batch(3)
    for rank, same in ((0, True), (1, False)):
        assert [torch.equal(*pair) for pair in zip(found["straight", rank]["batch"], alone, strict=True)] == [same] * 2


def test_both_optimizers_are_those_of_the_config():
    config = read_yaml(GanRecipe, CONFIG, [*SMOKE, "generator_optimizer={method: adam, lr: 0.5, betas: [0.0, 0.9]}"])
    game = Game(config, "dense", images(config), False, brightness)
    kinds = [type(p.optimizer.optimizer.optimizers[0]).__name__ for p in (game.generator, game.discriminator)]
    assert kinds == ["Adam", "AvaGrad"]
    assert game.generator.scheduler.get_last_lr() == [0.5]
    game.train()
    assert game.generator.scheduler.get_last_lr() == [0.0]
    assert game.discriminator.scheduler.get_last_lr() == [0.0]


def test_the_config_for_a_gpu_can_be_read():
    config = read_yaml(GanRecipe, CONFIGS / "cifar10_gan_bits4.yaml", ["width=8", "discriminator_width=8"])
    assert config.data.methods()[0].target_bits == 4
    assert config.n_critic == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepps=8", "unknown option 'stepps' (did you mean 'steps'?)"),
        ("card={colour: red}", "card: unknown option 'colour'; known: model_name, "),
        ("steps=0", "steps must be a whole number of at least 1, got 0"),
        ("batch_size=1", "batch_size must be a whole number of at least 2, got 1"),
        ("image_size=28", "image_size must be one of 8, 16, 32, 64, 128, 256, got 28"),
        ("num_channels=2", "num_channels must be 1 or 3, got 2"),
        ("samples=20", "samples must be more than feature_size"),
        ("store_dtype=int8", "Packed weights are stored as float32, float16, bfloat16, not 'int8'"),
        ("generator_optimizer=fast", "generator_optimizer must be a mapping of options, got 'fast'"),
        ("generator_optimizer.eps=0", "generator_optimizer: AvaGrad: eps must be a finite number > 0"),
        ("discriminator_optimizer={method: sgd}", "method must be avagrad or adam, got 'sgd'"),
        ("discriminator_optimizer={method: adam, lr: -1}", "discriminator_optimizer: Invalid learning rate: -1"),
        ("discriminator_optimizer={method: adam, momentum: 1}", "unknown option 'momentum'"),
        ("approx.0.target_bits=9", "target_bits must be between 1 and 8"),
        ("approx.0.target_modules=[convs]", "approx: No module of Generator matches"),
        ("approx=[{method: sharing}]", "approx: sharing changes which weights there are"),
        ("approx=[{method: pruning}]", "method must be one of"),
        ("discriminator_approx=[{method: smol, target_modules: [x]}]", "No module of Discriminator matches"),
        ("image_column=picture", "no column 'picture'"),
        ("image_column=label", "the column 'label' holds no images"),
        ("dataset={python: 'digits:loads'}", "cannot load 'digits:loads'"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, capsys, override, message):
    options = ["--config", str(CONFIG), "--smoke", "--output_dir", str(tmp_path / "out"), "--set", override]
    assert image_generation.main(options) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_is_refused(tmp_path, capsys):
    options = ["--config", str(CONFIG), "--output_dir", str(tmp_path), "--set", "approx=[]", "--set", "baseline=false"]
    assert image_generation.main(options) == 2
    assert "nothing to train" in capsys.readouterr().err


def test_the_distance_tells_digits_from_noise():
    """The measure of the recipe, on real images against others of the same mean and variance in every pixel."""
    config = read_yaml(GanRecipe, CONFIG, [*SMOKE, "feature_epochs=10", "max_train_samples=700"])
    from digits import load

    data = load()
    train, held_out = (pixels(data[split], config) for split in ("train", "validation"))
    measure = Measure(config, tuple(t[:700] for t in train), held_out)
    real = train[0][700:1400]
    order = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)).argsort(0)
    mixed = real.gather(0, order)
    assert measure.facts["classifier_accuracy"] > 0.9
    assert measure(mixed) > 5 * measure(real)
