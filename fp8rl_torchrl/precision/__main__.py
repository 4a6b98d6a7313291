"""``python -m fp8rl_torchrl.precision``: what this machine multiplies in FP8 hardware, and what it emulates."""

import torch

from fp8rl_torchrl.precision.capability import capability_table

if __name__ == "__main__":
    print(f"PyTorch {torch.__version__}")
    print(capability_table())
