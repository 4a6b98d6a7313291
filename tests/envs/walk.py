"""A tiny environment that keeps every promise, in the ways in which correct environments differ."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

LIMIT = 12
SPEED = 0.3


class Walk(EnvBase):
    """Walk left or right on a line; leaving [-1, 1] terminates, 12 steps truncate. Correct.

    Positions and step counts are kept on the instance; starts come from a generator that the seed sets.
    """

    def __init__(self, rows: int | None = 3) -> None:
        super().__init__(device="cpu", batch_size=() if rows is None else (rows,))
        batch = self.batch_size
        self.observation_spec = Composite(
            position=Bounded(-1.5, 1.5, (*batch, 1), dtype=torch.float32),
            step_count=Bounded(0, LIMIT, (*batch, 1), dtype=torch.int64),
            shape=batch,
        )
        self.action_spec = Categorical(2, shape=batch, dtype=torch.int64)
        self.reward_spec = Unbounded((*batch, 1), dtype=torch.float32)
        flag = Categorical(2, shape=(*batch, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=batch)
        self.generator = torch.Generator()
        self.position = torch.zeros(*batch, 1)
        self.count = torch.zeros(*batch, 1, dtype=torch.int64)
        self.set_seed(0)

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)

    def draw_start(self) -> torch.Tensor:
        return torch.rand(self.position.shape, generator=self.generator) * 0.4 - 0.2

    def move(self, action: torch.Tensor) -> torch.Tensor:
        return SPEED * (2.0 * action.unsqueeze(-1) - 1.0)

    def observe(self) -> dict[str, torch.Tensor]:
        return {"position": self.position.clone(), "step_count": self.count.clone()}

    def output(self, **entries: torch.Tensor) -> TensorDict:
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def restart(self, mask: torch.Tensor) -> None:
        self.position = torch.where(mask, self.draw_start(), self.position)
        self.count = torch.where(mask, 0, self.count)

    def mask(self, tensordict: TensorDictBase | None) -> torch.Tensor:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        return torch.ones_like(self.count, dtype=torch.bool) if mask is None else mask.reshape(self.count.shape)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        self.restart(self.mask(tensordict))
        no = torch.zeros_like(self.count, dtype=torch.bool)
        return self.output(**self.observe(), done=no, terminated=no.clone(), truncated=no.clone())

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.position.abs() > 1, self.count >= LIMIT

    def reward(self) -> torch.Tensor:
        return 1 - self.position.abs()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.position = self.position + self.move(tensordict["action"])
        self.count = self.count + 1
        terminated, truncated = self.ends()
        return self.output(
            **self.observe(),
            reward=self.reward(),
            done=terminated | truncated,
            terminated=terminated,
            truncated=truncated,
        )


class NoisyWalk(Walk):
    """Correct: every step adds noise from the seeded generator, shared by all rows."""

    def move(self, action: torch.Tensor) -> torch.Tensor:
        return super().move(action) + 0.05 * (torch.rand(self.position.shape, generator=self.generator) - 0.5)


class GlobalWalk(Walk):
    """Correct: draws from torch's global generator, which its set_seed seeds."""

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)

    def draw_start(self) -> torch.Tensor:
        return torch.rand(self.position.shape) * 0.4 - 0.2


class FixedWalk(Walk):
    """Correct: deterministic, so that seeds make no difference."""

    def draw_start(self) -> torch.Tensor:
        return torch.zeros_like(self.position)


class CountingWalk(Walk):
    """Correct: starts are hashed from the seed and the number of the episode."""

    episode = 0
    start_seed = 0

    def _set_seed(self, seed: int | None) -> None:
        self.start_seed, self.episode = seed or 0, 0

    def draw_start(self) -> torch.Tensor:
        self.episode += 1
        generator = torch.Generator().manual_seed(1000 * self.start_seed + self.episode)
        return torch.rand(self.position.shape, generator=generator) * 0.4 - 0.2


class MaskedWalk(Walk):
    """Correct: takes only the actions that its mask allows; wrap it in TorchRL's `ActionMask`."""

    def __init__(self) -> None:
        super().__init__(None)
        mask = Binary(2, dtype=torch.bool)
        self.observation_spec = Composite(**dict(self.observation_spec.items()), action_mask=mask)

    def observe(self) -> dict[str, torch.Tensor]:
        mask = torch.cat([self.position > -0.5, self.position < 0.5])
        return {**super().observe(), "action_mask": mask}

    def move(self, action: torch.Tensor) -> torch.Tensor:
        if not self.observe()["action_mask"][action]:
            raise ValueError("not allowed")
        return super().move(action)


class CarriedWalk(Walk):
    """Correct: keeps nothing but the mask's leftovers on the instance; all state travels in the TensorDict."""

    stateless = True

    def __init__(self, rows: int | None = 3) -> None:
        super().__init__(rows)
        self.state_spec = self.observation_spec.clone()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.position, self.count = tensordict["position"], tensordict["step_count"]
        return super()._step(tensordict)
