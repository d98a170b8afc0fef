"""Texts: tokens, windows, and what becomes of them as inputs."""

import torch
from calibrated import TEXT, refused, runs
from families import build

from fxc.data.calibration import calibration_samples
from fxc.data.text import encode, tokenizer_of, windows
from fxc.frontend.capture import capture
from fxc.source.load import load_source


def test_windows_do_not_overlap_and_lose_only_a_single_token():
    batches = windows(torch.arange(21), 5, rows=3)
    assert [b.shape for b in batches] == [(3, 5), (1, 5)]
    assert torch.cat([b.flatten() for b in batches]).tolist() == list(range(20))
    assert windows(torch.arange(22), 5)[-1].tolist() == [[20, 21]]
    assert len(windows(torch.arange(100), 5, limit=3)) == 3


def test_a_decoder_gets_windows_from_all_over_the_text(pylm, pylm_dir):
    path = pylm_dir / "heldout.txt"
    samples = calibration_samples(pylm, path, folder=pylm_dir, limit=4, window=32)
    tokens = encode(tokenizer_of(pylm_dir), path.read_text(encoding="utf-8"))
    cut = tokens[: len(tokens) // 32 * 32].view(-1, 1, 32)
    assert [s[0].tolist() for s in samples] == [cut[i * len(cut) // 4].tolist() for i in range(4)]
    for ids, mask, positions, *past in samples:
        assert mask.tolist() == [[1] * 32] and positions.tolist() == [list(range(32))] and ids.dtype == torch.int64
        assert {tuple(t.shape) for t in past} == {(1, 4, 0, 32)} and len(past) == 10
    again = calibration_samples(pylm, str(path), folder=pylm_dir, limit=4, window=32)
    assert all(torch.equal(a, b) for one, other in zip(samples, again) for a, b in zip(one, other))
    runs(pylm, samples[:1])


def test_an_encoder_gets_windows_with_its_tokenizers_tokens_around_them(minilm_dir, folder):
    program = capture(load_source(str(minilm_dir)).model, check=False)
    samples = calibration_samples(program, folder / "text.txt", folder=minilm_dir, limit=3, window=16)
    tokenizer = tokenizer_of(minilm_dir)
    for ids, mask, *kinds in samples:
        assert ids.shape == (1, 16) and ids[0, 0] == tokenizer.cls_token_id and ids[0, -1] == tokenizer.sep_token_id
        assert mask.all() and not any(k.any() for k in kinds)
    runs(program, samples[:1])


def test_windows_fit_the_model_and_a_short_text_is_one_sample(programs, folder, tmp_path):
    program, config = programs("bert"), build("bert")[0].config
    samples = calibration_samples(program, folder / "text.txt", folder=folder, config=config, window=4096)
    assert {s[0].shape[1] for s in samples} == {128} and len(samples) == len(TEXT) // 128
    (tmp_path / "short.md").write_text("abc")
    ((ids, *_),) = calibration_samples(program, tmp_path / "short.md", folder=folder)
    assert ids.shape == (1, 3)


def test_the_tokenizer_is_found_where_the_model_came_from(programs, folder):
    config = build("qwen2")[0].config
    refused(programs("qwen2"), folder / "text.txt", "came without its tokenizer", config=config)
    config.name_or_path = str(folder)
    assert calibration_samples(programs("qwen2"), folder / "text.txt", config=config)


def test_texts_that_cannot_be_used(programs, folder, tmp_path):
    bert, qwen2, mlp = map(programs, ("bert", "qwen2", "mlp"))
    text = folder / "text.txt"
    refused(bert, text, "tokenizer", folder=tmp_path)
    assert "images" in refused(programs("vit"), text, "does not read text")
    assert ".jsonl" in refused(mlp, text, "does not read text")
    assert "iterable of dicts" in refused(programs("clip"), text, "pixel_values too", folder=folder)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused(bert, tmp_path / "latin.txt", "cannot be read", folder=folder)
    (tmp_path / "nothing.txt").write_text("")
    refused(qwen2, tmp_path / "nothing.txt", "empty", folder=folder)
