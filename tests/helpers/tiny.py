"""Tiny models with a tokenizer as Hugging Face folders, made offline."""

from pathlib import Path

from families import build


def byte_tokenizer(vocabulary: int = 320):
    """One token for each byte, <pad> 0, <s> 1, </s> 2: encodes and decodes any text exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    assert len(tokens) <= vocabulary
    made = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", padding_side="left")


def save(name: str, folder: Path, tokenizer: bool = True) -> Path:
    """The family `name` in `folder`."""
    model, _ = build(name)
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder
