"""Dynamics and auto-reset of a native environment alone: blocks of steps as one program, nothing stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict.nn import CudaGraphModule

from fp8rl_torchrl.data.pure import Starts, Table, unrolled


def at_the_edge(function: Callable[..., Any], compiled: bool, device: torch.device) -> Callable[..., Any]:
    """A function of tensors as it runs in training: compiled, and on a GPU captured; or as it is."""
    if not compiled:
        return function
    # Each shape gets its own code, as in the collector, and not code for any shape once a second one was seen.
    program = torch.compile(function, fullgraph=True, dynamic=False)
    return CudaGraphModule(program) if device.type == "cuda" else program


class Dynamics:
    """Environments that are stepped with actions drawn beforehand; a call does one block of steps.

    Args:
        env: A native environment of ``N``, with discrete actions.
        block: Steps that are one program.
        compiled: Whether that is compiled (and captured, on a GPU).
        blocks: Blocks in one call.
        fixed: Whether all calls take the same actions; else each block draws its own, in one piece, within the call.

    Attributes:
        state: The state after the last step, each field ``[N]``; all that is carried on.
    """

    def __init__(self, env: Any, block: int, compiled: bool = True, *, blocks: int = 1, fixed: bool = False) -> None:
        self.state = tuple(env.read(env.reset()))
        self._size, self._actions = (block, *env.batch_size), env.action_spec.n
        self._blocks, self._fixed, kind = blocks, fixed, env.state_type

        def run(state: tuple[torch.Tensor, ...], actions: torch.Tensor, table: Table) -> tuple[torch.Tensor, ...]:
            given, first = iter(actions.unbind(0)), kind(*state)
            # The observations are seen by nobody, and a compiler leaves them out.
            return tuple(unrolled(env, first, env.observe(first), lambda *_: next(given), block, table)[0])

        device: Any = env.device
        self._device, self._drawn = device, self._draw_on(device)
        self._kind, self._run = kind, at_the_edge(run, compiled, device)
        self._starts = Starts(env, lambda compute: at_the_edge(compute, compiled, device))

    def _draw_on(self, device: torch.device) -> torch.Tensor:
        return torch.randint(0, self._actions, self._size, device=device)

    @torch.no_grad()
    def __call__(self) -> None:
        """Do the steps of one call."""
        for _ in range(self._blocks):
            actions = self._drawn if self._fixed else self._draw_on(self._device)
            table = self._starts.ahead(self._kind(*self.state), self._size[0])
            self.state = self._run(self.state, actions, table)
