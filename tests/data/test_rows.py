"""Rows and items: what becomes of numbers, tensors and texts, and what is said of wrong ones."""

import json

import pytest
import torch
from calibrated import refused, runs

from fxc.data.calibration import calibration_samples


def test_texts_and_rows(programs, folder):
    program = programs("qwen2")
    samples = calibration_samples(program, folder / "rows.jsonl", folder=folder)
    assert [s[0].shape[1] for s in samples] == [5, 3] and samples[1][0].tolist() == [[3, 4, 5]]
    texts = calibration_samples(program, ["hello", {"text": "a" * 99}], folder=folder, window=8)
    assert torch.equal(texts[0][0], samples[0][0]) and texts[1][0].shape == (1, 8)
    runs(program, samples)
    assert len(calibration_samples(program, folder / "rows.jsonl", folder=folder, limit=1)) == 1


def test_rows_of_numbers_are_inputs_by_name(programs, tmp_path):
    rows = [{"x": [0.5] * 40}, {"x": [list(range(40))] * 3}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = calibration_samples(programs("mlp"), tmp_path / "x.jsonl")
    assert [(tuple(s[0].shape), s[0].dtype) for s in samples] == [((1, 40), torch.float32), ((3, 40), torch.float32)]
    runs(programs("mlp"), samples)
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "token_type_ids": [0, 0, 0]}
    for name in ("bert", "distilbert"):
        (sample,) = calibration_samples(programs(name), [row])
        assert [t.tolist() for t in sample] == [[v] for v in row.values()][: len(sample)]


def test_tensors_tuples_dicts_and_batches_are_kept(programs):
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    for data in ([x], [(x,)], [{"x": x}], x, {"x": x}, (each for each in [x]), [x.detach().numpy()], x.detach().numpy()):
        ((found,),) = calibration_samples(programs("mlp"), data)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), x) and not found.requires_grad
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(6, 40)), batch_size=2)
    assert [s[0].shape[0] for s in calibration_samples(programs("mlp"), loader)] == [2, 2, 2]
    assert len(calibration_samples(programs("mlp"), iter(lambda: x, None), limit=3)) == 3
    clip = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "pixel_values": torch.zeros(2, 3, 32, 32)}
    ((ids, mask, pixels),) = calibration_samples(programs("clip"), [clip])
    assert mask.all() and ids.shape == (2, 4) and pixels.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("\n  \n", "empty"),
        ('{"text": ""}', "empty"),
        ('{"text": "a"}\n{"text": ', ":2"),
        ("[1, 2]", "not a JSON object"),
        ('{"text": 3}', '"text" is of the type int'),
        ('{"input_ids": [1, 320]}', "holds 320, and the model knows 0 to 319"),
        ('{"input_ids": [1, -100]}', "holds -100"),
        ('{"input_ids": []}', "empty"),
        ('{"input_ids": [[1, 2], [3]]}', "does not make a tensor"),
        ('{"input_ids": [1.5]}', "must be torch.int64"),
        ('{"input_ids": "abc"}', "must be a tensor"),
        ('{"tokens": [1]}', "input_ids"),
        ('{"input_ids": [1, 2], "targets": [1]}', "'targets'"),
    ],
)
def test_wrong_rows(programs, folder, tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    for name in ("bert", "qwen2"):
        assert "rows.jsonl" in refused(programs(name), path, said, folder=folder)
