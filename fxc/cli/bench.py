"""fxc bench model."""

from __future__ import annotations

import torch

from fxc.measure import bench
from fxc.report.console import Output, size
from fxc.source.load import kind_of


def bench_models(
    output: Output,
    models: list[str],
    batches: list[int],
    lengths: list[int],
    new: int,
    rounds: int,
    threads: int | None,
    backend: str,
    device: str | None,
    dtype: str,
    static_cache: bool | None = None,
    keep_compressed: bool = False,
    keep_float: float | None = None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    entries = []
    for source in models:
        with output.doing(f"loading {source}"):
            entries += bench.entries_of(
                source, backend=backend, device=device, dtype="auto" if kind_of(source) == "artifact" else dtype,
                static_cache=static_cache, keep_compressed=keep_compressed, keep_float=keep_float,
            )  # fmt: skip
    rows = bench.race(entries, batches, lengths, new=new, rounds=rounds, device=device, track=output.track)
    results = []
    for row in rows:
        baseline = next(r for r in rows if (r.batch, r.seq) == (row.batch, row.seq))
        medians = {phase: row.median(phase) for phase in row.milliseconds}
        speedups = {phase: row.speedup(phase, baseline) for phase in row.milliseconds}
        results.append(
            {"name": row.entry.name, "how": row.entry.how, "bytes": row.entry.nbytes, "batch": row.batch,
             "seq": row.seq, "milliseconds": medians, "speedup": speedups, "rounds": row.milliseconds}
        )  # fmt: skip
    phases = list(rows[0].milliseconds)
    table = [
        (r["name"], r["how"], size(r["bytes"]), r["batch"], r["seq"] or "-",
         *(f"{r['milliseconds'][p]:.2f}" for p in phases), *(f"x{r['speedup'][p]:.2f}" for p in phases))
        for r in results
    ]  # fmt: skip
    where = f"{device or 'cpu'}, {torch.get_num_threads()} threads, median of {rounds} rounds"
    output.table(
        f"milliseconds ({'decode: for a token; ' if 'decode' in phases else ''}{where})",
        [
            "model",
            "runs as",
            ">weights",
            ">batch",
            ">seq",
            *(f">{p}" for p in phases),
            *(f">{p} speed" for p in phases),
        ],
        table,
    )
    output.json({"device": device or "cpu", "threads": torch.get_num_threads(), "new": new, "results": results})
