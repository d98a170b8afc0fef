"""Which builds of kernels are compiled in a plain run of the tests, and which in a slow one."""

import pytest

from fxc_kernels.cuda.tile import Build


def each_once(shipped: list[tuple[int, Build]]) -> list:
    """Parameters (chip, build): each build for the newest chip that ships it, and marked slow for the older ones."""
    newest = {str(vars(build)): chip for chip, build in sorted(shipped, key=lambda each: each[0])}
    return [
        pytest.param(chip, build, id=f"sm_{chip} {build.name}", marks=[pytest.mark.slow] * (newest[str(vars(build))] != chip))
        for chip, build in shipped
    ]
