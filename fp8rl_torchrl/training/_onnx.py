"""ONNX files: written from a traced program, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram


def require_onnx() -> None:
    """Make sure that ONNX files can be written and run.

    Raises:
        ImportError: If a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")


def write_onnx(program: ExportedProgram, outputs: Sequence[str], path: Path) -> None:
    """Write a traced program of one input and a dictionary of outputs, and of any batch size."""
    example, _ = program.example_inputs or ((), {})
    with quiet("torch.onnx"):
        written: Any = torch.onnx.export(
            program,
            example,
            dynamo=True,
            input_names=["observation"],
            output_names=list(outputs),
            dynamic_shapes={"observation": {0: "batch"}},
            verbose=False,
        )
    _run_bf16_in_fp32(written.model)
    for node in written.model.graph:
        node.metadata_props.clear()  # how it was traced: longer than the program itself
    written.save(str(path), external_data=False)


def _run_bf16_in_fp32(model: Any) -> None:
    """Let every operation on BF16 values compute in FP32 and round its result to BF16, which stays stored as such.

    ONNX Runtime has no BF16 kernels for CPUs. A BF16 matrix product, too, sums in FP32 and rounds once, so the numbers
    are those of BF16.
    """
    import onnx_ir as ir

    def cast(value: Any, dtype: Any) -> Any:
        return ir.node("Cast", [value], attributes={"to": dtype})

    for node in list(model.graph):
        if node.op_type in ("Cast", "Constant"):
            continue
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                widened = cast(value, ir.DataType.FLOAT)
                model.graph.insert_before(node, widened)
                node.replace_input_with(place, widened.outputs[0])
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                readers = tuple(value.uses())
                value.dtype = ir.DataType.FLOAT
                rounded = cast(value, ir.DataType.BFLOAT16)
                rounded.outputs[0].dtype, rounded.outputs[0].shape = ir.DataType.BFLOAT16, value.shape
                model.graph.insert_after(node, rounded)
                for reader, place in readers:
                    reader.replace_input_with(place, rounded.outputs[0])


def read_onnx(path: Path) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function that runs a file of one input on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (observation,) = (each.name for each in session.get_inputs())
    names: Sequence[str] = [each.name for each in session.get_outputs()]

    def run(observations: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = session.run(names, {observation: observations.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

    return run


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Keep a logger's warnings back, which are about its own workings and not for the user."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
