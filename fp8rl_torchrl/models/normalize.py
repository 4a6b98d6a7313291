"""Normalisation of observations by their running mean and standard deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RunningStatistics(nn.Module):
    """The mean and variance, component by component, of everything that `update` was shown.

    They change only there: an evaluation, or a second pass over a batch, sees what training left. Kept in float64,
    whose sums do not stall after many frames.

    Args:
        size: The number of components.

    Attributes:
        mean: float64 ``[size]``.
        variance: float64 ``[size]``, population; 1 before the first update.
        count: float64 ``[]``, the number of observations seen.

    Example:
        >>> statistics = RunningStatistics(1)
        >>> statistics.update(torch.tensor([[1.0], [3.0]]))
        >>> statistics.mean.item(), statistics.variance.item()
        (2.0, 1.0)
    """

    mean: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, observations: torch.Tensor) -> None:
        """Take observations into account.

        Batches are merged by their counts, means and sums of squares (Chan, Golub and LeVeque, 1979), which loses no
        digits where a mean is large.

        Args:
            observations: ``[..., size]``. A batch with a number that is not finite is left out.

        Raises:
            ValueError: If the observations are of another size.
        """
        if observations.shape[-1:] != self.mean.shape:
            raise ValueError(
                f"these are statistics of observations [..., {len(self.mean)}]; got {list(observations.shape)}"
            )
        if not observations.numel():
            return
        batch = observations.reshape(-1, len(self.mean)).double()
        usable = batch.isfinite().all()
        batch = batch.nan_to_num(0.0, 0.0, 0.0)
        count = usable * torch.full_like(self.count, len(batch))
        mean, variance = batch.mean(0), batch.var(0, correction=0)
        total = (self.count + count).clamp(min=1)
        distance = mean - self.mean
        squares = self.variance * self.count + variance * count + distance.square() * self.count * count / total
        # Before the first usable batch there is nothing to divide by: the variance stays 1.
        self.variance.copy_(torch.where(self.count + count > 0, squares / total, self.variance))
        self.mean.add_(distance * count / total)
        self.count.add_(count)


class Normalize(nn.Module):
    """A layer that shifts and scales observations to mean 0 and standard deviation 1, and clips them.

    The statistics are referred to and not owned: the layers of an actor, a critic, their copies and their targets (for
    which TorchRL's losses copy buffers, too) all see the same ones. Whoever builds the layers registers the statistics
    once, and before them, so that a copy of the whole comes with statistics of its own.

    Args:
        statistics: The running statistics.
        limit: Results are clipped to plus or minus this many standard deviations.
    """

    statistics: RunningStatistics

    def __init__(self, statistics: RunningStatistics, limit: float = 10.0) -> None:
        super().__init__()
        self.__dict__["statistics"] = statistics  # past nn.Module, which would register it as a part
        self.limit = limit

    def __deepcopy__(self, memo: dict[int, Any]) -> Normalize:
        """A copy with the same statistics; if their owner is being copied whole, with the copy's."""
        return Normalize(memo.get(id(self.statistics), self.statistics), self.limit)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., size]``, in FP32 even inside autocast."""
        statistics = self.statistics
        mean, variance = statistics.mean.to(observation.dtype), statistics.variance.to(observation.dtype)
        return ((observation - mean) * (variance + 1e-8).rsqrt()).clamp(-self.limit, self.limit)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{len(self.statistics.mean)}, limit={self.limit}"
