import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "recipes")]

# Tiny models gain nothing from threads and lose much where other processes want the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing here may need a network; without this, clients would try for a while to reach it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples everywhere and every time, however long they take: `make torture` is what looks for new ones.
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_runtest_setup():
    """What a test draws does not depend on which tests ran before it in its process."""
    torch.manual_seed(0)
