"""Which functions a program may call: pure `aten` and `fxc` operators, integer arithmetic on sizes, and nothing else.

A program is data that may come from a stranger, so its text can name no other function. An operator is admitted when its
schema says that it neither mutates nor aliases-and-writes its arguments and when it is not one of the few that reach
outside of the tensors it is given.
"""

from __future__ import annotations

import math
import operator

import torch
from torch._ops import OpOverload

NAMESPACES = ("aten", "fxc")
# Operators of one device, and of several processes, which a lowered program calls and no text names.
DEVICE_NAMESPACES = ("fxc_cpu", "fxc_cuda", "fxc_ranks")
# What a lowered program may write with: into the buffers that a decode step is given.
WRITES = {"index_copy_"}
# Reads a file, or memory that the text chooses, or returns memory that nobody wrote.
FORBIDDEN = {"from_file", "as_strided", "as_strided_copy", "as_strided_scatter", "data"}
# Operators of one backend or of packed, sparse and quantized tensors: some trust their arguments and crash on wrong ones.
FORBIDDEN_PREFIXES = (
    "fbgemm_", "mkldnn_", "cudnn_", "miopen_", "mps_", "quantize", "q_", "fake_quantize", "sparse_", "to_sparse", "to_mkldnn",
    "resize", "set", "empty", "new_empty", "quantized_", "choose_qparams", "dequantize", "record_stream", "unsafe_",
)  # fmt: skip
# Private operators are refused unless a captured model needs them: many check their arguments less than public ones do.
PRIVATE = {
    "_softmax",
    "_log_softmax",
    "_to_copy",
    "_grouped_mm",
    "__and__",
    "__or__",
    "__xor__",
    "__lshift__",
    "__rshift__",
}

_FUNCTIONS = {
    **{f"operator.{f.__name__}": f for f in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.truediv, operator.neg,
        operator.pow, operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    )},
    **{f"torch.{f.__name__}": f for f in (torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float,
                                          torch.sym_ite, torch.sym_sum)},
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
}  # fmt: skip
_NAMES = {f: name for name, f in _FUNCTIONS.items()}


def refusal(target: object, lowered: bool = False) -> str | None:
    """Why `target` may not stand in a program, or in a lowered one, or None when it may."""
    if isinstance(target, OpOverload):
        if target.namespace not in (NAMESPACES + DEVICE_NAMESPACES if lowered else NAMESPACES):
            return f"operators of the namespace {target.namespace!r} are not allowed"
        short = target._schema.name.split("::")[1]
        is_private = short.startswith("_") and short not in PRIVATE
        if target.namespace == "aten" and (is_private or short in FORBIDDEN or short.startswith(FORBIDDEN_PREFIXES)):
            return f"aten.{short} is not on the list of allowed operators"
        if target._schema.is_mutable and not (lowered and short in WRITES):
            return f"{name_of(target)} mutates its arguments"
        return None
    return None if target in _NAMES else f"{target!r} is not an operator"


def name_of(target: object) -> str:
    """The name in the text: `aten.linear` for a default overload, `aten.add.Tensor` for another, `operator.add`."""
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return _NAMES[target]


def resolve(name: str) -> object:
    """The function that `name` stands for. Raises `KeyError` with the reason when there is none or it is not allowed."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    short, _, overload = rest.partition(".")
    if namespace not in NAMESPACES or not short.isidentifier() or (overload and not overload.isidentifier()):
        raise KeyError(f"{name} is not on the list of allowed operators")
    packet = getattr(getattr(torch.ops, namespace), short, None)
    target = getattr(packet, overload or "default", None)
    if not isinstance(target, OpOverload):
        raise KeyError(f"this version of torch and fxc has no operator {name}")
    if reason := refusal(target):
        raise KeyError(reason)
    return target
