"""What every recipe's configuration shares: the task, the precision, the device, and how it is named and saved."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

import torch
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs.gym import is_native, make
from fp8rl_torchrl.precision.mode import Precision
from fp8rl_torchrl.recipes.choices import choose
from fp8rl_torchrl.recipes.option_types import check_value
from fp8rl_torchrl.training.loop import LoopConfig
from fp8rl_torchrl.training.run import RunSchedule

Config = TypeVar("Config", bound="RecipeConfig")


_kinds_of = functools.cache(get_type_hints)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig(LoopConfig, RunSchedule):
    """The options that all recipes have in common.

    Raises:
        ValueError: If an option is out of range or names something that does not exist.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    """Tuned options by task."""
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named sets of options for any task."""

    env: str = "CustomEnv"
    """The task: "CustomEnv", or any Gymnasium id."""
    precision: str = "bf16"
    """What the loss computes in: fp32, tf32, bf16, fp16, fp8, fp8-tensorwise or fp8-rowwise-gw-hp; auto takes the one
    in which an update of this configuration is fastest on this machine, measured once."""
    rollout_precision: str | None = None
    """What the collecting policy computes in. By default fp32; with an fp8 precision, the same as the loss."""
    fp8_base: str = "bf16"
    """What everything but the FP8 products runs in: bf16 or fp32."""
    fp8_backend: str = "auto"
    """FP8 products in hardware (native) or emulated; auto is native where the device has them."""
    fp8_skip: tuple[str, ...] = ()
    """Layers to leave out of FP8, as glob patterns on their names."""
    init_scale: float = 2.0**16
    """First loss scale of fp16."""
    growth_interval: int = 2000
    """The loss scale of fp16 doubles after this many updates without an overflow."""
    seed: int = 0
    """Seed of everything random."""
    deterministic: bool = False
    """Whether only algorithms are used that repeat bit for bit, also on a GPU, where they can be slower."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:1, ...; auto takes cuda if there is one."""
    num_threads: int = 1
    """CPU threads; one is fastest for small networks, more pay off from a width of about 256."""
    num_envs: int = 128
    """Environments stepped side by side."""
    frames_per_collection: int = 1024
    """Environment steps between two phases of updates, over all environments."""
    collector: Literal["auto", "torchrl", "fused"] = "auto"
    """TorchRL's Collector, or many steps as one program, for native environments; auto takes the latter where the run
    is long enough to repay its compilation."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the update and a fused collector are compiled; auto does where the run is long enough to repay it."""
    cudagraph: Literal["auto", "on", "off"] = "auto"
    """Whether both are captured as CUDA graphs; auto does on a GPU where they are compiled."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the layers of each network."""
    activation: Literal["tanh", "relu"] = "tanh"
    """The nonlinearity after each layer; relu is several times cheaper on a CPU."""
    lr: float | None = None
    """Learning rate at the start; by default 1e-3, or 1e-4 where a layer is wider than 64."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls."""
    lr_decay_updates: int | None = None
    """It falls over this many updates, by default those of the whole run, ..."""
    lr_final: float = 0.05
    """... to this fraction of lr, and stays there."""
    gamma: float = 0.99
    """Discount of rewards to come, per step."""
    reward_scale: float = 1.0
    """What is learned from are rewards times this; reported returns are the task's own."""
    reward_clip: float | None = None
    """What is learned from are rewards clipped to plus or minus this, after scaling."""
    normalize_observation: bool = False
    """Whether the networks normalise observations by their running mean and standard deviation."""
    max_grad_norm: float | None = 0.5
    """Gradients are clipped to this 2-norm; None does not clip."""
    report_every: int = 100
    """Print the average return of every so many episodes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is built."""
        self._check_types()
        LoopConfig.__post_init__(self)
        RunSchedule.__post_init__(self)
        if self.collector == "fused" and not is_native(self.env):
            raise ValueError(
                f"collector='fused' needs an environment of pure functions, and {self.env} has none: use torchrl"
            )
        if self.rollout_precision == "auto":
            raise ValueError("rollout_precision takes the name of a precision, or nothing: only precision may be auto")
        precisions = self.make_precision(), self.make_rollout_precision()
        fp8_options = self.fp8_base, self.fp8_backend, self.fp8_skip
        if fp8_options != ("bf16", "auto", ()) and not any(precision.fp8_recipe for precision in precisions):
            raise ValueError(
                f"fp8_base, fp8_backend and fp8_skip are options of the fp8 precisions; the precision is "
                f"{self.precision!r}"
            )
        for name in ("num_threads", "num_envs", "frames_per_collection", "report_every", "lr_decay_updates"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.frames_per_collection % self.num_envs:
            raise ValueError(
                f"frames_per_collection must be a multiple of num_envs; got {self.frames_per_collection} and "
                f"{self.num_envs}: try {self.num_envs * max(1, round(self.frames_per_collection / self.num_envs))}"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must name at least one layer, each at least 1 wide; got {self.hidden}")
        for name in ("lr", "max_grad_norm", "reward_scale", "reward_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0; got {value}")
        for name in ("gamma", "lr_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32); got {self.seed}")

    def _check_types(self) -> None:
        """Refuse values of another type than their option's, which a file or a script may well hold."""
        for field in dataclasses.fields(self):
            check_value(field.name, _kinds_of(type(self))[field.name], getattr(self, field.name))

    @classmethod
    def for_task(cls: type[Config], env: str, **options: Any) -> Config:
        """The tuned preset of a task, with some options set otherwise; the defaults where there is none.

        Args:
            env: The task.
            **options: Fields of this class.
        """
        return cls(**{"env": env, **cls.PRESETS.get(env, {}), **options})

    @classmethod
    def variant(cls: type[Config], name: str, env: str, **options: Any) -> Config:
        """A named set of options for a task, with some options set otherwise.

        Args:
            name: One of ``VARIANTS``.
            env: The task.
            **options: Fields of this class.

        Raises:
            ValueError: If there is no such set.
        """
        if name not in cls.VARIANTS:
            known = ", ".join(cls.VARIANTS) or "none"
            raise ValueError(f"there is no variant {name!r} of {cls.__name__}; there are: {known}")
        return cls(**{"env": env, **cls.VARIANTS[name], **options})

    def resolved(self: Config) -> Config:
        """The same configuration with every default that depends on others, or on this machine, put in its place.

        Raises:
            ValueError: If the device does not exist.
        """
        if self.precision == "auto":
            raise ValueError(
                "precision 'auto' is measured: use fp8rl_torchrl.recipes.build, or resolve_precision first"
            )
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {self.device!r} cannot be used here: {reason}") from None
        if torch.device(name).type == "cpu" and self.fp8_backend == "native":
            raise ValueError("fp8_backend='native' needs FP8 hardware, and a CPU has none: use auto or emulated")
        if torch.device(name).type == "cpu" and self.cudagraph == "on":
            raise ValueError("cudagraph='on' needs a GPU; use auto or off")
        decay = self.lr_decay_updates or self._updates() * self._collections()
        settled = {"device": name, "lr": self.initial_lr(), "lr_decay_updates": decay}
        resolved = dataclasses.replace(self, **settled, **self.chosen(name)[0])
        return dataclasses.replace(resolved, rollout_precision=resolved.make_rollout_precision().name)

    def chosen(self, device: str) -> tuple[dict[str, str], list[str]]:
        """What ``auto`` stands for in ``collector``, ``compile`` and ``cudagraph``, and why, in a sentence each."""
        return choose(
            {name: getattr(self, name) for name in ("collector", "compile", "cudagraph")},
            native=is_native(self.env),
            device=device,
            collections=self._collections(),
            steps=self.frames_per_collection // self.num_envs,
            updates=self._updates(),
        )

    def _updates(self) -> int:
        """Updates after each collection."""
        return self.updates_per_collection

    def _collections(self) -> int:
        """About how many collections the run has; an episode is taken to last 100 steps."""
        frames = self.total_frames or self.episodes * 100
        return -(-frames // self.frames_per_collection)

    def initial_lr(self) -> float:
        """The learning rate at the start."""
        if self.lr is not None:
            return self.lr
        return 1e-3 if max(self.hidden) <= 64 else 1e-4

    def make_precision(self) -> Precision:
        """The loss's precision, with this configuration's loss scaling and FP8 options."""
        return self._precision(self.precision)

    def make_rollout_precision(self) -> Precision:
        """The collecting policy's precision, which by default goes with the loss's."""
        return self._precision(
            self.rollout_precision or (self.precision if self.make_precision().fp8_recipe else "fp32")
        )

    def _precision(self, name: str) -> Precision:
        if name == "auto":  # what it stands for is known once it is resolved
            name = "fp32"
        precision = Precision(name, init_scale=self.init_scale, growth_interval=self.growth_interval)
        if precision.fp8_recipe is None:
            return precision
        return dataclasses.replace(precision, base=self.fp8_base, backend=self.fp8_backend)

    def make_env(self) -> EnvBase:
        """The training environment."""
        return make(self.env, num_envs=self.num_envs, device=self.device, seed=self.seed)

    def default_run_dir(self) -> str:
        """``runs/<algo>-<env>-<precision>-s<seed>-<time>``."""
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        algo: str = getattr(self, "algo", type(self).__name__)
        return f"runs/{algo}-{self.env.replace('/', '-')}-{self.precision}-s{self.seed}-{now}"

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-compatible values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[Config], options: dict[str, Any]) -> Config:
        """The configuration that `to_dict` described.

        Raises:
            ValueError: If an option is unknown, or its value is not one that it can have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown options {', '.join(unknown)}; this version knows {', '.join(sorted(known))}")
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
        return cls(**values)
