"""The options of `train.py`, `evaluate.py` and `tune.py`: every one of them has help."""

import re

import pytest
from programs import call, evaluate, train, tune


def documented_options(text):
    """Each option of a help text with its description, without its default."""
    options, current = {}, None
    for line in text.splitlines():
        line = line.strip("│╭╮╰╯─- \t") if not re.match(r"[│ ]*--?[a-z]", line) else line.strip("│ ")
        if match := re.match(r"(?:-h, )?--([a-z0-9-]+)(.*)", line):
            current = match[1]
            placeholder = r"^(, --no-[a-z-]+)?( (\{[^}]*\}(\|[A-Z]+)?|[A-Z]+|\[(INT|STR) \[(INT|STR) \.\.\.\]\]))?"
            options[current] = re.sub(placeholder, "", match[2])
        elif not line or line.endswith(("options", "arguments")):
            current = None  # the end of a group
        elif current:
            options[current] += " " + line
    return {name: re.sub(r"\((default|required).*", "", words).strip() for name, words in options.items()}


@pytest.mark.parametrize("name", ["train", "evaluate", "tune"])
def test_every_option_has_help(name, capsys):
    script = {"train": train, "evaluate": evaluate, "tune": tune}[name]
    assert call(script, "--help") == 0
    options = documented_options(capsys.readouterr().out)
    if name == "train":
        config, parsed = train.parse([])
        expected = {*config.to_dict(), *vars(parsed)} - {"config_file"}  # its option is --config
    elif name == "tune":
        parsed = tune.parse([])
        expected = {*parsed.config.to_dict(), *vars(parsed)} - {"config"}
    else:
        expected = {"episodes", "seed", "checkpoint", "best", "device", "json", "video"}
    assert set(options) == {each.replace("_", "-") for each in expected} | {"help"}
    for option, description in options.items():
        assert len(description.split()) >= 2, f"--{option} has no help"


def test_an_option_without_help_would_be_found():
    lines = ["--documented INT  What it is for. (default: 3)", "--bare {None}|STR (default: None)", "--flag, --no-flag"]
    text = "\n".join(f"│ {line} │" for line in lines)
    assert documented_options(text) == {"documented": "What it is for.", "bare": "", "flag": ""}
