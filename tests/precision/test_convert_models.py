"""`convert` on models of every make: the layers that it chooses, and that the report is what runs."""

import warnings

import pytest
import torch
from converted_models import BATCH, LAST, MODELS, OBSERVATION, float8, observations
from float8_layers import watch
from reported_runs import assert_it_ran_as_reported
from torch import nn
from torchrl.modules import MultiAgentMLP

from fp8rl_torchrl.precision.convert import convert
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.mode import Precision

every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    torch.manual_seed(0)
    return MODELS[name].build()


def converted(name, base="bf16"):
    model, precision = build(name), Precision("fp8", base=base)
    return model, convert(model, precision), precision


@every_model
def test_the_layers_that_are_chosen_and_why_the_others_are_not(name):
    model, report, _ = converted(name)
    found = {layer.name: (layer.in_features, layer.out_features) for layer in report.converted}
    assert found == MODELS[name].float8
    assert {layer.name: layer.reason for layer in report.layers if layer.reason} == MODELS[name].alone
    assert set(float8(model)) == set(MODELS[name].float8)
    # Each linear layer is in the report once, in the order of the model.
    linears = [path for path, each in model.named_modules() if isinstance(each, nn.Linear)]
    assert [layer.name for layer in report.layers] == linears


@every_model
@pytest.mark.parametrize("base", ["bf16", "fp32"])
def test_each_layer_runs_as_reported(name, base, monkeypatch):
    if name == "lstm" and base == "bf16" and not runs_lstm_in_bf16():
        pytest.skip("this CPU has no LSTM in BF16: PyTorch raises also for a plain torch.nn.LSTM under autocast")
    model, report, precision = converted(name, base)
    products = watch(monkeypatch)

    def call(model):
        with warnings.catch_warnings(), precision.autocast("cpu"):
            warnings.simplefilter("ignore")
            return MODELS[name].call(model)

    assert_it_ran_as_reported(model, report, products, call, MODELS[name].fp32)
    formats = {layer.name: layer.format for layer in report.layers if layer.reason}
    assert formats == {path: "fp32" if path in MODELS[name].fp32 else base for path in MODELS[name].alone}


def runs_lstm_in_bf16():
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            nn.LSTM(8, 8)(torch.ones(2, 3, 8))
    except RuntimeError:
        return False
    return True


class Bypass(nn.Sequential):
    """Takes the weight of its first layer and multiplies itself."""

    def forward(self, x):
        if self.bypassed:
            hidden = nn.functional.linear(x, self[0].weight)
            for hook in self[0]._forward_pre_hooks.values():
                hook(self[0], (x,))
            for hook in self[0]._forward_hooks.values():
                hook(self[0], (x,), hidden)
            return self[2](self[1](hidden))
        return super().forward(x)


@pytest.mark.parametrize("lie", ["none", "plain instead of FP8", "FP8 instead of plain", "FP32 instead of BF16"])
def test_a_report_that_is_not_what_runs_is_found_out(lie, monkeypatch):
    model = Bypass(nn.Linear(OBSERVATION, 40), nn.Linear(40, 8), nn.Linear(8, 4))
    report = convert(model, "fp8")
    model.bypassed = lie == "plain instead of FP8"
    if lie == "FP8 instead of plain":
        model[1].__class__, model[1].recipe, model[1].backend = Float8Linear, "rowwise", "auto"
    if lie == "FP32 instead of BF16":
        model[1].forward = torch.autocast("cpu", enabled=False)(lambda x: nn.Linear.forward(model[1], x.float()))
    products = watch(monkeypatch)

    def call(model):
        with Precision("fp8").autocast("cpu"):
            return model(observations())

    if lie == "none":
        assert_it_ran_as_reported(model, report, products, call)
    else:
        with pytest.raises(AssertionError):
            assert_it_ran_as_reported(model, report, products, call)


@pytest.mark.parametrize(
    ("precision", "formats"),
    [
        ("fp8-tensorwise", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e5m2", "e4m3")]),
        ("fp8-rowwise", [("e4m3", "e4m3")] * 3),
        ("fp8-rowwise-gw-hp", [("e4m3", "e4m3")] * 2),
    ],
)
def test_each_recipe_multiplies_what_the_report_says(precision, formats, monkeypatch):
    model = nn.Sequential(nn.Linear(OBSERVATION, 40), nn.Linear(40, 4))
    report = convert(model, precision)
    products = watch(monkeypatch)
    with Precision(precision).autocast("cpu"):
        model(observations()).sum().backward()
    assert products.formats == formats
    assert report.precision == precision
    said = report.products.split(", ")
    for (left, right), words in zip(formats, said, strict=False):
        assert words.split(": ")[1].replace("/row", "").replace("/tensor", "") == f"{left} × {right}"
    assert ("high precision" in said[2]) == (len(formats) == 2)


def test_an_ensemble_that_holds_its_parameters_elsewhere(monkeypatch):
    model = MultiAgentMLP(OBSERVATION, 4, 3, centralized=False, share_params=False, num_cells=[40, 56])
    report = convert(model, "fp8")
    assert [(layer.in_features, layer.out_features) for layer in report.converted] == [(OBSERVATION, 40), (40, 56)]
    assert report.others == {}  # the stacked parameters are those of the layers
    products = watch(monkeypatch)
    model(torch.randn(BATCH, 3, OBSERVATION)).sum().backward()
    assert products.shapes[:2] == [
        ((3, BATCH, OBSERVATION), (3, 40, OBSERVATION)),
        ((3, BATCH, 40), (3, 56, 40)),
    ]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_never_leaves_a_layer_out_that_was_reported(gradients, training, monkeypatch):
    # In evaluation without gradients PyTorch's encoder layer calls none of its own layers.
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(encoder, nn.Linear(32, 48), nn.Linear(48, 4)).train(training)
    report = convert(model, "fp8")
    assert {layer.name: layer.reason for layer in report.layers} == {
        "0.self_attn.out_proj": "NonDynamicallyQuantizableLinear, a kind of its own",
        "0.linear1": "TransformerEncoderLayer uses its weight itself",
        "0.linear2": "TransformerEncoderLayer uses its weight itself",
        "1": None,
        "2": LAST,
    }
    assert report.others == {"MultiheadAttention": 1, "LayerNorm": 2}
    products = watch(monkeypatch)
    with torch.set_grad_enabled(gradients), Precision("fp8").autocast("cpu"):
        model(torch.randn(2, BATCH, 32))
    assert products.shapes == [((2 * BATCH, 32), (48, 32))]
