"""Weight formats, one file each: pack, unpack, and the operator that reads it."""

import fxc_kernels.fp8_linear
import fxc_kernels.grouped_linear
import fxc_kernels.int4_linear
import fxc_kernels.int8_linear
import fxc_kernels.sparse24_linear  # noqa: F401 - importing a kernel registers its operators
