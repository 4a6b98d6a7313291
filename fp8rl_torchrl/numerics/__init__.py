"""What happens to the numbers while a pipeline trains: which layer loses how many of them, and what went wrong."""

from fp8rl_torchrl.numerics.diagnosis import Diagnosis
from fp8rl_torchrl.numerics.recorder import LayerNumbers, Recorder, Sample

__all__ = ["Diagnosis", "LayerNumbers", "Recorder", "Sample"]
