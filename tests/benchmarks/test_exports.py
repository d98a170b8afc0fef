"""The table of what goes where: what it says of a cell, and a cell that is refused."""

from benchmarks.exports.cells import FORMATS, cell
from benchmarks.exports.sources import SOURCES
from benchmarks.exports.text import _letter, page, table


def test_a_cell_that_has_no_place_says_why(tmp_path):
    digits = next(source for source in SOURCES if source.name.startswith("digits"))
    plain = next(column for column in FORMATS if column.name == "gguf, float")
    found = cell(digits, plain, tmp_path)
    assert found["status"] == "refused" and "GGUF" in found["why"] and not any(tmp_path.iterdir())


def test_the_table_has_a_letter_for_each_reason():
    names = [column.name for column in FORMATS[:4]]
    report = {
        "versions": {"torch": "2.13.0"},
        "cells": {
            "A": {
                names[0]: {"status": "agrees", "warnings": []},
                names[1]: {"status": "agrees", "warnings": [], "error": 0.0123},
                names[2]: {"status": "refused", "where": "x.y", "why": "no | place"},
            },
            "B": {
                names[0]: {"status": "failed", "where": None, "why": "ValueError: of a <class>"},
                names[2]: {"status": "refused", "where": "z", "why": "no | place"},
                names[3]: {"status": "agrees", "llama.cpp": "16 of 16 greedy tokens"},
            },
        },
    }
    made = table(report)
    assert "| A | yes | 1e-02 | a | not run |" in made and "| B | failed (b) | not run | a | yes |" in made
    assert "- **a** refused: no \\| place\n- **b** failed: ValueError: of a &lt;class>" in made
    assert "| B | 16 of 16 greedy tokens |" in made and "torch 2.13.0." in made
    assert page(report).endswith(made) and [_letter(n) for n in (0, 25, 26, 27)] == ["a", "z", "aa", "ab"]


def test_rows_and_columns_have_names_of_their_own():
    for several in (SOURCES, FORMATS):
        assert len({each.name for each in several}) == len(several)
