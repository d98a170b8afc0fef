"""A compilation that is killed goes on with --resume, and gives the bytes of one that was not disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from command import fxc
from families import build
from repo import REPO

import fxc as package
from fxc.calibrate.journal import Journal

PASSES = "sparsify:criterion=wanda,int4:group=32:algorithm=grid"

# Kills the process when `WHERE` is called for the n-th time: before a stage is saved, while a file is written, between a file
# and its line in the journal.
KILLER = textwrap.dedent("""
    import os, signal, sys
    from fxc.calibrate import journal
    where, count = sys.argv[1], int(sys.argv[2])
    module, name = (os, "fsync") if where == "fsync" else (journal.Journal, where)
    true = getattr(module, name)
    def killer(*arguments):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*arguments)
    setattr(module, name, killer)
    from fxc.cli.app import app
    app(sys.argv[3:])
""")


TRAINS = "int4:group=32,recover:steps=6:batch=2:block_steps=2"


def arguments(folder, out, *more, passes=PASSES):
    data = ("--calib", folder / "text.txt", "--calib-samples", 4, "--calib-length", 32)
    return [str(a) for a in ("compile", folder / "qwen2", "-o", out, "--passes", passes, *data, "--no-measure", *more)]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    fxc(*arguments(folder, out))
    return files(out)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("where", "count", "more"),
    [
        pytest.param("save_stage", 3, (), id="early", marks=pytest.mark.slow),
        pytest.param("_append", 12, (), id="between a file and its line", marks=pytest.mark.slow),
        pytest.param("fsync", 31, ("--calib-disk", "states"), id="in the second pass, on disk"),
    ],
)
def test_it_goes_on_after_a_kill_at_any_moment(where, count, more, folder, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", KILLER, where, str(count), *arguments(folder, "out", *more)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    place = tmp_path / "states" if more else tmp_path
    assert not (tmp_path / "out").exists() and (place / ".out.fxc-resume").is_dir()
    done = fxc(*arguments(folder, "out", *more), "--resume")
    assert "goes on:" in done.stderr
    assert files(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.rglob("*fxc-resume*")) == []


@pytest.mark.slow
def test_training_goes_on_after_a_kill(folder, tmp_path, monkeypatch):
    """Killed after half-blocks and two looks at held-out samples."""
    monkeypatch.chdir(tmp_path)
    fxc(*arguments(folder, "whole", passes=TRAINS))
    command = [sys.executable, "-c", KILLER, "save_stage", "3", *arguments(folder, "out", passes=TRAINS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = fxc(*arguments(folder, "out", passes=TRAINS), "--resume")
    assert "half-blocks are done" in done.stderr and "goes on: 2 of 6 parts are done" in done.stderr
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
def test_teaching_goes_on_after_a_kill(folder, tmp_path):
    """`fxc distill`; `fxc recover` is the pass of the test above with another teacher."""

    def words(out):
        models = ("--student", folder / "qwen2", "--teacher", folder / "qwen2")
        train = ("--data-samples", 8, "--data-length", 32, "--steps", 6, "--batch", 2, "--loss", "kl+task", "--method", "all")
        return [str(a) for a in ("distill", *models, "--data", folder / "text.txt", *train, "-o", tmp_path / out)]

    fxc(*words("whole"))
    run = [sys.executable, "-c", KILLER, "save_stage", "3", *words("out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "3 of 6 parts are done" in fxc(*words("out"), "--resume").stderr
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_without_resume_it_begins_anew_and_an_interrupted_run_says_how_to_go_on(folder, whole, tmp_path, monkeypatch):
    true, left = Journal.save_stage, [4]

    def interrupted(self, *values):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        true(self, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save_stage", interrupted)
        assert "--resume goes on from there" in fxc(*arguments(folder, tmp_path / "out"), code=130).stderr
    done = fxc(*arguments(folder, tmp_path / "out"))
    assert "goes on:" not in done.stderr and files(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_saved_where_so_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "__init__", lambda *_: 1 / 0)
    fxc(*arguments(folder, tmp_path / "out"), "--no-resume")


def test_resume_where_nothing_learns_is_refused(folder, tmp_path):
    done = fxc("compile", folder / "qwen2", "-o", tmp_path / "out", "--resume", code=2)
    assert "no pass learns from data" in done.stderr


@pytest.mark.parametrize("option", ["resume", "calib_disk"])
def test_in_python_a_folder_is_named_and_left_as_it_was(option, tmp_path):
    model, inputs = build("mlp")
    data = [torch.randn(5, 40) for _ in range(3)]
    spec = "sparsify:criterion=wanda"
    plain = package.optimize(model, inputs, spec, calib=data)
    made = package.optimize(model, inputs, spec, calib=data, **{option: tmp_path / "a"})
    assert all(torch.equal(t, plain.program.constants[name]) for name, t in made.program.constants.items())
    assert list(tmp_path.rglob("*.*")) == []
