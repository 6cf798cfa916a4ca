"""One thread per process: the suite shares its cores, and results do not depend on their number."""

import torch

torch.set_num_threads(1)
