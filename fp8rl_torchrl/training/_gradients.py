"""Losses of a batch and their gradients, in one precision, eager or as one compiled graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from fp8rl_torchrl._inductor import compiled
from fp8rl_torchrl.precision.mode import Precision
from fp8rl_torchrl.training._refusals import reaches
from fp8rl_torchrl.training.flat import FlatParameter

Found = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, tuple[torch.Tensor | None, ...]]]
"""What the loss returned, detached; whether each loss is finite; and the gradients of each loss's leaves."""


class Gradients:
    """Computes the gradients of each loss with respect to the leaves that its optimizer trains.

    Loss and gradients are compiled together: a backward graph apart from the forward one would keep what a fused
    kernel can compute again, which took twice as long on a CPU.

    Args:
        precision: The precision of the forward.
        device: Where the leaves are.
        leaves: The leaves of each loss, by loss key.
        single: Whether there is one optimizer, for the sum of the losses.
        accumulate: Each loss is divided by this.
        compile: Whether to compile, from the second call on; the first one checks what the loss returns.
    """

    def __init__(
        self,
        precision: Precision,
        device: torch.device,
        leaves: Mapping[str, list[torch.Tensor]],
        single: bool,
        accumulate: int,
        compile: bool,
    ) -> None:
        self.precision, self.device, self.leaves = precision, device, dict(leaves)
        self.single, self.accumulate, self.compile = single, accumulate, compile
        self.checked = False
        # Otherwise a compiler drops the roundings between the operations that it fuses.
        rounds = precision.autocast_dtype is not None
        self._compiled = compiled(self._differentiate, emulate_precision_casts=rounds)

    def __call__(
        self,
        compute_loss: Callable[[TensorDictBase], TensorDictBase],
        batch: TensorDictBase,
        scales: Mapping[str, torch.Tensor],
    ) -> Found:
        """Compute the losses of a batch and, of each loss that has a scale, its gradients times that.

        Raises:
            ValueError: If the losses and the optimizers do not fit together.
        """
        if self.compile and self.checked:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return self._compiled(compute_loss, batch, scales)
        found = self._differentiate(compute_loss, batch, scales)
        self.checked = True
        return found

    def _differentiate(
        self,
        compute_loss: Callable[[TensorDictBase], TensorDictBase],
        batch: TensorDictBase,
        scales: Mapping[str, torch.Tensor],
    ) -> Found:
        # A loss may write into its batch. Of what it writes, no compiled graph can hand out the history.
        seen = batch.copy() if torch.compiler.is_compiling() else batch
        with self.precision.autocast(self.device):
            outputs = dict(compute_loss(seen).items())
        losses = self._select(outputs)
        if not self.checked:
            self._check(losses)
        gradients: dict[str, tuple[torch.Tensor | None, ...]] = {}
        due = {key: loss for key, loss in losses.items() if key in scales}
        for place, (key, loss) in enumerate(due.items()):
            trainable = trainable_of(self.leaves[key])
            scaled = loss / self.accumulate * scales[key]
            more = place + 1 < len(due)
            gradients[key] = torch.autograd.grad(scaled, trainable, retain_graph=more, allow_unused=True)
        if seen is not batch:
            for key in seen.keys(True, True):
                if (entry := seen.get(key)) is not batch.get(key, None):
                    batch.set(key, entry.detach())
        finite = {key: torch.isfinite(loss.detach()) for key, loss in losses.items()}
        return {key: value.detach() for key, value in outputs.items()}, finite, gradients

    def _select(self, outputs: Mapping[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {key: value for key, value in outputs.items() if isinstance(key, str) and key.startswith("loss")}
        if not found:
            raise ValueError(f"the loss returned no entry that starts with 'loss', only {sorted(outputs)}")
        if self.single:
            return {"loss": sum(found.values())}  # pyright: ignore[reportReturnType]
        if set(found) != set(self.leaves):
            raise ValueError(
                f"the loss returned {sorted(found)}, but the optimizers are keyed by {sorted(self.leaves)}: "
                "give each loss its optimizer, or one optimizer for their sum"
            )
        return found

    def _check(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Refuse losses that reach no parameter or another optimizer's parameters."""
        for key, loss in losses.items():
            if loss.dtype != torch.float32:
                warnings.warn(
                    f"{key!r} was computed in {loss.dtype}: end the networks in float32 (models.Float32Head) so that "
                    "log-probabilities, targets and losses keep their precision",
                    stacklevel=6,
                )
            for owner, leaves in self.leaves.items():
                reached = reaches(loss, trainable_of(leaves))
                if owner == key and not reached:
                    raise ValueError(f"{key!r} does not depend on any parameter of its optimizer")
                if owner != key and reached:
                    raise ValueError(
                        f"{key!r} reaches parameters that belong to the optimizer of {owner!r}. Their loss scales can "
                        "differ, so the gradients must not mix: detach what one loss uses of the other's network, or "
                        "use a single optimizer for the sum of the losses"
                    )


def trainable_of(leaves: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """An optimizer may hold frozen parameters, which can thaw at any time."""
    return [leaf for leaf in leaves if leaf.requires_grad]


def add_gradients(parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """Add the gradients of the parameters' leaves to what the parameters hold.

    Args:
        parameters: What an optimizer steps.
        gradients: Those of the leaves that are trained, in order.
    """
    rest = iter(gradients)
    for parameter in parameters:
        if isinstance(parameter, FlatParameter):
            gradient = parameter.gather([next(rest) for _ in parameter.views])
        else:
            gradient = next(rest) if parameter.requires_grad else None
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
