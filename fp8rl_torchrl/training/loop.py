"""`Pipeline`: collect, store, update, report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector
from torchrl.data import TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.objectives import LossModule

from fp8rl_torchrl.precision.convert import ConversionReport
from fp8rl_torchrl.training.rollout_gap import rollout_gap
from fp8rl_torchrl.training.step import OptimStep

RECENT_EPISODES = 100
SAMPLED_TOGETHER = 32
"""Batches that a replay buffer gathers at once, where it can."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, and how collecting and updating alternate.

    Raises:
        ValueError: If a number is out of range.
    """

    episodes: int = 2000
    """Train until this many episodes have ended. Not used if total_frames is given."""
    total_frames: int | None = None
    """Train for this many environment steps instead, rounded up to whole collections."""
    updates_per_collection: int = 24
    """Optimizer steps after each collection."""
    min_replay: int = 1000
    """Learning starts when this many transitions are stored."""

    def __post_init__(self) -> None:
        """Refuse budgets that cannot be met."""
        for name in ("episodes", "updates_per_collection", "min_replay"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.total_frames is not None and self.total_frames < 1:
            raise ValueError(f"total_frames must be >= 1; got {self.total_frames}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one collection and the updates after it did; numbers on the host."""

    frames: int
    """Environment steps since the start of training."""
    episodes: int
    """Episodes that have ended since the start."""
    updates: int
    """Optimizer steps applied since the start; skipped ones do not count."""
    seconds: float
    """Time spent training since the start, in s."""
    episode_returns: tuple[float, ...]
    """Returns of the episodes that ended in this collection."""
    episode_return: float
    """Mean return of the last 100 episodes; NaN before the first ends."""
    episode_length: float
    """Mean length of the last 100 episodes, in steps; NaN before the first ends."""
    metrics: Mapping[str, float]
    """Means over the applied updates of what the loss and the step returned (over all of them of ``skipped`` and
    ``loss_scale``), and how far the learner's policy was from the one that collected (see
    `fp8rl_torchrl.training.rollout_gap`); empty before learning starts."""
    skipped_steps: int
    """Optimizer steps skipped for a non-finite loss or gradient since the start."""


class Agent(Protocol):
    """The networks of a pipeline, usually an `nn.Module`."""

    @property
    def policy(self) -> Callable[[TensorDictBase], TensorDictBase]:
        """Writes ``action`` into a TensorDict."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """The parameters by name."""
        ...


class Observer(Protocol):
    """Looks on while a pipeline trains, such as `fp8rl_torchrl.numerics.Recorder`."""

    def collected(self, rollout: TensorDictBase) -> None:
        """Called with each collection ``[N, T]``, before it is learned from."""
        ...

    def update(self, step: OptimStep, batch: TensorDictBase) -> TensorDict:
        """Called in place of ``step(batch)``, whose result it returns."""
        ...


def _refuse_strangers(agent: Agent, loss: LossModule, step: OptimStep) -> None:
    if step.loss is not loss:
        raise ValueError("the step updates another loss than the pipeline's: make it OptimStep(loss, ...) of this loss")
    if isinstance(agent, nn.Module):
        groups = [group for optimizer in step.optimizers.values() for group in optimizer.param_groups]
        stepped = [parameter for group in groups for parameter in group["params"]]
        # By memory: the agent's parameters may be views of a flat one.
        own, trained = ({p.untyped_storage().data_ptr() for p in each} for each in (agent.parameters(), stepped))
        if own and own.isdisjoint(trained):
            raise ValueError(
                "no optimizer steps a parameter of the agent, so training would not change its policy: build the loss "
                "on this agent's modules, after the agent was moved to its device, and the optimizer on the loss's"
            )


class Pipeline:
    """The parts of a training run; iterating it trains and yields one `Report` per collection.

    Args:
        env: The environment that the collector steps.
        agent: The networks, shared by the collector's policy and the loss.
        collector: Yields TensorDicts ``[N, T]`` of experience without end; iterating it advances ``env``.
        replay: Stores what the loss reads (its ``in_keys``) and draws the batches; None hands each collection to the
            step as it is, once.
        loss: Computes the losses of a batch.
        step: Performs one update.
        config: Budget and pace: a `LoopConfig`, or a recipe's config.
        conversion: What `fp8rl_torchrl.convert` did to the agent, for the record.
        prepare: Completes each collection before it is stored, with advantages for instance.
        after_collection: Called with each collection and its report, when its updates are done: for what follows the
            run's progress (exploration, target networks by episodes, running statistics). What it changes must be part
            of the agent or the loss, which checkpoints hold.
        enough: Asked after each update, with what the step returned, whether this collection's updates end early.
        keys: The entries of a collection that are learned from; by default the loss's ``in_keys``.

    Raises:
        ValueError: If the step updates another loss, or other networks than the agent's: training would then leave the
            policy as it is.

    Attributes:
        frames: Environment steps so far.
        episodes: Episodes ended so far.
        seconds: Time spent training so far, in s.
        observer: Looks on, if there is one; it is not saved.
    """

    def __init__(
        self,
        env: EnvBase,
        agent: Agent,
        collector: BaseCollector,
        replay: TensorDictReplayBuffer | None,
        loss: LossModule,
        step: OptimStep,
        config: LoopConfig,
        conversion: ConversionReport | None = None,
        prepare: Callable[[TensorDictBase], TensorDictBase] | None = None,
        after_collection: Callable[[TensorDictBase, Report], None] | None = None,
        enough: Callable[[TensorDict], bool] | None = None,
        keys: Sequence[Any] | None = None,
    ) -> None:
        _refuse_strangers(agent, loss, step)
        self.env, self.agent, self.collector, self.replay = env, agent, collector, replay
        self.loss, self.step, self.config = loss, step, config
        self.conversion, self.prepare, self.keys = conversion, prepare, keys
        self.after_collection, self.enough = after_collection, enough
        self.frames = 0
        self.episodes = 0
        self.seconds = 0.0
        self.observer: Observer | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_EPISODES)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        if self.config.total_frames is not None:
            return self.frames >= self.config.total_frames
        return self.episodes >= self.config.episodes

    @property
    def recent_returns(self) -> tuple[float, ...]:
        """The returns of the last episodes, at most 100, oldest first."""
        return tuple(episode_return for episode_return, _ in self._recent)

    def __iter__(self) -> Iterator[Report]:
        """Train until the budget is spent; leaving early and iterating again goes on where it stopped."""
        experience = iter(self.collector)
        while not self.finished:
            started = time.perf_counter()
            rollout = next(experience)
            if self.observer is not None:
                self.observer.collected(rollout)
            gap = self._rollout_gap(rollout)
            updates = list(self._update(rollout))
            self.frames += rollout.numel()
            returns = self._note_episodes(rollout)
            metrics = _mean_over_applied(updates) | gap if updates else {}
            report = self._report(returns, metrics)
            if self.after_collection is not None:
                self.after_collection(rollout, report)
            self.seconds += time.perf_counter() - started
            yield dataclasses.replace(report, seconds=self.seconds)

    def _rollout_gap(self, rollout: TensorDictBase) -> dict[str, float]:
        # A loss that sees whole collections, once, measures it on its way.
        if "rollout_kl" in getattr(self.loss, "out_keys", ()):
            return {}
        return rollout_gap(getattr(self.agent, "policy", None), rollout, self.step.precision)

    def _update(self, rollout: TensorDictBase) -> Iterator[TensorDict]:
        """Perform the updates after a collection, and yield what each returned."""
        for batch in self._batches(rollout):
            losses = self.step(batch) if self.observer is None else self.observer.update(self.step, batch)
            if isinstance(self.replay, TensorDictPrioritizedReplayBuffer) and not self._skipped(losses):
                self.replay.update_tensordict_priority(batch)  # this buffer waits for the device anyway
            yield losses
            if self.enough is not None and self.enough(losses):
                if self.replay is not None and isinstance(self.replay.sampler, SamplerWithoutReplacement):
                    self.replay.empty()  # what is left of this pass must not be drawn in the next
                return

    @staticmethod
    def _skipped(losses: TensorDict) -> bool:
        return any(losses[key].item() for key in losses.keys() if str(key).startswith("skipped"))

    def _batches(self, rollout: TensorDictBase) -> Iterator[TensorDictBase]:
        """What the updates after a collection learn from."""
        if self.prepare is not None:
            rollout = self.prepare(rollout)
        rollout = rollout.select(*(self.keys or self.loss.in_keys))
        if self.replay is None:
            yield rollout
            return
        self.replay.extend(rollout.reshape(-1))
        if len(self.replay) < self.config.min_replay:
            return
        remaining = self.config.updates_per_collection
        while remaining:
            count = min(remaining, SAMPLED_TOGETHER)
            sample_many: Any = getattr(self.replay, "sample_many", None)
            yield from [self.replay.sample() for _ in range(count)] if sample_many is None else sample_many(count)
            remaining -= count

    def _note_episodes(self, rollout: TensorDictBase) -> tuple[float, ...]:
        following = rollout.get("next")
        ended = following.get("done").nonzero(as_tuple=True)
        returns = following.get("episode_reward")[ended].tolist()
        lengths = following.get("step_count")[ended].tolist()
        self.episodes += len(returns)
        self._recent.extend(zip(returns, lengths, strict=True))
        return tuple(returns)

    def _report(self, returns: tuple[float, ...], metrics: dict[str, float]) -> Report:
        count = len(self._recent)
        return Report(
            frames=self.frames,
            episodes=self.episodes,
            updates=int(self.step.updates),
            seconds=self.seconds,
            episode_returns=returns,
            episode_return=sum(r for r, _ in self._recent) / count if count else float("nan"),
            episode_length=sum(n for _, n in self._recent) / count if count else float("nan"),
            metrics=metrics,
            skipped_steps=int(self.step.skipped_steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """The loop's own counters; the parts save themselves (see `training.checkpoint`)."""
        return {
            "frames": self.frames,
            "episodes": self.episodes,
            "seconds": self.seconds,
            "recent": torch.tensor(list(self._recent), dtype=torch.float64).reshape(-1, 2),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.frames, self.episodes = state_dict["frames"], state_dict["episodes"]
        self.seconds = state_dict["seconds"]
        self._recent = deque(map(tuple, state_dict["recent"].tolist()), maxlen=RECENT_EPISODES)


def _mean_over_applied(updates: list[TensorDict]) -> dict[str, float]:
    """Average each metric over the updates that were applied (see `Report.metrics`), reading the device once."""
    names = sorted(str(key) for key in updates[-1].keys())
    values = [update.get(name).float() for update in updates for name in names]
    table = torch.stack([value.mean() if value.ndim else value for value in values])
    rows = [dict(zip(names, row, strict=True)) for row in table.reshape(-1, len(names)).tolist()]
    skipped = [name for name in names if name.startswith("skipped")]
    applied = [row for row in rows if not any(row[name] for name in skipped)]
    # Where every update was skipped, the loss scale says why.
    scaling = [*skipped, *(name for name in names if name.startswith("loss_scale"))]
    means = {name: _mean([row[name] for row in applied]) for name in names}
    return means | {name: _mean([row[name] for row in rows]) for name in scaling}


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
