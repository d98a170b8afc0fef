"""fxc compare: one command for a table, and one that is killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from command import fxc, fxc_json
from repo import REPO

from fxc.comparison.folder import STATE, Folder

LEARNS = "int4:group=32:algorithm=grid"
STRATEGIES = f"none;int8;{LEARNS}"

# Kills the process when a stage is saved for the third time.
KILLER = textwrap.dedent("""
    import os, signal, sys
    from fxc.calibrate.journal import Journal
    true, left = Journal.save_stage, [2]
    def killer(*arguments):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*arguments)
    Journal.save_stage = killer
    from fxc.cli.app import app
    app(sys.argv[1:])
""")


def arguments(folder, out, strategies=STRATEGIES, learns=True):
    data = ("--data", folder / "text.txt", "--eval-length", 32, "--eval-samples", 4)
    calib = ("--calib", folder / "text.txt", "--calib-samples", 4, "--calib-length", 32) if learns else ()
    timing = ("--sizes", "1x8", "--new", 2, "--rounds", 1)
    return [str(a) for a in ("compare", folder / "qwen2", "--strategies", strategies, *data, *calib, *timing, "-o", out)]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, fxc(*arguments(folder, out))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_table_and_what_it_means(whole):
    out, done = whole
    assert [line.split()[0] for line in done.stdout.splitlines()[2:6]] == ["original", "none", "int8", LEARNS]
    assert "prefill 1x8, ms" in done.stdout and "decode 1x8, ms" in done.stdout and "perplexity" in done.stdout
    assert "nothing is smaller and as good:" in done.stdout and f"written to {out}" in done.stdout
    assert "2 of 3: int8" in done.stderr
    assert not list(out.rglob("*.resume*")) and not list(out.parent.glob("*.lock"))


def test_killed_it_goes_on_and_ends_the_same(folder, whole, tmp_path):
    out, _ = whole
    command = [sys.executable, "-c", KILLER, *arguments(folder, tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "compare.json").exists()
    done = fxc(*arguments(folder, tmp_path / "out"))
    assert "1 of 3: none: done before" in done.stderr and "2 of 3: int8: done before" in done.stderr
    assert "goes on:" in done.stderr
    artifacts = [path.name for path in out.iterdir() if path.is_dir() and path.name != STATE]
    assert len(artifacts) == 3
    assert all(files(tmp_path / "out" / name) == files(out / name) for name in artifacts)
    rows = [json.loads((each / "compare.json").read_text())["rows"] for each in (out, tmp_path / "out")]
    assert [row["quality"] for row in rows[0]] == [row["quality"] for row in rows[1]]


def test_interrupted_between_an_artifact_and_its_entry_it_says_how_to_go_on(folder, whole, tmp_path, monkeypatch):
    true, words = Folder.write, arguments(folder, tmp_path / "out", "none;int8", learns=False)

    def interrupted(self, name, entry):
        if name == "int8" and "hash" in entry:
            raise KeyboardInterrupt
        true(self, name, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", interrupted)
        done = fxc(*words, code=130)
    assert "the same command goes on from there" in done.stderr and (tmp_path / "out" / "int8" / "fxc.json").is_file()
    done = fxc(*words)
    assert "none: done before" in done.stderr and "int8: done before" not in done.stderr
    assert files(tmp_path / "out" / "int8") == files(whole[0] / "int8")


def test_json_and_the_folder_that_is_written_where_none_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "bert" / "heldout.txt").write_text((folder / "text.txt").read_text())
    found = fxc_json("compare", folder / "bert", "--strategies", "int8", "--sizes", "1x8", "--rounds", 1)
    (folder / "bert" / "heldout.txt").unlink()
    assert found["data_was_found"] and found["out"] == "bert-compare"
    assert [row["strategy"] for row in found["rows"]] == ["original", "int8"]
    assert (tmp_path / "bert-compare" / "compare.md").is_file()


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        (("--strategies", "int9"), "no pass 'int9'", "did you mean 'int8'"),
        (("--sizes", "big"), "no list of sizes", "1x128,8x512"),
        (("--sizes", "8"), "no size of this model", "batch x length"),
        (("--data", "nowhere.txt"), "no such evaluation data", "folder of images"),
        (("--data", "IMAGES"), "does not take images", "text file"),
        (("--data", "WEIGHTS"), "no evaluation data", "load it in Python"),
        (("--rounds", "0"), "0 rounds", "at least 1"),
        (("--backend", "magic"), "no backend", "eager"),
        (("-o", "TAKEN"), "will not be replaced", "another folder"),
    ],
)
def test_a_mistake_is_said_before_anything_is_done(given, what, hint, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    names = {"IMAGES": "images", "WEIGHTS": "a.safetensors", "TAKEN": "taken"}
    before = files(tmp_path)
    words = [names.get(each, each) for each in given]
    done = fxc("compare", folder / "qwen2", *words, *(("--strategies", "int8") if "--strategies" not in words else ()), code=2)
    assert what in done.stderr and hint in done.stderr
    assert files(tmp_path) == before
