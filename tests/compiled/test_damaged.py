"""An artifact whose configurations transformers objects to is refused in one line."""

import json
import shutil

import pytest
from artifacts import rehash
from families import build

import fxc
from fxc.errors import InputRefused


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("damaged") / "out"
    fxc.optimize(build("qwen2")[0], passes="int8", budget=9, layer_budget=9).save(out)
    return out


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda text: json.dumps(json.loads(text) | {"hidden_size": "x"})),
        ("config.json", lambda text: json.dumps(json.loads(text) | {"rope_parameters": 3})),
        ("generation_config.json", lambda text: "[]"),
        ("generation_config.json", lambda text: "{"),
        ("generation_config.json", lambda text: json.dumps({"max_new_tokens": {}})),
    ],
)
def test_it_is_refused(file, change, artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_text(change(path.read_text()))
    rehash(tmp_path / "out")
    with pytest.raises(InputRefused):
        fxc.load(tmp_path / "out")
