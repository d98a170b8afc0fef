"""Labels beside samples: from rows, dicts, pairs, folders of images and datasets, and why some are none."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from calibrated import refused

from fxc.data.calibration import calibration_samples, check_data, held_out
from fxc.errors import UsageError

CONFIG = SimpleNamespace(label2id={"cat": 0, "dog": 1})


def labels_of(program, data, **options):
    made = calibration_samples(program, data, **options)
    assert made.labels is not None, made.unlabelled
    assert len(made.labels) == len(made) and all(each.dtype == torch.int64 for each in made.labels)
    return [each.tolist() for each in made.labels]


def unlabelled(program, data, **options) -> str:
    made = calibration_samples(program, data, **options)
    assert made.labels is None and len(made)
    return str(made.unlabelled)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_labels(programs, folder, tmp_path):
    bert = programs("bert")
    rows = [{"text": "a", "label": 1}, {"text": " ", "label": 5}, {"input_ids": [3, 4], "labels": "cat"}]
    data = write(tmp_path / "rows.jsonl", *rows)
    assert labels_of(bert, data, folder=folder, config=CONFIG) == [[1], [0]]
    assert "'cat' is no class" in unlabelled(bert, data, folder=folder)
    write(data, {"text": "a", "label": 0.5}, {"text": "b", "label": 1})
    assert "rows.jsonl:1" in unlabelled(bert, data, folder=folder) and "0.5" in unlabelled(bert, data, folder=folder)
    write(data, {"text": "a", "label": None}, {"text": "b", "label": 1})
    assert "1 of 2 samples have no label" in unlabelled(bert, data, folder=folder)
    write(data, {"text": "a"}, {"text": "b"})
    assert unlabelled(bert, data, folder=folder) == "None"


def test_labels_of_tokens_are_as_many_as_tokens(programs):
    qwen = programs("qwen2")
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}]
    assert labels_of(qwen, rows) == [[[-100, 4, 5]]]
    assert "[1, 2]" in unlabelled(qwen, [{"input_ids": [3, 4, 5], "labels": [4, 5]}])


def test_pairs_and_batches(programs, folder):
    mlp, bert = programs("mlp"), programs("bert")
    x = torch.randn(3, 40)
    assert labels_of(mlp, [(x, torch.tensor([2, 0, 1])), [x, np.array([1, 1, 1])], ({"x": x}, [0, 1, 2])]) == [
        [2, 0, 1], [1, 1, 1], [0, 1, 2],
    ]  # fmt: skip
    assert labels_of(mlp, [(x[:1], 4), (x[0], np.int64(5)), (x[0].tolist(), 6)]) == [[4], [5], [6]]
    assert labels_of(bert, [("a text", 1), ("another", "dog")], folder=folder, config=CONFIG) == [[1], [1]]
    ids = torch.tensor([[3, 4]])
    assert calibration_samples(bert, [(ids, torch.tensor([[1, 0]]))])[0][1].tolist() == [[1, 0]], "a mask is no label"
    assert labels_of(bert, [(ids, torch.tensor([1]))]) == [[1]]
    assert "3 classes" in unlabelled(mlp, [(x, torch.tensor([1, 2]))])
    assert "not the number" in unlabelled(mlp, [(x[:1], True)])


def test_a_folder_of_images_has_a_folder_for_each_class(programs, pictures, tmp_path):
    image = pytest.importorskip("PIL.Image")
    vit = programs("vit")
    (tmp_path / "preprocessor_config.json").write_text("{}")

    def labelled(*names, config=None):
        root = tmp_path / "-".join(names)
        for at, name in enumerate(names):
            (root / name / "deeper").mkdir(parents=True)
            for number in range(at + 1):
                image.new("RGB", (9, 9)).save(root / name / "deeper" / f"{number}.png")
        return root, {"folder": tmp_path, "config": config}

    root, options = labelled("zebra", "ant", "bee")
    assert labels_of(vit, root, **options) == [[0], [0], [1], [1], [1], [2]]
    assert labels_of(vit, root, **options, limit=3) == [[0], [1], [1]]
    root, options = labelled("10", "9", "2")
    assert sorted(labels_of(vit, root, **options)) == [[2], [2], [2], [9], [9], [10]]
    root, options = labelled("dog", "cat", config=CONFIG)
    assert labels_of(vit, root, **options) == [[0], [0], [1]]
    root, options = labelled("dog", "cow", config=CONFIG)
    assert "'cow' is no class" in unlabelled(vit, root, **options)
    root, options = labelled("train")
    assert unlabelled(vit, root, **options) == "None"
    assert unlabelled(vit, pictures, folder=tmp_path) == "None", "some are in no folder"


def test_pictures_and_what_a_dataset_gives(programs, tmp_path, monkeypatch, folder):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    picture = image.new("L", (9, 9))
    samples = [(picture, 1), {"img": picture, "label": 0, "file": "a.png"}]
    assert labels_of(programs("vit"), samples, folder=tmp_path) == [[1], [0]]
    asked = []

    def load_dataset(path, config=None, split=None):
        if path == "nowhere":
            raise FileNotFoundError("there is no nowhere\nat all")
        asked.append((path, config, split))
        return [{"text": str(number), "label": number, "id": number} for number in range(10)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    bert = programs("bert")
    assert labels_of(bert, "datasets:org/name", folder=folder, limit=5) == [[0], [2], [4], [6], [8]], "from all over"
    assert len(calibration_samples(bert, "datasets:name:test", folder=folder)) == 10
    calibration_samples(bert, "datasets:name:en:validation", folder=folder)
    assert asked == [("org/name", None, "train"), ("name", None, "test"), ("name", "en", "validation")]
    assert "FileNotFoundError: there is no nowhere" in refused(bert, "datasets:nowhere", "cannot be loaded", folder=folder)
    refused(bert, "datasets:", "names no dataset", folder=folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the library datasets") as caught:
        check_data("datasets:name")
    assert caught.value.hint == "pip install datasets"


def test_labels_stay_with_their_samples(programs):
    x = torch.randn(40)
    samples = calibration_samples(programs("mlp"), [(x + n, n) for n in range(20)])
    for some in held_out(samples):
        assert [each.item() for each in some.labels] == [round(float(sample[0][0, 0] - x[0])) for sample in some]
    assert [len(some) for some in held_out(samples)] == [18, 2]
    doubled = samples.map(lambda sample: [sample[0] * 2])
    assert torch.equal(doubled[3][0], samples[3][0] * 2) and doubled.labels is samples.labels
