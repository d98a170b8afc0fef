"""What becomes one kernel on CUDA: a product with the activation behind it, gate and up, a norm with its sum, a rotation."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxc.ir import edit
from fxc.ir.program import Program
from fxc.lower.fusion import RmsNorm, insert_norm, match_rms_norm, match_rope
from fxc_kernels.cuda import ops as cuda_ops  # noqa: F401  registers the operators
from fxc_kernels.cuda.quantize_rows import KEPT

_ADD = torch.ops.aten.add.Tensor
_MUL = torch.ops.aten.mul.Tensor
_OPS = torch.ops.fxc_cuda
# Quantization -> the same of a norm; of a norm of a sum; and which of the latter's results is the sum.
_NORMS = {
    _OPS.quantize_int8.default: (
        _OPS.rms_norm_int8.default, _OPS.add_rms_norm_int8.default, 3
    ),
    _OPS.quantize_fp8.default: (
        _OPS.rms_norm_fp8.default, _OPS.add_rms_norm_fp8.default, 2
    ),
}  # fmt: skip


def fuse_norms(program: Program) -> int:
    """Quantizations of an RMSNorm that nothing else reads become one operator with it, and with the residual sum in front of
    it. Returns how many there were."""
    count = 0
    for target, (plain, with_sum, sum_at) in _NORMS.items():
        for node in program.graph.find_nodes(op="call_function", target=target):
            norm = _norm_that_fits(node.args[0])
            if norm is not None and len(node.args[0].users) == 1:
                rest = (norm.weight, norm.eps)
                fused, _ = insert_norm(program, norm.source, node, (plain, *rest), (with_sum, *rest), sum_at)
                for part in list(node.users):
                    edit.call(program, operator.getitem, (fused, part.args[1]), replacing=part, by="lower")
                count += 1
    edit.sweep(program)
    return count


def _norm_that_fits(node: fx.Node) -> RmsNorm | None:
    """The norm whose result `node` is, of rows that the kernel takes."""
    norm = match_rms_norm(node)
    return norm if norm is not None and norm.columns <= KEPT else None


def fuse_float_norms(program: Program) -> int:
    """RMSNorms whose result stays a float become one operator each, with the residual sum in front of them."""
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=_MUL):
        norm = _norm_that_fits(node)
        if norm is None:
            continue
        rest = (norm.weight, norm.eps)
        calls = (_OPS.rms_norm.default, *rest), (_OPS.add_rms_norm.default, *rest)
        fused, has_sum = insert_norm(program, norm.source, node, *calls, 1)
        if has_sum:
            edit.call(program, operator.getitem, (fused, 0), replacing=node, by="lower")
        else:
            edit.replace(node, fused)
        count += 1
    edit.sweep(program)
    return count


def fuse_rope(program: Program) -> int:
    """x * cos + rotate_half(x) * sin becomes one operator."""
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=_ADD):
        arguments = match_rope(node)
        if arguments is not None:
            edit.call(program, _OPS.rope.default, arguments, replacing=node, by="lower")
            count += 1
    edit.sweep(program)
    return count
