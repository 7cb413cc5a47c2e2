"""Every worker computes on one thread: two of them share the machine, and tiny tensors gain nothing from more."""

import torch

torch.set_num_threads(1)
