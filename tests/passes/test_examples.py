"""Every pass shows what it does as two programs, in its docstring and in tests/passes/<pass>/*.fxc, and does that.

FXC_ACCEPT=1 rewrites the files as the passes work now; the difference is for a reader of the change.
"""

import os
from pathlib import Path

import pass_text
import pytest

from fxc.passes.base import Pass

_FILES = sorted(Path(__file__).parent.glob("*/*.fxc"))
_PASSES = {name: cls for name, cls in Pass.registry.items() if cls.__module__.startswith("fxc.")}


@pytest.mark.parametrize("name", sorted(_PASSES))
def test_the_docstring_of_a_pass_shows_what_it_does(name):
    example = pass_text.in_docstring(_PASSES[name])
    assert example is not None, f"{name} has no example: a program, a line of ---, and the program after the pass"
    pass_text.check(example)


@pytest.mark.parametrize("path", _FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_file_shows_what_a_pass_does(path):
    example = pass_text.in_file(path)
    if os.environ.get("FXC_ACCEPT"):
        pass_text.accept(path, example)
        example = pass_text.in_file(path)
    pass_text.check(example)


def test_every_folder_is_a_pass():
    assert {path.parent.name for path in _FILES} <= _PASSES.keys()


def test_a_wrong_example_is_noticed():
    example = pass_text.in_docstring(_PASSES["int8"])
    wrong = pass_text.Example(example.where, example.passes, example.before, example.after.replace("qweight", "weight"))
    with pytest.raises(AssertionError, match="the pass makes"):
        pass_text.check(wrong)
