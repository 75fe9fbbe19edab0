import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / 'lab')]
torch.set_num_threads(1)            # the models are tiny, so a second thread would only wait for the first
