"""The promises of the layout: who imports whom, how things are named, how large they grow, what an import costs.

Every rule is a function of the source files that returns its complaints. Each is applied to the real files, where it
must find nothing, and to files with a planted violation, where it must find it.
"""

import ast
import functools
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fp8rl_torchrl"
LEAVES = {"envs", "models", "precision", "data", "objectives"}
MAY_IMPORT = {leaf: set() for leaf in LEAVES} | {
    "training": {"precision"},
    "numerics": {"precision"},
    "recipes": LEAVES | {"training", "numerics"},
}
MAX_LINES = 400
HEAVY = [
    "matplotlib",
    "tyro",
    "tqdm",
    "tensorboard",
    "imageio",
    "pytest",
    "stable_baselines3",
    "wandb",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "optuna",
]


def read(*folders):
    """The Python files below some folders of the repository: {path: text}."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


@pytest.fixture(scope="module")
def package():
    return read(PACKAGE)


@pytest.fixture(scope="module")
def everything():
    shell_scripts = {path.relative_to(ROOT).as_posix(): "" for path in (ROOT / "benchmarks").glob("*.sh")}
    return read(PACKAGE, "scripts", "benchmarks", "tests") | shell_scripts


# --- imports ---


@functools.cache
def parse(text):
    return ast.parse(text)


def imported(path, text):
    """Every module that a file imports, anywhere in it: absolute dotted names, with the imported name at the end."""
    here = PurePosixPath(path).with_suffix("").parts[:-1]
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def forbidden_imports(files):
    """Imports between the parts of the package that the layout does not allow."""
    for path, text in files.items():
        part = PurePosixPath(path).parts[1]
        if part.endswith(".py"):  # the package's own __init__.py and what it is made of
            continue
        if part not in MAY_IMPORT:
            yield f"{path}: who may import {part}?"
            continue
        for name in imported(path, text):
            first, second, *_ = [*name.split("."), ""]
            if first == PACKAGE and second not in MAY_IMPORT[part] | {part, "_lazy", "_inductor"}:
                yield f"{path}: {part} imports {name}"


def imports_of_programs(files):
    """Imports of what is not part of the package."""
    for path, text in files.items():
        for name in imported(path, text):
            if name.split(".")[0] in ("scripts", "benchmarks", "tests"):
                yield f"{path}: imports {name}"


def test_each_part_imports_only_what_it_may(package):
    assert len(package) > 20
    assert not list(forbidden_imports(package))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("envs/bad.py", "from fp8rl_torchrl.models.actor_critic import ActorCritic"),
        ("envs/bad.py", "import fp8rl_torchrl.models"),
        ("models/bad.py", "from fp8rl_torchrl import precision"),
        ("models/bad.py", "import fp8rl_torchrl as f8"),
        ("models/bad.py", "from fp8rl_torchrl import Precision"),
        ("data/bad.py", "def build():\n    from fp8rl_torchrl.envs.gym import make"),
        ("data/bad.py", "if TYPE_CHECKING:\n    from fp8rl_torchrl.envs import CustomEnv"),
        ("objectives/bad.py", "from ..models import ActorCritic"),
        ("objectives/bad.py", "from .. import models"),
        ("precision/bad.py", "import importlib\nimportlib.import_module('fp8rl_torchrl.training.step')"),
        ("training/bad.py", "from fp8rl_torchrl.data.collect import CollectorState"),
        ("training/bad.py", "from fp8rl_torchrl.recipes import build"),
        ("numerics/bad.py", "from fp8rl_torchrl.training.step import OptimStep"),
        ("envs/_conformance/bad.py", "from ...models import ActorCritic"),
        ("novelty/bad.py", ""),
    ],
)
def test_a_planted_import_is_found(package, path, text):
    planted = f"{PACKAGE}/{path}"
    assert [complaint.split(":")[0] for complaint in forbidden_imports(package | {planted: text})] == [planted]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("envs/good.py", "from fp8rl_torchrl.envs.custom import CustomEnv\nfrom . import gym\nfrom .custom import x"),
        ("training/good.py", "from fp8rl_torchrl.precision.mode import Precision\nfrom fp8rl_torchrl import precision"),
        ("recipes/good.py", "from fp8rl_torchrl.envs.gym import make\nfrom ..training.loop import Pipeline"),
    ],
)
def test_an_allowed_import_is_not(package, path, text):
    assert not list(forbidden_imports(package | {f"{PACKAGE}/{path}": text}))


def test_nothing_imports_programs():
    files = read(PACKAGE, "scripts", "benchmarks")
    assert not list(imports_of_programs(files))
    for text in ("from scripts.train import main", "import benchmarks.precision_modes", "from tests import conftest"):
        assert len(list(imports_of_programs(files | {f"{PACKAGE}/training/bad.py": text}))) == 1


# --- names and sizes ---


def vague_names(files):
    """Files and folders whose name says nothing."""
    vague = {"util", "utils", "common", "helper", "helpers", "misc"}
    for path in files:
        if any(vague & set(part.split("_")) for part in PurePosixPath(path).with_suffix("").parts):
            yield path


def long_files(files):
    return [path for path, text in files.items() if len(text.splitlines()) > MAX_LINES]


def names_of_modules(files):
    """Public functions that a package offers, or a module defines, under the name of a module beside it."""
    for path, text in files.items():
        folder, stem = PurePosixPath(path).parent.as_posix(), PurePosixPath(path).stem
        beside = {PurePosixPath(other).stem for other in files if PurePosixPath(other).parent.as_posix() == folder}
        tree = parse(text)
        if stem == "__init__":
            names = {name for name in _exported(tree) if name in beside}
        else:
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            names = {node.name for node in tree.body if isinstance(node, functions)} & (beside - {stem})
        yield from (f"{path}: {name}" for name in sorted(names))


def _exported(tree):
    """What a package's `__init__` offers: `__all__` and what it binds by imports, but not its own submodules."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield from ast.literal_eval(node.value)
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def test_no_name_is_vague(everything):
    assert not list(vague_names(everything))
    for path in ("envs/utils.py", "training/_helpers.py", "common/step.py", "models/misc.py", "data/replay_utils.py"):
        assert list(vague_names({f"{PACKAGE}/{path}": ""})) == [f"{PACKAGE}/{path}"]


def test_no_file_of_the_package_is_too_long(package):
    assert not long_files(package)
    assert long_files({"full.py": "pass\n" * 400, "long.py": "pass\n" * 401}) == ["long.py"]


def test_no_public_function_has_the_name_of_a_module_beside_it(package):
    assert not list(names_of_modules(package))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        # Whether `training.evaluate` is the function or the module would depend on what was imported first.
        ("training/__init__.py", "from fp8rl_torchrl.training.evaluate import evaluate"),
        ("training/__init__.py", '__all__ = ["evaluate"]'),
        ("training/loop.py", "def step():\n    pass"),
    ],
)
def test_a_planted_function_with_the_name_of_a_module_is_found(package, path, text):
    assert len(list(names_of_modules(package | {f"{PACKAGE}/{path}": text}))) == 1


# --- tests mirror the package and the scripts ---

OF_A_WHOLE_PART = {"tests/recipes/test_learning.py"}


def misplaced_tests(files):
    """Test files that belong to no module: ``tests/<part>/test_<module>.py``, or ``test_<module>_<what>.py``.

    ``tests/scripts`` and ``tests/benchmarks`` mirror ``scripts`` and ``benchmarks`` in the same way.
    """
    for path in files:
        folder, *parts, name = PurePosixPath(path).parts
        if folder != "tests" or not parts or not name.startswith("test_") or path in OF_A_WHOLE_PART:
            continue
        beside = f"{parts[0]}/" if parts in (["scripts"], ["benchmarks"]) else f"{PACKAGE}/{'/'.join(parts)}/"
        modules = [
            PurePosixPath(other).stem for other in files if PurePosixPath(other).parent.as_posix() + "/" == beside
        ]
        subject = name.removeprefix("test_").removesuffix(".py")
        if not any(subject == module or subject.startswith(f"{module}_") for module in modules):
            yield path


def untested_modules(files):
    """Public modules without a test file of their own."""
    for path in files:
        package, *parts, name = PurePosixPath(path).parts
        if package == PACKAGE and parts and not any(part.startswith("_") for part in (*parts, name)):
            test = f"tests/{'/'.join(parts)}/test_{name}"
            if test not in files:
                yield f"{path}: {test} is missing"


def test_tests_mirror_the_package(everything):
    assert not list(misplaced_tests(everything))
    assert not list(untested_modules(everything))


def test_a_misplaced_test_and_an_untested_module_are_found(everything):
    for planted in (
        "tests/envs/test_step.py",
        "tests/training/test_custom.py",
        "tests/novelty/test_custom.py",
        "tests/scripts/test_custom.py",
    ):
        assert list(misplaced_tests(everything | {planted: ""})) == [planted]
    for fitting in ("tests/envs/test_custom_on_two_devices.py", "tests/scripts/test_train_on_two_devices.py"):
        assert not list(misplaced_tests(everything | {fitting: ""}))
    planted = f"{PACKAGE}/envs/novelty.py"
    assert f"{planted}: tests/envs/test_novelty.py is missing" in untested_modules(everything | {planted: ""})


# --- what an import costs ---


def run_python(code, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT.parent
    )


def costs(code):
    """What running some code costs that importing the package should not: a list of complaints."""
    check = f"import sys; print('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    cuda = "torch = sys.modules.get('torch'); print('cuda', torch is not None and torch.cuda.is_initialized())"
    process = run_python(f"{code}\n{check}\n{cuda}", "-W", "error")
    complaints = []
    if process.returncode or process.stderr:
        complaints.append(f"warned or failed: {process.stderr}")
    *printed, loaded, initialised = process.stdout.splitlines() or ["loaded", "cuda False"]
    if printed:
        complaints.append(f"printed {printed}")
    if loaded != "loaded":
        complaints.append(loaded)
    if initialised != "cuda False":
        complaints.append("initialised CUDA")
    return complaints


def test_the_import_is_lean_and_silent():
    assert not costs(f"import {PACKAGE}")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import tqdm", "loaded tqdm"),
        ("print('hello')", "printed ['hello']"),
        ("import warnings; warnings.warn('careful')", "warned or failed"),
        ("import sys; sys.stderr.write('log')", "warned or failed: log"),
        (
            "import sys, types; sys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace("
            "is_initialized=lambda: True))",
            "initialised CUDA",
        ),
    ],
)
def test_a_planted_cost_is_found(code, complaint):
    (found,) = costs(code)
    assert found.startswith(complaint)


def test_using_every_public_name_loads_no_more_than_torchrl_does():
    # TorchRL itself imports tqdm, and warns; both are its own.
    touch = f"import {PACKAGE} as f8\nfor name in f8.__all__: getattr(f8, name)"
    code = f"import torchrl.trainers, torchrl.checkpoint\nimport sys; before = set(sys.modules)\n{touch}\n"
    process = run_python(
        f"{code}print([name for name in {HEAVY!r} if name in sys.modules and name not in before])\n"
        "import torch; print(torch.cuda.is_initialized())"
    )
    assert process.stdout.splitlines() == ["[]", "False"], process.stderr


# --- the wheel ---


def strangers(names):
    """Files of a wheel that are neither the package's nor the wheel's own."""
    return [name for name in names if not re.match(rf"{PACKAGE}(-[\w.]+\.dist-info)?/", name)]


def test_a_stranger_in_the_wheel_is_found():
    names = [f"{PACKAGE}/envs/gym.py", f"{PACKAGE}-0.1.0.dist-info/METADATA", "tests/test_x.py", "scripts/train.py"]
    assert strangers(names) == names[2:]


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path, package):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not strangers(names)
    assert set(package) | {f"{PACKAGE}/py.typed"} == {name for name in names if name.startswith(f"{PACKAGE}/")}
    assert any(name.endswith("entry_points.txt") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
