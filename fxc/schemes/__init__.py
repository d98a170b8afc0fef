"""Weight formats, one file each: pack, unpack, and the operator that reads it."""

import fxc_kernels.grouped_linear
import fxc_kernels.int8_linear  # noqa: F401 - importing a kernel registers its operators
