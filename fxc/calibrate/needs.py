"""What a run over calibration data takes of memory, said before it starts, and refused where it cannot fit."""

from __future__ import annotations

from dataclasses import dataclass

from fxc.errors import ResourceError
from fxc.memory import available


@dataclass(frozen=True)
class Needs:
    """Bytes, besides the program and its samples. states: the hidden states of all samples where they are largest, as if they
    had nothing in common; statistics: the most at one time; block: the values of one sample in one block; work: what computing
    on a layer takes; result: the compressed weights; stages: of each, the names of its layers and the bytes of its
    statistics; on_disk: whether the hidden states are there."""

    states: int
    statistics: int
    block: int
    work: int
    stages: list[tuple[list[str], int]]
    result: int = 0
    on_disk: bool = False

    @property
    def total(self) -> int:
        """Of memory."""
        return (0 if self.on_disk else self.states) + self.statistics + self.block + self.work + self.result

    def __str__(self) -> str:
        disk = " on disk" if self.on_disk else ""
        parts = {
            f"of hidden states{disk}": self.states, "of statistics": self.statistics, "for a block": self.block,
            "to work on a layer": self.work, "of compressed weights": self.result,
        }  # fmt: skip
        said = [f"{nbytes / 1e6:.1f} MB {what}" for what, nbytes in parts.items()]
        return f"{', '.join(said[:-1])} and {said[-1]}: {self.total / 1e6:.1f} MB of memory"

    def check(self, where: str, lighter: str | None = None) -> None:
        """Raises `ResourceError` where there is not so much memory. where: what needs it; lighter: the option that
        makes do with smaller statistics."""
        left = available()
        if left is None or self.total <= left:
            return
        states = "fewer or shorter samples (--calib-samples, --calib-length), or --calib-disk DIR for the hidden states"
        fewer = f"{lighter}, which needs less, or only= for some layers" if lighter else "only= for some layers at a time"
        ways = {
            fewer: self.statistics + self.work,
            states: 0 if self.on_disk else self.states,
            "shorter samples (--calib-length)": self.block,
            "a machine with more memory": self.result,
        }
        raise ResourceError(
            f"what it learns needs {self.total / 1e9:.2f} GB of memory and {left / 1e9:.2f} GB are left",
            where=where,
            why=self,
            hint="; or ".join(sorted(filter(ways.get, ways), key=ways.get, reverse=True)[:2]),
        )
