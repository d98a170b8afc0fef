"""ONNX Runtime and OpenVINO on one layer, from the very numbers that fxc has. Both are optional."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxc.kernel_bench.contender import HALF, INT8, Call, Contender
from fxc.kernel_bench.weights import Weights, group_of
from fxc_kernels import int4_linear

# What ONNX files with all their weights inside can be at most.
PROTOBUF_BYTES = 2**31 - 2**20
# The level at which MatMulNBits multiplies int8 activations.
ACCURACY_INT8 = 4


def contenders(schemes: tuple[str, ...], threads: int) -> list[Contender]:
    found = [openvino("OpenVINO bf16", "bf16", "dense", threads)]
    for scheme in schemes:
        if scheme == "int8":
            found += [
                onnxruntime("ONNX Runtime DynamicQuantizeMatMul", scheme, "int8", threads),
                openvino("OpenVINO int8, static activations", scheme, "int8", threads, quantize=True),
            ]
        elif scheme == "int8_weight_only":
            found.append(openvino("OpenVINO int8 weights", scheme, "int8", threads))
        elif scheme.startswith("int4"):
            found += [
                onnxruntime("ONNX Runtime MatMulNBits, int8 activations", scheme, scheme, threads),
                openvino("OpenVINO int4 weights", scheme, scheme, threads),
            ]
    return found


def onnxruntime(name: str, scheme: str, kind: str, threads: int) -> Contender:
    """float32 activations, which it quantizes itself: all at once for int8 weights, block by block for int4 ones. One copy,
    because each session has a thread pool that spins against the next one's."""
    return Contender(
        name, scheme, kind, lambda weights: _OnnxRuntime(weights, threads), INT8, torch.float32,
        needs=("onnx", "onnxruntime"), holds=1 if kind == "int8" else 0.6, rotates=False,
    )  # fmt: skip


class _OnnxRuntime:
    def __init__(self, weights: Weights, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = _onnx_model(weights)
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> Call:
        feed = {"x": x.numpy()}
        return lambda: torch.from_numpy(self.session.run(None, feed)[0])


def _onnx_model(weights: Weights) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    n, k = weights.n, weights.k
    if weights.format == "int8":
        qweight, scale = weights.parts
        constants = {"w": qweight.t().contiguous().numpy(), "s": scale.numpy()}
        node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    else:
        group = group_of(weights.format)
        qweight, scale = weights.parts[:2]
        # Its bytes hold k = 2j in the low half too, and without zero points they stand for q - 8.
        constants = {"w": qweight.reshape(n, k // group, group // 2).numpy(), "s": scale.float().flatten().numpy()}
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
            K=k, N=n, bits=4, block_size=group, accuracy_level=ACCURACY_INT8,
        )  # fmt: skip
    size = sum(each.nbytes for each in constants.values())
    if size > PROTOBUF_BYTES:
        raise ValueError(f"{size / 1e9:.1f} GB of weights do not go into one ONNX file")
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def openvino(name: str, scheme: str, kind: str, threads: int, quantize: bool = False) -> Contender:
    """float32 in and out, bfloat16 inside. quantize: activations to int8 by limits that are known before, as after calibration:
    those of the input that it is given."""
    holds = {"dense": 2.0, "int8": 1.0}.get(kind, 0.6)
    return Contender(
        name, scheme, kind, lambda weights: _OpenVino(weights, threads, quantize), INT8 if quantize else 2 * HALF,
        torch.float32, needs=("openvino",), holds=holds,
    )  # fmt: skip


class _OpenVino:
    def __init__(self, weights: Weights, threads: int, quantize: bool):
        self.weights, self.quantize = weights, quantize
        self.options = {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16",
        }  # fmt: skip
        self.request: Any = None

    def __call__(self, x: Tensor) -> Call:
        import openvino

        if self.request is None or self.quantize:
            model = _openvino_model(self.weights, x.abs().max().item() if self.quantize else None)
            self.request = openvino.Core().compile_model(model, "CPU", self.options).create_infer_request()
        request, feed = self.request, [x.numpy()]
        return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])


def _openvino_model(weights: Weights, largest: float | None) -> Any:
    """largest: the magnitude that becomes 127 in the activations, or None where they stay floats."""
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([-1, weights.k], np.float32, name="x")
    if weights.format == "dense":
        weight = ops.constant(weights.dense().numpy())
    elif weights.format == "int8":
        qweight, scale = weights.parts
        weight = ops.multiply(ops.convert(ops.constant(qweight.numpy()), "f32"), ops.constant(scale[:, None].numpy()))
    else:
        group = group_of(weights.format)
        q = int4_linear.unpack(weights.parts[0]).to(torch.int8).reshape(weights.n, -1, group) - int4_linear.MIDDLE
        halves = _packed_int4(q)  # has a name because the tensor does not keep it alive
        stored = ops.constant(openvino.Tensor(halves, [*q.shape], openvino.Type.i4), shared_memory=False)
        scaled = ops.multiply(ops.convert(stored, "f32"), ops.constant(weights.parts[1].float()[..., None].numpy()))
        weight = ops.reshape(scaled, ops.constant(np.array([weights.n, weights.k])), False)
    if largest is not None:
        low, high = (ops.constant(np.float32(each)) for each in (-largest * 128 / 127, largest))
        x_read = ops.fake_quantize(x, low, high, low, high, 256)
    else:
        x_read = x
    return openvino.Model([ops.matmul(x_read, weight, False, True)], [x], "layer")


def _packed_int4(q: Tensor) -> np.ndarray:
    """int8 -8..7 -> two to a byte, the even one in the low half: the layout of OpenVINO's i4."""
    halves = (q & 15).to(torch.uint8).flatten()
    return (halves[0::2] | halves[1::2] << 4).numpy()
