"""Recipes share their parts: no block of ten lines of code stands in two of them."""

import ast
from pathlib import Path

import pytest

import fp8rl_torchrl.recipes


@pytest.fixture(scope="module")
def recipes():
    """The files of the recipes: {name: text}."""
    folder = Path(fp8rl_torchrl.recipes.__file__).parent
    return {path.name: path.read_text() for path in sorted(folder.glob("*.py"))}


def code_lines(text):
    """The lines of a file, stripped, without its imports, blank lines, comments and docstrings; with their numbers."""
    without = set()
    for node in ast.walk(ast.parse(text)):
        documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or documents:
            without |= set(range(node.lineno, node.end_lineno + 1))
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in without]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def repeated_blocks(files, length=10):
    """Blocks of so many lines of code that stand in two files."""
    first = {}
    for path, text in files.items():
        lines = code_lines(text)
        for start in range(len(lines) - length + 1):
            block = tuple(line for _, line in lines[start : start + length])
            other, number = first.setdefault(block, (path, lines[start][0]))
            if other != path:
                yield f"{path}:{lines[start][0]} repeats {other}:{number}"


def test_no_ten_lines_stand_in_two_recipes(recipes):
    assert len(recipes) > 15
    assert not list(repeated_blocks(recipes))


def test_planted_lines_of_a_recipe_are_found(recipes):
    original = recipes["reinforce.py"]
    disguised = original.replace("\n    ", "\n\n    # as elsewhere\n    ").replace(
        "import torch", "import numpy, torch"
    )
    for text in (original, disguised):
        found = [each for each in repeated_blocks(recipes | {"copied.py": text}) if each.startswith("copied.py")]
        assert found
        assert all(" reinforce.py:" in each for each in found)


def test_ten_lines_are_a_block_and_nine_are_not():
    lines = [f"    part_{number} = make({number})" for number in range(12)]
    for count, blocks in ((12, 3), (10, 1), (9, 0)):
        body = "\n".join(lines[:count])
        files = {"a.py": f"def a():\n{body}\n    return 1", "b.py": f"import os\ndef b():\n\n{body}\n    return 2"}
        assert len(list(repeated_blocks(files))) == blocks
