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

from fxc_kernels.cuda.tile import Config, capability_of, choose, processors_of

# Up to so many rows of a tile, the kernels of weights that become floats have no tensor cores.
GEMV_ROWS = 4
# And up to so many of x, all kernels compute out^T = W x^T.
SKINNY_ROWS = 64
TABLES = Path(__file__).with_name("tables")
SCHEMES = (
    "int8", "fp8", "int8_weight_only", "fp8_weight_only", "int4_g32", "int4_g64", "int4_g128", "sparse24", "int8_sparse24",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """config: the fastest one; us, dense_us: microseconds of it and of the dense bfloat16 product."""

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
def table(chip: str) -> dict[tuple[str, int, int], dict[int, Measurement]]:
    """(scheme, n, k) -> rows -> what was measured; empty for a chip that was not measured."""
    path = TABLES / f"{chip}.json"
    found: dict[tuple[str, int, int], dict[int, Measurement]] = {}
    if not path.exists():
        return found
    try:
        for each in json.loads(path.read_text())["entries"]:
            if each["scheme"] not in SCHEMES:
                raise ValueError(f"an entry is for {each['scheme']!r}, which is none of {', '.join(SCHEMES)}")
            if not (each["us"] > 0 and each["dense_us"] > 0):
                raise ValueError(f"an entry took {each['us']} us, and dense {each['dense_us']} us")
            config = None if each["config"] is None else Config.parse(each["config"])
            if config is not None and (reason := _misfit(each["scheme"], each["m"], config)):
                raise ValueError(f"{config} is no configuration of {each['scheme']} for {each['m']} rows: {reason}")
            of_shape = found.setdefault((each["scheme"], each["n"], each["k"]), {})
            of_shape[each["m"]] = Measurement(config, each["us"], each["dense_us"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no table of measurements: {what}. Measure again, or remove it") from error
    return found


def _misfit(scheme: str, rows: int, config: Config) -> str | None:
    """Why the kernel of `scheme` cannot have `config` for so many rows."""
    if "sparse24" in scheme:
        fits = config.m >= 8 and config.n >= 16 and config.k >= 64 and config.warps * min(config.n, 32) >= config.n
        return None if fits else "tiles are of 8 x 16 x 64 or more, with a warp for each 32 rows of the weight"
    if scheme not in ("int8", "fp8") and config.m <= GEMV_ROWS:
        if rows > config.m:
            return f"it multiplies up to {config.m}"
        return None if config.k >= 32 else "its k is 32 or more"
    smallest = 32 if scheme in ("int8", "fp8") else 16
    return None if min(config.m, config.n) >= 16 and config.k >= smallest else f"tiles are of 16 x 16 x {smallest} or more"


def measured(chip: str, scheme: str, outputs: int, columns: int) -> dict[int, Measurement]:
    """What was measured of `scheme` for a weight [outputs, columns]: rows -> entry, empty for nothing."""
    return table(chip).get((scheme, outputs, columns), {})


@functools.cache
def measurement_for(chip: str, scheme: str, outputs: int, columns: int, rows: int) -> Measurement | None:
    """The measurement that stands for `rows`: of the smallest measured number of rows that is not below it. A configuration
    may serve fewer rows than it was measured with, not more, and those of one kernel not another."""
    of_shape = measured(chip, scheme, outputs, columns)
    at = min((m for m in of_shape if m >= rows and (m <= SKINNY_ROWS or rows > SKINNY_ROWS)), default=None)
    return None if at is None else of_shape[at]


def config_for(scheme: str, x: Tensor, outputs: int, columns: int, configs: dict[int, tuple[Config, ...]]) -> Config:
    """The configuration for rows x [M, K] and a weight [outputs, columns]: the measured one, else the first in `configs`
    that is meant for so many rows on so new a chip. float32 rows, which are never measured, need more registers and more
    shared memory: they always take the latter."""
    if x.dtype != torch.float32:
        found = measurement_for(chip_of(x.device), scheme, outputs, columns, x.shape[0])
        if found is not None and found.config is not None:
            return found.config
    return choose(configs, capability_of(x), x.shape[0], outputs, processors_of(x))
