"""One cell of the comparison of precisions: a recipe trained on a task in one mode, with one seed, in its own process.

Run as a program, this trains the cell that its argument describes and prints a line of JSON.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from judged_run import tell
from negative_controls import spoil
from peers import take_turn
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fp8rl_torchrl import Float8Linear, Pipeline, envs, evaluate
from fp8rl_torchrl.numerics import Recorder, Sample
from fp8rl_torchrl.precision import RECIPES
from fp8rl_torchrl.recipes import RecipeConfig, build, config_class
from fp8rl_torchrl.training.memory import keep_freed_memory

POINTS = 200
"""Of the loss scale's trajectory that are kept, at most."""
SAMPLES = 20
"""Of the recorder's that are kept, at most."""
ROLES = ("activation", "weight", "output", "gradient")
MEASURES = ("amax", "underflow", "saturation", "snr_db")
PARTS = ("env", "policy", "replay", "update", "other")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is looked at while a cell trains."""

    evaluations: int = 20
    """Of the policy during training, evenly spaced; the last one is at the end."""
    episodes: int = 20
    """Of each of them, deterministic, always from the same start states."""
    final_episodes: int = 100
    """Of the one at the end."""
    record_every: int = 25
    """One update in so many is looked at by the recorder."""
    seed: int = 1_000_003
    """Of the episodes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        for name in ("evaluations", "episodes", "final_episodes", "record_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")


class Timer:
    """An observer that tells collecting, replay and updates apart, and lets another one look on.

    Attributes:
        seconds: ``collect``, ``replay`` (with advantages), ``update``, and ``look``: what the other observer took.
    """

    def __init__(self, inner: Recorder, device: str) -> None:
        self.inner, self.device = inner, device
        self.seconds: dict[str, float] = {"collect": 0.0, "replay": 0.0, "update": 0.0, "look": 0.0}
        self.updates = self.looked = 0
        self.rollout: TensorDictBase | None = None
        self.batch: TensorDictBase | None = None
        self._last = self._now()

    def begin(self) -> None:
        """A collection begins."""
        self._last = self._now()

    def collected(self, rollout: TensorDictBase) -> None:
        """See `fp8rl_torchrl.training.loop.Observer`."""
        self._spend("collect")
        self.inner.collected(rollout)
        self._spend("look")
        self.rollout = rollout

    def update(self, step: Any, batch: TensorDictBase) -> TensorDict:
        """See `fp8rl_torchrl.training.loop.Observer`."""
        self._spend("replay")
        due = self.inner.due
        losses = self.inner.update(step, batch)
        self._spend("look" if due else "update")
        self.updates += 1
        self.looked += due
        self.batch = batch
        return losses

    def _spend(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def train(config: RecipeConfig, mode: str, watch: Watch) -> dict[str, Any]:
    """Train a cell and say all about it.

    A run whose parameters are no longer finite ends there: its later evaluations count as not finite.

    Returns:
        ``curve`` (frames and mean return), ``final`` (mean, standard deviation, minimum; None where it diverged),
        ``diverged``, ``seconds`` of each part, ``memory`` in bytes by category, ``loss_scale``, ``skipped_steps``,
        ``conversion``, ``products`` (the share of each format in the linear layers' products), ``numerics`` (see
        `compact`), ``nonfinite`` (see `nonfinite_events`), ``diagnosis``.
    """
    keep_freed_memory()
    pipeline = build(config)
    spoil(mode, pipeline)
    recorder = Recorder(watch.record_every).attach(pipeline)
    timer = Timer(recorder, config.device)
    pipeline.observer = timer
    judge = envs.make(config.env, num_envs=watch.episodes, device=config.device, seed=watch.seed)
    total = config.total_frames or 0
    due = [round(total * (place + 1) / watch.evaluations) for place in range(watch.evaluations)]
    curve: list[tuple[int, float | None]] = []
    scale: list[tuple[int, float | None, int]] = []
    began, diverged = time.perf_counter(), None
    for report in _reports(pipeline, timer):
        scales = [value for name, value in report.metrics.items() if name.startswith("loss_scale")]
        scale.append((report.frames, min(scales, default=None), report.skipped_steps))
        if not _finite(pipeline):
            diverged = report.frames
            break
        if due and report.frames >= due[0]:
            curve.append((report.frames, _mean(pipeline, judge, watch.episodes, watch.seed)))
            due = [frames for frames in due if frames > report.frames]
    wall = time.perf_counter() - began
    curve += [(frames, None) for frames in due]
    final = None
    if diverged is None:
        result = evaluate(pipeline.agent.policy, judge, watch.final_episodes, seed=watch.seed)
        final = {"mean": result.mean, "std": result.std, "min": min(result.returns)}
    seconds = _parts(pipeline, timer)
    return {
        "curve": curve,
        "final": final,
        "diverged": diverged,
        "frames": pipeline.frames,
        "updates": int(pipeline.step.updates),
        "skipped_steps": int(pipeline.step.skipped_steps),
        "seconds": seconds,
        "wall_seconds": wall,
        "memory": memory(pipeline, timer.batch),
        "loss_scale": scale[:: max(1, len(scale) // POINTS)],
        "conversion": pipeline.conversion.to_dict() if pipeline.conversion else None,
        "products": products(pipeline),
        "nonfinite": nonfinite_events(recorder.samples()),
        "numerics": compact(recorder.samples()),
        "diagnosis": str(recorder.diagnose()),
    }


def compact(samples: Sequence[Sample]) -> dict[str, Any]:
    """The recorder's samples in few bytes: at most `SAMPLES` of them, in three digits.

    Returns:
        ``layers`` and ``formats``, one a layer; ``frames``, one a sample; ``values`` by sample, layer, `ROLES` and
        `MEASURES`; ``update_survival`` by sample and layer. What is not finite is None.
    """
    kept = [sample for sample in samples[:: max(1, -(-len(samples) // SAMPLES))] if sample.layers]
    if not kept:
        return {"layers": [], "formats": [], "frames": [], "values": [], "update_survival": []}
    return {
        "layers": [layer.name for layer in kept[0].layers],
        "formats": [layer.format for layer in kept[0].layers],
        "frames": [sample.frames for sample in kept],
        "values": [
            [[[_digits(getattr(getattr(layer, r), m)) for m in MEASURES] for r in ROLES] for layer in sample.layers]
            for sample in kept
        ],
        "update_survival": [[_digits(layer.update_survival) for layer in sample.layers] for sample in kept],
    }


def nonfinite_events(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Where infinities and NaNs were seen: for each layer and role, how many samples, and the first one's frames.

    Returns:
        ``layer``, ``role``, ``samples`` and ``first_frames``, in the order of the layers.
    """
    events: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in samples:
        for layer in sample.layers:
            for role in ROLES:
                if getattr(layer, role).nonfinite > 0:
                    fresh = {"layer": layer.name, "role": role, "samples": 0, "first_frames": sample.frames}
                    events.setdefault((layer.name, role), fresh)["samples"] += 1
    return list(events.values())


def _digits(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _reports(pipeline: Pipeline, timer: Timer) -> Iterator[Any]:
    """The reports, with the timer started anew after each: what looks at a report is no part of training."""
    reports = iter(pipeline)
    while True:
        timer.begin()
        report = next(reports, None)
        if report is None:
            return
        yield report


def _finite(pipeline: Pipeline) -> bool:
    agent: Any = pipeline.agent
    return all(bool(parameter.isfinite().all()) for parameter in agent.parameters())


def _mean(pipeline: Pipeline, judge: Any, episodes: int, seed: int) -> float | None:
    mean = evaluate(pipeline.agent.policy, judge, episodes, seed=seed).mean
    return mean if math.isfinite(mean) else None


def _parts(pipeline: Pipeline, timer: Timer) -> dict[str, float]:
    """Seconds of `PARTS`, and of the recorder.

    The policy's are measured apart, eagerly, on as many calls, which is too much where a collector compiles it; the
    rest of collecting is the env's. Updates that were looked at are taken to have lasted as long as the others.
    """
    spent = timer.seconds
    update = spent["update"] * timer.updates / max(1, timer.updates - timer.looked)
    other = max(0.0, pipeline.seconds - sum(spent.values())) if pipeline.seconds else 0.0
    policy = min(_policy_seconds(pipeline, timer.rollout), spent["collect"])
    return {
        "env": spent["collect"] - policy,
        "policy": policy,
        "replay": spent["replay"],
        "update": update,
        "other": other,
        "recorder": spent["look"] - (update - spent["update"]),
    }


@torch.no_grad()
def _policy_seconds(pipeline: Pipeline, rollout: TensorDictBase | None) -> float:
    if rollout is None or not pipeline.frames:
        return 0.0
    policy: Any = getattr(pipeline.collector, "policy", None) or pipeline.agent.policy
    observed = rollout.select("observation").reshape(-1)[: rollout.shape[0]].contiguous()
    calls = pipeline.frames / observed.shape[0]
    config: Any = pipeline.config
    with set_exploration_type(ExplorationType.RANDOM):  # pyright: ignore[reportArgumentType]
        for _ in range(3):
            policy(observed.copy())
        timed = 50
        began = time.perf_counter()
        for _ in range(timed):
            policy(observed.copy())
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / timed * calls


def memory(pipeline: Pipeline, batch: TensorDictBase | None) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer state, saved activations (of one update) and replay."""
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _parameters(pipeline)}
    trained = [p for o in pipeline.step.optimizers.values() for g in o.param_groups for p in g["params"]]
    states = [each for o in pipeline.step.optimizers.values() for state in o.state.values() for each in state.values()]
    return {
        "parameters": sum(parameters.values()),
        "gradients": sum(_bytes(parameter) for parameter in trained),
        "optimizer": sum(_bytes(each) for each in states if torch.is_tensor(each)),
        "activations": 0 if batch is None else _saved_bytes(pipeline, batch, set(parameters)),
        "replay": 0 if pipeline.replay is None else _replay_bytes(pipeline.replay),
    }


def _parameters(pipeline: Pipeline) -> Iterator[torch.Tensor]:
    agent: Any = pipeline.agent
    yield from agent.parameters()
    yield from pipeline.loss.parameters()
    yield from pipeline.loss.buffers()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _replay_bytes(replay: Any) -> int:
    """Of the transitions that are stored."""
    if not len(replay):
        return 0
    sample = replay[:1]
    return len(replay) * sum(_bytes(each) for each in sample.values(True, True) if torch.is_tensor(each))


def _saved_bytes(pipeline: Pipeline, batch: TensorDictBase, own: set[int]) -> int:
    """What one eager update keeps between its forward and its backward pass, without parameters and the batch."""
    given = {each.untyped_storage().data_ptr() for each in batch.values(True, True)}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with pipeline.step.precision.autocast(pipeline.step.device):
            losses = pipeline.loss(batch.copy())
        found = sum(kept.values())
    del losses
    torch.set_rng_state(state)
    return found


def products(pipeline: Pipeline) -> dict[str, float]:
    """The share of each format in the multiply-adds of the linear layers' three products."""
    shares: dict[str, float] = {}
    agent: Any = pipeline.agent
    base = pipeline.step.precision.base if pipeline.conversion else pipeline.step.precision.name
    for layer in agent.modules():
        if not isinstance(layer, nn.Linear):
            continue
        formats = [getattr(layer, "compute_format", base)] * 3
        if isinstance(layer, Float8Linear):
            recipe = RECIPES[layer.recipe]
            gemms = (recipe.output, recipe.grad_input, recipe.grad_weight)
            formats = [base if gemm is None else _operands(gemm) for gemm in gemms]
        for format in formats:
            shares[format] = shares.get(format, 0.0) + layer.weight.numel()
    total = sum(shares.values())
    return {format: share / total for format, share in shares.items()}


def _operands(gemm: Any) -> str:
    return "×".join(dict.fromkeys((gemm.left.format, gemm.right.format)))


def run(config: RecipeConfig, mode: str, watch: Watch, core: int | None, limit: float) -> dict[str, Any]:
    """Train a cell in a process of its own.

    Returns:
        What `train` returned and ``failure``, which is None; or ``failure`` alone, with the reason.
    """
    job = {"config": config.to_dict(), "mode": mode, "watch": asdict(watch)}
    return take_turn([sys.executable, str(Path(__file__)), json.dumps(job)], core, limit)


def main(argv: list[str]) -> int:
    """Train what the argument describes, and print the result."""
    job = json.loads(argv[0])
    options = job["config"]
    config = config_class(options["algo"]).from_dict(options)
    return tell(lambda: train(config, job["mode"], Watch(**job["watch"])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
