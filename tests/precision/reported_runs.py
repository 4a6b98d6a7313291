"""What shows that a `ConversionReport` told the truth: the products that each layer ran."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from converted_models import BATCH
from float8_layers import Products
from tensordict import TensorDictBase
from torch import nn

from fp8rl_torchrl.precision.convert import ConversionReport


def outputs(result: Any) -> list[torch.Tensor]:
    """The differentiable tensors that a model returned."""
    if isinstance(result, TensorDictBase):
        result = [result[key] for key in result.keys(True, True) if key != "observation"]
    result = [result] if isinstance(result, torch.Tensor) else list(result)
    return [tensor for tensor in result if tensor.requires_grad]


def assert_it_ran_as_reported(
    model: nn.Module, report: ConversionReport, products: Products, call: Callable[[Any], Any], fp32: Any = ()
) -> None:
    """Run a model forward and backward, and hold against its report what each layer multiplied.

    Args:
        model: The converted model.
        report: Its report.
        products: What `float8_layers.watch` notes.
        call: Runs the model, each layer once and on `BATCH` rows, under the precision's autocast.
        fp32: The layers that run in FP32 under every base.
    """
    during: dict[str, tuple[list[Any], torch.dtype]] = {}
    with contextlib.ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                start: list[int] = []
                hooks.callback(layer.register_forward_pre_hook(lambda *_, s=start: s.append(len(products))).remove)
                note = lambda _, __, y, n=name, s=start: during.update({n: (products.shapes[s[-1] :], y.dtype)})  # noqa: E731
                hooks.callback(layer.register_forward_hook(note).remove)
        results = outputs(call(model))
    forward = len(products)
    assert during.keys() == {layer.name for layer in report.layers}
    base = {"bf16": torch.bfloat16, "fp32": torch.float32}
    backward: Counter[Any] = Counter()
    for layer in report.layers:
        n, k = layer.out_features, layer.in_features
        multiplied, dtype = during[layer.name]
        if layer.reason is None:
            assert layer.format == "e4m3/row × e4m3/row, emulated"
            assert multiplied == [((BATCH, k), (n, k))], layer.name
            backward.update([((BATCH, n), (k, n)), ((n, BATCH), (k, BATCH))])
        else:
            assert not multiplied, layer.name
            assert dtype == base[layer.format], layer.name
            assert (layer.name in fp32) <= (layer.format == "fp32")
    assert forward == len(report.converted)  # nothing else multiplied codes
    sum(each.float().square().sum() for each in results).backward()
    assert Counter(products.shapes[forward:]) == backward
    assert set(products.formats) == {("e4m3", "e4m3")}
