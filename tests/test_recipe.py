"""A recipe that is written is read back as it was."""

import pytest

from fxc.passes.base import parse_passes
from fxc.recipe import read_recipe, recipe_text


@pytest.mark.parametrize(
    "passes", [[], ["int8"], ["int4:group=32:only='re:^a\\.b$;c,d'", 'int8:mode=weight_only:only="x""y"', "prune:heads=0.25"]]
)
def test_it_is_read_back(tmp_path, passes):
    path = tmp_path / "r.toml"
    path.write_text(recipe_text(passes, ["*.head", 're:"é'], "torch.bfloat16", {"calib_samples": 12}), encoding="utf-8")
    found = read_recipe(path)
    assert found == {"passes": passes, "skip": ["*.head", 're:"é'], "dtype": "bfloat16", "calib_samples": 12}
    assert [str(each) for each in parse_passes(found["passes"])] == [str(each) for each in parse_passes(passes)]


def test_what_is_as_usual_is_left_out(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(recipe_text(["int8"]))
    assert read_recipe(path) == {"passes": ["int8"]} and path.read_text().count("\n") == 3
