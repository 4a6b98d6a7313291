"""`convert`: the report, what is refused, and converting again."""

import copy
import json

import pytest
import torch
from converted_models import LAST, SMALL, chain, float8, logits_actor
from float8_layers import watch
from torch import nn
from torchrl.modules import MLP, NoisyLinear, ValueOperator
from torchrl.objectives import A2CLoss

from fp8rl_torchrl.models.networks import Float32Head
from fp8rl_torchrl.precision.convert import ConversionError, convert
from fp8rl_torchrl.precision.mode import Precision


@pytest.fixture
def model():
    """Layers ``0``, ``2`` and ``4``, of which the first two are for FP8."""
    torch.manual_seed(0)
    return chain(24, 40, 56, 4)


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers if layer.reason}


def snapshot(module):
    """All that a conversion could change."""
    return [
        (name, id(each), type(each), sorted(vars(each)), [*map(id, each.parameters())], each.training)
        for name, each in module.named_modules()
    ]


# --- the report ---


def test_the_table():
    model = nn.Sequential(
        nn.Linear(24, 100), nn.LayerNorm(100), nn.Linear(100, 15), nn.Linear(15, 4), Float32Head(4, 2)
    )
    assert str(convert(model, "fp8")).splitlines() == [
        "layer   in  out  runs in                        left alone because",
        "0       24  100  e4m3/row × e4m3/row, emulated",
        "2      100   15  bf16                           a dimension under 16",
        "3       15    4  bf16                           a dimension under 16",
        "4        4    2  fp32                           last layer of a network",
        # 2400 of 2400 + 1500 + 60 + 8 = 3968, which is 60.5%, rounded down
        "fp8, emulated: 1 of 4 linear layers, 60% of their multiply-adds; ensembles: batched products",
        "output: e4m3/row × e4m3/row, grad_input: e4m3/row × e4m3/row, grad_weight: e4m3/row × e4m3/row",
        "not linear, so not in FP8: 1 LayerNorm",
    ]


def test_the_share_of_fp8():
    report = convert(chain(8, 64, 15, 17, 33, 100, 4), "fp8")
    assert [layer.name for layer in report.converted] == ["6", "8"]
    assert reasons(report) == {"0": SMALL, "2": SMALL, "4": SMALL, "10": LAST}
    fp8, total = 17 * 33 + 33 * 100, 8 * 64 + 64 * 15 + 15 * 17 + 17 * 33 + 33 * 100 + 100 * 4
    assert report.fp8_share == pytest.approx(fp8 / total) == pytest.approx(3861 / 5988)


@pytest.mark.parametrize("base", ["bf16", "fp32"])
def test_as_json(model, base):
    report = convert(model, Precision("fp8-tensorwise", base=base))
    read = json.loads(json.dumps(report.to_dict()))
    assert read == report.to_dict()
    assert read == {
        "precision": "fp8-tensorwise",
        "backend": "emulated",
        "products": report.products,
        "ensembles": "batched products",
        "layers": [
            {
                "name": "0",
                "in_features": 24,
                "out_features": 40,
                "format": "e4m3/tensor × e4m3/tensor, emulated",
                "reason": None,
            },
            {
                "name": "2",
                "in_features": 40,
                "out_features": 56,
                "format": "e4m3/tensor × e4m3/tensor, emulated",
                "reason": None,
            },
            {"name": "4", "in_features": 56, "out_features": 4, "format": base, "reason": LAST},
        ],
        "others": {},
        "fp8_share": pytest.approx((24 * 40 + 40 * 56) / (24 * 40 + 40 * 56 + 56 * 4)),
    }


def test_other_modules_are_counted_by_type():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm(8), nn.LSTM(8, 8), nn.GRUCell(8, 8)
    )
    model.extend([nn.MultiheadAttention(8, 2), nn.Embedding(3, 8), nn.Tanh(), *chain(24, 40, 4)])
    model.append(nn.LayerNorm(4, elementwise_affine=False))  # has no parameters
    assert convert(model, "fp8").others == {
        "Conv2d": 2,
        "BatchNorm2d": 1,
        "LayerNorm": 1,
        "LSTM": 1,
        "GRUCell": 1,
        "MultiheadAttention": 1,
        "Embedding": 1,
    }


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


def weight_normed(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def patched(layer):
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    ("odd", "reason", "format"),
    [
        (lambda: Float32Head(24, 24), "Float32Head, a kind of its own", "fp32"),
        (lambda: NoisyLinear(24, 24), "NoisyLinear, a kind of its own", "bf16"),
        (lambda: weight_normed(nn.Linear(24, 24)), "ParametrizedLinear, a kind of its own", "bf16"),
        (lambda: Doubled(24, 24), "Doubled, a kind of its own", "its own way"),
        (lambda: patched(nn.Linear(24, 24)), "its forward was replaced", "its own way"),
        (lambda: nn.LazyLinear(24), "no size yet: run the model once, then convert", "bf16"),
    ],
)
def test_kinds_of_their_own_stay_what_they_are(odd, reason, format):
    layer = odd()
    before = type(layer), sorted(vars(layer))
    model = nn.Sequential(layer, nn.Linear(24, 40), nn.Linear(40, 4))
    report = convert(model, "fp8")
    assert (report.layers[0].reason, report.layers[0].format) == (reason, format)
    assert (type(layer), sorted(vars(layer))) == before
    assert model[0] is layer
    assert report.others == {}  # the parts of a layer are none
    with Precision("fp8").autocast("cpu"):
        output = model[0](torch.ones(2, 24))
    if format in ("bf16", "fp32"):
        assert output.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[format]


def test_a_lazy_layer_is_converted_once_it_has_a_size():
    model = MLP(out_features=4, num_cells=[40, 56])
    assert reasons(convert(model, "fp8")) == {"0": "no size yet: run the model once, then convert", "4": LAST}
    model(torch.ones(2, 24))
    report = convert(model, "fp8")
    assert (report.layers[0].in_features, report.layers[0].out_features) == (24, 40)
    assert list(float8(model)) == ["0", "2"]


@pytest.mark.parametrize("width", [16, 17, 33, 100])
def test_widths_of_16_and_more_are_padded(width, monkeypatch):
    model = chain(width, width, 4)
    convert(model, "fp8")
    products = watch(monkeypatch)
    assert model(torch.ones(3, width)).isfinite().all()
    assert products.shapes == [((3, width), (width, width))]


@pytest.mark.parametrize("width", [1, 15])
def test_narrower_layers_stay(width):
    report = convert(
        nn.Sequential(nn.Linear(width, 40), nn.Linear(40, width), nn.Linear(24, 24), nn.Linear(24, 4)), "fp8"
    )
    assert reasons(report) == {"0": SMALL, "1": SMALL, "3": LAST}


# --- skip ---


@pytest.mark.parametrize(
    ("skip", "alone"),
    [
        ((), {}),
        ([], {}),
        (("0",), {"0": "matched by skip='0'"}),
        (["[2-9]"], {"2": "matched by skip='[2-9]'", "4": "matched by skip='[2-9]'"}),
        (("4", "0"), {"0": "matched by skip='0'", "4": "matched by skip='4'"}),
    ],
)
def test_skip(model, skip, alone):
    report = convert(model, "fp8", skip)
    assert reasons(report) == {"4": LAST} | alone
    assert list(float8(model)) == [name for name in ("0", "2") if name not in alone]


@pytest.mark.parametrize(
    ("skip", "error", "message"),
    [
        (("encodr.*",), ConversionError, r"skip='encodr\.\*' matches no linear layer; there are: 0, 2, 4$"),
        (("0", "1"), ConversionError, r"skip='1' matches no linear layer"),  # 1 is the Tanh
        (("",), ConversionError, r"skip='' matches no linear layer"),
        ("0", TypeError, r"got the string '0': write \('0',\)$"),
        (None, TypeError, r"skip takes a sequence of patterns on names, such as \('encoder\.\*',\); got None"),
        ((nn.Linear,), TypeError, "skip takes a sequence of patterns on names"),
        ((0,), TypeError, r"got \(0,\)"),
        (("*",), ConversionError, r"nothing to convert: .*\n  0: matched by skip='\*'\n  2: matched by"),
    ],
)
def test_a_wrong_skip_is_refused_and_nothing_changed(model, skip, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        convert(model, "fp8", skip)
    assert snapshot(model) == before


# --- what is refused ---


@pytest.mark.parametrize(
    ("module", "precision", "error", "message"),
    [
        (chain(24, 40, 4), "bf16", ValueError, "convert is for the fp8 precisions; 'bf16' needs no conversion"),
        (chain(24, 40, 4), "banana", ValueError, "unknown precision 'banana'"),
        ("fp8", chain(24, 40, 4), TypeError, "convert takes a torch.nn.Module, then a precision; got a str"),
        ([chain(24, 40, 4)], "fp8", TypeError, "got a list"),
        (nn.Linear(24, 40), "fp8", ConversionError, r"for a single layer use Float8Linear.from_linear\(layer\)"),
        (nn.LSTM(24, 40), "fp8", ConversionError, "nothing to convert: LSTM contains no linear layer"),
        (nn.Linear(24, 4), "fp8", ConversionError, "convert replaces layers inside a module"),
        (chain(24, 4), "fp8", ConversionError, "stay in high precision\n  0: last layer of a network$"),
        (
            chain(2, 15, 64, 4),
            "fp8",
            ConversionError,
            "\n  0: a dimension under 16\n  2: a dimension under 16\n  4: last",
        ),
        (chain(24, 40, 4).double(), "fp8", ConversionError, r"parameters of '0' are torch.float64; .*module.float\(\)"),
        (chain(24, 40, 4).bfloat16(), "fp8", ConversionError, "are torch.bfloat16"),
        (
            chain(24, 40, 4).to("meta"),
            Precision("fp8", backend="native"),
            RuntimeError,
            "no native FP8 products on meta .*use backend='emulated'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_and_unchanged(module, precision, error, message):
    before = snapshot(module) if isinstance(module, nn.Module) else None
    with pytest.raises(error, match=message):
        convert(module, precision)
    assert before is None or snapshot(module) == before


def test_a_loss_is_refused_with_advice():
    loss = A2CLoss(logits_actor(24, 40), ValueOperator(MLP(24, 1, num_cells=[40]), ["observation"]))
    with pytest.raises(ConversionError, match=r"A2CLoss contains no linear layer.*convert those"):
        convert(loss, "fp8")


def test_nothing_has_changed_if_the_second_layer_cannot_run():
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 40, device="meta"), nn.Linear(40, 4))
    convert(model, "fp8-tensorwise", skip=("0",))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no native FP8 products on meta"):
        convert(model, Precision("fp8", backend="native"))
    assert snapshot(model) == before
    assert model[1].recipe == "tensorwise"


# --- again ---


def test_converting_again_starts_afresh(model):
    plain, other = snapshot(model), copy.deepcopy(model)
    convert(model, "fp8-tensorwise", skip=("0",))
    assert (list(float8(model)), model[2].recipe) == (["2"], "tensorwise")
    report = convert(model, Precision("fp8", backend="emulated", base="fp32"), skip=("2",))
    assert (list(float8(model)), model[0].recipe, model[0].backend) == (["0"], "rowwise", "emulated")
    assert type(model[2]) is nn.Linear
    assert report == convert(other, Precision("fp8", backend="emulated", base="fp32"), skip=("2",))
    assert convert(model, "fp8") == convert(other, "fp8")  # skip=() matches nothing, whatever was skipped before
    # No trace is left on a layer that is plain again.
    convert(model, "fp8", skip=("0",))
    assert snapshot(model)[1] == plain[1]
    assert model[0].extra_repr() == "in_features=24, out_features=40, bias=True"


def test_a_refused_second_conversion_leaves_the_first(model):
    convert(model, "fp8", skip=("0",))
    before = snapshot(model)
    with pytest.raises(ConversionError):
        convert(model, "fp8-tensorwise", skip=("*",))
    assert snapshot(model) == before
    assert model[2].recipe == "rowwise"
