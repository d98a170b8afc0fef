"""Which configuration of a kernel is used: the fastest one measured on this chip, or else a rule of thumb.

tables/<chip>.json holds what was measured, one entry for a scheme, a weight [n, k] and a number of rows (tokens) m:

    {"chip": "nvidia-h200", "versions": {"triton": "3.6.0"}, "entries": [
        {"scheme": "int8", "n": 4608, "k": 3584, "m": 1, "config": "16x64x256 w4 s5 split 4", "us": 9.9, "dense_us": 14.2}]}

us and dense_us are microseconds of the compressed product and of the bfloat16 one in the same run; config is None where the
kernel has none to choose. Nothing is measured while a model runs, so that a captured CUDA graph always holds the same kernels.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxc_kernels.triton_tile import Config, capability_of, choose, processors_of

TABLES = Path(__file__).with_name("tables")
SCHEMES = (
    "int8", "fp8", "int8_weight_only", "fp8_weight_only", "int4_g32", "int4_g64", "int4_g128", "sparse24", "int8_sparse24",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One measurement. config: the fastest one; us, dense_us: microseconds of it and of the dense bfloat16 product."""

    config: Config | None
    us: float
    dense_us: float


@functools.cache
def chip_of(device: torch.device) -> str:
    """The name of a device as tables have it: "nvidia-h200"; "cpu" for what is no CUDA device."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@functools.cache
def table(chip: str) -> dict[tuple[str, int, int], dict[int, Entry]]:
    """(scheme, n, k) -> rows -> what was measured; empty for a chip that was not measured."""
    path = TABLES / f"{chip}.json"
    found: dict[tuple[str, int, int], dict[int, Entry]] = {}
    if not path.exists():
        return found
    for each in json.loads(path.read_text())["entries"]:
        if each["scheme"] not in SCHEMES:
            raise ValueError(f"{path.name} has an entry for {each['scheme']!r}, which is none of {', '.join(SCHEMES)}")
        config = None if each["config"] is None else Config.parse(each["config"])
        of_shape = found.setdefault((each["scheme"], each["n"], each["k"]), {})
        of_shape[each["m"]] = Entry(config, each["us"], each["dense_us"])
    return found


def measured(chip: str, scheme: str, outputs: int, columns: int) -> dict[int, Entry]:
    """What was measured of `scheme` for a weight [outputs, columns]: rows -> entry, empty for nothing."""
    return table(chip).get((scheme, outputs, columns), {})


@functools.cache
def entry_for(chip: str, scheme: str, outputs: int, columns: int, rows: int) -> Entry | None:
    """The measurement that stands for `rows`: of the smallest measured number of rows that is not below it. A configuration
    may serve fewer rows than it was measured with, not more."""
    of_shape = measured(chip, scheme, outputs, columns)
    return of_shape[min(m for m in of_shape if m >= rows)] if any(m >= rows for m in of_shape) else None


def config_for(scheme: str, x: Tensor, outputs: int, columns: int, configs: dict[int, tuple[Config, ...]]) -> Config:
    """The configuration for rows x [M, K] and a weight [outputs, columns]: the measured one, else the first in `configs`
    that is meant for so many rows on so new a chip."""
    entry = entry_for(chip_of(x.device), scheme, outputs, columns, x.shape[0])
    if entry is not None and entry.config is not None:
        return entry.config
    return choose(configs, capability_of(x), x.shape[0], outputs, processors_of(x))
