"""What tests of calibration data share."""

import pytest

from fxc.data.calibration import calibration_samples
from fxc.errors import UsageError

TEXT = "def answer(question):\n    return 42 if question else None\n\n" * 40


def runs(program, samples) -> None:
    for sample in samples:
        assert all(output.isfinite().all() for output in program.module()(*sample))


def refused(program, data, said: str, **options) -> str:
    with pytest.raises(UsageError) as caught:
        calibration_samples(program, data, **options)
    assert said in str(caught.value) and "try:" in str(caught.value)
    return str(caught.value)
