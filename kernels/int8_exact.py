"""Whether an int8 product of this process is exact: it multiplies extreme values, and only the numbers count.

Without VNNI, oneDNN adds pairs of u8 x s8 products in 16 bits and saturates (vpmaddubsw): 255 * 127 + 255 * 127 becomes 32767.
Random values hardly ever get there. What a CPU can do does not tell either: ONEDNN_MAX_CPU_ISA takes instructions away.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# (N, K): below and above a vector, ragged, long. oneDNN has a kernel for few rows, and one for many.
SIZES = ((1, 64), (33, 77), (64, 64), (256, 256), (48, 4096))
ROWS = (1, 2, 3, 16, 128)
EXTREMES = ((127, 127), (127, -128), (-128, 127), (-128, -128))


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For what is tried once in a process, which may be while something is traced."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


def is_exact(product_of: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> bool:
    """product_of: weight int8 [N, K] -> (q int8 [M, K] -> q @ weight^T [M, N] in integers or float32)."""
    with unwatched():
        for (outputs, columns), (activation, weight) in itertools.product(SIZES, EXTREMES):
            product = product_of(torch.full((outputs, columns), weight, dtype=torch.int8, device="cpu"))
            for rows in ROWS:
                q = torch.full((rows, columns), activation, dtype=torch.int8, device="cpu")
                if not (product(q) == activation * weight * columns).all():
                    return False
    return True
