"""`compose.py`: fifteen lines that train."""

import ast
import re

from programs import SCRIPTS

from fp8rl_torchrl import OptimStep


def test_compose_is_fifteen_lines():
    """Lines of code: neither blank, nor a comment, nor the docstring."""
    source = (SCRIPTS / "compose.py").read_text()
    docstring, *statements = ast.parse(source).body
    assert isinstance(docstring.value, ast.Constant)
    body = source.splitlines()[statements[0].lineno - 1 :]
    assert len([line for line in body if line.strip() and not line.strip().startswith("#")]) == 15
    assert max(map(len, source.splitlines())) <= 120


def test_compose_trains_in_fp16_with_a_live_scaler(capsys):
    source = (SCRIPTS / "compose.py").read_text()
    shorter = source.replace("200_000", "3_000")
    assert shorter != source
    names = {}
    exec(compile(shorter, "compose.py", "exec"), names)
    step = names["step"]
    assert isinstance(step, OptimStep)
    assert step.precision.name == "fp16"
    assert step.scalers["loss"].is_enabled()
    assert step.scalers["loss"].get_scale() > 1
    assert step.updates > 0
    *reports, result = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(r" *([\d,]+) frames, return .*, loss scale (.*)", line)[1] for line in reports] == [
        "1,024",
        "2,048",
        "3,072",
    ]
    assert all(float(line.rpartition(" ")[2]) > 1 for line in reports)
    assert 0 < float(result) <= 220
