"""What Hugging Face's generate takes gives the original's tokens, or is refused; an image captioner without example inputs."""

import functools

import pytest
import torch
import transformers
from families import build
from tiny import byte_tokenizer

import fxc
from fxc.errors import FxcError

IDS = torch.randint(5, 250, (1, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


@functools.cache
def pair():
    model = build("llama")[0]
    return model, fxc.optimize(model, passes="")


class Streamer(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")


class OnlyEven(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = float("-inf")
        return scores


class AfterThree(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= IDS.shape[1] + 3)


def tokenizer():
    return byte_tokenizer()


def a_letter_it_writes():
    written = pair()[0].generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)[0, IDS.shape[1] :]
    return next(t for t in tokenizer().batch_decode(written[2:, None]) if t and t.isprintable())


OPTIONS = {
    "stop string": lambda: {"stop_strings": [a_letter_it_writes()], "tokenizer": tokenizer()},
    "stop strings never met": lambda: {"stop_strings": ["zzzzzz", "no"], "tokenizer": tokenizer()},
    "logits processor": lambda: {"logits_processor": transformers.LogitsProcessorList([OnlyEven()])},
    "stopping criteria": lambda: {"stopping_criteria": transformers.StoppingCriteriaList([AfterThree()])},
    "several samples": lambda: {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 0.7},
    "several beams": lambda: {"num_beams": 3, "num_return_sequences": 2},
    "repetition": lambda: {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "bad words": lambda: {"bad_words_ids": [[7], [11, 12]], "min_new_tokens": 4},
    "all logits": lambda: {"output_logits": True, "output_scores": True, "return_dict_in_generate": True},
    "generation config": lambda: {"generation_config": transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0)},
    "prefix": lambda: {"prefix_allowed_tokens_fn": lambda batch, ids: [10, 20, 30]},
    "without cache": lambda: {"use_cache": False},
    "time limit": lambda: {"max_time": 100.0},
    "eos of several": lambda: {"eos_token_id": [2, 9]},
    "assistant by lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "attentions": lambda: {"output_attentions": True, "return_dict_in_generate": True},
    "hidden states": lambda: {"output_hidden_states": True, "return_dict_in_generate": True},
    "static cache": lambda: {"cache_implementation": "static"},
}  # fmt: skip
REFUSED = {"attentions", "hidden states", "static cache", "assistant by lookup"}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_gives_what_the_original_gives(name):
    options = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False} | OPTIONS[name]()
    outputs = []
    for model in pair():
        torch.manual_seed(0)
        try:
            outputs.append(model.generate(IDS, **options))
        except FxcError as error:
            assert name in REFUSED and error.hint, error
            return
    expected, found = outputs
    if not isinstance(found, torch.Tensor):
        for a, b in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
        expected, found = expected.sequences, found.sequences
    assert torch.equal(found, expected)


def test_a_streamer_sees_every_token():
    seen = []
    for model in pair():
        seen.append(Streamer())
        model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False, streamer=seen[-1])
    assert seen[0].seen == seen[1].seen and seen[0].seen[-1] == "end"


def test_a_stop_string_stops():
    options = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False}
    stopped = pair()[1].generate(IDS, **options, **OPTIONS["stop string"]())
    assert IDS.shape[1] < stopped.shape[1] < IDS.shape[1] + 8


@functools.cache
def captioner():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    decoder = transformers.BertConfig(**sizes, vocab_size=128, is_decoder=True, add_cross_attention=True)
    return transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)),
        decoder=transformers.BertLMHeadModel(decoder),
    ).eval()


def test_a_vision_encoder_decoder_without_example_inputs():
    """The size of its images is in the configuration of its encoder."""
    model = captioner()
    compiled = fxc.optimize(model, passes="int8")
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(3, 128, (2, 5))
    expected = model(pixel_values=pixels, decoder_input_ids=ids).logits.detach()
    found = compiled(pixel_values=pixels, decoder_input_ids=ids).logits
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("ids", [IDS[0], IDS.float(), IDS.tolist(), IDS[None]], ids=["vector", "float", "list", "three"])
def test_ids_that_are_no_matrix_of_integers_are_refused(ids):
    with pytest.raises(FxcError, match="must be integers"):
        pair()[1](ids)
