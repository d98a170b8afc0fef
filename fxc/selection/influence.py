"""How much of an error of each weight reaches the loss: from a few runs with noise on one weight at a time.

For small errors the loss is a weighted sum over layers of what each loses, whatever made it lose that: the linearity that HIGGS
describes (Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", arXiv
2411.17525). Each weight is run with its noise added and taken away, so that what is odd in the noise cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxc.ir.cache import is_causal_lm, is_present
from fxc.ir.program import Program
from fxc.passes.float64 import in_float32
from fxc.progress import Track, untracked
from fxc.selection.errors import Errors, noise

SIZE = 0.05
"""Of the noise, a share of the rows' own size."""
RUNS = 512
"""About so many runs, shared out among the weights, so that the time grows with the model and not with its square."""
SAMPLES = 16


@torch.no_grad()
def influence(
    program: Program, errors: Errors, samples: Sequence[Sequence[Tensor]], seed: int, track: Track = untracked
) -> dict[str, float]:
    """Weight -> by how much the loss rises for each unit of e. The loss is the divergence in nats of the distributions that a
    causal language model or a classifier gives, of other models the squared relative error of the outputs.

    samples: each the inputs of `program`; errors: with those of the same noise.
    """
    names = list(errors.of_noise)
    count = max(1, min(SAMPLES, len(samples), RUNS // max(2 * len(names), 1)))
    wide = in_float32(program) or program
    module = wide.module()
    held = {id(tensor): name for name, tensor in (*module.named_buffers(), *module.named_parameters())}
    clean = [_Clean(wide, sample, module(*sample)) for sample in samples[:SAMPLES]]
    found: dict[str, float] = {}
    for number, name in enumerate(track(names, f"weighing {len(names)} weights by noise", len(names))):
        # Where there are more samples than each weight has, all are used.
        some = [clean[(number * count + at) % len(clean)] for at in range(count)]
        weight, off = wide.constants[name], noise(name, program.constants[name], SIZE, seed)
        risen = 0.0
        for sign in (1, -1):
            setattr(module, held[id(weight)], (weight.float() + sign * off).to(weight.dtype))
            risen += sum(each.loss(module(*each.inputs)) for each in some) / (2 * count)
        setattr(module, held[id(weight)], weight)
        found[name] = risen / errors.of_noise[name] if errors.of_noise[name] > 0 else 0.0
    return found


class _Clean:
    """A sample, and what the program gives for it."""

    def __init__(self, program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        named = list(zip(program.signature.outputs, program.results, strict=True))
        floats = [at for at, (name, n) in enumerate(named) if n.meta["val"].dtype.is_floating_point and not is_present(name)]
        logits = [at for at in floats if named[at][0] == "logits"]
        self.are_logits = bool(logits) and (is_causal_lm(program) or outputs[logits[0]].ndim == 2)
        self.places = logits[:1] if self.are_logits else floats
        self.outputs = [outputs[at].float() for at in self.places]
        if self.are_logits:
            self.outputs = [each.log_softmax(-1) for each in self.outputs]

    def loss(self, outputs: Sequence[Tensor]) -> float:
        """Divergence in nats a row of logits, or |found - clean|^2 / |clean|^2 over all outputs."""
        found = [outputs[at].float() for at in self.places]
        if self.are_logits:
            known, logs = self.outputs[0], found[0].log_softmax(-1)
            return (known.exp() * (known - logs)).sum(-1).mean(dtype=torch.float64).item()
        off = sum((a - b).square().sum(dtype=torch.float64).item() for a, b in zip(found, self.outputs, strict=True))
        whole = sum(each.square().sum(dtype=torch.float64).item() for each in self.outputs)
        return off / whole if whole else 0.0
