"""What `OptimStep` refuses, before the first update changes anything."""

import pytest
import torch
from losses import NAN, Loss, adam, bits, by_key, gradient_of, linear, two_losses
from tensordict import TensorDict
from torch import nn

from fp8rl_torchrl import OptimStep


def test_a_loss_that_reaches_the_parameters_of_another_optimizer_is_refused():
    loss = two_losses(shared=True)
    before = bits(loss.state_dict())
    with pytest.raises(ValueError, match=r"'loss_b' reaches parameters that belong to the optimizer of 'loss_a'"):
        OptimStep(loss, by_key(loss), "fp16")(gradient_of(1.0, 1.0))
    assert bits(loss.state_dict()) == before


def test_a_non_fused_optimizer_is_refused_with_the_fix():
    loss = linear()
    with pytest.raises(ValueError, match=r"build it as torch.optim.AdamW\(..., fused=True\)"):
        OptimStep(loss, torch.optim.AdamW(loss.parameters()), "fp32")
    with pytest.raises(ValueError, match="not fused"):
        OptimStep(loss, torch.optim.RMSprop(loss.parameters()), "fp32")


def test_a_shared_parameter_is_refused():
    loss = two_losses()
    both = adam([*loss.model["a"].parameters(), *loss.model["b"].parameters()])
    with pytest.raises(ValueError, match=r"optimizers of 'loss_a' and 'loss_b' share a parameter of shape \(1, 1\)"):
        OptimStep(loss, {"loss_a": both, "loss_b": adam(loss.model["b"].parameters())}, "fp32")


@pytest.mark.parametrize("keys", [("loss_a",), ("loss_a", "loss_c"), ("loss_a", "b")])
def test_loss_keys_that_do_not_match_are_refused(keys):
    loss = two_losses()
    parts = list(loss.model.values())
    step = OptimStep(loss, {key: adam(part.parameters()) for key, part in zip(keys, parts, strict=False)}, "fp32")
    with pytest.raises(ValueError, match=r"the loss returned \['loss_a', 'loss_b'\], but the optimizers are keyed by"):
        step(gradient_of(1.0, 1.0))


@pytest.mark.parametrize("constant", [True, False], ids=["a constant", "of other parameters"])
def test_a_loss_that_reaches_none_of_its_parameters_is_refused(constant):
    elsewhere = nn.Linear(2, 1)
    loss = Loss(nn.Linear(1, 1), lambda model, batch: torch.ones(()) if constant else elsewhere.weight.sum())
    with pytest.raises(ValueError, match="'loss' does not depend on any parameter of its optimizer"):
        OptimStep(loss, adam(loss.parameters()), "fp32")(TensorDict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_that_are_not_float32_are_refused(dtype):
    loss = linear().to(dtype)
    with pytest.raises(ValueError, match=f"must be float32 master weights; found {dtype}"):
        OptimStep(loss, adam(loss.parameters()), "fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
        ({"max_grad_norm": NAN}, "max_grad_norm must be > 0"),
        ({"accumulate": 0}, "accumulate must be >= 1"),
        ({"precision": "fp64"}, "unknown precision 'fp64'; use one of fp32"),
        ({"precision": "fp8"}, "no Float8Linear layer"),
        ({"optimizer": {}}, "give one optimizer"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    loss = linear()
    arguments = {"optimizer": adam(loss.parameters()), "precision": "fp32", **options}
    with pytest.raises(ValueError, match=message):
        OptimStep(loss, arguments.pop("optimizer"), arguments.pop("precision"), **arguments)


def test_sgd_that_cannot_skip_its_first_step_is_refused():
    loss = linear()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9, dampening=0.1, fused=True)
    with pytest.raises(ValueError, match="drop dampening"):
        OptimStep(loss, optimizer, "fp32")


def test_a_target_updater_of_another_kind_is_refused():
    loss = linear()
    with pytest.raises(TypeError, match="must be a SoftUpdate or a HardUpdate; got function"):
        OptimStep(loss, adam(loss.parameters()), "fp32", target_updater=lambda: None)


def test_what_is_no_loss_no_optimizer_or_no_switch_is_refused():
    loss = linear()
    optimizer = adam(loss.parameters())
    for given in ((optimizer, loss), (loss, "adam"), (loss, [optimizer])):
        with pytest.raises(TypeError, match="OptimStep takes a loss, then an optimizer"):
            OptimStep(*given, "fp32")
    for option in ("compile", "cudagraph"):
        with pytest.raises(TypeError, match="compile and cudagraph must be True or False"):
            OptimStep(loss, optimizer, "fp32", **{option: "off"})


def test_a_loss_module_without_losses_is_refused():
    loss = Loss(nn.Linear(1, 1), lambda model, batch: {"objective": model.weight.sum()})
    with pytest.raises(ValueError, match=r"no entry that starts with 'loss', only \['objective'\]"):
        OptimStep(loss, adam(loss.parameters()), "fp32")(TensorDict())
