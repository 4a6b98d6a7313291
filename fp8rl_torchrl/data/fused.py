"""`FusedCollector`: policy, environment step and auto-reset of many steps as one program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fp8rl_torchrl._inductor import compiled
from fp8rl_torchrl.data.pure import Starts, Table, random_action, refuse_impure, unrolled

BLOCK = 8
"""Steps that are compiled together: more take longer to compile, fewer make more calls."""

_FLAGS = ("terminated", "truncated", "done")

Live = tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor, torch.Tensor]
"""The state, its observation, the numbers of the running episodes ``[N]`` and the number of the next one ``[]``."""
Columns = dict[Any, torch.Tensor]


class FusedCollector(BaseCollector):
    """TorchRL's `Collector` for environments that are pure functions, many steps at a time without any overhead.

    The TensorDicts that it yields have the layout ``[N, T]`` and the keys of `torchrl.collectors.Collector`'s, and the
    same content: start states are the same, and so are sampled actions where torch's global generator is in the same
    state when collecting begins, because compiled code draws its random numbers from it in the same order. (A
    `Collector` draws some while it is built: seed after that to compare. And where a compiler rounds a probability
    differently, an action can differ once in millions; PyTorch 2.11 was seen to draw two steps' actions in another
    order.) In memory they lie time-major.

    On a CPU, blocks of steps are compiled. On a GPU a whole collection is captured as a CUDA graph besides; random
    numbers then come from the graph's own place in the generator's stream, so that actions have the same distribution
    but are not the same.

    Args:
        create_env_fn: The environment, or a function that makes one. It needs what `fp8rl_torchrl.data.pure.PureEnv`
            lists, as `fp8rl_torchrl.envs.CustomEnv` has it. The collector keeps the state; the environment itself is
            only reset.
        policy: Writes ``action`` into a TensorDict, and whatever else of it is to be stored; None draws random actions.
        frames_per_batch: Environment steps in each TensorDict ``[N, T]``, over all environments.
        total_frames: When to stop; -1 never does.
        exploration_type: As in `Collector`.
        track_traj_ids: As in `Collector`: whether ``("collector", "traj_ids")`` numbers the episodes.
        reset_at_each_iter: Whether each collection starts new episodes.
        postproc: Applied to each TensorDict before it is yielded.
        compile: Whether to compile. Eager steps are faster than `Collector`'s, too, and start at once.
        cudagraph: Whether to capture; None does so where the environment is on a GPU and ``compile`` is on.

    Raises:
        TypeError: If the environment does not offer what `PureEnv` lists or is none, or ``compile`` is no bool.
        ValueError: If a number is out of range, a CUDA graph is asked for without a GPU, or the policy cannot act in
            this environment. It acts once here, to see; what it draws for that is put back.

    Example:
        >>> from fp8rl_torchrl.envs import CustomEnv
        >>> collector = FusedCollector(CustomEnv(num_envs=4, seed=0), frames_per_batch=32, compile=False)
        >>> next(iter(collector))["next", "reward"].shape
        torch.Size([4, 8, 1])
    """

    def __init__(
        self,
        create_env_fn: EnvBase | Callable[[], EnvBase],
        policy: Callable[[TensorDictBase], TensorDictBase] | None = None,
        *,
        frames_per_batch: int,
        total_frames: int = -1,
        exploration_type: ExplorationType = ExplorationType.RANDOM,  # pyright: ignore[reportArgumentType]
        track_traj_ids: bool = True,
        reset_at_each_iter: bool = False,
        postproc: Callable[[TensorDictBase], TensorDictBase] | None = None,
        compile: bool = True,
        cudagraph: bool | None = None,
    ) -> None:
        super().__init__()
        if not callable(create_env_fn) and not isinstance(create_env_fn, EnvBase):
            raise TypeError(
                f"create_env_fn is an environment, or a function that makes one, such as "
                f"fp8rl_torchrl.envs.make(...); got {create_env_fn!r}"
            )
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False; got {compile!r}")
        self.env: Any = create_env_fn if isinstance(create_env_fn, EnvBase) else create_env_fn()
        refuse_impure(self.env)
        count, on_gpu = self.env.batch_size.numel(), self.env.device is not None and self.env.device.type == "cuda"
        if not isinstance(frames_per_batch, int) or frames_per_batch < 1 or frames_per_batch % count:
            raise ValueError(
                f"frames_per_batch must be a positive multiple of the {count} environments; got {frames_per_batch!r}"
            )
        if total_frames != -1 and total_frames < 1:
            raise ValueError(f"total_frames must be >= 1, or -1 for no end; got {total_frames}")
        if cudagraph and not on_gpu:
            raise ValueError(f"cudagraph=True needs an environment on a GPU; this one is on {self.env.device}")
        self.policy, self._action_spec = policy, self.env.action_spec
        self.steps = frames_per_batch // count
        self.frames_per_batch = self.requested_frames_per_batch = frames_per_batch
        self.total_frames = total_frames
        self.exploration_type, self.track_traj_ids = exploration_type, track_traj_ids
        self.reset_at_each_iter, self.postproc = reset_at_each_iter, postproc
        self.compiled, self.captured = compile, (on_gpu and compile) if cudagraph is None else cudagraph
        self._frames, self._iter = 0, -1
        self._next_traj_id = torch.zeros((), dtype=torch.int64, device=self.env.device)
        self._starts = Starts(self.env, compiled if compile else lambda function: function)
        self._begin(self.env.read(self.env.reset()))
        self._try_policy()
        # Random numbers from torch's generator, as in eager mode, and not from the compiler's own.
        # And every rounding of a policy in low precision, which the compiler would leave out between operations.
        options: dict[str, Any] = {"fallback_random": True, "emulate_precision_casts": True}
        # A block makes dozens of short calls. From C++, on a CPU, they cost less than from Python.
        options["cpp_wrapper"] = not on_gpu
        if policy is None:
            # Storing is then most of the work. A C++ compiler does it twice as fast from plain loops as from the
            # vectors of integers and flags that Inductor writes; only functions such as tanh are slower so.
            options["cpp.simdlen"] = 1
        self._run_block: Any = compiled(self._block, **options) if compile else self._block
        collect: Any = self._collect
        self._run: Any = CudaGraphModule(collect) if self.captured else collect

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield TensorDicts ``[N, T]`` until ``total_frames`` are collected."""
        while self.total_frames == -1 or self._frames < self.total_frames:
            self._iter += 1
            if self.pre_collect_hook is not None:
                self.pre_collect_hook()
            rollout = self.rollout()
            self._frames += rollout.numel()
            if self.postproc is not None:
                rollout = self.postproc(rollout)
            if self.post_collect_hook is not None:
                self.post_collect_hook(rollout)
            yield rollout

    @torch.no_grad()
    def rollout(self) -> TensorDictBase:
        """Collect once: a TensorDict ``[N, T]`` that shares no memory with any other."""
        if self.reset_at_each_iter:
            self._restart()
        with set_exploration_type(self.exploration_type):
            live, columns = self._run((tuple(self._state), self._observation, self._traj_ids, self._next_traj_id))
        state, self._observation, self._traj_ids, self._next_traj_id = live
        self._state = self._state_type(*state)
        return _as_tensordict(columns, self.env.batch_size)

    @property
    def _carrier(self) -> TensorDict:
        """The live step, from which the next collection starts, as `Collector` calls and keeps it."""
        running = torch.zeros(self.env.batch_size, dtype=torch.bool, device=self.env.device)
        carrier = self.env.write(self._state, self._observation.clone(), running, running).clone()
        return carrier.set(("collector", "traj_ids"), self._traj_ids.clone()) if self.track_traj_ids else carrier

    def _collect(self, live: Live) -> tuple[Live, Columns]:
        blocks: list[Columns] = []
        for done in range(0, self.steps, BLOCK):
            steps = min(BLOCK, self.steps - done)
            table = self._starts.ahead(self._state_type(*live[0]), steps)
            live, columns = self._run_block(live, table, steps)
            blocks.append(columns)
        columns = blocks[0] if len(blocks) == 1 else {k: torch.cat([each[k] for each in blocks]) for k in blocks[0]}
        # No step begins at an end. A compiler fills flags one by one, and slowly.
        columns |= {key: torch.zeros_like(columns["next", key]) for key in _FLAGS}
        return live, columns

    def _block(self, live: Live, table: Table, steps: int) -> tuple[Live, Columns]:
        """Some steps as plain tensors: what the next block goes on from, and what is stored, ``[steps, N]``."""
        state, observation, traj_ids, next_traj_id = live
        env, before, chosen = self.env, [], []
        running = torch.zeros(env.batch_size, dtype=torch.bool, device=env.device)

        def act(state: Any, observation: torch.Tensor) -> torch.Tensor:
            before.append(env.entries(state, observation, running, running))
            chosen.append(self._act(before[-1]))
            return chosen[-1]["action"]

        state, observation, transitions = unrolled(env, self._state_type(*state), observation, act, steps, table)
        rows = []
        for root, written, (ended, last, reward, *flags) in zip(before, chosen, transitions, strict=True):
            following = env.entries(ended, last, *flags) | {"reward": reward.unsqueeze(-1)}
            next_ = {("next", *((key,) if isinstance(key, str) else key)): each for key, each in following.items()}
            rows.append({**root, **written, **next_})
        columns = {key: _column([row[key] for row in rows]) for key in rows[0] if key not in _FLAGS}
        if self.track_traj_ids:
            done = columns["next", "done"].squeeze(-1)
            columns["collector", "traj_ids"], traj_ids, next_traj_id = self._number(done, traj_ids, next_traj_id)
        return (tuple(state), observation, traj_ids, next_traj_id), columns

    def _act(self, root: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """What the policy writes, by key; what it keeps to itself begins with an underscore."""
        if self.policy is None:
            return {"action": random_action(self._action_spec)}
        seen = {key: root[key] for key in getattr(self.policy, "in_keys", root)}
        written = self.policy(TensorDict(seen, batch_size=self.env.batch_size, device=self.env.device))
        # What it has only read is still the same object.
        entries = {key: written.get(key) for key in written.keys(True, True) if not _is_private(key)}
        return {key: value for key, value in entries.items() if value is not seen.get(key)}

    def _try_policy(self) -> None:
        """Have the policy act once, so that what it lacks is told before anything is compiled."""
        spec, device = self._action_spec, self.env.device
        running = torch.zeros(self.env.batch_size, dtype=torch.bool, device=device)
        root = self.env.entries(self._state, self._observation, running, running)
        # What it draws here must not change what it draws later.
        forked = torch.random.fork_rng([device] if device is not None and device.type == "cuda" else [])
        try:
            with forked, torch.no_grad(), set_exploration_type(self.exploration_type):
                action = self._act(root).get("action")
        except Exception as error:
            raise self._unfit(f"cannot act on observations {list(self._observation.shape)}: {error!r}") from error
        if action is None:
            raise self._unfit("writes no 'action'")
        if (action.dtype, action.shape) != (spec.dtype, spec.shape):
            raise self._unfit(
                f"writes actions {action.dtype} {list(action.shape)}, not {spec.dtype} {list(spec.shape)}"
            )

    def _unfit(self, reason: str) -> ValueError:
        return ValueError(
            f"the policy {reason}. {type(self.env).__name__} needs a TensorDictModule that was made for it, such as "
            "ActorCritic.for_env(env).policy"
        )

    def _number(
        self, done: torch.Tensor, traj_ids: torch.Tensor, next_traj_id: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The number of the episode of each step ``[T, N]``; new ones are numbered in the order in which they began."""
        ends = done.flatten().cumsum(0, dtype=torch.int64)
        begun = (ends + (next_traj_id - 1)).reshape(done.shape)
        numbers = [traj_ids]
        for ended, new in zip(done, begun, strict=True):
            numbers.append(torch.where(ended, new, numbers[-1]))
        return torch.stack(numbers[:-1]), numbers[-1], next_traj_id + ends[-1]

    def _restart(self) -> None:
        # Of the collector's own state: the environment has not seen the episodes that ended since it was reset.
        state = self._state
        self._begin(self.env.pure_reset(state.seed, state.index, state.episode + 1))

    def _begin(self, state: Any) -> None:
        self._state_type: Any = type(state)
        self._starts.forget()
        self._state, self._observation = state, self.env.observe(state)
        batch_size = self.env.batch_size
        numbers = torch.arange(batch_size.numel(), device=self.env.device).reshape(batch_size)
        self._traj_ids = numbers + self._next_traj_id
        self._next_traj_id = self._next_traj_id + batch_size.numel()

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seed the environment: as with `Collector`, running episodes end as they began, the next ones are new.

        Returns:
            A seed for what comes next, as `torchrl.envs.EnvBase.set_seed` gives it.
        """
        following = self.env.set_seed(seed, static_seed=static_seed)
        fresh = self.env.read(self.env.reset())
        self._starts.forget()
        self._state = self._state._replace(seed=fresh.seed, index=fresh.index, episode=fresh.episode - 1)
        return following

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """Close the environment."""
        if close_env and not self.env.is_closed:
            self.env.close(raise_if_closed=raise_on_error)

    def update_policy_weights_(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, policy_or_weights: Any = None, *, weights: Any = None, policy: Any = None
    ) -> None:
        """Copy weights into the policy.

        Args:
            policy_or_weights: A module, or its weights as a TensorDict; None changes nothing, since a policy that
                shares its parameters with the learner is always up to date.
            weights: The same by another name, as TorchRL's collectors take it.
            policy: The same by another name.

        Raises:
            TypeError: If the policy is not a module, or what is given is neither a module nor a TensorDict.
            ValueError: If weights are given under more than one name.
        """
        named = {"policy_or_weights": policy_or_weights, "weights": weights, "policy": policy}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"the weights are given more than once, as {' and '.join(given)}")
        if not given:
            return
        if not isinstance(self.policy, torch.nn.Module):
            raise TypeError(f"a policy of type {type(self.policy).__name__} has no weights to update")
        (new,) = given.values()
        new = TensorDict.from_module(new) if isinstance(new, torch.nn.Module) else new
        if not isinstance(new, TensorDictBase):
            raise TypeError(f"weights come as a module or as TensorDict.from_module(module); got {type(new).__name__}")
        own: Any = TensorDict.from_module(self.policy)
        own.data.update_(new.data)

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The counters and the live step, from which another collector continues exactly."""
        live = self._carrier.to_dict()
        return {"frames": self._frames, "iter": self._iter, "next_traj_id": int(self._next_traj_id), "live_step": live}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Restore what `state_dict` returned."""
        batch_size, device = self.env.batch_size, self.env.device
        live = TensorDict(state_dict["live_step"], batch_size=batch_size).clone().to(device)
        self._state, self._observation = self.env.read(live), live["observation"]
        self._starts.forget()
        if self.track_traj_ids:
            self._traj_ids = live["collector", "traj_ids"]
        self._frames, self._iter = state_dict["frames"], state_dict["iter"]
        self._next_traj_id = torch.tensor(state_dict["next_traj_id"], device=device)


def _column(steps: list[torch.Tensor]) -> torch.Tensor:
    """What is stored of one entry, ``[steps, ...]``; what no step changes, such as a seed, is one copy."""
    if all(each is steps[0] for each in steps):
        return steps[0].expand(len(steps), *steps[0].shape).clone()
    return torch.stack(steps)


def _is_private(key: Any) -> bool:
    return any(name.startswith("_") for name in ([key] if isinstance(key, str) else key))


def _as_tensordict(columns: Mapping[Any, torch.Tensor], batch_size: torch.Size) -> TensorDict:
    """Columns ``[T, N, ...]`` as a TensorDict ``[N, T]``, each a view."""
    steps = next(iter(columns.values())).shape[0]
    shape = torch.Size((*batch_size, steps))
    tree: dict[str, Any] = {}
    for key, column in columns.items():
        *parents, name = (key,) if isinstance(key, str) else key
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = column.movedim(0, len(batch_size))
    return _branch(tree, shape)


def _branch(tree: Mapping[str, Any], shape: torch.Size) -> TensorDict:
    entries = {name: _branch(value, shape) if isinstance(value, dict) else value for name, value in tree.items()}
    names: Any = [*[None] * (len(shape) - 1), "time"]
    return TensorDict._new_unsafe(entries, batch_size=shape, names=names)
