"""The operators of compressed layers, by name. Importing this registers them with torch."""

import torch

from fxc_kernels import fp8_linear as _fp8_linear  # noqa: F401
from fxc_kernels import grouped_linear as _grouped_linear  # noqa: F401
from fxc_kernels import int4_linear as _int4_linear  # noqa: F401
from fxc_kernels import int8_linear as _int8_linear  # noqa: F401
from fxc_kernels import sparse24_linear as _sparse24_linear  # noqa: F401

GROUPED_MM = torch.ops.fxc.grouped_mm.default
GROUPED_LINEAR = torch.ops.fxc.grouped_linear.default
INT8_LINEAR = torch.ops.fxc.int8_linear.default
INT8_WEIGHT_ONLY_LINEAR = torch.ops.fxc.int8_weight_only_linear.default
INT8_GROUPED_LINEAR = torch.ops.fxc.int8_grouped_linear.default
INT4_WEIGHT_ONLY_LINEAR = torch.ops.fxc.int4_weight_only_linear.default
FP8_LINEAR = torch.ops.fxc.fp8_linear.default
FP8_WEIGHT_ONLY_LINEAR = torch.ops.fxc.fp8_weight_only_linear.default
SPARSE24_LINEAR = torch.ops.fxc.sparse24_linear.default
INT8_SPARSE24_LINEAR = torch.ops.fxc.int8_sparse24_linear.default
