import os
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "recipes")]

# Tiny models gain nothing from threads and lose much where other processes want the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing here may need a network; without this, clients would try for a while to reach it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
