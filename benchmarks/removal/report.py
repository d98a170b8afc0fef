"""The results as markdown: of each model what is left and how good it is, then a table of times for each size."""

from __future__ import annotations

from benchmarks.removal.measure import CRITERION, PLAIN, passes
from benchmarks.table import conditions
from fxc.kernel_bench.files import markdown_table

FORMS = ("dense", "int8", "masked")


def markdown(report: dict) -> str:
    """The whole report for reading: of each model what is left and how good it is, then a table of times for each size."""
    lines = [
        f"# What removal is worth on {report['hardware']['cpu']}",
        "",
        conditions(report),
        "",
        "Of each model that share of the heads and of the FFN channels of every layer goes "
        f'(`passes="{passes(0.25, CRITERION)}"` and so on), '
        "without any training afterwards. dense: removed. int8: removed, then quantized. masked: set to zero.",
    ]
    for result in report["models"]:
        lines += ["", f"## {result['title']}, {result['dtype']}", "", *_quality(result)]
        for size, title in result["sizes"].items():
            lines += ["", f"### {title}", "", *_times(result, size)]
    lines += [
        "",
        "Each time is the median over the rounds, times faster than the same form with nothing pruned (masked: than dense), "
        "and below it the lowest and the highest. FLOPs are those of matrix products and attention.",
    ]
    return "\n".join(lines) + "\n"


def _quality(result: dict) -> list[str]:
    name = result["quality"]
    heads = ["pruned", "parameters", "MB", "MB int8", name, f"{name} int8", f"{name} masked", f"{name} by {PLAIN}"]
    body = []
    for row in result["rows"]:
        dense, int8 = row["forms"]["dense"], row["forms"]["int8"]
        rated = [dense, int8, row["forms"].get("masked"), row.get(PLAIN)]
        body.append(
            [
                f"{row['pruned']:.0%}",
                f"{dense['parameters']:,}",
                *(f"{each['bytes'] / 1e6:.2f}" for each in (dense, int8)),
                *(f"{each[name]:.4g}" if each else "-" for each in rated),
            ]
        )
    return markdown_table(heads, body)


def _times(result: dict, size: str) -> list[str]:
    ways = [(form, backend) for form in FORMS for backend in result["backends"]]
    whole = result["rows"][0]["flops"][size]
    body = []
    for row in result["rows"]:
        left = row["flops"][size] / whole
        line = [f"{row['pruned']:.0%}", f"{left:.0%}", f"{1 / left:.2f}x"]
        for form, backend in ways:
            cell = row["forms"].get(form, {}).get("times", {}).get(backend, {}).get(size)
            line.append("{ms:.2f}  {speedup:.2f}x<br>{low:.2f}-{high:.2f}".format(**cell) if cell else "-")
        body.append(line)
    return markdown_table(["pruned", "FLOPs left", "ideal", *(f"{form} {backend}" for form, backend in ways)], body)
