"""The files of recipes/accelerate are what `accelerate launch` reads."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from helpers import ROOT

FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def test_there_is_a_file_for_every_kind_of_launch():
    assert [path.stem for path in FILES] == ["cpu", "cpu_2_processes", "fsdp2", "gpu", "multi_gpu"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_name(path):
    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert config.num_processes == given["num_processes"]
    assert config.mixed_precision == given["mixed_precision"]
    assert config.use_cpu == given["use_cpu"]
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(given.get("fsdp_config", {})) <= known


def test_fsdp2_is_what_methods_can_train_with(monkeypatch):
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"))
    # `accelerate launch` hands the settings on like this.
    for name, value in config.fsdp_config.items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is not None
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
