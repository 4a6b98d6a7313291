"""One seed for everything random, and algorithms that repeat bit for bit."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed the global random streams of torch, numpy and Python.

    Args:
        seed: The seed.
        deterministic: Whether torch may from now on use only algorithms that repeat bit for bit, in this process; what
            has none raises. On a CPU, the algorithms used here all do.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries that draw from the global stream are the reason)
    random.seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
