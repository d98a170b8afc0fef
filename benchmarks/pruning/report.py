"""The results as tables: what counts as done, a line for each model, and a sentence for each contender."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.pruning.oracle import EXACT
from benchmarks.pruning.ours import PASSES
from benchmarks.pruning.outcome import Record
from fxc.kernel_bench.files import markdown_table, versions_text


def complete(record: Record) -> bool:
    """Whether all that was asked for is gone."""
    return all(name in record and record[name][0] == record[name][1] for name in ("heads", "widths"))


def exact(record: Record) -> bool:
    difference = record.get("difference")
    return isinstance(difference, (list, tuple)) and difference[0] <= EXACT


def works(record: Record) -> bool:
    """Whether, besides, the result is right, runs at another size, generates, comes back from disk and can be quantized."""
    stages = all(record.get(name, "ok") == "ok" for name in ("forward", "generate", "reload"))
    return complete(record) and exact(record) and stages and isinstance(record["int8"], dict)


def is_int8(record: Record) -> bool:
    return isinstance(record.get("int8"), dict) and record["int8"]["layers"] > 0


def has_no_layer(record: Record) -> bool:
    return isinstance(record.get("int8"), dict) and record["int8"]["layers"] == 0


def short(text: Any) -> str:
    text = "-" if text is None else str(text).replace("|", "/")
    return text if len(text) <= 70 else f"{text[:67]}..."


def our_cells(entry: Record) -> list[str]:
    record = entry["fxc"]
    if "failed" in record:
        return [entry["name"], short(f"failed: {record['failed']}"), *["-"] * 9]
    difference = record["difference"]
    return [
        entry["name"],
        "{:,} -> {:,}".format(*record["parameters"]),
        *(("{} of {}".format(*record[k]) if k in record else "?") for k in ("heads", "widths")),
        short(difference) if isinstance(difference, str) else f"{difference[0]:.1e}, {difference[1]} sizes",
        short(record["moved"]) if isinstance(record["moved"], str) else f"{record['moved']:.1%}",
        *(short(record.get(k)) for k in ("forward", "generate", "reload")),
        quantized(record["int8"]),
        "{passes} of {all}".format(**record["seconds"]),
    ]


def quantized(int8: Any) -> str:
    if isinstance(int8, str):
        return short(int8)
    if not int8["layers"]:
        return "no layer to quantize"
    return "{:,} -> {:,} bytes, {:.1%}".format(*int8["bytes"], int8["difference"])


def peer_cells(entry: Record) -> list[str]:
    record = entry["torch-pruning"]
    if "failed" in record:
        return [entry["name"], short(f"failed: {record['failed']}"), *["-"] * 7]
    return [
        entry["name"],
        "{:,} -> {:,}".format(*record["parameters"]),
        *("{} of {}".format(*record[k]) for k in ("heads", "widths")),
        *(short(record.get(k)) for k in ("forward", "repaired", "generate", "reload")),
        "{graph} + {prune}".format(**record["seconds"]),
    ]


OUR_HEADS = [
    "fxc", "parameters", "heads", "widths", "masked - sliced (float64)", "moved", "other size",
    "generate", "reload", "int8", "seconds",
]  # fmt: skip
PEER_HEADS = [
    "torch-pruning", "parameters", "heads", "widths", "forward", "after repair", "generate", "reload", "seconds",
]  # fmt: skip


def summary(entries: list[Record]) -> list[str]:
    """One sentence for each contender."""
    total = len(entries)
    ours = [e["fxc"] for e in entries]
    lines = [
        f"fxc: all that was asked removed on {sum(map(complete, ours))} of {total}; masked = sliced in float64 to {EXACT:g} on "
        f"{sum(map(exact, ours))}; reloads: {sum(r.get('reload') == 'ok' for r in ours)}; "
        f"int8 on top: {sum(map(is_int8, ours))}, with no layer for it: {sum(map(has_no_layer, ours))}; nothing of this, of "
        f"another size and of generation fails: {sum(map(works, ours))}."
    ]
    peers = [e["torch-pruning"] for e in entries if "torch-pruning" in e]
    if peers:
        lines.append(
            f"torch-pruning: all that was asked removed on {sum(map(complete, peers))} of {len(peers)}; runs as it is: "
            f"{sum(r.get('forward') == 'ok' for r in peers)}, after repair by hand: "
            f"{sum(r.get('repaired') == 'ok' for r in peers)}; reloads with a configuration edited by hand: "
            f"{sum(r.get('reload') == 'ok' for r in peers)}; no result: {sum('failed' in r for r in peers)}."
        )
    return lines


def parts(report: Record) -> list[tuple[str, list[Record]]]:
    titles = {"models": "Models", "ratios": "Query heads to KV heads, two layers of Qwen2 (plain) and of Qwen3 (q/k norms)"}
    return [(title, report[key]) for key, title in titles.items() if report.get(key)]


def markdown(report: Record) -> str:
    """The whole report for reading: the machine, then for each part its summary and a table for each contender."""
    hardware = report["hardware"]
    lines = [
        f"# Structured pruning on {hardware['cpu']}",
        "",
        f"{hardware['cores']} cores, {hardware['memory']}, threads: {report['protocol']['threads']}. "
        f"{versions_text(report['versions'])}.",
        "",
        f'fxc: `optimize(model, inputs, passes="{PASSES}")`, the same line for every model. torch-pruning: the same shares, '
        "local ranking, with the heads, the layers to leave alone, the repairs and the configuration of each model given by "
        f"hand; limit {report['protocol']['peer_seconds']:g} s.",
        "",
        "heads, widths: attentions, and feed-forward parts and convolutions (of torch-pruning their layers), that lost all "
        "that was asked, rounded down, of those there are. moved: the masks' effect on the outputs. int8: bytes, and its "
        "effect on the outputs. forward: it runs at two sizes and is finite. seconds: fxc's passes, of all with capture and "
        "gates; torch-pruning's graph + pruning.",
    ]
    if report["absent"]:
        lines += ["", f"torch-pruning is absent: {report['absent']}."]
    for title, entries in parts(report):
        lines += ["", f"## {title}", "", *(f"- {line}" for line in summary(entries))]
        lines += ["", *markdown_table(OUR_HEADS, map(our_cells, entries))]
        if peers := [e for e in entries if "torch-pruning" in e]:
            lines += ["", *markdown_table(PEER_HEADS, map(peer_cells, peers))]
    return "\n".join(lines) + "\n"


def show(console: Console, title: str, entries: list[Record]) -> None:
    for heads, cells, key in ((OUR_HEADS, our_cells, "fxc"), (PEER_HEADS, peer_cells, "torch-pruning")):
        if not any(key in entry for entry in entries):
            continue
        shown = Table(title=title)
        for name in heads:
            shown.add_column(name)
        for entry in entries:
            shown.add_row(*cells(entry))
        console.print(shown, markup=False)
    for line in summary(entries):
        console.print(line, markup=False, highlight=False)
