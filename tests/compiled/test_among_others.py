"""A compiled model in the hands of transformers, sentence-transformers, threads and streamers."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import build
from tiny import byte_tokenizer
from torch import nn

import fxc
from fxc.errors import UsageError

IDS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def decoder():
    return fxc.optimize(build("llama")[0], passes="int8", budget=1, layer_budget=1)


@pytest.fixture(scope="module")
def encoder(minilm_dir):
    return fxc.optimize(minilm_dir, passes="int8")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_it_says_what_it_is(decoder):
    assert (decoder.device, decoder.dtype) == (torch.device("cpu"), torch.float32)
    assert decoder.config.model_type == "llama" and decoder.can_generate()
    assert list(decoder.parameters()) == [] and decoder.generation_config is not None
    decoder.tie_weights()  # which lm-eval calls


def test_threads_that_generate_at_once_get_what_one_does(decoder):
    prompts = [IDS, IDS[:1], IDS[:, :4], IDS[1:, 2:]]
    expected = [decoder.generate(each, **GREEDY) for each in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: decoder.generate(each, **GREEDY), prompts * 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True))


def test_text_is_streamed_from_a_thread(decoder, tokenizer):
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=decoder.generate, kwargs={"inputs": IDS[:1], "streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(decoder.generate(IDS[:1], **GREEDY)[0, 7:])
    assert len(pieces) > 1


@pytest.mark.parametrize("static_cache", [False, True])
def test_no_new_tokens_are_refused_as_transformers_does(decoder, static_cache):
    model = fxc.optimize(build("llama")[0], passes="", verify=False).use_static_cache() if static_cache else decoder
    for each in (build("llama")[0], model):
        with pytest.raises(ValueError, match="must be greater than 0"):
            each.generate(IDS, max_new_tokens=0)


@pytest.mark.parametrize("ids", [IDS[:0], IDS[:, :0]])
def test_nothing_to_read_is_refused(decoder, ids):
    with pytest.raises(UsageError, match="there is no token in it"):
        decoder(ids)


def test_no_rows_are_refused_by_generation(decoder):
    with pytest.raises(UsageError, match="there is no token in it"):
        decoder.generate(IDS[:0], **GREEDY)


@pytest.mark.parametrize("passes", ["", "int8", "int4:group=32"])
def test_a_batch_of_nothing_gives_nothing_where_the_original_does(passes):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    compiled = fxc.optimize(model, (torch.randn(4, 64),), passes, budget=1, layer_budget=1)
    assert compiled(torch.randn(0, 64)).shape == model(torch.randn(0, 64)).shape == (0, 32)


def test_a_batch_of_nothing_is_refused_where_the_original_refuses_it(encoder):
    nothing = torch.zeros(0, 7, dtype=torch.int64)
    with pytest.raises(UsageError, match="an input without numbers"):
        encoder(nothing, attention_mask=nothing)


def test_a_pipeline_generates(decoder, tokenizer, caplog):
    from transformers import pipeline

    with caplog.at_level(logging.ERROR, logger="transformers"):
        pipe = pipeline("text-generation", model=decoder, tokenizer=tokenizer)
    assert "not supported" not in caplog.text
    found = [rows[0]["generated_text"] for rows in pipe(["import os", "def f"], batch_size=2, **GREEDY)]
    inputs = tokenizer(["import os", "def f"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    assert found == tokenizer.batch_decode(decoder.generate(**inputs, **GREEDY), skip_special_tokens=True)


def test_a_pipeline_extracts_features(encoder, minilm_dir):
    from transformers import AutoModel, AutoTokenizer, pipeline

    words = AutoTokenizer.from_pretrained(minilm_dir)
    pipe = pipeline("feature-extraction", model=encoder, tokenizer=words)
    found = pipe("a sentence about dogs", return_tensors=True)
    expected = AutoModel.from_pretrained(minilm_dir)(**words("a sentence about dogs", return_tensors="pt")).last_hidden_state
    assert found.shape == expected.shape and (found - expected).norm() < 0.1 * expected.norm()


def test_sentence_transformers_encodes_with_it(encoder, minilm_dir):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(minilm_dir), device="cpu")
    texts = ["A dog runs over the field.", "The museum opens at nine, and closes at five.", "no"]
    expected = model.encode(texts, convert_to_tensor=True)
    model[0].model = encoder
    found = model.encode(texts, convert_to_tensor=True)
    assert torch.cosine_similarity(found, expected).min() > 0.99 and not torch.equal(found, expected)
