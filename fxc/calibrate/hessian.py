"""Statistics of what a layer reads, added up batch by batch: nothing of a batch is kept.

`Squares` is E[x^2] by channel (with mean and largest |x|), `Hessian` is H = 2/n X^T X, and with a second stream also the cross
statistic G = 2/n X^T Y of X, what the layer reads, and Y, what it would read if the layers before it were not compressed,
and 2/n Y^T Y.
All are running means in float32 or float64, so any number of rows is as good as few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc import ranks
from fxc.errors import InputRefused


def as_rows(values: Tensor, width: int) -> Tensor:
    """[*, width] -> [n, width]. Raises InputRefused for another width or for integers."""
    if values.dim() == 0 or values.shape[-1] != width or not values.is_floating_point():
        why = f"{values.dtype}{list(values.shape)}"
        raise InputRefused(f"these are not inputs of a layer that reads {width} channels", why=why)
    return values.detach().reshape(-1, width)


class Squares:
    """Of each of `width` channels: mean [K] of x^2, size [K] the mean of |x|, largest [K] |x|."""

    def __init__(self, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.mean = torch.zeros(width, dtype=dtype, device=device)
        self.size = torch.zeros_like(self.mean)
        self.largest = torch.zeros_like(self.mean)

    def add(self, inputs: Tensor) -> None:
        """Count `inputs` [*, K] in. Raises InputRefused for another width, or NaN and Inf."""
        x = as_rows(inputs, len(self.mean)).to(self.mean)
        if not len(x):
            return
        share = len(x) / (self.rows + len(x))
        mean = torch.lerp(self.mean, x.square().mean(0), share)
        _refuse_infinite(mean)
        size = x.abs()
        self.mean, self.size = mean, torch.lerp(self.size, size.mean(0), share)
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.rows += len(x)

    def meet(self) -> None:
        """Become the statistic of what all processes of this run have counted."""
        self.rows, share = _share(self.rows)
        self.mean, self.size = (ranks.added_tensor(each * share) for each in (self.mean, self.size))
        self.largest = ranks.largest(self.largest)

    @property
    def dead(self) -> Tensor:
        """bool [K]: the channels that were zero in every row (all, where there was no row)."""
        return self.mean == 0


class Hessian:
    """mean: H = 2/n X^T X [K, K]; cross: G = 2/n X^T Y, uncompressed: 2/n Y^T Y, or None without a second stream.

    H is the second derivative of the layer's squared error by a row of its weight, the same for all rows.
    """

    def __init__(
        self, width: int, *, cross: bool = False, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.rows = 0
        self.mean = torch.zeros(width, width, dtype=dtype, device=device)
        self.cross = torch.zeros_like(self.mean) if cross else None
        self.uncompressed = torch.zeros_like(self.mean) if cross else None

    def add(self, inputs: Tensor, uncompressed: Tensor | None = None) -> None:
        """Count `inputs` [*, K] in, and `uncompressed` of the same shape where there is a second stream.

        Raises InputRefused for another width, NaN and Inf, or one stream where there are two.
        """
        if (uncompressed is None) != (self.cross is None):
            given = "one was given" if uncompressed is None else "two were given, and it was not asked for"
            raise InputRefused("the cross statistic is of two streams", why=given)
        x = as_rows(inputs, len(self.mean)).to(self.mean)
        if not len(x):
            return
        kept, new = self.rows / (self.rows + len(x)), 2 / (self.rows + len(x))
        if self.cross is not None:
            y = as_rows(uncompressed, len(self.mean)).to(self.mean)
            if y.shape != x.shape:
                raise InputRefused("the two streams differ in rows", why=f"{len(x)} and {len(y)}")
            _refuse_infinite(y.square().mean(0))
            self.cross.mul_(kept).addmm_(x.t(), y, alpha=new)
            self.uncompressed.mul_(kept).addmm_(y.t(), y, alpha=new)
        _refuse_infinite(x.square().mean(0))
        self.mean.mul_(kept).addmm_(x.t(), x, alpha=new)
        self.rows += len(x)

    def meet(self) -> None:
        """Become the statistic of what all processes of this run have counted."""
        self.rows, share = _share(self.rows)
        self.mean = ranks.added_tensor(self.mean.mul_(share))
        if self.cross is not None:
            self.cross = ranks.added_tensor(self.cross.mul_(share))
            self.uncompressed = ranks.added_tensor(self.uncompressed.mul_(share))

    def squares(self) -> Squares:
        """E[x^2] alone of the same rows."""
        found = Squares(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        found.rows, found.mean = self.rows, self.mean.diagonal() / 2
        return found

    @property
    def dead(self) -> Tensor:
        """bool [K]: the channels that were zero in every row (all, where there was no row)."""
        return self.mean.diagonal() == 0


def _share(rows: int) -> tuple[int, float]:
    """The rows of all processes, and which share this one's are."""
    total = int(ranks.added(rows))
    return total, rows / max(total, 1)


def _refuse_infinite(mean_squares: Tensor) -> None:
    if not mean_squares.isfinite().all():
        bad = int((~mean_squares.isfinite()).sum())
        raise InputRefused("a layer reads NaN or Inf", why=f"{bad} of its {len(mean_squares)} channels are affected")
