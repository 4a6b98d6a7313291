"""The FP32 head under every autocast, and the encoder."""

import pytest
import torch
from torch import nn

from fp8rl_torchrl.models.networks import Float32Head, mlp_encoder
from fp8rl_torchrl.models.normalize import Normalize, RunningStatistics

LOW = [torch.bfloat16, torch.float16]


def random_features(dtype=torch.float32):
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_computes_in_fp32(head, dtype):
    """Under autocast the head gives exactly what FP32 arithmetic gives for the same features."""
    features = random_features(dtype)
    expected = torch.addmm(head.bias, features.float(), head.weight.t())
    with torch.autocast("cpu", dtype=dtype):
        output = head(features)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", LOW)
def test_the_head_computes_in_fp32_under_autocast(dtype):
    assert_computes_in_fp32(Float32Head(64, 3), dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_a_plain_linear_layer_does_not(dtype):
    with pytest.raises(AssertionError):
        assert_computes_in_fp32(nn.Linear(64, 3), dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_casting_the_output_of_a_plain_layer_would_be_too_late(dtype):
    # A state value near 100 has a resolution of 0.5 in BF16 and 0.0625 in FP16.
    class CastAfterwards(nn.Linear):
        def forward(self, features):
            return super().forward(features).float()

    with pytest.raises(AssertionError):
        assert_computes_in_fp32(CastAfterwards(64, 3), dtype)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_the_head_takes_features_of_any_dtype_outside_autocast(dtype):
    head, features = Float32Head(64, 3), random_features(dtype)
    assert head(features).dtype == torch.float32
    assert torch.equal(head(features), head(features.float()))


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_through_the_head_reach_the_features_and_the_weights(dtype):
    head, features = Float32Head(64, 3), random_features(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        total = head(features).sum()
    total.backward()
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(head.weight.grad, features.float().sum(0).expand(3, 64))
    torch.testing.assert_close(features.grad, head.weight.sum(0).to(dtype).expand(32, 64))


def test_the_head_leaves_autocast_as_it_was():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Float32Head(64, 3)(random_features())
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("gain", [1.0, 0.01])
def test_the_head_starts_orthogonal_with_its_gain(gain):
    head = Float32Head(64, 3, gain)
    torch.testing.assert_close(head.weight @ head.weight.t(), gain**2 * torch.eye(3), rtol=0, atol=1e-5 * gain**2)
    assert not head.bias.any()


def test_the_encoder_is_layers_each_with_an_activation():
    encoder = mlp_encoder(5, (32, 16), nn.ReLU)
    assert [type(layer) for layer in encoder] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
    assert [(layer.in_features, layer.out_features) for layer in list(encoder)[::2]] == [(5, 32), (32, 16)]
    assert encoder(torch.ones(4, 3, 5)).shape == (4, 3, 16)


def test_an_encoder_with_statistics_normalises_first():
    statistics = RunningStatistics(5)
    statistics.update(torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    torch.manual_seed(0)
    encoder = mlp_encoder(5, (32, 16), nn.ReLU, statistics)
    torch.manual_seed(0)
    plain = mlp_encoder(5, (32, 16), nn.ReLU)
    assert [type(layer) for layer in encoder] == [Normalize, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
    assert encoder[0].statistics is statistics
    observation = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(encoder(observation), plain(Normalize(statistics)(observation)))
    assert not torch.equal(encoder(observation), plain(observation))


@pytest.mark.parametrize(("activation", "gain"), [(nn.Tanh, 5 / 3), (nn.ReLU, 2**0.5)])
def test_the_encoder_starts_orthogonal_with_the_gain_of_its_activation(activation, gain):
    layer = mlp_encoder(4, (32,), activation)[0]
    torch.testing.assert_close(layer.weight.t() @ layer.weight, gain**2 * torch.eye(4), rtol=0, atol=1e-5)
    assert not layer.bias.any()


@pytest.mark.parametrize("hidden", [(), (0,), (64, -1)])
def test_an_encoder_without_layers_is_refused(hidden):
    with pytest.raises(ValueError, match="hidden must name at least one layer, each at least 1 wide"):
        mlp_encoder(4, hidden)


@pytest.mark.parametrize("hidden", [64, [16.5], (), (8, 0)])
def test_widths_that_make_no_network_are_refused(hidden):
    with pytest.raises(ValueError, match=r"each at least 1 wide, as in \(64, 64\); got"):
        mlp_encoder(2, hidden)
