"""A categorical distribution that costs one uniform number to sample, and no gather to differentiate."""

from __future__ import annotations

import itertools

import torch
from torch import distributions

FEW = 8
"""Up to so many outcomes, sums one by one are faster: a compiler fuses them with what surrounds them."""


class Categorical(distributions.Categorical):
    """`torch.distributions.Categorical`, sampled by inverting its cumulative distribution.

    ``multinomial`` draws and divides by as many random numbers as there are outcomes and reads the probabilities on
    the host to check them. Here a sample is the number of outcomes but the last whose cumulative probability does not
    exceed one uniform number, and the log-probability of an outcome is picked by comparison, which a compiler
    vectorises, forward and backward, where a gather is scalar and its backward a scatter.

    Arguments and results are those of the parent class; ``logits`` are float32 ``[..., n]``, a sample is int64
    ``[...]``.
    """

    def sample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008 (the parent's signature)
        """Draw int64 ``[*sample_shape, ...]``, without gradient."""
        with torch.no_grad():
            probs, shape = self.probs, self._extended_shape(sample_shape)
            noise = torch.rand(shape, dtype=probs.dtype, device=probs.device)
            # The sum of all rounds to just below 1 at times; unscaled, noise beyond it would choose the last outcome
            # even if that is impossible.
            if self._num_events > FEW:
                cumulative = probs.cumsum(-1)
                return (noise.unsqueeze(-1) * cumulative[..., -1:] >= cumulative[..., :-1]).sum(-1)
            *sums, total = itertools.accumulate(probs.unbind(-1))
            passed = [(noise * total >= each).long() for each in sums]
            return sum(passed, start=torch.zeros(shape, dtype=torch.int64, device=probs.device))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """The log-probability, float32 ``[...]``, of outcomes ``[...]``; -inf of a value that is no outcome.

        Raises:
            ValueError: If arguments are validated and a value is no outcome.
        """
        if self._validate_args:
            self._validate_sample(value)
        outcomes = torch.arange(self._num_events, device=value.device)
        chosen = outcomes == value.unsqueeze(-1)
        log_prob = torch.where(chosen, self.logits, 0.0).sum(-1)
        return torch.where(chosen.any(-1), log_prob, -torch.inf)

    def entropy(self) -> torch.Tensor:
        """The entropy in nats, float32 ``[...]``."""
        # 0 · log 0 is 0. The parent class replaces -inf by the most negative number, whose gradient overflows.
        return -(self.probs * self.logits.masked_fill(self.logits == -torch.inf, 0.0)).sum(-1)

    @property
    def deterministic_sample(self) -> torch.Tensor:
        """The likeliest outcome, int64 ``[...]``: what TorchRL asks for where exploration is off."""
        return self.mode
