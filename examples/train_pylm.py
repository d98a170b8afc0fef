"""Train the bundled example: a small Qwen2-architecture language model of Python source code.

    python examples/train_pylm.py --out examples/pylm --steps 2700

The corpus is the running interpreter's own standard library, split by file: a file belongs to the held-out part when
the SHA-256 of its relative path says so. The held-out text is written beside the model (at most 400 kB), so that anyone
can measure perplexity on text that the model has not seen, whatever Python they run. Needs about 4 GB of memory and an
hour on one core with AMX or AVX-512; the schedule is in steps, so an interrupted run resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HELD_OUT_BYTES = 400_000
END = "<|endoftext|>"


def corpus() -> tuple[list[str], list[str]]:
    """The standard library's files as (training, held-out) texts, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training, held_out, budget = [], [], HELD_OUT_BYTES
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith("site-packages/") or "lib2to3/tests/data" in name:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = re.sub(r"\A#!.*", "#!/usr/bin/env python3", text)  # an installer may have put its own path there
        size = len(text.encode())
        is_library = not name.startswith(("test/", "idlelib/idle_test/", "unittest/test/")) and "/test" not in name
        chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 16 == 0
        if is_library and chosen and 2_000 < size < 40_000 and size + 1 <= budget:
            held_out.append(text)
            budget -= size + 1
        elif 200 < size < 400_000:
            training.append(text)
    return training, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes and decodes back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, padding_side="left")


def perplexity(model, tokens: torch.Tensor, window: int = 256, limit: int | None = None) -> float:
    """Over windows that do not overlap; every token but a window's first is scored."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, min(len(tokens), limit or len(tokens)) - 1, window):
            ids = tokens[start : start + window][None]
            if ids.shape[1] < 2:
                break
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/pylm"))
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    training, held_out = corpus()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_text("\n".join(held_out), encoding="utf-8")
    tokenizer = train_tokenizer(training, vocab_size=4096)
    end = tokenizer.eos_token_id
    ids = [t for text in tokenizer(training, verbose=False)["input_ids"] for t in [*text, end]]
    data = torch.tensor(ids, dtype=torch.int32)
    held = torch.tensor(tokenizer("\n".join(held_out), verbose=False)["input_ids"])
    print(f"training tokens {len(data):,}, held-out tokens {len(held):,}", flush=True)

    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    config._attn_implementation = "eager"  # under torch.compile its backward is faster on CPU than flash attention's
    model = Qwen2ForCausalLM(config)
    print(f"parameters {sum(p.numel() for p in model.parameters()):,}", flush=True)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)

    def rate(step: int) -> float:
        warmup = 100
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))

    @torch.compile(dynamic=False)
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    checkpoint, first = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    began = time.time()
    for step in range(first, args.steps):
        sampler = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(0, len(data) - args.window - 1, (args.batch,), generator=sampler)
        batch = torch.stack([data[s : s + args.window] for s in starts.tolist()]).long()
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            spent = time.time() - began
            print(f"step {step} loss {loss.item():.3f} {spent:.0f}s", flush=True)
        if step and step % 500 == 0:
            model.eval()
            print(f"step {step} held-out perplexity {perplexity(model, held, limit=20_000):.2f}", flush=True)
            model.train()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint)

    model = model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.generation_config.pad_token_id = end
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "steps": args.steps,
        "batch": args.batch,
        "window": args.window,
        "training_tokens": len(data),
        "held_out_tokens": len(held),
        "held_out_perplexity_bfloat16": round(perplexity(model, held), 3),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(record, flush=True)


if __name__ == "__main__":
    main()
