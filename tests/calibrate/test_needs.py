"""What a run needs is said, and a run that cannot fit is refused with what would."""

from dataclasses import replace

import pytest

from fxc.calibrate import needs
from fxc.calibrate.needs import Needs
from fxc.errors import ResourceError

NEEDS = Needs(states=3_000_000_000, statistics=2_000_000_000, block=100_000_000, work=50_000_000, stages=[], result=25_000_000)


def test_all_parts_are_said():
    said = "3000.0 MB of hidden states, 2000.0 MB of statistics, 100.0 MB for a block, 50.0 MB to work on a layer and "
    assert str(NEEDS) == f"{said}25.0 MB of compressed weights: 5175.0 MB of memory"
    assert "3000.0 MB of hidden states on disk" in str(replace(NEEDS, on_disk=True))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("needed", "ways"),
    [
        (NEEDS, ["--calib-disk", "algorithm=grid"]),
        (replace(NEEDS, statistics=9_000_000_000), ["algorithm=grid", "--calib-disk"]),
        (replace(NEEDS, block=5_000_000_000), ["--calib-length", "--calib-disk"]),
        (replace(NEEDS, on_disk=True), ["algorithm=grid", "--calib-length"]),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would_help_most(needed, ways, monkeypatch):
    monkeypatch.setattr(needs, "available", lambda: 2_000_000_000)
    with pytest.raises(ResourceError, match=r"2\.00 GB are left") as caught:
        needed.check("int4", "algorithm=grid")
    first, second = caught.value.hint.split("; or ")
    assert ways[0] in first and ways[1] in second


def test_what_fits_goes_on(monkeypatch):
    monkeypatch.setattr(needs, "available", lambda: NEEDS.total)
    NEEDS.check("int4")
    monkeypatch.setattr(needs, "available", lambda: NEEDS.total - NEEDS.states)
    replace(NEEDS, on_disk=True).check("int4")
    with pytest.raises(ResourceError, match="only= for some layers"):
        NEEDS.check("int4")
    monkeypatch.setattr(needs, "available", lambda: None)
    NEEDS.check("int4")


def test_what_is_trained_is_trained_when_statistics_are_no_more(monkeypatch):
    little, much = replace(NEEDS, training=1_000_000_000), replace(NEEDS, training=9_000_000_000)
    assert little.total == NEEDS.total
    assert much.total == NEEDS.states + 9_000_000_000 + NEEDS.result
    monkeypatch.setattr(needs, "available", lambda: NEEDS.total)
    with pytest.raises(ResourceError, match=r"12\.03 GB") as caught:
        much.check("int4")
    assert caught.value.hint.startswith("only= for some layers at a time; or fewer or shorter samples")
