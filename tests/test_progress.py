"""How long what is left will take."""

from fxc import progress
from fxc.progress import Pace


def test_time_left_goes_by_what_was_done_here(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = Pace([1, 1, 2, 6, 400, 8000], first=1)
    assert pace.left(1) is None
    now[0] += 1
    assert pace.left(2) == "2.3 h left"
    now[0] += 2
    assert pace.left(3) == "2.3 h left"
    now[0] += 6
    assert Pace([1, 1]).left(0) is None
    short = Pace([1, 1, 3])
    now[0] += 10
    assert short.left(1) == "40 s left"
    now[0] += 90
    assert short.left(2) == "2 min left"
