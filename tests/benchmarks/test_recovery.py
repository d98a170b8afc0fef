"""The benchmark of training after compression: what it trains on, its reference, and its table."""

from __future__ import annotations

import torch

from benchmarks.recovery import __main__ as command
from benchmarks.recovery.language import WORKS, distilled
from benchmarks.recovery.pictures import batches
from benchmarks.recovery.row import Row
from benchmarks.recovery.sentences import docstrings, judged_by
from benchmarks.workloads import PYLM
from fxc.passes.base import parse_passes
from fxc.source.load import load_source


def test_sentences_are_those_of_docstrings():
    found = docstrings(50)
    assert len(set(found)) == 50
    assert all(20 < len(each) < 250 for each in found)
    assert len(judged_by()) == 200 and not set(judged_by()) & set(found)


def test_works_can_be_parsed_and_each_says_what_is_to_be_reached():
    for work in WORKS:
        assert parse_passes(f"{work.passes},recover:minutes={work.minutes}{work.options}") and work.bar


def test_batches_of_digits_are_of_one_size():
    assert {tuple(each.shape) for each in batches()} == {(64, 1, 8, 8)}


def test_the_reference_brings_a_student_nearer():
    teacher, student = (load_source(str(PYLM), dtype="float32").model.eval() for _ in range(2))
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    windows = torch.randint(0, 4000, (8, 16), generator=torch.Generator().manual_seed(0))

    def apart() -> float:
        with torch.no_grad():
            aim, given = (model(input_ids=windows).logits.log_softmax(-1) for model in (teacher, student))
        return float(torch.nn.functional.kl_div(given, aim, log_target=True, reduction="batchmean"))

    before = apart()
    assert distilled(student, windows, 1.0, "float32") > 0
    assert apart() < before


def test_the_table_has_each_row_with_what_is_lost():
    rows = [Row("a", "bar", 20.0, 24.0, 20.5, 3.0, "int8"), Row("b", "bar", 0.99, 0.5, 0.985, 3.0, "prune")]
    report = {
        "hardware": {"cpu": "some chip", "cores": 2}, "versions": {"torch": "2.13"}, "threads": 2, "load_before": 0.1,
        "precision": "float32", "rows": [vars(row) for row in rows],
    }  # fmt: skip
    text = command.markdown(report)
    assert "24.000 (+20.00 %)" in text and "20.500 (+2.50 %)" in text and "0.9850" in text and "`prune`" in text
