"""Against torchao, an independent implementation: the same recipes, the same scales and codes, to the bit."""

import warnings

import pytest
import torch
from products import normal

from fp8rl_torchrl.precision.quantize import quantize, scale_for
from fp8rl_torchrl.precision.recipe import RECIPES, Cast

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao.float8", reason="torchao, the oracle of these tests, is not installed")
    from torchao.float8.config import Float8LinearConfig, ScalingGranularity, ScalingType
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.float8.float8_utils import amax_to_scale

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
CASTS = [
    Cast("e4m3", "row"),  # rowwise, and rowwise-gw-hp
    Cast("e4m3", "tensor"),  # the weight for grad_input in rowwise-gw-hp
    Cast("e4m3", "tensor", power_of_two=False),  # tensorwise
    Cast("e5m2", "tensor", power_of_two=False),  # gradients in tensorwise
    Cast("e5m2", "row"),
]
INPUTS = {
    "normal": normal(64, 96),
    "wide": normal(64, 96, seed=1) * 10.0 ** (torch.arange(64) % 60 - 30)[:, None],
    "tiny": normal(64, 96, seed=2) * 1e-13,
    "about the least amax": normal(64, 96, seed=3) * torch.linspace(1e-13, 1e-12, 64)[:, None],
    "subnormal": normal(64, 96, seed=4) * 1e-40,
    "huge": normal(64, 96, seed=5) * 5e37,
    "zeros": torch.zeros(4, 16),
    "rows of zeros": normal(64, 96, seed=6) * (torch.arange(64) % 2)[:, None],
    "bfloat16": normal(64, 96, seed=7).bfloat16(),
    "the ends of the range": torch.tensor([[448.0], [1.75], [57344.0], [1.0], [2.0**-20]]).expand(5, 16),
    "one element": torch.tensor([[-3.0]]),
}


def theirs(x, cast):
    found = hp_tensor_to_float8_dynamic(
        x,
        DTYPES[cast.format],
        LinearMMConfig(),
        scaling_granularity=ScalingGranularity.AXISWISE if cast.scaling == "row" else ScalingGranularity.TENSORWISE,
        axiswise_dim=-1 if cast.scaling == "row" else None,
        round_scales_to_power_of_2=cast.power_of_two,
    )
    return found._data, found._scale


@pytest.mark.parametrize("cast", CASTS, ids=lambda cast: f"{cast}-{cast.power_of_two}")
@pytest.mark.parametrize("name", INPUTS)
def test_the_same_scales_and_codes(name, cast):
    codes, scale = quantize(INPUTS[name], cast)
    expected, expected_scale = theirs(INPUTS[name], cast)
    assert torch.equal(scale.flatten(), expected_scale.flatten())
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def test_the_comparison_sees_a_difference():
    # The negative twin: the other rounding of scales differs from both.
    x = INPUTS["normal"]
    assert not torch.equal(quantize(x, Cast("e4m3", "row", power_of_two=False))[1], theirs(x, Cast("e4m3", "row"))[1])


def test_where_torchao_rounds_a_scale_up():
    # It takes log2 in FP32, which cannot tell 1.75 from the numbers right above it. So its scale lets them saturate,
    # by 2^-19 at most; ours never does. The numbers that the codes stand for are the same.
    amax = 1.75 + torch.arange(0, 64) * 2.0**-23
    ours, torchaos = scale_for(amax, "e4m3"), amax_to_scale(amax, torch.float8_e4m3fn, round_scales_to_power_of_2=True)
    differs = ours != torchaos
    assert not differs[0]
    assert differs[1]
    assert not differs[32:].any()
    assert torch.equal(ours[differs] * 2, torchaos[differs])
    assert (amax * torchaos > 448)[differs].all()
    assert (amax * ours <= 448).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_nan_here_but_may_be_finite_there(bad):
    x = torch.tensor([[1.0, bad]])
    assert quantize(x, Cast("e4m3", "row"))[0].float().isnan().all()
    # torchao scales by 448/inf = 0, so the finite numbers of the row become 0.
    assert theirs(x, Cast("e4m3", "row"))[0].float()[0, 0].isnan().item() is (bad != float("inf"))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_torchaos(name):
    theirs = {"rowwise-gw-hp": "rowwise_with_gw_hp"}.get(name, name)
    ours, config = RECIPES[name], Float8LinearConfig.from_recipe_name(theirs)
    granularity = {"row": ScalingGranularity.AXISWISE, "tensor": ScalingGranularity.TENSORWISE}
    products = {
        "output": (config.cast_config_input, config.cast_config_weight, config.gemm_config_output),
        "grad_input": (
            config.cast_config_grad_output,
            config.cast_config_weight_for_grad_input,
            config.gemm_config_grad_input,
        ),
        "grad_weight": (
            config.cast_config_grad_output_for_grad_weight,
            config.cast_config_input_for_grad_weight,
            config.gemm_config_grad_weight,
        ),
    }
    for product, (left, right, gemm_config) in products.items():
        gemm = getattr(ours, product)
        if gemm is None:
            assert left.scaling_type == right.scaling_type == ScalingType.DISABLED
            continue
        assert gemm.fast_accum == gemm_config.use_fast_accum
        for cast, their in ((gemm.left, left), (gemm.right, right)):
            assert their.scaling_type == ScalingType.DYNAMIC
            assert their.scaling_granularity == granularity[cast.scaling]
            assert their.target_dtype == DTYPES[cast.format]
            assert config.round_scales_to_power_of_2 == cast.power_of_two
