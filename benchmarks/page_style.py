"""What a self-contained page looks like: its style in light and dark, and figures that take its colours."""

from __future__ import annotations

import html
import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.text import Text

INK = "#010203"
"""Drawn in this colour, lines and letters take the page's own."""
SIZE = (5.4, 3.5)
"""Of a figure, in inches: readable on a phone, where it takes the whole width."""
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fdfdfc; --quiet: #5c5c5c; --line: #d9d9d6; --good: #1b7f3b;
  --bad: #b3261e; --unsure: #8a6100; --box: #f3f3f0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #16171a; --quiet: #a8a8a4; --line: #3a3b3f;
  --good: #6fce8b; --bad: #ff8a80; --unsure: #e5b95c; --box: #202226 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 72rem; padding: 1rem }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem }
p, li { max-width: 46rem } .quiet { color: var(--quiet) } small { color: var(--quiet) }
.advice { font-size: 1.05rem; background: var(--box); border-left: 4px solid var(--good); padding: .6rem .9rem;
  margin: .5rem 0; max-width: 60rem }
.advice ul { margin: .3rem 0 0; padding-left: 1.2rem; font-size: .92rem }
.advice.unsure { border-color: var(--unsure) }
.scroll { overflow-x: auto; margin: .5rem 0 } table { border-collapse: collapse; font-size: .9rem; width: 100% }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:nth-child(2) { min-width: 12rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.equivalent, .better { color: var(--good) } .worse { color: var(--bad) } .cannot { color: var(--unsure) }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
figure { margin: 0 } figure svg { width: 100%; height: auto } figcaption { font-size: .8rem; color: var(--quiet) }
details { margin: .6rem 0 } summary { cursor: pointer } code { font-size: .85em; overflow-wrap: anywhere }
a { color: inherit }
"""


def figure(drawn: Figure, name: str, caption: str) -> str:
    """A figure as SVG in the page's colours."""
    return f"<figure>{svg(drawn, name)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element; its letters are text, and black takes the page's colour.

    Args:
        figure: The figure.
        name: Its identifiers are made from this, so that those of different figures on a page differ.
    """
    for text in figure.findobj(lambda each: isinstance(each, Text) and each.get_color() != "k"):
        text.set_color(INK)  # pyright: ignore[reportAttributeAccessIssue]
    for axes in figure.get_axes():
        axes.tick_params(colors=INK)
        axes.patch.set_alpha(0)
        for spine in axes.spines.values():
            spine.set_color(INK)
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.get_axes())):
        if legend is not None:
            legend.get_frame().set_alpha(0)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    found = buffer.getvalue()
    found = found[found.index("<svg") :].replace(INK, "currentColor")
    # The drawing scales with the page: its own size in points would not.
    found = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", found, count=1)
    found = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", found, count=1)
    return found.replace("<svg ", f'<svg role="img" aria-label="{html.escape(name, quote=True)}" ', 1)
