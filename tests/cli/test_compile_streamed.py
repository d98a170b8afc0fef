"""fxc compile of a model that is read piece by piece."""

import pytest
from command import fxc, fxc_json

from fxc.artifact.spill import Spill
from fxc.cli.parameters import bytes_of
from fxc.errors import UsageError


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("words", [("--plan",), ("--plan-only",), ("--plan", "--passes", "int8")], ids=" ".join)
def test_the_plan_alone_writes_nothing(words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fxc("compile", folder / "qwen2", *words)
    assert "in memory as a whole" in done.stdout and "result" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_plan_before_the_model_and_as_json(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fxc_json("compile", "--plan", folder / "qwen2", "--stream")
    assert said["is_streamed"] and said["weights"] > said["result"] > 0 and said["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_it_takes_and_a_killed_run_goes_on(folder, tmp_path, monkeypatch):
    words = ("compile", folder / "qwen2", "--stream", "--passes", "int4:group=32", "-o", tmp_path / "out")
    monkeypatch.setattr("fxc.ir.store.PART_BYTES", 10_000)
    write, left = Spill.write, [2]

    def killed(self, tensors):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(self, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Spill, "write", killed)
        assert "--resume" in fxc(*words, code=130).stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.fxc-resume").is_dir()
    done = fxc(*words, "--resume")
    assert "piece by piece" in done.stderr and "first layers" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    fxc(*words[:-1], tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert fxc("run", tmp_path / "out", "--prompt", "def", "--max-new-tokens", 2)


@pytest.mark.fault(28)
def test_what_does_not_fit_is_refused_before_it_starts(folder, tmp_path):
    done = fxc("compile", folder / "qwen2", "--stream", "--max-memory", "500MB", "-o", tmp_path / "out", code=6)
    assert "compiling takes about" in done.stderr and list(tmp_path.iterdir()) == []
    assert "folder of safetensors" in fxc("compile", folder / "qwen2-int8", "--stream", code=2).stderr
    assert "not a number of bytes" in fxc("compile", folder / "qwen2", "--max-memory", "much", code=2).stderr


@pytest.mark.parametrize(
    ("text", "nbytes"), [("3GB", 3e9), ("500MiB", 500 << 20), ("2.5e9", 2.5e9), ("7", 7), ("1.5 gb", 1.5e9), ("2TiB", 2 << 40)]
)
def test_bytes_are_read_as_people_write_them(text, nbytes):
    assert bytes_of("--max-memory", text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3 apples", "1,5GB", "3GBB"])
def test_other_texts_are_no_bytes(text):
    with pytest.raises(UsageError, match="not a number of bytes"):
        bytes_of("--max-memory", text)
