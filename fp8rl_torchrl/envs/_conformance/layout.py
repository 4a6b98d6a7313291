"""What the specs promise about each entry of a TensorDict, and whether an entry keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, is_leaf_nontensor
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Stacked,
    StackedComposite,
    TensorSpec,
)
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs._conformance.findings import Findings

Key = str | tuple[str, ...]
Leaves = dict[Key, Any]


def leaves(data: TensorDictBase, *, without: set[str] | None = None) -> Leaves:
    """The entries of a TensorDict by (nested) key; a first key in ``without`` is left out."""
    found: Leaves = dict(data.items(True, True, is_leaf=is_leaf_nontensor))  # pyright: ignore[reportAssignmentType]
    if not without:
        return found
    return {key: value for key, value in found.items() if (key if isinstance(key, str) else key[0]) not in without}


def spec_leaves(spec: Composite | None) -> dict[Key, TensorSpec]:
    """The leaf specs of a Composite by (nested) key."""
    if spec is None:
        return {}
    return {key: spec[key] for key in spec.keys(True, True) if spec[key] is not None}


def show(key: object) -> str:
    """A key as a person would write it."""
    return repr(key)


class Layout:
    """The entries that an environment's specs promise.

    Args:
        env: The environment.
    """

    def __init__(self, env: EnvBase) -> None:
        self.env = env
        self.observation = spec_leaves(env.full_observation_spec)
        self.reward = spec_leaves(env.full_reward_spec)
        self.done = spec_leaves(env.full_done_spec)
        self.state = spec_leaves(env.full_state_spec)
        self.action = spec_leaves(env.full_action_spec)
        self.root = {**self.state, **self.observation, **self.done}
        self.next = {**self.observation, **self.reward, **self.done}
        specs = (env.full_observation_spec, env.full_reward_spec, env.full_done_spec, env.full_state_spec)
        self.ragged = any(map(_is_ragged, (*specs, env.full_action_spec)))
        self.has_parameters = any(parameter.requires_grad for parameter in env.parameters())
        self._good: dict[object, tuple[Key, ...]] = {}

    def promised(self, place: str) -> dict[Key, TensorSpec]:
        """The specs that hold at ``"root"`` or under ``"next"`` (state may also be returned under ``"next"``)."""
        return self.root if place == "root" else {**self.state, **self.next}

    def inspect(self, data: TensorDictBase, place: str, where: str, findings: Findings) -> Leaves:
        """Check keys, shapes, dtypes and devices of one TensorDict.

        Args:
            data: A TensorDict that reset returned, or the ``"next"`` one of a step.
            place: ``"root"`` or ``"next"``.
            where: The moment, for messages.
            findings: Where failures go.

        Returns:
            The entries that are tensors of the promised shape and dtype, fit for checks of their values.
        """
        # Also at the root: a step leaves its action there, and the next step overwrites it.
        found = leaves(data, without={"next"}) if place == "root" else leaves(data)
        signature = (place, data.batch_size, data.device, *((key, *_traits(value)) for key, value in found.items()))
        if signature in self._good:
            return {key: found[key] for key in self._good[signature]}
        before = findings.count
        sound = self._inspect(data, found, place, where, findings)
        if findings.count == before:
            self._good[signature] = tuple(sound)
        return sound

    def _inspect(self, data: TensorDictBase, found: Leaves, place: str, where: str, findings: Findings) -> Leaves:
        promised, needed = self.promised(place), self.root if place == "root" else self.next
        label = "at the root" if place == "root" else "under 'next'"
        for key in needed.keys() - found.keys():
            findings.fail("keys", f"{show(key)} is missing {label}, {where}; the specs declare it", (place, key))
        extra = found.keys() - promised.keys() - (self.action.keys() if place == "root" else set())
        for key in sorted(extra, key=str):
            findings.fail("keys", f"{show(key)} appears {label}, {where}; no spec declares it", (place, key))
        if self.env.batch_locked and data.batch_size != self.env.batch_size:
            message = f"the TensorDict {label} has batch_size {list(data.batch_size)}, {where}; the environment's is"
            findings.fail("shape", f"{message} {list(self.env.batch_size)}", (place, "batch_size"))
        if None not in (data.device, self.env.device) and data.device != self.env.device:
            message = f"the TensorDict {label} is on {data.device}, {where}; the environment is on {self.env.device}"
            findings.fail("device", message, (place, "device"))
        sound: Leaves = {}
        for key in promised.keys() & found.keys():
            value = found[key]
            if isinstance(value, torch.Tensor) and self._matches(value, promised[key], place, key, where, findings):
                sound[key] = value
        return sound

    def _matches(
        self, value: torch.Tensor, spec: TensorSpec, place: str, key: Key, where: str, findings: Findings
    ) -> bool:
        name, topic, sound = f"{show(key)} ({place}), {where},", (place, key), True
        expected = tuple(spec.shape)
        same = len(expected) == value.ndim and all(e in (-1, v) for e, v in zip(expected, value.shape, strict=True))
        if not same:
            findings.fail("shape", f"{name} has shape {list(value.shape)}; its spec says {list(expected)}", topic)
            sound = False
        if value.dtype != spec.dtype:
            findings.fail("dtype", f"{name} is {value.dtype}; its spec says {spec.dtype}", topic)
            sound = False
        device = spec.device if self.env.device is None else self.env.device
        if device is not None and value.device != _indexed(torch.device(device), value.device):
            findings.fail("device", f"{name} is on {value.device}; expected {device}", topic)
            sound = False
            sound = False
        if value.requires_grad and not self.has_parameters:
            findings.fail("detached", f"{name} requires grad, though the environment has no parameters", topic)
        return sound and not any(size < 0 for size in expected)


def _is_ragged(spec: TensorSpec) -> bool:
    """Whether a spec is, or holds, a lazy stack of specs."""
    inner = spec.values() if isinstance(spec, Composite) else ()
    return isinstance(spec, (Stacked, StackedComposite)) or any(map(_is_ragged, inner))


def _traits(value: Any) -> tuple[object, ...]:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return (type(value),)


def _indexed(expected: torch.device, actual: torch.device) -> torch.device:
    """``cuda`` without an index means the tensor's own index."""
    return actual if expected.type == actual.type and expected.index is None else expected


def same(a: Any, b: Any) -> bool:
    """Whether two entries are equal; NaN equals NaN. Accelerators are allowed float rounding, a CPU is not."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and repr(a) == repr(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if "meta" in (a.device.type, b.device.type):
        return a.device == b.device
    if torch.equal(a, b.to(a.device)):
        return True
    if not a.is_floating_point():
        return False
    exact = a.device.type == "cpu"
    return torch.allclose(a, b.to(a.device), rtol=0.0 if exact else 1e-4, atol=0.0 if exact else 1e-5, equal_nan=True)


def first_difference(a: Leaves, b: Leaves) -> Key | None:
    """The first key whose entries differ, or that only one of them has; None if all are the same."""
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in a or key not in b or not same(a[key], b[key]):
            return key
    return None


def check_values(values: torch.Tensor, spec: TensorSpec, name: str, moments: list[str], findings: Findings) -> None:
    """Check a stack of one entry's values against its spec.

    Args:
        values: ``[T, *spec.shape]``.
        spec: The entry's spec.
        name: The entry, for messages.
        moments: ``T`` descriptions of when each value was seen.
        findings: Where failures go.
    """
    if values.is_floating_point() or values.is_complex():
        nonfinite = ~torch.isfinite(values)
        if nonfinite.any():
            findings.fail("finite", _first(nonfinite, values, name, moments, "is not finite"), name)
            if isinstance(spec, Bounded):  # reported once: a value that is no number is in no range either
                values = torch.where(nonfinite, _box(spec)[0].to(values).expand_as(values), values)
    try:
        inside = bool(spec.expand(torch.Size([len(values), *spec.shape])).is_in(values))
    except Exception:  # a spec that does not expand
        inside = all(bool(spec.is_in(value)) for value in values)
    if not inside:
        bad, rule = _violations(values, spec)
        if bad is None or not bad.any():
            step = next((i for i, value in enumerate(values) if not spec.is_in(value)), 0)
            findings.fail("bounds", f"{name}, {moments[step]}, is {_short(values[step])}, not in its spec {rule}", name)
        else:
            findings.fail("bounds", _first(bad, values, name, moments, f"is outside {rule}"), name)


def _box(spec: Bounded) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of a bounded spec."""
    box: Any = spec.space
    return box.low, box.high


def _violations(values: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor | None, str]:
    """Where values break a spec's rule, ``[T, ...]``, and the rule in words."""
    if isinstance(spec, Bounded):
        low, high = (bound.to(values.device) for bound in _box(spec))
        return (values < low) | (values > high), f"its spec, [{_short(low)}, {_short(high)}]"
    if isinstance(spec, MultiCategorical):
        return (values < 0) | (values >= spec.nvec.to(values.device)), f"its spec, below {spec.nvec.tolist()}"
    if isinstance(spec, Categorical) and spec.mask is None:
        return (values < 0) | (values >= spec.space.n), f"its spec, categories 0 to {spec.space.n - 1}"
    if isinstance(spec, OneHot) and not isinstance(spec, MultiOneHot) and spec.mask is None:
        return values.sum(-1, keepdim=True).ne(1).expand_as(values), "its spec: one-hot vectors"
    return None, type(spec).__name__


def _first(bad: torch.Tensor, values: torch.Tensor, name: str, moments: list[str], verdict: str) -> str:
    index = [int(i) for i in bad.nonzero()[0]]
    steps = int(bad.flatten(1).any(1).sum()) if bad.ndim > 1 else int(bad.sum())
    element = f" element {index[1:]}" if len(index) > 1 else ""
    seen = values[tuple(index)].item()
    return f"{name}{element}, {moments[index[0]]}, is {seen}: it {verdict} ({steps} of {len(values)} there)"


def _short(value: torch.Tensor) -> str:
    if value.numel() == 1 or value.eq(value.flatten()[0]).all():
        return f"{value.flatten()[0].item():g}"
    text = str(value.tolist())
    return text if len(text) <= 80 else text[:77] + "..."


def extremes(spec: TensorSpec, limit: int = 64) -> Iterator[tuple[str, torch.Tensor]]:
    """The outermost values of an action's spec, or all of them where they are categories (at most ``limit``).

    Args:
        spec: The leaf spec of an action.
        limit: How many categories are tried.

    Yields:
        A description and a value of the spec's shape.
    """
    if isinstance(spec, Bounded):
        for label, bound in zip(("low", "high"), _box(spec), strict=True):
            if torch.isfinite(bound).all():
                yield f"its {label}est value", bound.to(spec.dtype).expand(spec.shape).clone()
    elif getattr(spec, "mask", None) is not None:
        return
    elif isinstance(spec, MultiCategorical):
        yield "all zeros", spec.zero()
        yield "the highest categories", (spec.nvec - 1).to(spec.zero()).expand(spec.shape).clone()
    elif isinstance(spec, Binary):
        yield "all zeros", spec.zero()
        yield "all ones", torch.ones_like(spec.zero())
    elif isinstance(spec, Categorical):
        for category in range(min(spec.space.n, limit)):
            yield f"category {category}", torch.full_like(spec.zero(), category)
    elif isinstance(spec, OneHot) and not isinstance(spec, MultiOneHot):
        for category in range(min(spec.space.n, limit)):
            value = torch.zeros_like(spec.zero())
            value[..., category] = 1
            yield f"category {category}", value
