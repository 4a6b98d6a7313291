"""`FlatParameter`: one parameter in the place of many, which train exactly as they would themselves."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import BAD, INF, Loss, adam, bits, data, gradient_of, linear
from torch import nn

import fp8rl_torchrl as f8
from fp8rl_torchrl import OptimStep, Precision
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.training.flat import FlatParameter, leaves_of


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def error(model, batch):
    return (model(batch["x"])[:, :2].float() - batch["y"]).square().mean()


def regression(seed=0):
    return Loss(network(seed), error)


def of_whole_vectors(seed=0):
    """Parameters whose sizes are multiples of 16.

    On a CPU, torch's fused kernels round the last few numbers of a tensor, which fill no vector register, otherwise
    than the rest: for all other sizes the parts and the whole differ by an ulp here and there.
    """
    torch.manual_seed(seed)
    loss = Loss(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16)), error)
    assert all(parameter.numel() % 16 == 0 for parameter in loss.parameters())
    return loss


# ------------------------------------------------------------------------------------------------------------ views


def test_what_changes_in_one_changes_in_the_other():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    weight = model.weight
    flat = FlatParameter(model.parameters())
    assert isinstance(flat, nn.Parameter)
    assert flat.requires_grad
    assert flat.tolist() == [1.0, 2.0, 3.0]
    with torch.no_grad():
        flat[1] = 7.0
        model.bias.fill_(8.0)
    assert model.weight.tolist() == [[1.0, 7.0]]
    assert flat.tolist() == [1.0, 7.0, 8.0]
    assert model.weight is weight, "the module keeps its parameters"


def test_a_copy_is_no_view():
    """Negative twin: a concatenation alone would not do."""
    model = nn.Linear(2, 1)
    copied = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    with torch.no_grad():
        copied.fill_(7.0)
    assert not (model.weight == 7.0).any()


@given(shapes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_order_shapes_and_names_stay(shapes):
    torch.manual_seed(0)
    model = nn.ParameterDict({f"p{place}": nn.Parameter(torch.randn(shape)) for place, shape in enumerate(shapes)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = FlatParameter(model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(flat, torch.cat([value.reshape(-1) for value in before.values()]))
    assert flat.views == list(model.parameters())


def test_a_transposed_parameter_keeps_its_values():
    parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    assert not parameter.is_contiguous()
    flat = FlatParameter([parameter])
    assert parameter.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert flat.tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


def test_the_gradient_of_the_whole_is_that_of_its_parts():
    model = nn.Linear(2, 1)
    flat = FlatParameter(model.parameters())
    assert flat.gather([torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])]).tolist() == [1.0, 2.0, 3.0]
    assert flat.gather([None, torch.tensor([3.0])]).tolist() == [0.0, 0.0, 3.0]
    with pytest.raises(ValueError, match="argument"):
        flat.gather([None])


def test_losses_depend_on_the_views():
    model, other = nn.Linear(2, 1), nn.Parameter(torch.zeros(1))
    flat = FlatParameter(model.parameters())
    found = leaves_of([flat, other])
    assert [id(leaf) for leaf in found] == [id(leaf) for leaf in (*model.parameters(), other)]


# -------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_flattened_is_refused():
    free, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    half = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    far = nn.Parameter(torch.zeros(2, device="meta"))
    before = free.data_ptr()
    for parameters, message in (
        ([], "no parameters to flatten"),
        ([free, free], "occurs twice"),
        ([free, frozen], "frozen; flatten only what is trained"),
        ([free, half], r"must be float32 and on one device; got .*bfloat16"),
        ([half], "must be float32"),
        ([free, far], "one device; got .*cpu.*meta"),
    ):
        with pytest.raises(ValueError, match=message):
            FlatParameter(parameters)
    assert free.data_ptr() == before, "nothing was changed"


def test_a_module_is_not_its_parameters():
    with pytest.raises(TypeError, match=r"give the module's parameters: FlatParameter\(Linear.parameters\(\)\)"):
        FlatParameter(torch.nn.Linear(2, 2))


def test_a_parameter_that_left_is_noticed():
    def new_tensor(model):
        model[2].weight.data = model[2].weight.data.clone()

    for tear in (lambda model: model.to(torch.float64), new_tensor):
        model = network()
        flat = FlatParameter(model.parameters())
        flat.refuse_if_torn()
        tear(model)
        with pytest.raises(RuntimeError, match=r"no longer a view .*would not be trained: build the FlatParameter"):
            flat.refuse_if_torn()
    # What loads weights the usual way writes into the views.
    model = network()
    flat = FlatParameter(model.parameters())
    model.load_state_dict(network(seed=1).state_dict())
    flat.refuse_if_torn()
    assert torch.equal(flat, torch.cat([p.detach().reshape(-1) for p in network(seed=1).parameters()]))
    loss = regression()
    step = OptimStep(loss, adam([FlatParameter(loss.parameters())]), "fp32")
    loss.model.load_state_dict(network(seed=1).state_dict(), assign=True)  # other parameters altogether
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        step(data())


def test_a_step_on_torn_parameters_is_refused():
    loss = regression()
    step = OptimStep(loss, adam([FlatParameter(loss.parameters())]), "fp32")
    loss.model[0].weight.data = loss.model[0].weight.data.clone()
    with pytest.raises(RuntimeError, match="no longer a view"):
        step(data())
    assert step.updates == 0

    loss = regression()
    step = OptimStep(loss, adam([FlatParameter(loss.parameters())]), "fp32")
    step(data())
    loss.model[0].weight.data = loss.model[0].weight.data.clone()
    with pytest.raises(RuntimeError, match="no longer a view"):
        step.load_state_dict(step.state_dict())


# ------------------------------------------------------------------------------------------------------- training


def both(loss, precision, optimizer=adam, **options):
    """The same loss twice: stepped by its parameters, and by one flat parameter."""
    flat = copy.deepcopy(loss)
    rate = {"lr": 0.01, **options.pop("optimizer_options", {})}
    plain_step = OptimStep(loss, optimizer(loss.parameters(), **rate), precision, **options)
    flat_step = OptimStep(flat, optimizer([FlatParameter(flat.parameters())], **rate), precision, **options)
    return loss, plain_step, flat, flat_step


def same_parameters(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, fused=True, **options)


@pytest.mark.parametrize(
    ("optimizer", "optimizer_options"),
    [(adam, {}), (adam, {"weight_decay": 0.1}), (adamw, {"weight_decay": 0.1}), (adam, {"amsgrad": True})],
    ids=["adam", "decay", "adamw", "amsgrad"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_as_the_parameters_would_bit_for_bit(precision, optimizer, optimizer_options):
    loss, plain, flat, flattened = both(of_whole_vectors(), precision, optimizer, optimizer_options=optimizer_options)
    for seed in range(200):
        expected, found = plain(data(seed=seed)), flattened(data(seed=seed))
        assert torch.equal(expected["loss"], found["loss"]), seed
        assert torch.allclose(expected["grad_norm"], found["grad_norm"], rtol=1e-6)
        assert same_parameters(loss, flat), seed
    assert not same_parameters(flat, of_whole_vectors())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_of_other_sizes_differ_by_rounding_alone(precision):
    loss, plain, flat, flattened = both(regression(), precision)
    for seed in range(10):
        plain(data(seed=seed))
        flattened(data(seed=seed))
    for ours, theirs in zip(flat.parameters(), loss.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_another_optimizer_trains_differently():
    """Negative twin: that all bits agree says that both take the same steps."""
    loss, plain, flat, _ = both(of_whole_vectors(), "fp32")
    other = OptimStep(flat, adam([FlatParameter(flat.parameters())], lr=0.01, weight_decay=1e-3), "fp32")
    for seed in range(5):
        plain(data(seed=seed))
        other(data(seed=seed))
    assert not same_parameters(loss, flat)


def test_clipping_by_hand():
    """Of one linear layer with the gradient (3, 4), clipped to the norm 1, both move by (0.6, 0.8)."""
    loss = linear()
    flat = FlatParameter(loss.parameters())
    step = OptimStep(loss, torch.optim.SGD([flat], lr=1.0, fused=True), "fp32", max_grad_norm=1.0)
    metrics = step(gradient_of(3.0, 4.0))
    assert metrics["grad_norm"] == 5.0
    assert loss.model.weight[0].tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)


def test_clipped_it_trains_as_the_parameters_would():
    # The norm of one vector and the norm of the norms of its parts are rounded differently, by an ulp; Adam hardly
    # depends on the size of a gradient.
    loss, plain, flat, flattened = both(regression(), "fp32", max_grad_norm=0.1)
    for seed in range(100):
        assert plain(data(seed=seed))["grad_norm"] > 0.1, "nothing to clip: this would prove nothing"
        flattened(data(seed=seed))
    for ours, theirs in zip(flat.parameters(), loss.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_with_a_loss_scale_and_skipped_steps_it_trains_as_the_parameters_would():
    precision = Precision("fp16", init_scale=2.0**16, growth_interval=3)
    loss, plain, flat, flattened = both(of_whole_vectors(), precision)
    for seed in range(40):
        batch = data(seed=seed)
        if seed % 7 == 3:
            batch["y"][0, 0] = INF
        expected, found = plain(batch), flattened(batch)
        for name in ("skipped", "loss_scale"):
            assert torch.equal(expected[name], found[name])
        assert same_parameters(loss, flat)
    assert flattened.skipped_steps == plain.skipped_steps >= 6
    assert flattened.updates == plain.updates > 20


@pytest.mark.parametrize("name", BAD)
def test_a_skipped_step_changes_nothing(name):
    loss = linear()
    flat = FlatParameter(loss.parameters())
    optimizer = adam([flat], lr=0.1)
    step = OptimStep(loss, optimizer, Precision("fp16", init_scale=8.0))
    step(gradient_of(1.0, -1.0))
    before = bits([flat, optimizer.state[flat]])
    step(BAD[name])
    assert bits([flat, optimizer.state[flat]]) == before
    assert (int(step.updates), int(step.skipped_steps)) == (1, 1)


def test_gradients_are_accumulated():
    loss, plain, flat, flattened = both(of_whole_vectors(), "fp32", accumulate=3)
    for seed in range(12):
        plain(data(seed=seed))
        flattened(data(seed=seed))
    assert flattened.updates == 4
    assert same_parameters(loss, flat)


def test_saved_and_restored_it_goes_on_as_if_it_had_never_stopped():
    def fresh(seed):
        loss = regression(seed)
        step = OptimStep(loss, adam([FlatParameter(loss.parameters())], lr=0.01), "fp32", max_grad_norm=0.5)
        return loss, step

    whole, step = fresh(0)
    for seed in range(8):
        if seed == 4:
            saved = copy.deepcopy([whole.state_dict(), step.state_dict()])
        step(data(seed=seed))

    resumed, again = fresh(1)
    again(data(seed=99))
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.updates == 4
    for seed in range(4, 8):
        again(data(seed=seed))
    assert bits([resumed.state_dict(), again.state_dict()]) == bits([whole.state_dict(), step.state_dict()])

    # Negative twin: without the moments it goes on differently.
    forgetful, again = fresh(1)
    forgetful.load_state_dict(saved[0])
    for seed in range(4, 8):
        again(data(seed=seed))
    assert bits(forgetful.state_dict()) != bits(whole.state_dict())


@pytest.mark.parametrize("recipe", ["fp8", "fp8-tensorwise", "fp8-rowwise-gw-hp"])
def test_a_converted_agent_trains_as_its_parameters_would(recipe):
    torch.manual_seed(0)
    env = CustomEnv(num_envs=8, seed=0)
    agent = f8.ActorCritic.for_env(env, hidden=(32, 32))
    f8.convert(agent, f8.Precision(recipe))
    rollout = env.rollout(8, agent.policy).flatten().detach()
    _, plain, flat, flattened = both(ReplayedActorCriticLoss(agent), recipe)
    assert any(isinstance(module, Float8Linear) for module in flat.modules())
    before = copy.deepcopy(flat.state_dict())
    for _ in range(20):
        expected, found = plain(rollout)["loss_critic"], flattened(rollout)["loss_critic"]
        assert torch.allclose(found, expected, rtol=1e-2)  # where an ulp moves a number to the next code
    assert all(not torch.equal(flat.state_dict()[name], value) for name, value in before.items())
    # A rollout keeps the codes of a weight; they follow the flat parameter.
    with torch.no_grad():
        old = flat.actor_critic.policy(rollout.clone())["logits"]
    flattened(rollout)
    with torch.no_grad():
        new = flat.actor_critic.policy(rollout.clone())["logits"]
    assert not torch.equal(old, new)
