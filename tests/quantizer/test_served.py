"""`transformers serve` of a folder with packed weights, asked as OpenAI's API is. Runs where its packages are installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from repo import REPO
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxc

for package in ("accelerate", "fastapi", "openai", "uvicorn"):
    pytest.importorskip(package)

HERE = "127.0.0.1"
SERVE = "import fxc; from transformers.cli.transformers import main; main()"
ASKED = "import os\nimport "


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def test_a_chat_completion_is_what_the_folder_generates(tmp_path):
    folder, log = tmp_path / "served", tmp_path / "log"
    fxc.optimize(REPO / "examples" / "pylm", passes="int8:embeddings=int8", verify=False).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }}{% endfor %}")
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--host", HERE, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as server:
        try:
            url, until = f"http://{HERE}:{port}", time.monotonic() + 600
            while True:
                try:
                    ask(f"{url}/health")
                    break
                except urllib.error.URLError:
                    assert server.poll() is None and time.monotonic() < until, log.read_text()
                    time.sleep(0.5)
            body = {"model": str(folder), "messages": [{"role": "user", "content": ASKED}], "max_tokens": 8, "temperature": 0}
            answer = ask(f"{url}/v1/chat/completions", body)
        finally:
            server.terminate()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(ASKED, return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert answer["usage"]["completion_tokens"] == 8
    # Where a template has no marks of turns, transformers reads the prompt as part of the answer.
    assert answer["choices"][0]["message"]["content"].removeprefix(ASKED) == expected
