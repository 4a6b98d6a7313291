"""`Float8Linear` on a GPU, native against emulated, captured and compiled; the other test_linear files run on a CPU."""

import pytest
import torch
from float8_layers import every_recipe, forward_and_backward, make, normal, relative, watch
from torch import func

M, K, N = 256, 512, 128
pytestmark = pytest.mark.gpu


@pytest.fixture
def data():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply FP8")
    return normal(M, K).cuda(), normal(M, N, seed=2).cuda()


def cuda(backend, recipe, seed=0):
    return make(K, N, recipe, seed, backend=backend).cuda()


def bits_of(products):
    return [codes for pair in products.bits for codes in pair]


@every_recipe
@pytest.mark.parametrize("autocast", [False, True])
def test_native_and_emulated_products_of_the_same_codes_agree(monkeypatch, data, recipe, autocast):
    results, codes = [], []
    for backend in ("native", "emulated"):
        with monkeypatch.context() as patched, torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            products = watch(patched)
            results.append(forward_and_backward(cuda(backend, recipe), *data))
        codes.append(bits_of(products))
    assert all(torch.equal(*pair) for pair in zip(*codes, strict=True))
    for native, emulated in zip(*results, strict=True):
        assert native.dtype == emulated.dtype
        # Hopper's accumulators keep about 14 bits; BF16 outputs keep 8.
        assert relative(native, emulated) < (2**-7 if autocast else 1e-3)


@every_recipe
def test_codes_on_a_gpu_are_those_on_a_cpu(monkeypatch, data, recipe):
    codes = []
    for device in ("cuda", "cpu"):
        with monkeypatch.context() as patched:
            products = watch(patched)
            layer = make(K, N, recipe, backend="emulated").to(device)
            forward_and_backward(layer, *(each.to(device) for each in data))
        codes.append([each.cpu() for each in bits_of(products)])
    assert all(torch.equal(*pair) for pair in zip(*codes, strict=True))


@every_recipe
@pytest.mark.parametrize("backend", ["native", "emulated"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_cuda_graph_multiplies_the_same_codes(monkeypatch, data, recipe, backend, autocast):
    layer, (x, g) = cuda(backend, recipe), data
    static = torch.zeros_like(x)

    def run(x):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            return forward_and_backward(layer, x, g)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with monkeypatch.context() as patched:
        captured = watch(patched)
        with torch.cuda.graph(graph):
            results = run(static)
    static.copy_(x)
    graph.replay()
    with monkeypatch.context() as patched:
        eager = watch(patched)
        expected = run(x)
    assert all(torch.equal(*pair) for pair in zip(bits_of(captured), bits_of(eager), strict=True))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    # A changed weight is cast anew at the next replay.
    with torch.no_grad():
        layer.weight.mul_(1.7)
    graph.replay()
    assert not torch.equal(results[0], expected[0])
    assert torch.equal(results[0], run(x)[0])


@every_recipe
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_is_eager(data, recipe, autocast):
    layer, (x, g) = cuda("native", recipe), data
    torch.compiler.reset()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = forward_and_backward(torch.compile(layer, fullgraph=True), x, g)
        expected = forward_and_backward(layer, x, g)
    # The gradient of an FP32 input may skip a last rounding to BF16.
    for value, reference, bound in zip(found, expected, (1e-5, 2**-8 if autocast else 1e-5, 1e-5), strict=True):
        assert relative(value, reference) <= bound


@every_recipe
@pytest.mark.parametrize("autocast", [False, True])
def test_an_ensemble_is_its_members(data, recipe, autocast):
    layers = [cuda("native", recipe, seed) for seed in range(3)]
    parameters, _ = func.stack_module_state(layers)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.no_grad():
        found = func.vmap(lambda p, x: func.functional_call(layers[0], p, (x,)), (0, None))(parameters, data[0])
        for index, layer in enumerate(layers):
            assert relative(found[index], layer(data[0])) < (2**-7 if autocast else 1e-5)
