"""A categorical distribution that costs one uniform number to sample, and no gather to differentiate."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributions

FEW = 8
"""Up to so many outcomes, a compiled distribution is computed one outcome at a time: along a short last dimension no
exponential, logarithm or sum is vectorised."""


class Categorical(distributions.Categorical):
    """`torch.distributions.Categorical`, sampled by inverting its cumulative distribution.

    ``multinomial`` draws and divides by as many random numbers as there are outcomes and reads the probabilities on
    the host to check them. Here a sample is the number of outcomes but the last whose cumulative probability does not
    exceed one uniform number, and the log-probability of an outcome is picked by comparison, which a compiler
    vectorises, forward and backward, where a gather is scalar and its backward a scatter.

    Arguments and results are those of the parent class; ``logits`` are float32 ``[..., n]``, a sample is int64
    ``[...]``.
    """

    def __init__(
        self,
        probs: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._each: list[torch.Tensor] | None = None  # log-probabilities [...], by outcome
        if probs is not None or logits is None or logits.dim() < 1 or not logits.is_floating_point():
            super().__init__(probs, logits, validate_args)  # pyright: ignore[reportArgumentType]
            return
        self._num_events = logits.shape[-1]
        if torch.compiler.is_compiling() and self._num_events <= FEW:
            self._each = _log_softmax_of_few(logits.unbind(-1))
            log_probs = torch.stack(self._each, dim=-1)
        else:
            log_probs = torch.log_softmax(logits, dim=-1)
        self.__dict__["logits"] = log_probs  # the parent computes it again only where it is not there
        self._param: Any = log_probs
        distributions.Distribution.__init__(self, logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Categorical:
        """A distribution of another batch shape, each entry a view."""
        new: Any = super().expand(batch_shape, self._get_checked_instance(Categorical, _instance))
        new._each = None if self._each is None else [each.expand(batch_shape) for each in self._each]
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008 (the parent's signature)
        """Draw int64 ``[*sample_shape, ...]``, without gradient."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            noise = torch.rand(shape, dtype=self._param.dtype, device=self._param.device)
            # The sum of all rounds to just below 1 at times; unscaled, noise beyond it would choose the last outcome
            # even if that is impossible.
            if self._each is None:
                cumulative = self.probs.cumsum(-1)
                return (noise.unsqueeze(-1) * cumulative[..., -1:] >= cumulative[..., :-1]).sum(-1)
            *sums, total = itertools.accumulate(each.exp() for each in self._each)
            passed = [(noise * total >= each).long() for each in sums]
            return sum(passed, start=torch.zeros(shape, dtype=torch.int64, device=noise.device))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """The log-probability, float32 ``[...]``, of outcomes ``[...]``; -inf of a value that is no outcome.

        Raises:
            ValueError: If arguments are validated and a value is no outcome.
        """
        if self._validate_args:
            self._validate_sample(value)
        if self._each is not None:
            log_prob = torch.full_like(self._each[0], -torch.inf)
            for outcome, each in enumerate(self._each):
                log_prob = torch.where(value == outcome, each, log_prob)
            return log_prob
        outcomes = torch.arange(self._num_events, device=value.device)
        chosen = outcomes == value.unsqueeze(-1)
        log_prob = torch.where(chosen, self.logits, 0.0).sum(-1)
        return torch.where(chosen.any(-1), log_prob, -torch.inf)

    def entropy(self) -> torch.Tensor:
        """The entropy in nats, float32 ``[...]``."""
        if self._each is not None:
            return -functools.reduce(torch.add, [each.exp() * _without_infinities(each) for each in self._each])
        return -(self.probs * _without_infinities(self.logits)).sum(-1)

    @property
    def deterministic_sample(self) -> torch.Tensor:
        """The likeliest outcome, int64 ``[...]``: what TorchRL asks for where exploration is off."""
        return self.mode


def _log_softmax_of_few(logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    largest = functools.reduce(torch.maximum, logits).detach()
    below = [each - largest for each in logits]
    normalizer = functools.reduce(torch.add, [each.exp() for each in below]).log()
    return [each - normalizer for each in below]


def _without_infinities(log_probs: torch.Tensor) -> torch.Tensor:
    # 0 · log 0 is 0. The parent class replaces -inf by the most negative number, whose gradient overflows.
    return log_probs.masked_fill(log_probs == -torch.inf, 0.0)
