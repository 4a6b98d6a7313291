"""This package: the recipes, with the fused collector and the compiled update."""

from __future__ import annotations

import sys
from typing import Any

from protocol import (
    CLIP_EPSILON,
    CRITIC_COEFF,
    ENTROPY_COEFF,
    GAMMA,
    HIDDEN,
    LAMBDA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NATIVE_IDS,
    REPLAY_BATCH,
    REPLAY_SIZE,
    UPDATES_PER_COLLECTION,
    Order,
    Train,
    Trained,
    UnsupportedError,
    main,
)

_CONFIGS = {"a2c": "A2CConfig", "ppo": "PPOConfig", "replay": "ActorCriticConfig"}
_FOREVER = 2**62
"""Frames that no benchmark reaches."""


def options(order: Order) -> dict[str, Any]:
    """The options of the recipe that trains the order."""
    common: dict[str, Any] = {
        "env": NATIVE_IDS[order.task],
        "num_envs": order.num_envs,
        "frames_per_collection": order.rollout,
        "total_frames": _FOREVER,
        "precision": order.precision,
        "seed": order.seed,
        "device": "cpu",
        "num_threads": 1,
        "hidden": HIDDEN,
        "lr": LEARNING_RATE,
        "gamma": GAMMA,
        "max_grad_norm": MAX_GRAD_NORM,
        "critic_coeff": CRITIC_COEFF,
        "entropy_coeff": ENTROPY_COEFF,
    }
    if order.algo == "replay":
        return common | {
            "replay_size": max(REPLAY_SIZE, order.rollout),
            "batch_size": REPLAY_BATCH,
            "min_replay": min(order.rollout, 1000),
            "updates_per_collection": UPDATES_PER_COLLECTION,
            "collector": "torchrl",
            "compile": "on",
        }
    common |= {"lmbda": LAMBDA, "activation": order.activation, "collector": "fused", "compile": "on"}
    if order.algo == "ppo":
        common |= {"epochs": order.epochs, "clip_epsilon": CLIP_EPSILON}
        common["batch_size"] = order.rollout // order.minibatches
    return common


def build(order: Order) -> Train:
    """The pipeline, started by the first call."""
    import fp8rl_torchrl as f8
    from fp8rl_torchrl.training.memory import keep_freed_memory

    keep_freed_memory()  # as scripts/train.py does
    name = _CONFIGS[order.algo]
    if not hasattr(f8.recipes, name):
        raise UnsupportedError(f"this version of fp8rl_torchrl has no {name}")
    pipeline = f8.recipes.build(getattr(f8.recipes, name)(**options(order)))
    reports = iter(pipeline)
    trained = Trained(0, 0)

    def train(frames: int) -> Trained:
        nonlocal trained
        before = trained
        while trained.frames - before.frames < frames:
            report = next(reports)
            trained = Trained(report.frames, report.updates)
        return Trained(trained.frames - before.frames, trained.updates - before.updates)

    return train


if __name__ == "__main__":
    sys.exit(
        main(
            build,
            packages=("fp8rl_torchrl", "torchrl", "tensordict"),
            algorithms=tuple(_CONFIGS),
            precisions=("fp32", "bf16"),
            compiles=True,
        )
    )
