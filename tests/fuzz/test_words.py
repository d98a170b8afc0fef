"""Random pass lines, recipes and command lines, by a seed: an answer or one clear error."""

import random

import pytest

from benchmarks.fuzz import words


@pytest.mark.parametrize("shard", range(2))
def test_pass_lines(shard):
    outcomes = {words.check_line(random.Random(f"short-{shard}-{n}")) for n in range(300)}
    assert "read" in outcomes and len(outcomes) > 1


def test_recipes(tmp_path):
    outcomes = {words.check_recipe(random.Random(f"short-{n}"), tmp_path) for n in range(100)}
    assert "read" in outcomes and len(outcomes) > 1


@pytest.mark.parametrize("shard", range(2))
def test_command_lines(shard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = {words.check_command(random.Random(f"short-{shard}-{n}"), tmp_path) for n in range(12)}
    assert "exit code 2" in outcomes
