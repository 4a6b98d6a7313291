"""What every peer program shares: its options, how it is timed, and the line of JSON that it prints.

A peer runs in a process of its own, possibly with another interpreter, so this needs nothing but torch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

GYMNASIUM_IDS = {"customenv": "fp8rl_torchrl:fp8rl/CustomEnv-v0", "cartpole": "CartPole-v1"}
NATIVE_IDS = {"customenv": "CustomEnv", "cartpole": "CartPole-v1"}
"""Names of the tasks for `fp8rl_torchrl.envs.make`."""
ALGORITHMS = ("a2c", "ppo", "replay")
"""``replay`` is an actor-critic that learns from a replay buffer, 64 transitions an update."""
ACTIVATIONS = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}

HIDDEN: tuple[int, ...] = (64, 64)
GAMMA, LAMBDA = 0.99, 0.95
LEARNING_RATE = 1e-3
ENTROPY_COEFF, CRITIC_COEFF = 0.01, 0.5
CLIP_EPSILON, MAX_GRAD_NORM = 0.2, 0.5
REPLAY_SIZE, REPLAY_BATCH, UPDATES_PER_COLLECTION = 10_000, 64, 24

WARM_UP_ROLLOUTS = 3
LONG_WARM_UP = 5.0
"""Seconds after which a warm-up that has done the necessary ends early."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a peer is asked to train."""

    task: str
    num_envs: int
    steps: int
    """Steps of each environment in a rollout."""
    frames: int | None
    """Frames to train while timed; None to go on for ``seconds``."""
    seconds: float
    seed: int
    algo: str
    precision: str
    activation: str
    epochs: int
    """Passes of PPO over a rollout."""
    minibatches: int
    """Minibatches in each pass of PPO."""

    @property
    def rollout(self) -> int:
        """Frames in a rollout."""
        return self.num_envs * self.steps


class Trained(NamedTuple):
    """What one call has trained."""

    frames: int
    updates: int


class UnsupportedError(Exception):
    """The peer does not do what it is asked for."""


Train = Callable[[int], Trained]
"""Trains for at least so many frames, in whole rollouts, going on from where the last call ended."""


def parse(argv: Sequence[str] | None = None) -> Order:
    """The order on the command line."""
    parser = argparse.ArgumentParser(description="Train one task with one library, and print one line of JSON.")
    parser.add_argument("--task", choices=GYMNASIUM_IDS, required=True)
    parser.add_argument("--num-envs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="of each environment in a rollout")
    parser.add_argument("--frames", type=int, default=None, help="to train while timed; default: as --seconds allows")
    parser.add_argument("--seconds", type=float, default=3.0, help="to train for, without --frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algo", choices=ALGORITHMS, default="a2c")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="tanh")
    parser.add_argument("--epochs", type=int, default=4, help="passes of PPO over a rollout")
    parser.add_argument("--minibatches", type=int, default=4, help="in each pass of PPO")
    return Order(**vars(parser.parse_args(argv)))


def main(
    build: Callable[[Order], Train],
    *,
    packages: Sequence[str],
    algorithms: Sequence[str] = ("a2c", "ppo"),
    precisions: Sequence[str] = ("fp32",),
    compiles: bool = False,
    notes: Sequence[str] = (),
) -> int:
    """Do what the command line orders and print the result; what cannot be done is printed as ``failure``.

    Args:
        build: Constructs everything and returns what trains it. It also imports the library.
        packages: Distributions whose versions are printed.
        algorithms: What the peer can train.
        precisions: What it can compute in.
        compiles: Whether the warm-up must see two rollouts, since the second may still compile.
        notes: In what the peer differs from the others.

    Returns:
        The exit code: 0, or 1 for a failure.
    """
    order = parse()
    torch.set_num_threads(1)
    torch.manual_seed(order.seed)
    try:
        if order.algo not in algorithms or order.precision not in precisions:
            raise UnsupportedError(f"does not offer {order.algo} in {order.precision}")
        result = timed(build(order), order, necessary=2 if compiles else 1)
    except (ImportError, UnsupportedError) as error:
        reason = f"not installed: {error}" if isinstance(error, ImportError) else str(error)
        print(json.dumps({"failure": reason}))
        return 1
    versions = {package: _version(package) for package in ("torch", *packages)}
    print(json.dumps({**asdict(order), **result, "versions": versions, "notes": list(notes)}))
    return 0


def timed(train: Train, order: Order, necessary: int = 1) -> dict[str, object]:
    """Warm up, then train while the clocks run.

    Args:
        train: What to time.
        order: Says how much.
        necessary: Rollouts that the warm-up may not leave out, however long they take.

    Returns:
        ``frames`` and ``updates`` trained in ``seconds`` (wall clock) and ``cpu_seconds`` (processor time of this
        process); ``warmup_seconds`` before, and how many of them the first rollout took beyond the last one
        (``compile_seconds``: compiling, caches, allocations).
    """
    started, warm_ups = time.perf_counter(), []
    while len(warm_ups) < WARM_UP_ROLLOUTS and (len(warm_ups) < necessary or sum(warm_ups) < LONG_WARM_UP):
        before = time.perf_counter()
        train(order.rollout)
        warm_ups.append(time.perf_counter() - before)
    warmup_seconds = time.perf_counter() - started

    frames = updates = 0
    portion = order.rollout if order.frames is None else order.frames
    wall, cpu = time.perf_counter(), time.process_time()
    while True:
        trained = train(portion)
        frames, updates = frames + trained.frames, updates + trained.updates
        elapsed = time.perf_counter() - wall
        if order.frames is not None or elapsed >= order.seconds:
            break
        if elapsed < order.seconds / 4:
            portion *= 2  # few, long calls: entering a library's training loop is not training
    return {
        "frames": frames,
        "updates": updates,
        "seconds": elapsed,
        "cpu_seconds": time.process_time() - cpu,
        "imports_excluded": True,
        "warmup_seconds": warmup_seconds,
        "compile_seconds": max(0.0, warm_ups[0] - warm_ups[-1]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def rollouts_in(frames: int, order: Order) -> int:
    """Whole rollouts that hold at least so many frames."""
    return -(-frames // order.rollout)
