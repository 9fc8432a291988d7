import os

import torch


# Nothing may be downloaded by a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models of the tests are tiny: more threads only cost.
torch.set_num_threads(1)
