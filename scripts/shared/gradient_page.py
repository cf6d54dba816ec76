"""A page that shows what a gradient check found: one file of HTML, without scripts or links."""

import io
import linecache
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import jaxnn
from shared.figures import Figure, plt

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --quiet: #57606a; --line: #d0d7de; --wash: #f6f8fa;
  --good: #00684a; --bad: #b3261e; --warn: #8a4b00; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 54rem; color: var(--ink);
  background: #fff; font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; } .quiet { color: var(--quiet); }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.figures { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 1.25rem 0 0; padding: 0; }
.figures div { min-width: 7rem; } dt { color: var(--quiet); font-size: .875rem; }
dd { margin: 0; font-size: 1.5rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; margin: .75rem 0; }
th, td { padding: .35rem .75rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
tr > :last-child { padding: .35rem 0; padding-left: .5rem; }
td:nth-child(2) { white-space: nowrap; }
code, pre { font-family: ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace;
  font-size: .8125rem; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: .9rem;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; }
figure { margin: .75rem 0; } figure svg { width: 100%; height: auto; display: block; }
summary { cursor: pointer; margin: .75rem 0 0; } ul { padding-left: 1.25rem; margin: .5rem 0; }
li { margin: .2rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; } tr, figure, pre { break-inside: avoid; } .wide { overflow: visible; } }
"""
LEAVES = ("leaf", "shape", "largest", "against jax.grad", "against differences", "ratio", "kinks")


def page_of(
    report: jaxnn.GradientReport, names: Mapping[str, str], files: Sequence[Path], figure: Figure
) -> str:
    """Return the page of a certified report.

    Args:
        report: of a check with `certify=True`.
        names: what was checked, such as `{"loss": "my.py:loss"}`.
        files: the user's own, of which lines are shown.
        figure: the error against the step of the differences; it is closed.
    """
    word, kind = ("passed", "good") if report.passed else ("failed", "bad")
    checked = ", ".join(f"{name} <code>{escape(text)}</code>" for name, text in names.items())
    worst = f"{report.worst.where()}, in sample {report.worst.sample}"
    parts = [
        f'<h1>Gradient check <span class="{kind}">{word}</span></h1>',
        f'<p class="quiet">{checked}</p>',
        _key_figures(report),
        "" if report.worst.passed else f"<p><strong>Worst:</strong> {escape(worst)}.</p>",
        *(f"<p><strong>Perhaps:</strong> {escape(text)}</p>" for text in report.suggestions),
        _smallest(report),
        _leaves(report),
        *(f'<p class="quiet">Note: {escape(note)}.</p>' for note in report.notes),
        _coverage(report, files),
        _power(report),
        _symmetries(report),
        _curve(figure),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Gradient check {word}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table of cells that are HTML, with numbers in these columns."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if place in numbers else "" for place in range(len(cells)))
        pairs = zip(kinds, cells, strict=True)
        return f"<tr>{''.join(f'<{tag}{kind}>{cell}</{tag}>' for kind, cell in pairs)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    head = line(header, "th")
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _percent(part: jaxnn.Coverage | jaxnn.Power | None) -> str:
    return "not known" if part is None else f"{100 * part.share:.3g} %"


def _key_figures(report: jaxnn.GradientReport) -> str:
    wrong = sum(not leaf.passed for leaf in report.leaves)
    leaves = f"{wrong} of {len(report.leaves)}"
    figures = [("wrong leaves", leaves), ("samples", f"{report.num_samples:,}")]
    figures += [("coverage of branches", _percent(report.coverage))]
    figures += [("planted faults caught", _percent(report.power))] * report.passed
    cells = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in figures)
    return f'<dl class="figures">{cells}</dl>'


def _short(number: float) -> str:
    return "&ndash;" if math.isnan(number) else f"{number:.1e}" if number else "0"


def _leaves(report: jaxnn.GradientReport) -> str:
    rows, within = [], f"within {report.tolerance:g} of <code>jax.grad</code> and "
    if all(math.isnan(leaf.error) for leaf in report.leaves):  # There is none of a loss in NumPy.
        within = ""
    for leaf in report.leaves:
        errors = (leaf.largest, leaf.error, leaf.difference_error)
        verdict = '<span class="good">right</span>'
        if not leaf.passed:
            verdict = '<strong class="bad">wrong</strong>'
        name, shape = f"<code>{escape(leaf.name)}</code>", f"{leaf.shape}"
        counts = f"{leaf.ratio:.4f}", f"{leaf.num_kinks:,}"
        rows.append((name, shape, *map(_short, errors), *counts, verdict))
    return f"""<h2>Leaf by leaf</h2>
<p>In float64, {within}within
{report.difference_tolerance:g} of the finite differences, relative to the largest coordinate; what
rounding explains counts as 0. The losses differ by {_short(report.value_error)}, relative.</p>
{_table((*LEAVES, ""), rows, range(2, 7))}"""


def _smallest(report: jaxnn.GradientReport) -> str:
    case = report.smallest
    if case is None:
        return ""
    return f"""<h2>The smallest case</h2>
<p><code>{escape(case.where())}</code>, in few and simple numbers, to be followed by hand:</p>
<pre>{escape(case.script)}</pre>"""


def _source(place: str, files: Sequence[Path]) -> str:
    """The text of the line that a place such as `"my.py:12 (loss)"` names, of the user's files."""
    match = re.match(r"(.*):(\d+)", place)
    paths = [path for path in files if match and path.name == Path(match[1]).name]
    return linecache.getline(str(paths[0]), int(match[2])).strip() if match and paths else ""


def _coverage(report: jaxnn.GradientReport, files: Sequence[Path]) -> str:
    coverage = report.coverage
    if coverage is None:
        return "<h2>Coverage</h2>\n<p>Not known of a loss that JAX cannot trace.</p>"
    told = f"{_percent(coverage)} of the sides of {len(coverage.branches)} branches were visited"
    tried = f"; {coverage.num_tried:,} others were tried for what was not visited"
    tried *= bool(coverage.num_tried)
    rows = []
    for branch in sorted(coverage.branches, key=lambda branch: branch not in coverage.missed):
        text = escape(_source(branch.place, files))
        place = f"<code>{escape(branch.place)}</code>" + f"<br><code>{text}</code>" * bool(text)
        counts = [f"{side} {count:,}" if count else f'<strong class="warn">{side} never</strong>'
                  for side, count in zip(branch.sides, branch.counts, strict=True)]  # fmt: skip
        rows.append((place, escape(branch.kind), *counts))
    table = _table(("line", "choice", "one side", "the other"), rows, (2, 3)) if rows else ""
    others = ", ".join(f"<code>{escape(text)}</code>" for text in coverage.uncounted)
    others = f"<p>Not counted: {others}.</p>\n" * bool(others)
    return f"""<h2>Coverage</h2>
<p>{told}, over {coverage.num_samples:,} samples{tried}. A gradient is checked on the
sides that its samples visit, and on no others.</p>
{others}{table}"""


def _power(report: jaxnn.GradientReport) -> str:
    power = report.power
    if power is None:
        return ""
    caught = [each.fault for each in power.faults if each.is_caught]
    lists = [
        ("Missed", power.missed, True),
        ("Caught", caught, False),
        ("Without any effect on these samples, and not counted", power.without_effect, False),
    ]
    details = "\n".join(
        f"<details{' open' * is_open}><summary>{name}: {len(faults):,}</summary><ul>"
        + "".join(f"<li>{escape(fault)}</li>" for fault in faults)
        + "</ul></details>"
        for name, faults, is_open in lists
        if faults
    )
    return f"""<h2>Power</h2>
<p>Faults were planted into the gradient that passed, one at a time. With these samples and
tolerances the check catches {len(caught)} of {len(power.faults)}.</p>
{details}"""


def _symmetries(report: jaxnn.GradientReport) -> str:
    rows = []
    for each in report.invariants or ():
        kind, word = ("good", "yes") if each.passed else ("bad", "no")
        rows.append((escape(each.name), _short(each.error), f'<span class="{kind}">{word}</span>'))
    if not rows:
        return ""
    return f"""<h2>Symmetries</h2>
<p>What holds of the loss, read off its values, has to hold of its gradient.</p>
{_table(("of the loss", "error of the gradient", "kept"), rows, (1,))}"""


def _curve(figure: Figure) -> str:
    """The figure as SVG, the same for the same numbers."""
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "gradient", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = text.getvalue()
    said = "A right gradient makes a V: truncation falls with the step, rounding grows."
    label = f'<svg role="img" aria-label="{said}" '
    svg = svg[svg.index("<svg") :].replace("<svg ", label, 1)
    return f"""<h2>Distance from finite differences</h2>
<p>Step by step, at one sample of params. {said} A wrong one stays as far off as it is wrong.</p>
<figure>{svg}</figure>"""
