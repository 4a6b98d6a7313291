"""Plain networks: the encoder, and the head that returns FP32 whatever ran before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrl.modules import MLP

from fp8rl_torchrl.models.normalize import Normalize, RunningStatistics


class Float32Head(nn.Linear):
    """A linear layer that computes in FP32 even inside autocast.

    The last layer of a network is tiny, and all that follows it (log-probabilities, targets, losses) is sensitive to
    its rounding: a state value near 100 has a resolution of 0.5 in BF16.

    Args:
        in_features: Size of the features.
        out_features: Size of the output.
        gain: Gain of the orthogonal initialisation; the bias starts at 0.
    """

    compute_format = "fp32"

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        nn.init.orthogonal_(self.weight, gain)
        nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map features ``[..., in_features]`` of any floating dtype to float32 ``[..., out_features]``."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def mlp_encoder(
    in_features: int,
    hidden: Sequence[int],
    activation: type[nn.Module] = nn.Tanh,
    statistics: RunningStatistics | None = None,
) -> nn.Sequential:
    """A multi-layer perceptron that ends in an activation, orthogonally initialised.

    Args:
        in_features: Size of the observation.
        hidden: Width of each layer, at least one.
        activation: The nonlinearity after every layer.
        statistics: Its input is normalised by these; None takes it as it is.

    Raises:
        ValueError: If ``hidden`` is empty or holds a width below 1.
    """
    if isinstance(hidden, int) or not hidden or any(not isinstance(width, int) or width < 1 for width in hidden):
        raise ValueError(f"hidden must name at least one layer, each at least 1 wide, as in (64, 64); got {hidden!r}")
    encoder = MLP(in_features, hidden[-1], num_cells=list(hidden[:-1]), activation_class=activation)
    encoder.append(activation())
    gain = nn.init.calculate_gain("tanh" if activation is nn.Tanh else "relu")
    for layer in encoder:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    if statistics is not None:
        encoder.insert(0, Normalize(statistics))
    return encoder
