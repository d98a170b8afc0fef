"""How strategies are written, and what their folders are called."""

import pytest

import fxc.passes  # noqa: F401 - which registers them
from fxc.comparison.strategies import DEFAULTS, parse_strategies, slug_of
from fxc.errors import UsageError


def texts(given):
    return [each.text for each in parse_strategies(given)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", ["none"]),
        ("none;int8", ["none", "int8"]),
        (" int8 ; prune:heads=0.25,int8;", ["int8", "prune:heads=0.25,int8"]),
        ("prune:keep=0;2;4,int8;int4", ["prune:keep=0;2;4,int8", "int4"]),
        ("int4:only='re:a;int8';bf16", ["int4:only='re:a;int8'", "bf16"]),
        ("int4:only=mlp;none", ["int4:only=mlp", "none"]),
        (["int8", "int8;none", "none"], ["int8", "none"]),
        ("default", list(DEFAULTS)),
        (["int8:mode=static", "default"], ["int8:mode=static", *(each for each in DEFAULTS if each != "int8:mode=static")]),
    ],
)
def test_a_semicolon_begins_a_strategy_where_one_follows(given, expected):
    assert texts(given) == expected


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        ("int8;int44", "no pass 'int44'", "did you mean 'int4'"),
        ("int8:mode=statik", "not a value", "dynamic, weight_only, static"),
        ("none,int8", "no pass 'none'", "none or default"),
        ("original", "no strategy", "always there"),
        ("missing.toml", "recipe cannot be read", None),
        (" ; ", "no strategy to compare", "default"),
        ([3], "a int is no strategy", "path of a recipe"),
    ],
)
def test_what_is_no_strategy_is_said_with_a_hint(given, what, hint):
    with pytest.raises(UsageError, match=what) as caught:
        parse_strategies(given)
    assert hint is None or hint in caught.value.hint


def test_a_recipe_is_a_strategy_with_all_that_it_says(tmp_path):
    path = tmp_path / "my recipe; v2.toml"
    path.write_text('passes = ["int4:group=32", "bf16"]\nskip = ["*.head"]\ndtype = "float32"\ncalib_samples = 3\n')
    (found,) = parse_strategies([path])
    assert [str(each) for each in found.passes] == ["int4:group=32", "bf16"]
    assert (found.skip, found.dtype, found.amounts) == (("*.head",), "float32", {"calib_samples": 3})
    assert slug_of(found).startswith("my-recipe-v2-")


def test_folders_have_plain_names_and_no_two_the_same():
    given = [
        *DEFAULTS, "prune:keep=0;2", "prune:keep=0;2;4", "int4:only='a,b'", "int4:only='a;b'", "int4:only='../../x'",
        "int4:only=A", "int4:only=a", "int4:only=a.b", "int4:only=a_b", f"int4:only={'a' * 200}", f"int4:only={'a' * 201}",
        "int4:only='\u202e$x'",
    ]  # fmt: skip
    slugs = [slug_of(each) for each in parse_strategies(given)]
    assert len(set(slugs)) == len(given)
    assert all(len(each) < 100 and set(each) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for each in slugs)
    assert not any(each.startswith(".") or ".." in each for each in slugs)
    assert slugs[:5] == ["none", "bf16", "int8-mode-weight_only", "int8", "int8-mode-static"]
