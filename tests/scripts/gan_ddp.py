"""Train a tiny GAN on two processes, then go on from its last state; write what each process has of both."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "recipes"))

from common import RECIPES
from config_files import read_yaml
from gan_config import SMOKE, GanRecipe
from gan_game import Game

DISCRIMINATOR = "discriminator_approx=[{method: smol, target_modules: ['conv1', 'conv2'], target_bits: 6}]"

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    path = RECIPES / "configs" / "digits_gan_bits4.yaml"
    config = read_yaml(GanRecipe, path, [*SMOKE, "save_every=8", DISCRIMINATOR])
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, resume in (("straight", False), ("resumed", True)):
        game = Game(config, name, images, True, lambda found: float(found.float().mean()), folder / "states", resume)
        assert game.accelerator.num_processes == 2, game.accelerator.num_processes
        assert game.step == (8 if resume else 0)
        game.train()
        state = {
            "generator": game.generator.plain.state_dict(),
            "discriminator": game.discriminator.plain.state_dict(),
            "discriminator_bits": game.discriminator.stack.methods[0].metrics()["bits"],
            "bits": game.generator.stack.methods[0].metrics()["bits"],
            "batch": game.batch(3),
        }
        torch.save(state, folder / f"{name}-{game.accelerator.process_index}.pt")
