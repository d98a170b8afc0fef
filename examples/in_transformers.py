"""A compiled model in the hands of transformers: a pipeline, a stream of text, and a folder that from_pretrained loads.

python examples/in_transformers.py [--model examples/pylm] [--passes int8] [--tokens 24]
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

import fxc

PROMPT = "import os\n"


def main(model: Path, passes: str, tokens: int) -> None:
    greedy = {"max_new_tokens": tokens, "do_sample": False}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    compiled = fxc.optimize(model, passes=passes)

    pipe = pipeline("text-generation", model=compiled, tokenizer=tokenizer)
    (answer,) = pipe(PROMPT, return_full_text=False, **greedy)
    print("pipeline:", repr(answer["generated_text"]))

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    thread = threading.Thread(target=compiled.generate, kwargs={**inputs, "streamer": streamer, **greedy})
    thread.start()
    streamed = list(streamer)
    thread.join()
    print("streamed in", len(streamed), "pieces:", repr("".join(streamed)))

    with tempfile.TemporaryDirectory() as folder:
        compiled.export_fxc(Path(folder) / "exported")
        loaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "exported")  # into fxc, imported above
        ids = loaded.generate(**inputs, **greedy)
    print("from_pretrained:", repr(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent / "pylm")
    parser.add_argument("--passes", default="int8")
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    main(given.model, given.passes, given.tokens)
