"""Every term of a loss, beside the few lines of torch that say what it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from formats import normal

from fxc.errors import UsageError
from fxc.train.losses import TERMS, Loss, Seen

TOKENS = {"input_ids": torch.arange(12).view(2, 6) % 9, "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
TOKENS["attention_mask"][1, 4:] = 0
THERE = TOKENS["attention_mask"].bool()


def both(*shape: int, name: str = "logits", inputs=TOKENS, **more) -> tuple[Seen, Seen]:
    """What a student and its teacher gave: another output besides that is not compared."""
    mine, theirs = (normal(*shape, seed=seed).requires_grad_(seed == 1) for seed in (1, 2))
    other = {"present.0.key": torch.full((2,), float("nan")), "count": torch.ones(2, dtype=torch.int64)}
    return Seen(inputs, {name: mine} | other, **more), Seen(inputs, {name: theirs} | other)


def value(text: str, student: Seen, teacher: Seen | None, **options) -> torch.Tensor:
    """The loss, of which all gradients are finite and some are not zero."""
    loss = Loss.parse(text, **options)(student, teacher)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    given = [each for each in (*student.outputs.values(), *student.features) if each.requires_grad]
    grads = [each for each in torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True) if each is not None]
    assert all(each.isfinite().all() for each in grads) and any(each.any() for each in grads)
    return loss.detach()


def divergence(mine, theirs, temperature=1.0):
    p, q = (theirs / temperature).softmax(-1), (mine / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("shape", [(5, 7), (2, 6, 7), (2, 3, 4, 4)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl(shape, temperature):
    student, teacher = both(*shape)
    mine, theirs = student.outputs["logits"], teacher.outputs["logits"]
    if len(shape) == 4:
        mine, theirs = mine.permute(0, 2, 3, 1), theirs.permute(0, 2, 3, 1)
    each = divergence(mine, theirs, temperature)
    expected = each[THERE].mean() if len(shape) == 3 else each.mean()
    torch.testing.assert_close(value("kl", student, teacher, temperature=temperature), expected.detach())


def test_kl_of_classes_that_cannot_be():
    student, teacher = both(5, 7)
    with torch.no_grad():
        teacher.outputs["logits"][:, 3] = student.outputs["logits"][:, 3] = float("-inf")
    left = [0, 1, 2, 4, 5, 6]
    expected = divergence(student.outputs["logits"][:, left], teacher.outputs["logits"][:, left]).mean()
    torch.testing.assert_close(value("kl", student, teacher), expected.detach())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(5, 9), (2, 6, 9)])
def test_topk_lumps_the_rest(shape, temperature):
    student, teacher = both(*shape)
    p, q = ((seen.outputs["logits"] / temperature).softmax(-1) for seen in (teacher, student))
    best = p.topk(3).indices
    p, q = (torch.cat([each.gather(-1, best), 1 - each.gather(-1, best).sum(-1, keepdim=True)], -1) for each in (p, q))
    each = temperature**2 * (p * (p / q).log()).sum(-1)
    expected = each[THERE].mean() if len(shape) == 3 else each.mean()
    made = value("topk", student, teacher, temperature=temperature, k=3)
    torch.testing.assert_close(made, expected.detach(), rtol=1e-4, atol=1e-6)
    all_of_them = value("topk", student, teacher, temperature=temperature, k=9)
    torch.testing.assert_close(all_of_them, value("kl", student, teacher, temperature=temperature))


def test_topk_is_finite_where_the_rest_is_next_to_nothing():
    student, teacher = both(4, 50)
    with torch.no_grad():
        for seen in (student, teacher):
            seen.outputs["logits"][:, :2] += 200
    assert value("topk", student, teacher, k=2) >= 0


def test_task_of_labels():
    labels = torch.tensor([0, 6, 3, 3, 1])
    student, _ = both(5, 7, labels=labels)
    torch.testing.assert_close(value("task", student, None), F.cross_entropy(student.outputs["logits"], labels).detach())


def test_task_of_tokens_labels():
    labels = torch.tensor([[0, 6, -100, 3, 1, 2], [-100] * 6])
    student, _ = both(2, 6, 7, labels=labels)
    logits = student.outputs["logits"]
    expected = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
    torch.testing.assert_close(value("task", student, None), expected.detach())
    student, _ = both(2, 6, 7, labels=labels, causal=True)
    expected = F.cross_entropy(logits[0, [0, 2, 3, 4]], labels[0, [1, 3, 4, 5]])
    torch.testing.assert_close(value("task", student, None), expected.detach())


def test_task_of_pixels_labels():
    labels = torch.arange(2 * 4 * 4).view(2, 4, 4) % 3
    student, _ = both(2, 3, 4, 4, labels=labels)
    torch.testing.assert_close(value("task", student, None), F.cross_entropy(student.outputs["logits"], labels).detach())


def test_task_of_the_next_token():
    student, _ = both(2, 6, 9, causal=True)
    logits, ids = student.outputs["logits"].detach(), TOKENS["input_ids"]
    expected = F.cross_entropy(torch.cat([logits[0, :5], logits[1, :3]]), torch.cat([ids[0, 1:], ids[1, 1:4]]))
    torch.testing.assert_close(value("task", student, None), expected)
    student, _ = both(2, 6, 9)
    with pytest.raises(UsageError, match="needs labels"):
        Loss.parse("task")(student, None)


def test_outputs():
    student, teacher = both(2, 6, 8, name="last_hidden_state")
    mine, theirs = (seen.outputs["last_hidden_state"][THERE] for seen in (student, teacher))
    expected = (mine - theirs).square().sum() / theirs.square().sum()
    torch.testing.assert_close(value("outputs", student, teacher), expected.detach())


@pytest.mark.parametrize("shape", [(5, 8), (2, 6, 8), (2, 3, 4, 4)])
def test_cosine(shape):
    student, teacher = both(*shape, name="out")
    mine, theirs = (seen.outputs["out"] for seen in (student, teacher))
    if len(shape) == 3:
        mine, theirs = mine[THERE], theirs[THERE]
    if len(shape) == 4:
        mine, theirs = mine.permute(0, 2, 3, 1).reshape(-1, 3), theirs.permute(0, 2, 3, 1).reshape(-1, 3)
    expected = 1 - (F.normalize(mine, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1).mean()
    torch.testing.assert_close(value("cosine", student, teacher), expected.detach())


@pytest.mark.parametrize("inputs", [TOKENS, {"input_ids": TOKENS["input_ids"]}])
def test_pooled_is_what_sentence_embeddings_are(inputs):
    student, teacher = both(2, 6, 8, name="last_hidden_state", inputs=inputs)
    counts = [6, 4 if "attention_mask" in inputs else 6]
    pooled = [
        torch.stack([seen.outputs["last_hidden_state"][row, :count].mean(0) for row, count in enumerate(counts)])
        for seen in (student, teacher)
    ]
    expected = 1 - F.cosine_similarity(*pooled).mean()
    torch.testing.assert_close(value("pooled", student, teacher), expected.detach())


def test_features_and_a_weighted_sum():
    student, teacher = both(2, 6, 9)
    mine, theirs = ([normal(2, 6, 8, seed=seed + at).requires_grad_(seed == 3) for at in (0, 1)] for seed in (3, 7))
    student, teacher = Seen(TOKENS, student.outputs, features=mine), Seen(TOKENS, teacher.outputs, features=theirs)
    of_samples = [
        [(a[at][THERE[at]] - b[at][THERE[at]]).square().sum() / b[at][THERE[at]].square().sum() for at in (0, 1)]
        for a, b in zip(mine, theirs)
    ]
    shares = [torch.stack(each).mean() for each in of_samples]
    torch.testing.assert_close(Loss.parse("features")(student, teacher), torch.stack(shares).mean())
    away = [1 - F.cosine_similarity(a[THERE], b[THERE], dim=-1).mean() for a, b in zip(mine, theirs)]
    torch.testing.assert_close(Loss.parse("features_cosine")(student, teacher), torch.stack(away).mean())
    whole = value("kl+0.5*features + 1e-1*kl", student, teacher, temperature=2.0)
    kl = value("kl", student, teacher, temperature=2.0)
    torch.testing.assert_close(whole, (1.1 * kl + 0.5 * torch.stack(shares).mean()).detach())


def test_encoders_with_decoders_have_two_masks():
    inputs = TOKENS | {"decoder_input_ids": TOKENS["input_ids"]}
    student, teacher = both(2, 6, 7, inputs=inputs)
    expected = divergence(student.outputs["logits"], teacher.outputs["logits"]).mean()
    torch.testing.assert_close(value("kl", student, teacher), expected.detach())
    student, teacher = both(2, 6, 7, name="encoder_last_hidden_state", inputs=inputs)
    mine, theirs = (seen.outputs["encoder_last_hidden_state"][THERE] for seen in (student, teacher))
    expected = (mine - theirs).square().sum() / theirs.square().sum()
    torch.testing.assert_close(value("outputs", student, teacher), expected.detach())


def test_logits_are_found_by_their_name_or_alone():
    for name in ("start_logits", "out"):
        student, teacher = both(5, 7, name=name)
        expected = divergence(student.outputs[name], teacher.outputs[name]).mean()
        torch.testing.assert_close(value("kl", student, teacher), expected.detach())
    student, teacher = both(2, 6, 7, name="last_hidden_state")
    with pytest.raises(UsageError, match="last_hidden_state") as caught:
        Loss.parse("kl")(student, teacher)
    assert "loss=outputs" in caught.value.hint


@pytest.mark.parametrize("text", ["", "kl+", "2*", "1..2*kl", "kl-task", "nothing", "-1*kl"])
def test_what_is_no_loss(text):
    with pytest.raises(UsageError) as caught:
        Loss.parse(text)
    assert all(term in caught.value.hint for term in TERMS)
