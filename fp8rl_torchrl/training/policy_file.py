"""Files of exported policies: read again, run, and compared with the policy that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8rl_torchrl.training._onnx import quiet, read_onnx, require_onnx

ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
"""The formats, and how the names of their files end."""
SCORES = ("logits", "action_value")
"""Outputs with a number for each discrete action, the greatest of which is taken."""

_BATCH = 1024


class ExportError(ValueError):
    """A policy cannot be exported, or a file does not do what the policy does."""


@dataclass(frozen=True, kw_only=True)
class OutputComparison:
    """How one output of a file compares with the policy's own on the same observations."""

    name: str
    """The output's name."""
    same: float | None
    """Of a discrete action, the share of observations where it is the very same; of other outputs None."""
    difference: float | None
    """The largest difference; of a discrete action None."""
    largest: float
    """The largest absolute value of the policy's own."""

    def __str__(self) -> str:
        """One line of a table."""
        if self.difference is None:
            return f"{self.name:<14}{self.same:>10.2%}  the same"
        return f"{self.name:<14}{self.difference:>10.2g}  largest difference, in values up to {self.largest:.3g}"


def checked_format(path: str | Path, format: str | None = None, *, overwrite: bool = False) -> str:
    """The format of a file that is to be written.

    Args:
        path: The file.
        format: ``torch`` or ``onnx``; None goes by the file's ending.
        overwrite: Whether it may exist.

    Raises:
        ExportError: If the format is unknown, the ending is not its own, the file exists, or its folder does not.
        ImportError: If a package that the format needs is missing.
    """
    path = Path(path)
    by_ending = next((name for name, ending in ENDINGS.items() if ending == path.suffix), None)
    if format is not None and format not in ENDINGS:
        raise ExportError(f"unknown format {format!r}; use one of {', '.join(ENDINGS)}")
    if by_ending is None or (format is not None and format != by_ending):
        wanted = ENDINGS[format] if format is not None else " (torch.export) or ".join(ENDINGS.values()) + " (ONNX)"
        raise ExportError(f"the file to write must end in {wanted}; got {path}")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists already; name another file, or ask for it to be overwritten (--overwrite)")
    if not path.absolute().parent.is_dir():
        raise ExportError(f"the folder {path.absolute().parent} does not exist")
    if by_ending == "onnx":
        require_onnx()
    return by_ending


def read_exported(path: str | Path) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """Read a policy that `fp8rl_torchrl.training.export.export_policy` wrote, to run it on the CPU.

    Args:
        path: The file; its ending, ``.pt2`` or ``.onnx``, says what it is.

    Returns:
        A function from observations ``[batch, ...]`` to the outputs by name, ``action`` first.

    Raises:
        ExportError: If the ending is another, or the file cannot be read.
        ImportError: If a package that the format needs is missing.
    """
    path = Path(path)
    if path.suffix not in ENDINGS.values():
        raise ExportError(f"an exported policy ends in {' or '.join(ENDINGS.values())}; got {path}")
    if path.suffix == ENDINGS["onnx"]:
        require_onnx()
    try:
        if path.suffix == ENDINGS["onnx"]:
            return read_onnx(path)
        with quiet("torch._export"):
            return torch.export.load(path).module()
    except Exception as error:  # whatever the two libraries raise
        raise ExportError(f"{path} cannot be read as an exported policy: {_first_line(error)}") from error


def compare_exported(
    path: str | Path,
    reference: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    observations: torch.Tensor,
    tolerance: float | None,
) -> tuple[OutputComparison, ...]:
    """Run a file and the policy on the same observations, in batches of different sizes.

    A number may differ by ``tolerance`` times the largest one of its output. A discrete action may be another only
    where the policy's own scores of the two are so close that such differences decide.

    Args:
        path: The file.
        reference: The policy, such as `fp8rl_torchrl.training.export.deterministic_actor` returns.
        observations: ``[N, ...]``.
        tolerance: As above; None compares and refuses nothing.

    Returns:
        One comparison an output.

    Raises:
        ExportError: If the file cannot be run on the observations, has other outputs, or differs by more than allowed
            or by what is no number.
    """
    run = read_exported(path)
    try:
        got = _in_batches(run, observations)
    except Exception as error:  # whatever the two libraries raise
        raise ExportError(f"the file cannot be run on these observations: {_first_line(error)}") from error
    expected = _in_batches(reference, observations)
    if _layout(got) != _layout(expected):
        raise ExportError(f"the file gives {_layout(got)}, the policy {_layout(expected)}")
    comparisons = tuple(_compare(name, expected[name], got[name]) for name in expected)
    if tolerance is not None:
        _refuse_other_actions(expected, got, tolerance)
        _refuse_other_numbers(comparisons, tolerance)
    return comparisons


def _in_batches(
    function: Callable[[torch.Tensor], dict[str, torch.Tensor]], observations: torch.Tensor
) -> dict[str, torch.Tensor]:
    batches = [observations[:1], *observations[1:].split(_BATCH)]  # one alone, since sizes of 1 get special treatment
    with torch.no_grad():
        outputs = [function(batch) for batch in batches if len(batch)]
    return {name: torch.cat([each[name] for each in outputs]) for name in outputs[0]}


def _layout(outputs: dict[str, torch.Tensor]) -> str:
    each = (f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in outputs.items())
    return ", ".join(each)


def _compare(name: str, expected: torch.Tensor, got: torch.Tensor) -> OutputComparison:
    largest = expected.double().abs().max().item()
    if expected.is_floating_point():
        difference = (got.double() - expected.double()).abs().max().item()
        return OutputComparison(name=name, same=None, difference=difference, largest=largest)
    same = (got == expected).reshape(len(got), -1).all(1).double().mean().item()
    return OutputComparison(name=name, same=same, difference=None, largest=largest)


def _refuse_other_actions(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor], tolerance: float) -> None:
    """Refuse discrete actions that are not the policy's, unless it scores them almost as high as its own."""
    mine, other = expected["action"], got["action"]
    if mine.is_floating_point() or torch.equal(mine, other):
        return
    scores = next((expected[name] for name in SCORES if name in expected), None)
    wrong = (mine != other).reshape(len(mine), -1).any(1)
    if scores is not None and mine.dim() == 1 and bool((other >= 0).all() and (other < scores.shape[-1]).all()):
        lost = (scores.gather(1, mine.unsqueeze(1)) - scores.gather(1, other.unsqueeze(1))).squeeze(1)
        wrong &= ~(lost <= 2 * tolerance * scores.abs().max())  # each of the two scores may be off by the tolerance
    if wrong.any():
        raise ExportError(
            f"the file does not do what the policy does: it takes another action in {int(wrong.sum()):,} of "
            f"{len(wrong):,} observations"
        )


def _refuse_other_numbers(comparisons: tuple[OutputComparison, ...], tolerance: float) -> None:
    for each in comparisons:
        allowed = tolerance * each.largest
        # Not "more than": a difference that is NaN is no small one.
        if each.difference is not None and not each.difference <= allowed:
            raise ExportError(
                f"the file does not do what the policy does: {each.name} differs by up to {each.difference:.2g}, and "
                f"{allowed:.2g} is allowed ({tolerance:.2g} of the largest value)"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
