"""Random streams: keep the caller's untouched, perturb the global ones, find those that an environment owns."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type, set_exploration_type

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def global_state() -> tuple[Any, ...]:
    """The state of torch's (CPU and, once initialised, CUDA), numpy's and Python's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()  # noqa: NPY002


def set_global_state(state: tuple[Any, ...]) -> None:
    """Put the global generators back to a state that `global_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])  # noqa: NPY002
    random.setstate(state[3])


def seed_globals(seed: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def isolated() -> Iterator[None]:
    """Restore global random streams, gradient mode, default dtype and exploration type on the way out."""
    state, dtype = global_state(), torch.get_default_dtype()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()), set_exploration_type(exploration_type()):
            yield
    finally:
        set_global_state(state)
        torch.set_default_dtype(dtype)


class PrivateStream:
    """A random stream for code that can only draw from the global generators, such as a spec's ``rand``.

    Args:
        seed: Seed of the stream.
    """

    def __init__(self, seed: int) -> None:
        outside = global_state()
        seed_globals(seed)
        self._state = global_state()
        set_global_state(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Swap the stream in for the global generators, and out again."""
        outside = global_state()
        set_global_state(self._state)
        try:
            yield
        finally:
            self._state = global_state()
            set_global_state(outside)


def own_generators(env: EnvBase, *, limit: int = 5000) -> list[Generator]:
    """The generator objects found by walking an environment's attributes (at most ``limit`` objects are looked at)."""
    found: list[Generator] = []
    queue: deque[Any] = deque([env])
    seen: set[int] = set()
    while queue and len(seen) < limit:
        item = queue.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.append(item)
        elif isinstance(item, dict):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            queue.extend(item)
        elif isinstance(item, FunctionType):
            queue.extend(cell.cell_contents for cell in item.__closure__ or () if cell != CellType())
        elif hasattr(item, "__dict__") and not isinstance(item, (type, ModuleType, torch.Tensor)):
            queue.extend(vars(item).values())
    return found


def generator_states(env: EnvBase) -> Callable[[], None]:
    """Remember the state of the global generators and the environment's own; the result puts them all back."""
    outside = global_state()
    saved = [(generator, _get(generator)) for generator in own_generators(env)]

    def restore() -> None:
        set_global_state(outside)
        for generator, state in saved:
            _set(generator, state)

    return restore


def fingerprint(env: EnvBase) -> list[str]:
    """A value that changes when the environment, or anybody, draws a random number."""
    states = [*global_state()[::2], random.getstate(), *(_get(generator) for generator in own_generators(env))]
    return [repr(state.tolist()) if isinstance(state, torch.Tensor) else repr(state) for state in states]


def _get(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate()


def _set(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
