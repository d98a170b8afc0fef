"""The folder of a comparison: whose it is, and what is never touched."""

import pytest
import torch
from torch import nn

import fxc
from fxc.comparison.folder import STATE, check_folder, opened
from fxc.errors import ResourceError, UsageError

MODEL = {"program": "abc", "name": "a model"}


def test_a_folder_that_is_no_comparison_stays_as_it_is(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="will not be replaced"), opened(out, MODEL, None, force=force):
            pass
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "file", None)
    with pytest.raises(UsageError, match="inside of the source"):
        check_folder(out / "inner", out)
    (out / STATE).symlink_to(tmp_path)
    with pytest.raises(UsageError, match="will not be replaced"):
        check_folder(out, None)


def test_one_of_another_model_is_refused_and_force_takes_away_only_what_is_ours(tmp_path):
    out = tmp_path / "out"
    with opened(out, MODEL, None, force=False) as folder:
        folder.write("int8", {"hash": "x"})
        fxc.optimize(nn.Linear(4, 4), (torch.zeros(2, 4),), passes="").save(folder.artifact("int8"))
        folder.write_file("compare.md", "old")
        (out / "notes.txt").write_text("mine")
        (out / "mine").mkdir()
    other = MODEL | {"program": "def"}
    with pytest.raises(UsageError, match="of another model") as caught, opened(out, other, None, force=False):
        pass
    assert caught.value.why == "of a model" and "--force" in caught.value.hint
    assert (out / "int8" / "fxc.json").is_file()
    (out / "int8" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="will not be removed"), opened(out, other, None, force=True):
        pass
    (out / "int8" / "mine.txt").unlink()
    with opened(out, other, None, force=True) as folder:
        assert folder.read("int8") is None and folder.read("model") == other
    assert sorted(path.name for path in out.iterdir()) == [STATE, "mine", "notes.txt"]


def test_two_at_once_are_one_too_many(tmp_path):
    with (
        opened(tmp_path / "out", MODEL, None, force=False),
        pytest.raises(ResourceError, match="another process"),
        opened(tmp_path / "out", MODEL, None, force=False),
    ):
        pass


def test_a_link_in_the_place_of_an_artifact_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with opened(tmp_path / "out", MODEL, None, force=False) as folder:
        (folder.path / "int8").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match="a link"):
            folder.artifact("int8")


@pytest.mark.parametrize("content", ["", "[1]", "{", '"x"', "[" * 100_000])
def test_an_entry_that_is_damaged_is_as_good_as_none(content, tmp_path):
    with opened(tmp_path / "out", MODEL, None, force=False) as folder:
        (folder.path / STATE / "int8.json").write_text(content)
        assert folder.read("int8") is None and folder.hash_of("int8") is None
