"""Collecting experience: what TorchRL's `Collector` needs so that a stopped run continues exactly.

Experience is collected by `torchrl.collectors.Collector` with its direct backend, the class that was called
``SyncDataCollector`` until torchrl 0.13 removed that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from fp8rl_torchrl.data.fused import FusedCollector


def make_collector(
    env: EnvBase, policy: Callable[[TensorDictBase], TensorDictBase], frames_per_batch: int, **options: Any
) -> Collector:
    """TorchRL's collector on one environment in this process, without an end.

    Args:
        env: The environment to step; batched environments are stepped side by side.
        policy: Writes ``action``; it samples, since the collector explores.
        frames_per_batch: Environment steps in each TensorDict ``[N, T]``, over all environments.
        **options: Others of `torchrl.collectors.Collector`.
    """
    return Collector(
        env,
        policy,
        frames_per_batch=frames_per_batch,
        total_frames=-1,
        # The policies here are not recurrent, so they need no transform that marks the start of an episode.
        auto_register_policy_transforms=False,
        **options,
    )


def restores_exactly(env: EnvBase) -> bool:
    """Whether the state of an environment is all in its TensorDict, so that a stopped episode can be continued."""
    return bool(getattr(env, "stateless", False))


class CollectorState:
    """The part of a collector that a checkpoint must hold, as an object with ``state_dict`` and ``load_state_dict``.

    `Collector.state_dict` leaves out the live step from which the next collection starts. Here it is saved with the
    counters, for environments that declare ``stateless = True``. Other environments keep state that nobody can read:
    their collector restores its counters and starts fresh episodes. A `FusedCollector` saves all of this itself.

    Args:
        collector: The `torchrl.collectors.Collector` or `FusedCollector` to save and restore.
    """

    def __init__(self, collector: Any) -> None:
        self.collector = collector

    def state_dict(self) -> dict[str, Any]:
        """The counters and, where the environment allows it, the live step (a nested dict of tensors)."""
        collector = self.collector
        if isinstance(collector, FusedCollector):
            return collector.state_dict()
        state: dict[str, Any] = {"frames": collector._frames, "iter": collector._iter}
        if collector.track_traj_ids:
            state["traj_pool"] = collector._traj_pool.state_dict()
        if restores_exactly(collector.env):
            state["live_step"] = collector._carrier.clone().to_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; without a live step the next collection starts fresh episodes."""
        collector = self.collector
        if isinstance(collector, FusedCollector):
            collector.load_state_dict(state_dict)
            return
        collector._frames, collector._iter = state_dict["frames"], state_dict["iter"]
        if collector.track_traj_ids:
            collector._traj_pool.load_state_dict(state_dict["traj_pool"])
        if "live_step" in state_dict:
            live = TensorDict(state_dict["live_step"], batch_size=collector.env.batch_size).clone()
            if hasattr(collector.env, "remember"):  # a native one, which may be reset without its TensorDict
                collector.env.remember(collector.env.read(live))
            collector._carrier = live if collector._carrier_has_no_device else live.to(collector.env.device)
        else:
            collector.reset()
