import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
torch.set_num_threads(1)             # the models are tiny: a second thread would only wait for the first
