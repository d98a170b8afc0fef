"""DeepSeek's attention writes its rotated halves through views of one tensor, which torch's functionalization resolves."""

import pytest
import torch
import transformers

import fxc

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "groups"), [("DeepseekV2", 1), ("DeepseekV3", 2)])
def test_it_generates_the_same_tokens(family, groups):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, n_group=groups)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(3, 60, (2, 9))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    compiled = fxc.optimize(model, passes="")
    assert torch.equal(compiled.generate(ids, **options), model.generate(ids, **options))
