"""Compare this package with the libraries that a user would pick instead: trained frames a second, side by side.

Every peer is a program of its own in ``peers/``, run in a process of its own, pinned to one core with one thread, and
timed after its imports, its construction and a warm-up. The peers take turns, so that a drift of the machine's speed
meets all of them alike; ratios are those of one turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from peers_report import plot, table
from timing import make_room, write_records
from tqdm import tqdm

from fp8rl_torchrl.training.run_folder import made_with

PROGRAMS = {
    "ours": "ours",
    "sb3": "sb3",
    "skrl": "skrl_peer",
    "tianshou": "tianshou_peer",
    "torchrl": "torchrl_plain",
    "compiled": "torch_compiled",
}
"""The program of each peer; none has the name of a library, which it would hide."""
TASKS = ("customenv", "cartpole")
ALGORITHMS = ("a2c", "ppo", "replay")
PRECISIONS = {"ours": ("fp32", "bf16"), "compiled": ("fp32", "bf16")}
"""What each peer is run in; the others run in fp32."""
REPLAY_PEERS = ("ours", "torchrl")
REPLAY_SETTING = "128x8"


class Run(NamedTuple):
    """What is run in one turn of one peer."""

    task: str
    algo: str
    setting: str
    """Environments x steps of a rollout."""
    peer: str
    precision: str

    @property
    def where(self) -> tuple[str, str, str]:
        """What runs of different peers must share to be compared."""
        return self.task, self.algo, self.setting


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and where the results go."""

    tasks: tuple[str, ...] = TASKS
    """customenv, cartpole or both."""
    algos: tuple[str, ...] = ("a2c",)
    """a2c, ppo, and replay: the actor-critic on a replay buffer, whose updates are counted."""
    peers: tuple[str, ...] = tuple(PROGRAMS)
    """Some of ours, sb3, skrl, tianshou, torchrl (plain) and compiled (plain PyTorch)."""
    settings: tuple[str, ...] = ("1024x32", "64x32", "8x5")
    """Environments x steps of a rollout, as in 64x32; replay runs with 128x8."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Of ours and of the compiled loop; the others run in fp32."""
    activation: str = "tanh"
    """Of every peer's networks: tanh or relu."""
    repeats: int = 5
    """Turns of each peer; medians count."""
    seconds: float = 3.0
    """About how long a turn is timed."""
    frames: int | None = None
    """Frames of each turn, instead of a time."""
    seed: int = 0
    """Of the first turn; each further one adds 1."""
    python: tuple[str, ...] = ()
    """Interpreters, as in skrl=/path/to/python; the others run in this one."""
    core: int | None = None
    """The core to pin every peer to; default: the last one that this process may use."""
    limit: float = 600.0
    """Seconds after which a turn is ended and counts as failed; a cold compilation takes minutes."""
    out: str = "benchmarks/results/peers"
    """Results go to OUT.jsonl (a record a turn, appended) and OUT.png."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for given, known, what in (
            (self.tasks, TASKS, "task"),
            (self.algos, ALGORITHMS, "algorithm"),
            (self.peers, tuple(PROGRAMS), "peer"),
            (self.precisions, ("fp32", "bf16"), "precision"),
            ((self.activation,), ("tanh", "relu"), "activation"),
        ):
            if unknown := sorted(set(given) - set(known)):
                raise ValueError(f"unknown {what} {', '.join(unknown)}; use some of {', '.join(known)}")
        if self.repeats < 1 or not self.seconds > 0 or not self.limit > 0:
            raise ValueError("repeats must be >= 1, seconds and limit > 0")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be >= 1; got {self.frames}")
        for setting in self.settings:
            sizes(setting)
        interpreters(self.python)


def sizes(setting: str) -> tuple[int, int]:
    """Environments and steps of a setting.

    Raises:
        ValueError: If it is not two positive integers with an x between.
    """
    parts = setting.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"a setting is ENVSxSTEPS, as in 64x32; got {setting!r}")
    return int(parts[0]), int(parts[1])


def interpreters(named: tuple[str, ...]) -> dict[str, str]:
    """The interpreter of each peer that has one of its own.

    Raises:
        ValueError: If an entry is not PEER=PATH, or its interpreter does not exist.
    """
    found = {}
    for entry in named:
        peer, _, path = entry.partition("=")
        if peer not in PROGRAMS or not path:
            raise ValueError(f"--python takes PEER=PATH with a peer of {', '.join(PROGRAMS)}; got {entry!r}")
        if not Path(path).is_file():
            raise ValueError(f"--python {entry}: there is no such interpreter")
        found[peer] = path
    return found


def plan(options: Options) -> list[Run]:
    """The runs of one turn; what is compared stands together."""
    runs = []
    for task in options.tasks:
        for algo in options.algos:
            for setting in (REPLAY_SETTING,) if algo == "replay" else options.settings:
                for peer in options.peers:
                    if algo == "replay" and peer not in REPLAY_PEERS:
                        continue
                    for precision in PRECISIONS.get(peer, ("fp32",)):
                        if peer not in PRECISIONS or precision in options.precisions:
                            runs.append(Run(task, algo, setting, peer, precision))
    return runs


def command(run: Run, options: Options, repeat: int) -> list[str]:
    """The command line of one turn."""
    num_envs, steps = sizes(run.setting)
    program = Path(__file__).parent / "peers" / f"{PROGRAMS[run.peer]}.py"
    arguments = {
        "task": run.task,
        "algo": run.algo,
        "num-envs": num_envs,
        "steps": steps,
        "precision": run.precision,
        "activation": options.activation,
        "seconds": options.seconds,
        "seed": options.seed + repeat,
    }
    if options.frames is not None:
        arguments["frames"] = options.frames
    python = interpreters(options.python).get(run.peer, sys.executable)
    return [python, str(program), *(f"--{name}={value}" for name, value in arguments.items())]


def take_turn(words: list[str], core: int | None, limit: float) -> dict[str, Any]:
    """Run one program to its end.

    Args:
        words: The command line.
        core: The core that it is pinned to, with all that it starts.
        limit: Seconds after which it is ended.

    Returns:
        What it printed, or ``failure`` with the reason.
    """
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
    try:
        done = subprocess.run(
            words,
            env=os.environ | threads | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=limit,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {limit:g} s"}
    except OSError as error:
        return {"failure": f"did not start: {error}"}
    return result_of(done.returncode, done.stdout, done.stderr)


def result_of(code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """What a program that ended has reported: its last line of JSON, or why there is none."""
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                break
    last = (stderr.strip().splitlines() or ["without a word"])[-1]
    return {"failure": f"ended with code {code}: {last}"}


def pinned_core(wanted: int | None) -> int | None:
    """The core to pin to; None where the system cannot pin.

    Raises:
        ValueError: If this process may not use the core that is wanted.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    usable = os.sched_getaffinity(0)
    if wanted is not None and wanted not in usable:
        raise ValueError(f"core {wanted} cannot be used here; there are {', '.join(map(str, sorted(usable)))}")
    return max(usable) if wanted is None else wanted


def allocator() -> dict[str, str]:
    """What the environment says about memory, which the peers inherit: reusing big blocks makes big batches faster."""
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "LD_PRELOAD"}


def main(argv: list[str]) -> int:
    """Run the comparison.

    Returns:
        The exit code: 0, also where a peer is not installed; 1 if nothing could be measured; 2 for bad input.
    """
    try:
        options = tyro.cli(Options, description=__doc__, args=argv)
        core = pinned_core(options.core)
        out = Path(options.out)
        make_room(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment, records = made_with() | {"allocator": allocator()}, []
    runs, failures = plan(options), dict[Run, str]()
    print("processor time of one thread" + (", not pinned" if core is None else f", pinned to core {core}"))
    turns = [(repeat, run) for where in dict.fromkeys(run.where for run in runs) for repeat in range(options.repeats)
             for run in runs if run.where == where]  # fmt: skip
    for repeat, run in tqdm(turns, unit=" turns", dynamic_ncols=True):
        if run in failures:  # it would fail again
            continue
        result = take_turn(command(run, options, repeat), core, options.limit)
        if "failure" in result:
            failures[run] = result["failure"]
        record = {"config": asdict(options), "core": core, "repeat": repeat, **run._asdict(), "result": result}
        records.append(record | environment)
        write_records(out.with_suffix(".jsonl"), records[-1:])
    print(table(records))
    plot(records, out.with_suffix(".png"))
    print(f"\n{len(records)} records in {out.with_suffix('.jsonl')}, picture {out.with_suffix('.png')}")
    return 0 if any("failure" not in record["result"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
