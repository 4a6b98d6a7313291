"""`Precision`: which names there are, what each computes in, and that nothing of it leaks out."""

import contextlib
import dataclasses
import pickle
import warnings

import pytest
import torch
from torch import nn

from fp8rl_torchrl.precision.mode import Precision, has_tf32
from fp8rl_torchrl.precision.recipe import RECIPES

NAMES = ("fp32", "tf32", "bf16", "fp16")
FP8 = {
    "fp8": "rowwise",
    "fp8-rowwise": "rowwise",
    "fp8-tensorwise": "tensorwise",
    "fp8-rowwise-gw-hp": "rowwise-gw-hp",
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def autocast(name):
    """The precision's autocast on the CPU, without tf32's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Precision(name).autocast("cpu"):
            yield


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(64, 64)


@pytest.fixture
def features():
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*NAMES, *FP8])
def test_every_name_is_accepted_and_kept(name):
    assert Precision(name).name == name
    assert Precision.names() == (*NAMES, *FP8)


@pytest.mark.parametrize("name", ["banana", "FP16", "float16", "", "auto", "fp4", None, "fp8-banana"])
def test_an_unknown_name_is_refused_with_the_names(name):
    with pytest.raises(
        ValueError, match=r"unknown precision .*; use one of fp32, tf32, bf16, fp16, fp8, .*fp8-rowwise-gw-hp$"
    ) as error:
        Precision(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", FP8)
def test_an_fp8_name_stands_for_a_recipe_on_a_base(name):
    assert Precision(name).fp8_recipe == FP8[name]
    assert Precision(name).fp8_recipe in RECIPES
    assert Precision(name).autocast_dtype == torch.bfloat16
    assert Precision(name, base="fp32").autocast_dtype is None
    assert not Precision(name).scales_loss


@pytest.mark.parametrize("name", NAMES)
def test_the_others_have_no_recipe(name):
    assert Precision(name).fp8_recipe is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fp8", {"base": "fp16"}, "base must be 'bf16' or 'fp32'; got 'fp16'"),
        ("fp8", {"backend": "fast"}, "backend must be 'auto', 'native' or 'emulated'; got 'fast'"),
        ("bf16", {"base": "fp32"}, "options of the fp8 precisions; 'bf16' has neither"),
        ("fp32", {"backend": "native"}, "options of the fp8 precisions; 'fp32' has neither"),
    ],
)
def test_options_of_fp8_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        Precision(name, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init_scale": 0.0}, "init_scale must be > 0"),
        ({"init_scale": -1.0}, "init_scale must be > 0"),
        ({"init_scale": float("nan")}, "init_scale must be > 0"),
        ({"init_scale": float("inf")}, "init_scale must be > 0 and finite"),
        ({"growth_interval": 0}, "growth_interval must be >= 1"),
    ],
)
def test_senseless_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Precision("fp16", **wrong)


def test_an_immutable_value():
    precision = Precision("bf16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        precision.name = "fp16"
    assert precision == Precision("bf16")
    assert precision != Precision("fp16")
    assert precision != Precision("bf16", init_scale=2.0)
    assert len({Precision("bf16"), Precision("bf16"), Precision("fp16")}) == 2
    assert pickle.loads(pickle.dumps(precision)) == precision


def test_the_arguments_are_kept_as_given():
    precision = Precision("fp16", init_scale=8.0, growth_interval=3)
    assert dataclasses.asdict(precision) == {
        "name": "fp16",
        "init_scale": 8.0,
        "growth_interval": 3,
        "base": "bf16",
        "backend": "auto",
    }


def test_of_takes_a_name_or_a_precision():
    precision = Precision("fp16", init_scale=8.0)
    assert Precision.of(precision) is precision
    assert Precision.of("fp16") == Precision("fp16")
    with pytest.raises(ValueError, match="unknown precision"):
        Precision.of("banana")


def test_only_fp16_scales_the_loss():
    assert [name for name in NAMES if Precision(name).scales_loss] == ["fp16"]


@pytest.mark.parametrize("name", NAMES)
def test_layers_compute_in_the_format(layer, features, name):
    reference = layer(features)
    with autocast(name):
        output = layer(features)
    assert output.dtype == DTYPES[name]
    error = ((output.float() - reference).norm() / reference.norm()).item()
    # BF16 has 8 bits of significand and FP16 11: relative errors of about 2^-9 and 2^-12.
    low, high = {"bf16": (1e-3, 6e-3), "fp16": (1e-4, 8e-4)}.get(name, (0.0, 0.0))
    assert low <= error <= high
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_of_the_parameters_are_fp32(layer, features, name):
    with autocast(name):
        loss = layer(features).float().square().mean()
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32


def test_autocast_dtype():
    assert {name: Precision(name).autocast_dtype for name in NAMES} == {
        "fp32": None,
        "tf32": None,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }


def test_tf32_without_the_hardware_says_so_and_computes_fp32(layer, features):
    reference = layer(features)
    with (
        pytest.warns(UserWarning, match="cpu has no TF32: precision 'tf32' runs FP32 there") as caught,
        Precision("tf32").autocast("cpu"),
    ):
        output = layer(features)
    assert torch.equal(output, reference)
    assert caught[0].filename == __file__  # it points at the caller


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_others_warn_of_nothing(layer, features, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Precision(name).autocast("cpu"):
            layer(features)


def test_a_cpu_has_no_tf32():
    assert not has_tf32("cpu")
    assert not has_tf32(torch.device("cpu"))


@pytest.mark.gpu
def test_tf32_on_a_gpu_that_has_it():
    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256, device="cuda")
    before, reference = torch.backends.cuda.matmul.allow_tf32, a @ b
    if not has_tf32("cuda"):
        pytest.skip("the GPU has no TF32")
    with Precision("tf32").autocast("cuda"):
        output = a @ b
    # TF32 has 11 bits of significand.
    assert 1e-5 < ((output - reference).norm() / reference.norm()).item() < 2e-3
    assert torch.backends.cuda.matmul.allow_tf32 == before
    assert torch.equal(a @ b, reference)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_leaks_out_of_the_block(layer, features, name, fails):
    reference = layer(features)
    with contextlib.suppress(KeyError), autocast(name):
        layer(features)
        if fails:
            raise KeyError
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(layer(features), reference)


# Torch's own blocks fail at 16 bits within 16 bits: they keep the casts of weights until the outermost block ends.
@pytest.mark.parametrize("outer", ["bf16", "fp16"])
@pytest.mark.parametrize("inner", ["fp32", "tf32", "bf16", "fp16"])
def test_the_innermost_block_decides_and_the_outer_one_comes_back(layer, features, outer, inner):
    with autocast(outer):
        with autocast(inner):
            assert layer(features).dtype == DTYPES[inner]
        assert layer(features).dtype == DTYPES[outer]


def test_a_changed_weight_is_seen_by_the_next_block(layer, features):
    # Autocast caches the casts of weights; the cache must end with the block.
    with autocast("bf16"):
        before = layer(features)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    with autocast("bf16"):
        assert not layer(features).any()
    assert before.any()
