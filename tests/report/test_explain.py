"""Every code has a meaning, and the page in docs is the text that the command prints."""

import os

import pytest
from command import fxc, fxc_json
from repo import REPO

from fxc.errors import FxcError, UsageError
from fxc.report.explain import EXPLAINED, as_text, explained, page


def kinds(kind):
    return {kind}.union(*(kinds(each) for each in kind.__subclasses__()))


def test_every_code_that_fxc_raises_is_explained():
    own = {each.exit_code for each in kinds(FxcError) if each.__module__ == "fxc.errors"}
    assert [each.kind.exit_code for each in EXPLAINED] == sorted(own)
    assert all(len(each.cases) > 1 for each in EXPLAINED)


@pytest.mark.parametrize("code", ["FXC-E5", "fxc-e5", "E5", "5"])
def test_a_code_is_found_however_it_is_written(code):
    assert fxc("explain", code).stdout.startswith("FXC-E5 VerificationFailed, exit code 5")
    assert fxc_json("explain", code)["code"] == "FXC-E5"


@pytest.mark.parametrize("code", ["FXC-E9", "", "five"])
def test_another_code_is_a_mistake(code):
    with pytest.raises(UsageError, match="no code"):
        explained(code)
    assert "FXC-E1" in fxc("explain", code, code=2).stderr


def test_the_page_is_what_the_command_prints():
    """FXC_ACCEPT=1 writes it."""
    path = REPO / "docs" / "errors.md"
    if os.environ.get("FXC_ACCEPT"):
        path.write_text(page(), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == page()
    assert all(each.meaning in as_text(each) for each in EXPLAINED)
