"""Export of a policy to a file that runs without this package, by `torch.export` or ONNX, and is checked against it."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.twin import twin
from fp8rl_torchrl.training._onnx import write_onnx
from fp8rl_torchrl.training.evaluate import evaluate
from fp8rl_torchrl.training.policy_file import SCORES, ExportError, OutputComparison, checked_format, compare_exported

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far a number may be from the policy's own, as a part of the largest such number, by precision."""

_OF_THE_SAME_PRECISION = 0.2  # how much of the tolerance is left where only the order of sums differs
_EXPLAINED_BY = (*SCORES, "loc", "scale")
_STORED_IN_BF16 = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported, and how it compares; printed, a table."""

    path: str
    """The file."""
    format: str
    """``torch`` or ``onnx``."""
    precision: str
    """``fp32`` or ``bf16``."""
    bytes: int
    """Its size."""
    observations: int
    """The number of observations that it was compared on."""
    tolerance: float
    """The largest difference allowed, as a part of the largest value."""
    outputs: tuple[OutputComparison, ...]
    """Against the policy in FP32."""
    float8_layers: int
    """The policy's layers that multiply in FP8; in the file they do not."""
    float8_outputs: tuple[OutputComparison, ...]
    """Against the policy with these layers in FP8, which is not part of the check; empty without any."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        return asdict(self)

    def __str__(self) -> str:
        """The table."""
        lines = [
            f"{self.path}: {self.format}, {self.precision}, {self.bytes:,} bytes",
            f"compared with the policy in fp32 on {self.observations:,} observations, "
            f"where differences up to {self.tolerance:.2%} of the largest value are allowed",
            *map(str, self.outputs),
        ]
        if self.float8_layers:
            lines += [
                f"{self.float8_layers} of the policy's layers multiply in FP8; in the file they do so in "
                f"{self.precision}. Compared with the policy in FP8:",
                *map(str, self.float8_outputs),
            ]
        return "\n".join(lines)


class DeterministicActor(nn.Module):
    """A policy's most likely (or best) actions, tensors in and tensors out.

    Made by `deterministic_actor`. The policy itself is called, in deterministic exploration mode.
    """

    def __init__(self, policy: nn.Module, key: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.policy, self.key, self.names = policy, key, names

    def forward(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map observations ``[batch, ...]`` to actions and the numbers they follow from; floats are float32."""
        tensordict = TensorDict({self.key: observation}, batch_size=observation.shape[:1])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            tensordict = self.policy(tensordict)
        outputs = {name: tensordict.get(name) for name in self.names}
        return {name: each.float() if each.is_floating_point() else each for name, each in outputs.items()}


def deterministic_actor(policy: nn.Module, precision: str = "fp32") -> DeterministicActor:
    """A copy of a policy as a module that maps observations to deterministic actions.

    It returns ``action`` and those of ``logits``, ``action_value``, ``loc`` and ``scale`` that the policy writes. In
    BF16 it computes what ``twin(policy, "bf16")`` does (heads that ask for it stay FP32), and the weights of its linear
    and convolutional layers are stored in BF16. `Float8Linear` layers become linear ones.

    Args:
        policy: A TensorDict module that reads one entry and writes ``action``, on the CPU; it is not changed.
        precision: ``fp32`` or ``bf16``.

    Raises:
        TypeError: If this is no policy, such as a whole agent.
        ExportError: If it reads several entries, is not on the CPU, or the precision is another.
    """
    if precision not in TOLERANCE:
        raise ExportError(f"a policy is exported in {' or '.join(TOLERANCE)}; got {precision!r}")
    key = _observation_key(policy)
    devices = {str(each.device) for each in (*policy.parameters(), *policy.buffers())} - {"cpu"}
    if devices:
        raise ExportError(f"the policy is on {', '.join(sorted(devices))}; export takes it from the CPU")
    own = copy.deepcopy(policy)
    network = twin(own, precision)
    for layer in network.modules():
        if precision == "bf16" and type(layer) in _STORED_IN_BF16:
            layer.bfloat16()
    names = ("action", *(name for name in _EXPLAINED_BY if name in network.out_keys))
    return DeterministicActor(network, key, names).eval().requires_grad_(False)


def _observation_key(policy: Any) -> Any:
    if not isinstance(policy, TensorDictModuleBase) or "action" not in policy.out_keys:
        raise TypeError(
            f"export takes a policy, a TensorDict module that writes 'action'; a {type(policy).__name__} is none: pass "
            "an agent's .policy"
        )
    if len(policy.in_keys) != 1:
        raise ExportError(f"the policy reads {policy.in_keys}; only one that reads a single entry can be exported")
    return policy.in_keys[0]


def collect_observations(policy: Any, env: EnvBase, episodes: int = 10, *, seed: int = 1_000_003) -> torch.Tensor:
    """The observations that a policy meets when it is evaluated (see `fp8rl_torchrl.evaluate`).

    Args:
        policy: A TensorDict module that reads one entry and writes ``action``.
        env: The environment to copy.
        episodes: The number of complete episodes.
        seed: Seed of the episodes.

    Returns:
        ``[N, ...]``, on the CPU.

    Raises:
        ValueError: As in `fp8rl_torchrl.evaluate`.
        TypeError: If this is no policy.
    """
    recorder = _Recorder(policy, _observation_key(policy))
    evaluate(recorder, env, episodes, seed=seed)
    return torch.cat(recorder.seen)


class _Recorder(nn.Module):
    """A policy that remembers what it was shown."""

    def __init__(self, policy: Any, key: Any) -> None:
        super().__init__()
        self.policy, self.key = policy, key
        self.seen: list[torch.Tensor] = []

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict.get(self.key)
        self.seen.append(observation.reshape(-1, *observation.shape[tensordict.ndim :]).to("cpu", copy=True))
        return self.policy(tensordict)


def export_policy(
    policy: nn.Module,
    observations: torch.Tensor,
    path: str | Path,
    *,
    format: str | None = None,
    precision: str = "fp32",
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a policy's deterministic actions to a file that needs neither this package nor TorchRL to run.

    The file maps ``observation`` ``[batch, ...]``, of any batch size, to ``action`` (int64 ``[batch]`` for a discrete
    one, float32 ``[batch, d]`` for a continuous one) and to what it was chosen by (``logits``, ``action_value``, or
    ``loc`` and ``scale``; float32). It is read again and compared with the policy before it gets its name.

    In BF16, weights and activations are BF16 and the heads FP32; see `deterministic_actor`. An ONNX file stores the
    weights in BF16 and computes in FP32 with every result rounded to BF16, since ONNX Runtime has no BF16 kernels for
    CPUs: it is smaller, and not faster.

    Args:
        policy: A TensorDict module that reads one entry and writes ``action``, on the CPU; it is not changed.
        observations: ``[N, ...]``, real ones, such as `collect_observations` returns.
        path: The file to write, ending in ``.pt2`` or ``.onnx``.
        format: ``torch`` or ``onnx``; None goes by the file's ending.
        precision: ``fp32`` or ``bf16``.
        tolerance: The largest difference from the policy in FP32, as a part of the largest value of an output; None
            takes that of `TOLERANCE`. A BF16 file may differ from the policy in BF16 by a fifth of it.
        overwrite: Whether to replace a file that exists.

    Raises:
        TypeError: If this is no policy, such as a whole agent.
        ExportError: If the path, the format or the precision will not do, the policy cannot be traced, or the file
            does not do what the policy does. Nothing is left at the path then, or what was there before.
        ImportError: If a package that the format needs is missing.

    Example:
        >>> import tempfile
        >>> from fp8rl_torchrl import ActorCritic, envs
        >>> env = envs.CustomEnv(num_envs=4, seed=0)
        >>> policy = ActorCritic.for_env(env).policy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_policy(policy, collect_observations(policy, env, 4), f"{folder}/policy.pt2")
        >>> report.outputs[0].name, report.outputs[0].same
        ('action', 1.0)
    """
    format = checked_format(path, format, overwrite=overwrite)
    actor = deterministic_actor(policy, precision)
    if observations.dim() < 1 or not len(observations):
        raise ExportError(f"a file is checked on at least one observation [N, ...]; got {list(observations.shape)}")
    tolerance = TOLERANCE[precision] if tolerance is None else tolerance
    if not tolerance >= 0:
        raise ExportError(f"tolerance must be >= 0; got {tolerance}")
    path, float8_outputs = Path(path), ()
    float8_layers = sum(isinstance(layer, Float8Linear) for layer in policy.modules())
    program = _trace(actor, observations[:1])
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".export-") as folder:
        written = Path(folder, path.name)
        if format == "onnx":
            write_onnx(program, actor.names, written)
        else:
            torch.export.save(program, written)
        outputs = _compare(written, policy, precision, observations, tolerance)
        if float8_layers:
            as_it_is = DeterministicActor(copy.deepcopy(policy), actor.key, actor.names).eval()
            float8_outputs = compare_exported(written, as_it_is, observations, None)
        size = written.stat().st_size
        os.replace(written, path)
    return ExportReport(
        path=str(path),
        format=format,
        precision=precision,
        bytes=size,
        observations=len(observations),
        tolerance=tolerance,
        outputs=outputs,
        float8_layers=float8_layers,
        float8_outputs=float8_outputs,
    )


def _trace(actor: DeterministicActor, observation: torch.Tensor) -> torch.export.ExportedProgram:
    """The actor as a program of tensor operations, for any batch size."""
    example = observation.repeat_interleave(2, 0)  # a size of 1 would be taken for a constant
    try:
        with torch.no_grad():
            program = torch.export.export(actor, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            program = program.run_decompositions({})  # autocast becomes explicit casts
    except Exception as error:  # whatever the tracer, or a module that it traces, raises
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"torch.export cannot trace this policy: {type(error).__name__}: {reason}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the folders of the machine that it was traced on
    return program


def _compare(
    path: Path, policy: nn.Module, precision: str, observations: torch.Tensor, tolerance: float
) -> tuple[OutputComparison, ...]:
    """Compare a file with the policy in FP32, and before that, more closely, in the file's own precision."""
    reference = deterministic_actor(policy)
    if precision == "fp32":
        return compare_exported(path, reference, observations, tolerance)
    own = deterministic_actor(policy, precision)
    compare_exported(path, own, observations, _OF_THE_SAME_PRECISION * tolerance)
    try:
        return compare_exported(path, reference, observations, tolerance)
    except ExportError as error:
        raise ExportError(
            f"{error}; {precision} is too coarse for this policy: export it in fp32, or allow more (--tolerance)"
        ) from None
