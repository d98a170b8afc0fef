"""What each criterion says of a unit."""

from __future__ import annotations

import functools

import pytest
import torch
from families import build
from pruned import DATA, Mlp, counts, gelu, masked, zero_columns
from removal import canonical, with_forward
from torch import Tensor, nn

from fxc.analysis.groups import groups
from fxc.data.decoder import decoder_inputs
from fxc.ir.program import Program
from fxc.passes.prune.scores import CRITERIA, mask_gradients, scores


@functools.cache
def tiny() -> tuple[Mlp, Program]:
    model = Mlp()
    return model, canonical(model, (DATA[0],))


def scored(criterion: str) -> Tensor:
    _, program = tiny()
    its = [g for g in groups(program) if g.kind == "ffn"]
    (found,) = scores(program, its, criterion, [[x] for x in DATA]).values()
    return found


def loss_of(output: Tensor) -> Tensor:
    """A fixed random combination of the outputs."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output * direction).sum() / output.numel() ** 0.5


def gradients_by_weights() -> Tensor:
    """[samples, units]: the gradient times the weight, summed over the weights that read a unit."""
    model, rows = tiny()[0], []
    for x in DATA:
        model.zero_grad()
        loss_of(model(x)).backward()
        rows.append((model.down.weight.grad * model.down.weight).sum(0).detach())
    return torch.stack(rows).double()


def test_magnitudes():
    model, _ = tiny()
    up, down = model.up.weight.detach().double(), model.down.weight.detach().double()
    torch.testing.assert_close(scored("l1"), up.abs().sum(1) + down.abs().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(scored("l2"), (up.square().sum(1) + down.square().sum(0)).sqrt(), rtol=1e-6, atol=0)


def test_wanda_is_the_weight_times_the_norm_of_what_it_multiplies():
    model, _ = tiny()
    with torch.no_grad():
        activations = torch.cat([gelu(model.up(x)) for x in DATA]).double()
    expected = (model.down.weight.detach().double().abs() * activations.norm(dim=0)).sum(0)
    torch.testing.assert_close(scored("wanda"), expected, rtol=1e-5, atol=0)


def test_taylor_is_the_squared_gradient_times_weight():
    torch.testing.assert_close(scored("taylor"), gradients_by_weights().square().mean(0), rtol=1e-4, atol=1e-9)


def test_mask_gradients_are_those_of_finite_differences():
    _, program = tiny()
    (group,) = (g for g in groups(program) if g.kind == "ffn")
    (found,) = mask_gradients(program, [group], [[x] for x in DATA]).values()
    torch.testing.assert_close(found, gradients_by_weights(), rtol=1e-4, atol=1e-7)
    wide, step = Mlp().double(), 1e-6
    for sample, x in enumerate(DATA):
        for unit in range(8):
            losses = []
            for mask in (1 + step, 1 - step):
                with torch.no_grad():
                    hidden = gelu(wide.up(x.double()))
                    hidden[:, unit] *= mask
                    losses.append(loss_of(wide.down(hidden)).item())
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(found[sample, unit].item(), rel=1e-3, abs=1e-6)


def test_mask_gradient_is_the_mean_magnitude_over_the_norm_of_the_layer():
    mean = gradients_by_weights().abs().mean(0)
    torch.testing.assert_close(scored("mask_gradient"), mean / mean.norm(), rtol=1e-4, atol=1e-9)


def test_batch_norm_scales():
    model = with_forward(
        lambda self, x: self.b(torch.relu(self.norm(self.a(x)))),
        a=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6), b=nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    program = canonical(model, (torch.randn(2, 3, 6, 6).double(),))
    its = [g for g in groups(program) if g.kind == "channel" and not g.pinned]
    (found,) = scores(program, its, "bn_scale").values()
    torch.testing.assert_close(found, model.norm.weight.detach().abs())
    after, _ = masked(program, "prune:channels=0.5:criterion=bn_scale")
    gone = (~after.constants["b.weight"].any(0).flatten(1).any(1)).nonzero().flatten()
    assert sorted(gone.tolist()) == sorted(model.norm.weight.abs().argsort()[:3].tolist())


def test_a_grouped_convolution_is_scored_like_each_of_its_groups():
    """Wanda where one position of the weight reads a channel of each group."""
    model = with_forward(
        lambda self, x: self.last(self.second(torch.relu(self.first(x)))),
        first=nn.Conv2d(3, 6, 1), second=nn.Conv2d(6, 4, 1, groups=2), last=nn.Conv2d(4, 2, 1),
    ).float()  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    program = canonical(model, (x,))
    its = [g for g in groups(program) if g.kind == "channel" and not g.pinned and ("second.weight", 1) in
           {(m.fqn, m.dim) for m in g.members}]  # fmt: skip
    (found,) = scores(program, its, "wanda", [[x]]).values()
    with torch.no_grad():
        norms = torch.relu(model.first(x)).double().square().sum((0, 2, 3)).sqrt().reshape(2, 3)
    expected = model.second.weight.detach().double().abs().sum((0, 2, 3)) * norms.sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_heads_of_a_language_model_are_scored_by_the_loss_of_the_next_token():
    model, _ = build("gpt2")
    program = canonical(model)
    its = [g for g in groups(program) if g.kind == "head"]
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    inputs = [decoder_inputs(program, row[None]) for row in ids]
    found = mask_gradients(program, its, inputs)
    for sample, row in enumerate(ids):
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for layer, group in zip(model.transformer.h, its, strict=True):
            weight = layer.attn.c_proj.weight  # stored as [inputs, outputs]
            expected = (weight.grad * weight).detach().reshape(4, -1).sum(1).double()
            torch.testing.assert_close(found[group][sample], expected, rtol=1e-3, atol=1e-7)
    taylor = scores(program, its, "taylor", inputs)
    torch.testing.assert_close(taylor[its[0]], found[its[0]].square().mean(0))


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "bn_scale"])
def test_a_unit_that_was_made_small_goes_first_by_every_criterion(criterion):
    model = Mlp()
    with torch.no_grad():
        for part in (model.up.weight, model.up.bias):
            part[[1, 6]] *= 1e-3
        model.down.weight[:, [1, 6]] *= 1e-3
    program = canonical(model, (DATA[0],))
    after, result = masked(program, f"prune:ffn=0.25:criterion={criterion}", [[x] for x in DATA])
    assert zero_columns(after.constants["down.weight"]) == [1, 6]
    assert counts(result) == {"": (8, 2)} or list(counts(result).values()) == [(8, 2)]
    assert torch.equal(after.constants["up.weight"], program.constants["up.weight"]), "only what reads a unit is masked"
