"""What ``auto`` stands for: numbers by hand, reasons in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8rl_torchrl.recipes import A2CConfig, ActorCriticConfig, PPOConfig
from fp8rl_torchrl.recipes.choices import COMPILATION, choose

AUTO = {"collector": "auto", "compile": "auto", "cudagraph": "auto"}


def chosen(options=None, **given):
    run = {"native": True, "device": "cpu", "collections": 1000, "steps": 32, "updates": 1, **given}
    return choose({**AUTO, **(options or {})}, **run)


# An eager step and an eager update take about 1 ms, a compilation 45 s; compiled is what takes more than 90 s.


@pytest.mark.parametrize(
    ("collections", "steps", "updates", "seconds", "compiled"),
    [
        (1000, 32, 1, 33, "off"),  # 1000 x (32 + 1) ms
        (1000, 32, 58, 90, "off"),  # exactly twice the compilation does not repay it
        (1000, 32, 59, 91, "on"),
        (1000, 90, 1, 91, "on"),
        (10_000, 8, 24, 320, "on"),
        (1, 1, 1, 0, "off"),
    ],
)
def test_long_runs_are_compiled(collections, steps, updates, seconds, compiled):
    options, reasons = chosen(collections=collections, steps=steps, updates=updates)
    fused = {"on": "fused", "off": "torchrl"}[compiled]
    assert options == {"compile": compiled, "collector": fused, "cudagraph": "off"}
    assert COMPILATION == 45
    length = f"uncompiled, it takes {seconds} s or more, and compiling alone about 45 s"
    assert reasons[0] == f"compile {compiled}: {length}"
    assert reasons[1].startswith(f"collector {fused}: ")
    assert len(reasons) == 2


def test_other_environments_are_collected_by_torchrls_collector():
    for collections, compiled in ((10, "off"), (100_000, "on")):
        options, reasons = chosen(native=False, collections=collections)
        assert options == {"compile": compiled, "collector": "torchrl", "cudagraph": "off"}
        assert reasons[1] == "collector torchrl: the environment has no pure functions"


def test_a_collector_follows_a_given_compile():
    on, reasons = chosen({"compile": "on"}, collections=1)
    assert (on["collector"], on["compile"]) == ("fused", "on")
    assert [reason.split()[0] for reason in reasons] == ["collector"]
    off, _ = chosen({"compile": "off"}, collections=1_000_000)
    assert (off["collector"], off["compile"]) == ("torchrl", "off")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_captures_what_is_compiled(device):
    for collections, on in ((1, "off"), (100_000, "on")):
        options, reasons = chosen(device=device, collections=collections)
        assert options["compile"] == options["cudagraph"] == on
        assert reasons[-1] == f"cudagraph {on}: as compile"


def test_a_cpu_captures_nothing():
    options, reasons = chosen({"compile": "on"}, device="cpu")
    assert options["cudagraph"] == "off"
    assert not any(reason.startswith("cudagraph") for reason in reasons)


@given(
    collector=st.sampled_from(["torchrl", "fused"]),
    compile=st.sampled_from(["on", "off"]),
    cudagraph=st.sampled_from(["on", "off"]),
    native=st.booleans(),
    collections=st.integers(1, 10**6),
)
def test_what_is_given_is_kept_and_needs_no_reason(collector, compile, cudagraph, native, collections):
    options = {"collector": collector, "compile": compile, "cudagraph": cudagraph}
    assert chosen(options, native=native, collections=collections) == (options, [])


@given(
    options=st.fixed_dictionaries(
        {
            "collector": st.sampled_from(["auto", "torchrl", "fused"]),
            "compile": st.sampled_from(["auto", "on", "off"]),
            "cudagraph": st.sampled_from(["auto", "on", "off"]),
        }
    ),
    native=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
    collections=st.integers(1, 10**6),
)
def test_nothing_stays_open_and_each_decision_has_its_reason(options, native, device, collections):
    before = dict(options)
    found, reasons = chosen(options, native=native, device=device, collections=collections)
    assert options == before, "what was given is not written to"
    assert "auto" not in found.values()
    named = {reason.split()[0]: reason.split()[1].rstrip(":") for reason in reasons}
    assert len(named) == len(reasons)
    expected = {name for name, value in options.items() if value == "auto"} - (
        {"cudagraph"} if device == "cpu" else set()
    )
    assert set(named) == expected
    assert all(found[name] == value for name, value in named.items())


# --------------------------------------------------------------------------------------------------- of each recipe


@pytest.mark.parametrize(
    ("config", "seconds", "compiled"),
    [
        # 2000 episodes of 100 steps make 196 collections of 1024 frames: 8 steps of 128 environments, 24 updates
        (ActorCriticConfig(), 6, "off"),
        # 367 collections of 8192 frames: 8 steps of 1024 environments, one update
        (A2CConfig(), 3, "off"),
        (A2CConfig(num_envs=8, frames_per_collection=40, total_frames=1_000_000), 150, "on"),  # 25,000 x 6 ms
        # 123 collections of 4096 frames: 64 steps of 64 environments, 4 epochs of 8 minibatches
        (PPOConfig(), 12, "off"),
        (PPOConfig(total_frames=50_000_000), 1172, "on"),  # 12,208 x 96 ms
    ],
)
def test_recipes_count_their_own_calls(config, seconds, compiled):
    options, reasons = config.chosen("cpu")
    assert options["compile"] == compiled
    assert (
        reasons[0] == f"compile {compiled}: uncompiled, it takes {seconds:,} s or more, and compiling alone about 45 s"
    )


def test_what_was_chosen_is_what_is_run():
    """The reasons that are printed before a configuration is resolved are those of the choice."""
    for config in (PPOConfig(total_frames=3_900_000), PPOConfig(total_frames=3_700_000)):
        resolved = config.resolved()
        assert config.chosen("cpu")[0]["compile"] == resolved.compile
    assert PPOConfig(total_frames=3_900_000, device="cpu").resolved().compile == "on"  # 953 x 96 ms = 91.5 s
    assert PPOConfig(total_frames=3_700_000, device="cpu").resolved().compile == "off"  # 904 x 96 ms = 86.8 s


def test_the_collector_is_fused_only_where_there_are_pure_functions():
    long = {"num_envs": 8, "frames_per_collection": 40, "total_frames": 1_000_000, "device": "cpu"}
    assert A2CConfig(env="CartPole-v1", **long).resolved().collector == "fused"
    assert A2CConfig(env="gymnasium:Acrobot-v1", **long).resolved().collector == "torchrl"
    assert A2CConfig(env="gymnasium:Acrobot-v1", **long).resolved().compile == "on"
    with pytest.raises(ValueError, match="Acrobot-v1 has none: use torchrl"):
        A2CConfig(env="gymnasium:Acrobot-v1", collector="fused")
