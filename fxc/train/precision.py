"""What products run in while master weights are float32 (Micikevicius et al., "Mixed Precision Training", ICLR 2018)."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]
# The loss scale doubles after so many steps without an overflow. torch's own 2000 would be never in a recovery's few hundred.
GROWTH = 200


def has_bfloat16(device: str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 itself, and does not emulate it."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def chosen(precision: Precision | Literal["auto"], device: str = "cpu") -> Precision:
    """auto: bfloat16 where the device has it, else float32. Twelve steps of examples/pylm as float32 with a quarter of its
    heads and 30 % of its FFN gone, 4 x 128 tokens each, on one thread of an AMD EPYC Zen 5 (AVX-512 BF16, 2 shared vCPUs):
    4.0 s in bfloat16, 8.6 s in float32, to held-out losses of 0.3556 and 0.3557; 0.3557 in float16."""
    return precision if precision != "auto" else "bfloat16" if has_bfloat16(device) else "float32"


def autocast(precision: Precision, device: str = "cpu") -> torch.autocast:
    """Products in the small type, everything else as it is."""
    dtype = getattr(torch, precision)
    return torch.autocast(device, dtype=dtype if precision != "float32" else torch.bfloat16, enabled=precision != "float32")


def scaler(precision: Precision, device: str = "cpu") -> torch.amp.GradScaler:
    """Of the loss, so that small gradients are none in float16 that vanish; one that does nothing for other types."""
    return torch.amp.GradScaler(device, growth_interval=GROWTH, enabled=precision == "float16")
