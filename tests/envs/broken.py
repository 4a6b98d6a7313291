"""Copies of a tiny correct environment that are each broken in one way."""

from __future__ import annotations

import random

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded
from walk import LIMIT, CarriedWalk, CountingWalk, FixedWalk, NoisyWalk, Walk


class WrongSpecBounds(Walk):
    def __init__(self, rows: int | None = 3) -> None:
        super().__init__(rows)
        self._output_spec.unlock_(recurse=True)
        box = Bounded(1.5, -1.5, (*self.batch_size, 1), dtype=torch.float32)
        self._output_spec["full_reward_spec"]["reward"] = box


class CrashesDeep(Walk):
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        if bool((self.count == LIMIT - 1).any()):
            raise ZeroDivisionError("float division by zero")
        return super()._step(tensordict)


class LateKey(Walk):
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        out = super()._step(tensordict)
        if bool((self.count > 5).any()):
            out["info"] = torch.zeros(*self.batch_size, 1)
        return out


class MissingKey(Walk):
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        return super()._reset(tensordict).exclude("step_count")


class MissingReward(Walk):
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return super()._step(tensordict).exclude("reward")


class WrongShape(Walk):
    def observe(self) -> dict[str, torch.Tensor]:
        return {"position": self.position.squeeze(-1).clone(), "step_count": self.count.clone()}


class LateDtype(Walk):
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        out = super()._reset(tensordict)
        return out.set("position", out["position"].double())


class WrongDevice(Walk):
    def output(self, **entries: torch.Tensor) -> TensorDict:
        entries["position"] = entries["position"].to("meta")
        return TensorDict(entries, batch_size=self.batch_size)


class OutOfBounds(Walk):
    def observe(self) -> dict[str, torch.Tensor]:
        far = torch.where(self.count == LIMIT - 2, 40.0, 1.0)
        return {"position": self.position * far, "step_count": self.count.clone()}


class BelowCount(Walk):
    def observe(self) -> dict[str, torch.Tensor]:
        return {"position": self.position.clone(), "step_count": self.count - 1}


class NanReward(Walk):
    def reward(self) -> torch.Tensor:
        return torch.where(self.position.abs() > 1, torch.nan, super().reward())


class InfiniteReward(Walk):
    def reward(self) -> torch.Tensor:
        return torch.where(self.count == LIMIT, torch.inf, super().reward())


class CarriesGraph(Walk):
    def reward(self) -> torch.Tensor:
        return super().reward() * torch.ones(1, requires_grad=True)


class TerminatedNotDone(Walk):
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        out = super()._step(tensordict)
        return out.set("done", out["truncated"].clone())


class DoneWithoutCause(Walk):
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        out = super()._step(tensordict)
        return out.set("truncated", torch.zeros_like(out["truncated"]))


class StillDone(Walk):
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        ended = self.count >= LIMIT
        out = super()._reset(tensordict)
        return out.set("done", ended).set("truncated", ended.clone())


class KeepsCount(Walk):
    def restart(self, mask: torch.Tensor) -> None:
        self.position = torch.where(mask, self.draw_start(), self.position)
        self.count = torch.where(mask & (self.count >= LIMIT), LIMIT - 1, torch.where(mask, 0, self.count))


class KeepsHiddenCount(Walk):
    """A second counter, which no reset sets back, truncates too: only the done flags give it away."""

    def __init__(self, rows: int | None = 3) -> None:
        super().__init__(rows)
        self.total = torch.zeros_like(self.count)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.total = self.total + 1
        return self.position.abs() > 1, (self.count >= LIMIT) | (self.total % 7 == 0)


class KeepsPosition(Walk):
    """Shows a fresh start, then goes on from where the old episode ended."""

    def restart(self, mask: torch.Tensor) -> None:
        self.shown = self.draw_start()
        self.count = torch.where(mask, 0, self.count)
        self.position = torch.where(mask, self.position.clamp(-0.9, 0.9), self.position)

    def observe(self) -> dict[str, torch.Tensor]:
        shown = torch.where(self.count == 0, self.shown, self.position)
        return {"position": shown, "step_count": self.count.clone()}


class KeepsVelocity(Walk):
    """Momentum, which is no part of the observation, is carried over into the next episode."""

    velocity = 0.0

    def move(self, action: torch.Tensor) -> torch.Tensor:
        self.velocity = 0.8 * self.velocity + 0.2 * super().move(action)
        return self.velocity


class IgnoresSeed(Walk):
    def _set_seed(self, seed: int | None) -> None:
        pass


class CountsEpisodes(CountingWalk):
    """set_seed does not set the episode number back."""

    def _set_seed(self, seed: int | None) -> None:
        self.start_seed = seed or 0


class ConstantSeed(Walk):
    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(7)


class ConstantNoiseSeed(FixedWalk, NoisyWalk):
    """The only randomness is in the steps, and every seed gives the same."""

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(7)


class UnseededNoise(Walk):
    def move(self, action: torch.Tensor) -> torch.Tensor:
        return super().move(action) + 0.01 * random.random()


class OwnUnseededNoise(Walk):
    """Step noise from a generator of its own that set_seed forgets."""

    def __init__(self, rows: int | None = 3) -> None:
        super().__init__(rows)
        self.forgotten = torch.Generator().manual_seed(3)

    def move(self, action: torch.Tensor) -> torch.Tensor:
        return super().move(action) + 0.01 * torch.rand(self.position.shape, generator=self.forgotten)


class AliasedObservation(Walk):
    def restart(self, mask: torch.Tensor) -> None:
        self.buffer = getattr(self, "buffer", torch.zeros_like(self.position))
        super().restart(mask)

    def observe(self) -> dict[str, torch.Tensor]:
        self.buffer.copy_(self.position)
        return {"position": self.buffer, "step_count": self.count.clone()}


class AliasedReward(Walk):
    def reward(self) -> torch.Tensor:
        self.buffer = getattr(self, "buffer", torch.zeros_like(self.position))
        return self.buffer.copy_(super().reward())


class InPlace(Walk):
    """Returns its own state, and steps by writing into it."""

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        before = self.position
        out = super()._step(tensordict)
        self.position = before.copy_(self.position)
        return out.set("position", self.position)

    def observe(self) -> dict[str, torch.Tensor]:
        return {"position": self.position, "step_count": self.count.clone()}


class WritesInput(Walk):
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        tensordict["seen"] = torch.ones(*self.batch_size, 1)
        return super()._step(tensordict)


class WritesAction(Walk):
    def move(self, action: torch.Tensor) -> torch.Tensor:
        return super().move(action.zero_())


class RejectsAction(Walk):
    def move(self, action: torch.Tensor) -> torch.Tensor:
        if bool((action == 1).all()):
            raise ValueError("unknown action")
        return super().move(action)


class NeedsMoreThanMask(Walk):
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        if tensordict is not None:
            self.position = tensordict["position"]
        return super()._reset(tensordict)


class ResetsAll(Walk):
    """A partial reset restarts every row behind the scenes."""

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        return super()._reset(None)


class ResetsNone(Walk):
    """A reset by mask changes nothing."""

    def mask(self, tensordict: TensorDictBase | None) -> torch.Tensor:
        mask = super().mask(tensordict)
        return mask if bool(mask.all()) else torch.zeros_like(mask)


class ResetsForShow(Walk):
    """A partial reset returns a start, and the next step goes on with the old episode."""

    def restart(self, mask: torch.Tensor) -> None:
        self.shown = self.draw_start()
        self.position = self.shown if bool(mask.all()) else self.position
        self.count = torch.where(mask, 0, self.count)

    def observe(self) -> dict[str, torch.Tensor]:
        return {"position": torch.where(self.count == 0, self.shown, self.position), "step_count": self.count.clone()}


class HiddenState(CarriedWalk):
    """Declares stateless = True, but counts steps on the instance."""

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        kept = self.position
        out = super()._step(tensordict)
        self.position = 0.5 * out["position"] + 0.5 * kept
        return out.set("position", self.position.clone())


class SharedState(Walk):
    """The position lives on the class."""

    where = torch.zeros(1)

    @property
    def position(self) -> torch.Tensor:
        return SharedState.where

    @position.setter
    def position(self, value: torch.Tensor) -> None:
        SharedState.where = value


class BrokenInThreeWays(LateDtype, CrashesDeep, NanReward):
    """One failure must not hide another."""
