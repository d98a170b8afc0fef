"""Damaged artifacts and Hugging Face folders, by a seed: read, or refused with one clear error, with nothing executed, in ten
seconds and a gigabyte. `python -m benchmarks.fuzz` has more of them."""

import os
import subprocess
import time

import pytest

from benchmarks.fuzz import guard
from benchmarks.fuzz.folders import artifacts, check_artifact, check_checkpoint, checkpoints
from benchmarks.fuzz.guard import Broke, judged
from fxc.errors import FxcError, InputRefused

SHARDS, PER_SHARD = 4, 25


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    return artifacts(place), checkpoints(place)


@pytest.mark.fault(8, 21, 22, 33)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_damaged_artifacts(shard, whole, tmp_path):
    said = {check_artifact(whole[0], tmp_path, "short", shard * PER_SHARD + n)[1].said is None for n in range(PER_SHARD)}
    assert False in said, "nothing was refused"


@pytest.mark.fault(10, 21, 22, 23, 24, 33)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_damaged_checkpoints(shard, whole, tmp_path):
    said = {check_checkpoint(whole[1], tmp_path, "short", shard * 12 + n)[1].said is None for n in range(12)}
    assert False in said, "nothing was refused"


def _system(folder):
    os.system("true")


def _child(folder):
    subprocess.run(["true"])


def _writes(folder):
    (folder / "x").write_text("")


def _faulty(folder):
    raise FxcError("a fault")


def _trace(folder):
    raise KeyError("x")


def _says_nothing(folder):
    raise InputRefused("")


def _sleeps(folder):
    time.sleep(5)


def _computes(folder):
    while True:
        pass


def _catches(folder):
    try:
        _computes(folder)
    except Exception as error:
        raise InputRefused("something is wrong with it") from error


def _takes_memory(folder):
    return len(b"x" * 80_000_000)


WRONG = [_system, _child, _writes, _faulty, _trace, _says_nothing, _sleeps, _computes, _catches, _takes_memory]


@pytest.mark.parametrize("reads", WRONG)
def test_the_guard_sees_what_may_not_be(reads, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    monkeypatch.setattr(guard, "BYTES", 40_000_000)
    with pytest.raises(Broke):
        judged(tmp_path, reads)
