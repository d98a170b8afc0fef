"""Whisper's own generation loop around a compiled model: language, task, timestamps and audio longer than a window, as the
original has them."""

import copy
import logging

import numpy as np
import pytest
import torch
import transformers
from seq2seq import built, inputs_of

import fxc
from fxc.compiled import own_loop
from fxc.errors import UsageError
from fxc.ir.program import Program

FEATURES = inputs_of("whisper")["input_features"]
LONG = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(4))  # two and a half windows
MASK = torch.ones(2, 100, dtype=torch.int64)
SAYS = {
    "is_multilingual": True, "lang_to_id": {"<|en|>": 80, "<|de|>": 81}, "task_to_id": {"transcribe": 82, "translate": 83},
    "no_timestamps_token_id": 84, "prev_sot_token_id": 79, "max_length": 40, "max_initial_timestamp_index": 5,
    "alignment_heads": [[0, 0]],
}  # fmt: skip


@pytest.fixture(scope="module")
def original():
    model = copy.deepcopy(built("whisper"))
    for name, value in SAYS.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.fixture(scope="module")
def compiled(original):
    return fxc.optimize(original, passes="", verify=False)


@pytest.mark.parametrize("options", [
    {}, {"language": "de", "task": "translate"}, {"language": ["en", "de"]}, {"return_timestamps": True},
    {"prompt_ids": torch.tensor([79, 5, 6])},
], ids=str)  # fmt: skip
def test_a_window_is_written_as_by_the_original(options, original, compiled):
    found = compiled.generate(input_features=FEATURES, **options)
    assert torch.equal(found, original.generate(input_features=FEATURES, **options)) and len(found.unique()) > 1


def test_language_and_task_make_a_difference(compiled):
    given = [compiled.generate(FEATURES, language=name, return_dict_in_generate=True).sequences for name in ("en", "de")]
    assert [each[0, :4].tolist() for each in given] == [[3, 80, 82, 84], [3, 81, 82, 84]]


def test_longer_audio_is_written_in_segments(original, compiled):
    options = {"attention_mask": MASK, "return_timestamps": True, "return_segments": True}
    found, expected = (each.generate(input_features=LONG, **options) for each in (compiled, original))
    assert torch.equal(found["sequences"], expected["sequences"]) and len(expected["segments"][0]) > 1
    starts = [[[float(each["start"]) for each in row] for row in made["segments"]] for made in (found, expected)]
    assert starts[0] == starts[1]


def test_what_was_said_before_is_read_again(original, compiled):
    options = {"attention_mask": MASK[:1], "return_timestamps": True, "condition_on_prev_tokens": True}
    found, expected = (each.generate(input_features=LONG[:1], **options) for each in (compiled, original))
    assert torch.equal(found, expected)


def test_what_is_given_as_a_dict_has_scores_and_no_cache(original, compiled):
    options = {"return_dict_in_generate": True, "output_scores": True}
    found, expected = (each.generate(FEATURES, **options) for each in (compiled, original))
    assert torch.equal(found.sequences, expected.sequences) and "past_key_values" not in found
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found.scores, expected.scores, strict=True))


def test_timestamps_of_tokens_are_refused(compiled):
    with pytest.raises(UsageError, match="read from the decoder's attention"):
        compiled.generate(FEATURES, return_token_timestamps=True)


def test_it_is_saved_with_its_languages(compiled, tmp_path):
    compiled.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    assert loaded.generation_config.lang_to_id == SAYS["lang_to_id"]
    assert torch.equal(loaded.generate(FEATURES), compiled.generate(FEATURES))


def test_a_pipeline_transcribes(original, compiled, caplog):
    names = [chr(33 + n) for n in range(79)]
    words = transformers.WhisperTokenizer(vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token=names[0],
                                          bos_token=names[1], eos_token=names[2])  # fmt: skip
    special = ["<|startofprev|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    words.add_special_tokens({"additional_special_tokens": special})
    windows = transformers.WhisperFeatureExtractor(feature_size=8, hop_length=400, chunk_length=1)
    audio = np.random.default_rng(0).standard_normal(9000).astype("float32")
    made = []
    for model in (original, compiled):
        with caplog.at_level(logging.ERROR, logger="transformers"):
            kind = "automatic-speech-recognition"
            pipe = transformers.pipeline(kind, model=model, tokenizer=words, feature_extractor=windows)
        # Of random weights a timestamp may be the likeliest token, and the loop then goes on from there, for long.
        made.append(pipe(audio, generate_kwargs={"num_beams": 1, "suppress_tokens": [*range(85, 96)]}))
    assert "not supported" not in caplog.text and made[0] == made[1] and made[0]["text"]


def test_another_loop_of_its_own_is_refused():
    def named(name):
        return Program(torch.fx.Graph(), {}, {}, None, {"class": name})

    assert own_loop.class_for(named("T5ForConditionalGeneration")) is own_loop.CompiledSeq2SeqLM
    assert own_loop.class_for(named("of my own")) is own_loop.CompiledSeq2SeqLM
    without = own_loop.class_for(named("Pop2PianoForConditionalGeneration"))
    assert without is own_loop.CompiledWithoutLoop
    model = without.__new__(without)
    model.__dict__["program"] = named("Pop2PianoForConditionalGeneration")
    with pytest.raises(UsageError, match=r"Pop2Piano.* generates by a loop of its own"):
        model.generate()
