"""`read_space`: the options of a recipe that a search varies, read from text such as ``lr=log:1e-4:1e-2``."""

from __future__ import annotations

import difflib
import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fp8rl_torchrl.recipes.config import RecipeConfig
from fp8rl_torchrl.recipes.option_types import alternatives, read_value

FIXED = {
    "algo": "it decides which options there are: name it by --algo",
    "env": "it is the task: name it by --env",
    "seed": "every trial is trained with each of --seeds seeds, from --seed on",
    "target_return": "it is what trials are measured by",
}
"""Options that are not searched, and why."""

MAX_COMBINATIONS = 4096


class Suggests(Protocol):
    """The part of an ``optuna.Trial`` that chooses values."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """An integer between two."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number between two."""
        ...


@dataclass(frozen=True)
class Choices:
    """An option that takes one of some values."""

    name: str
    """The option."""
    values: tuple[Any, ...]
    """What it may be."""

    @property
    def labels(self) -> tuple[Any, ...]:
        """The values as a database can store them: widths of layers as text, such as ``64x64``."""
        return tuple(_label(value) for value in self.values)

    def suggest(self, trial: Suggests) -> Any:
        """The value that a trial is to use."""
        return self.decode(trial.suggest_categorical(self.name, self.labels))

    def decode(self, label: Any) -> Any:
        """The value of a label."""
        return self.values[self.labels.index(label)]

    def encode(self, value: Any) -> Any:
        """The label of a value.

        Raises:
            ValueError: If it is none of them.
        """
        if value not in self.values:
            raise ValueError(f"{self.name}={_label(value)} is none of {', '.join(map(str, self.labels))}")
        return _label(value)

    @property
    def probes(self) -> tuple[Any, ...]:
        """The values that stand for all when a space is checked."""
        return self.values

    def describe(self) -> list[Any]:
        """What it is, as JSON-compatible values."""
        return list(self.labels)


@dataclass(frozen=True)
class Range:
    """An option that takes any value between two, both included; whole numbers if both are ``int``."""

    name: str
    """The option."""
    low: float
    """The smallest value."""
    high: float
    """The largest value."""
    log: bool
    """Whether every order of magnitude is as likely as the next."""

    def suggest(self, trial: Suggests) -> Any:
        """The value that a trial is to use."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def decode(self, value: Any) -> Any:
        """The value itself."""
        return value

    def encode(self, value: Any) -> Any:
        """The value itself.

        Raises:
            ValueError: If it is out of range.
        """
        if value is None or not self.low <= value <= self.high:
            raise ValueError(f"{self.name}={value} is not between {self.low} and {self.high}")
        return value

    @property
    def probes(self) -> tuple[Any, ...]:
        """The values that stand for all when a space is checked."""
        return self.low, self.high

    def describe(self) -> list[Any]:
        """What it is, as JSON-compatible values."""
        return ["log" if self.log else "linear", self.low, self.high]


@dataclass(frozen=True)
class SearchSpace:
    """The options that a search varies."""

    dimensions: tuple[Choices | Range, ...]
    """One for each option."""

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """The options of a trial."""
        return {each.name: each.suggest(trial) for each in self.dimensions}

    def decode(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a trial's stored parameters stand for."""
        return {each.name: each.decode(parameters[each.name]) for each in self.dimensions}

    def encode(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the space, perhaps not all of them, as the parameters that are stored.

        Raises:
            ValueError: If one is not searched, or lies outside of the space.
        """
        known = {each.name: each for each in self.dimensions}
        if strangers := [name for name in options if name not in known]:
            raise ValueError(f"{strangers[0]} is not searched; the space has {', '.join(known)}")
        return {name: known[name].encode(value) for name, value in options.items()}

    def grid(self) -> dict[str, list[Any]]:
        """The stored parameters of a grid: every choice of every option.

        Raises:
            ValueError: If an option has a range, which has no points.
        """
        for each in self.dimensions:
            if isinstance(each, Range):
                raise ValueError(
                    f"a grid needs the points of {each.name}: write {each.name}={each.low},{each.high} "
                    "with all that are to be tried"
                )
        return {each.name: list(each.labels) for each in self.dimensions if isinstance(each, Choices)}

    def describe(self) -> dict[str, list[Any]]:
        """What is searched, as JSON-compatible values."""
        return {each.name: each.describe() for each in self.dimensions}


def read_space(config: RecipeConfig, specs: Sequence[str]) -> SearchSpace:
    """Read a search space, and make sure that the recipe can take what is in it.

    Args:
        config: The configuration whose options are varied; those that are not keep its values.
        specs: One text for each option: ``NAME=LOW:HIGH``, ``NAME=log:LOW:HIGH`` or ``NAME=A,B,C``, in the type of the
            option. Widths of layers are joined by an x: ``hidden=64,64x64``.

    Returns:
        The space.

    Raises:
        ValueError: If a text cannot be read, names no option of the recipe, or has a value that the recipe refuses with
            every combination of the other options' values.

    Example:
        >>> from fp8rl_torchrl.recipes import ActorCriticConfig
        >>> read_space(ActorCriticConfig(), ["lr=log:1e-4:1e-2", "hidden=64,64x64"]).describe()
        {'lr': ['log', 0.0001, 0.01], 'hidden': ['64', '64x64']}
    """
    if not specs:
        raise ValueError("nothing to search: name options and their values, such as lr=log:1e-4:1e-2 hidden=64,128")
    space = SearchSpace(tuple(_read_dimension(name, _kind(config, name), text) for name, text in _split(specs)))
    for each in space.dimensions:
        others = [other for other in space.dimensions if other is not each]
        for value in each.probes:
            _refuse_impossible(config, {each.name: value}, others)
    return space


def read_options(config: RecipeConfig, specs: Sequence[str]) -> dict[str, Any]:
    """Read options of a recipe, each as ``NAME=VALUE``.

    Raises:
        ValueError: If a text cannot be read, or names no option of the recipe.
    """
    return {name: read_value(name, _kind(config, name), text) for name, text in _split(specs)}


def _split(specs: Iterable[str]) -> list[tuple[str, str]]:
    pairs = []
    for spec in specs:
        name, equals, text = spec.partition("=")
        if not (name and equals and text):
            raise ValueError(f"{spec!r} does not say NAME=VALUES, such as lr=log:1e-4:1e-2 or hidden=64,128")
        pairs.append((name.replace("-", "_"), text))
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is given twice")
    return pairs


def _kind(config: RecipeConfig, name: str) -> Any:
    """The type of an option, which `typing` resolves from its annotation."""
    known = config.to_dict()
    if name in FIXED and name in known:
        raise ValueError(f"{name} cannot be searched: {FIXED[name]}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(set(known) - set(FIXED)))}"
        raise ValueError(f"{known.get('algo', 'the recipe')} has no option {name!r}; {hint}")
    return typing.get_type_hints(type(config))[name]


def _read_dimension(name: str, kind: Any, text: str) -> Choices | Range:
    numbers = {int, float} & set(alternatives(kind))
    if ":" not in text or not numbers:
        values = tuple(read_value(name, kind, each) for each in text.split(","))
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{name} names {_label(repeated[0])} twice")
        return Choices(name, values)
    *scale, low_text, high_text = text.split(":")
    if scale not in ([], ["log"]):
        raise ValueError(f"{name}={text} is no range: write LOW:HIGH or log:LOW:HIGH")
    number = float if float in numbers else int
    low, high = (read_value(name, number, each) for each in (low_text, high_text))
    if not low < high:
        raise ValueError(f"{name}={text} is no range: {low} is not below {high}")
    if scale and low <= 0:
        raise ValueError(f"{name}={text} is no range of orders of magnitude: it must start above 0")
    return Range(name, low, high, bool(scale))


def _label(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _refuse_impossible(config: RecipeConfig, options: dict[str, Any], others: Sequence[Choices | Range]) -> None:
    """Raise what the recipe says of some options, unless it takes them together with values of the others."""
    combinations = itertools.product(*([(each.name, value) for value in each.probes] for each in others))
    refusal = None
    for combination in itertools.chain([()], itertools.islice(combinations, MAX_COMBINATIONS)):
        try:
            replace(config, **options, **dict(combination))
        except ValueError as error:
            refusal = refusal or error
        else:
            return
    (name, value), *_ = options.items()
    raise ValueError(f"{name}={_label(value)} cannot be tried: {refusal}")
