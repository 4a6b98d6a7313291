"""Which number format each part of learning runs in, and the FP8 products that some of them use."""

from fp8rl_torchrl.precision.capability import Float8Capability, float8_capability
from fp8rl_torchrl.precision.convert import ConversionError, ConversionReport
from fp8rl_torchrl.precision.error import ErrorReport, ModuleError, TensorError, quantization_error
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.mode import Precision
from fp8rl_torchrl.precision.recipe import RECIPES, Float8Recipe
from fp8rl_torchrl.precision.twin import Twin

__all__ = [
    "RECIPES",
    "ConversionError",
    "ConversionReport",
    "ErrorReport",
    "Float8Capability",
    "Float8Linear",
    "Float8Recipe",
    "ModuleError",
    "Precision",
    "TensorError",
    "Twin",
    "float8_capability",
    "quantization_error",
]
