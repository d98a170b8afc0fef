"""The results of a run as markdown, and as files."""

from __future__ import annotations

import json
from pathlib import Path

from fxc.kernel_bench.files import slug, write_texts

DENSE = "dense"


def baseline(report: dict, row: dict) -> dict | None:
    """The dense row of the same cell."""
    same = ("backend", "what", "mode", "batch")
    return next((r for r in report["rows"] if r["passes"] == DENSE and all(r[k] == row[k] for k in same)), None)


def markdown(report: dict) -> str:
    options, packages = report["options"], report["versions"]
    threads = f"{options['threads']} threads. " if options.get("threads") else ""
    lines = [
        f"# {report['title']}, on {report['device']}",
        "",
        f"{threads}Prompt {options['prompt']}, {options['new']} new tokens a sequence; prefill: one prompt of "
        f"{options['prefill']} "
        f"tokens, logits of all of them. Tokens a second: median of {options['rounds']} rounds (lowest-highest); x: of the "
        "dense model in the same cell. graph: each step replays a CUDA graph; launched: the same step, its kernels launched "
        "one by one; generate: Hugging Face's loop, prompt included. GB/s: weights read a second. "
        + ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "transformers") if packages.get(name))
        + ".",
        "",
        "| passes | backend | what | batch | tokens/s | x | GB/s | weights GB | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        dense = baseline(report, row)
        ratio = "-" if dense is None or row is dense else f"{row['tokens_per_s'] / dense['tokens_per_s']:.2f}"
        lines.append(
            f"| {row['passes']} | {row['backend']} | {row['what']} {row['mode']} | {row['batch']} | {row['tokens_per_s']:.1f} "
            f"({row['low']:.1f}-{row['high']:.1f}) | {ratio} | {row.get('read_gb_per_s') or '-'} | {row['weights_gb']} | "
            f"{'-' if row['peak_gb'] is None else row['peak_gb']} |"
        )
    forms = {f"{row['passes']}, {row['backend']}": row["forms"] for row in report["rows"] if row["forms"]}
    lines += ["", *(f"- {name}: layers run as {', '.join(f'{form} ({n})' for form, n in each.items())}"
                    for name, each in forms.items())]  # fmt: skip
    lines += ["", *(f"- not measured: {each['what']}: {each['why']}" for each in report["not_measured"])]
    return "\n".join(lines).rstrip() + "\n"


def write(report: dict, out: Path) -> None:
    stem = f"decode-{slug(report['device'])}"
    write_texts(out, {f"{stem}.json": json.dumps(report, indent=1) + "\n", f"{stem}.md": markdown(report)})
