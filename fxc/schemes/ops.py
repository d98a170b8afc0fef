"""The operators of fxc whose weights are as a model has them: linear layers over rows sorted by group, as experts are."""

import torch

from fxc_kernels import grouped_linear as _grouped_linear  # noqa: F401 - registers them

GROUPED_MM = torch.ops.fxc.grouped_mm.default
GROUPED_LINEAR = torch.ops.fxc.grouped_linear.default
