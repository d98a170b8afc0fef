"""Deep Compression of LeNet-300-100 on scikit-learn's digits: prune while training, share 32 values, store in Huffman codes.

python examples/lenet_digits.py [--out out/lenet-digits]

Han et al., "Deep Compression", arXiv 1510.00149, whose network has 784 inputs and this one 64. Training is plain torch: weights
are pruned by magnitude in steps, more slowly towards the end (Zhu and Gupta, arXiv 1710.01878), and what stays is trained on.
fxc does the rest: `pack:codebook=32` lets what stays share values and stores the artifact small.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxc

SPARSITY = 0.9
CODEBOOK = 32
STEPS, PRUNED_UNTIL, EVERY = 3000, 2000, 20
HELD_OUT = 5
Split = tuple[Tensor, Tensor]


def digits() -> tuple[Split, Split]:
    """(pictures float32 [n, 64] of 0 to 1, digits int64 [n]) to train on, and those of every fifth picture to judge by."""
    data = load_digits()
    pictures, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    return (pictures[~held_out], labels[~held_out]), (pictures[held_out], labels[held_out])


def lenet() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def train(net: nn.Sequential, split: Split, sparsity: float = 0.0, seed: int = 0) -> nn.Sequential:
    """A copy of `net`, trained for some seconds; the share `sparsity` of the weights of all its layers is zero in the end."""
    torch.manual_seed(seed)
    net, (pictures, labels) = copy.deepcopy(net), split
    weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
    masks = [torch.ones_like(weight) for weight in weights]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        batch = torch.randint(len(labels), (128,))
        loss = nn.functional.cross_entropy(net(pictures[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            if step <= PRUNED_UNTIL and step % EVERY == 0:
                masks = kept(weights, sparsity * (1 - (1 - step / PRUNED_UNTIL) ** 3))
            for weight, mask in zip(weights, masks, strict=True):
                weight.mul_(mask)
    return net.eval()


def kept(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of all but the share `sparsity` of the numbers, each measured by the deviation of its layer's."""
    sizes = [(weight / weight[weight != 0].std()).abs() for weight in weights]
    edge = torch.cat([size.flatten() for size in sizes]).quantile(sparsity)
    return [(size > edge).float() for size in sizes]


def accuracy(model: nn.Module, split: Split) -> float:
    pictures, labels = split
    with torch.no_grad():
        return (model(pictures).argmax(1) == labels).double().mean().item()


@dataclass(frozen=True)
class Outcome:
    """accuracy on held-out digits of the network as trained, pruned, and packed and loaded; zeros: of all weights, a share;
    sizes: bytes of the files of weights, as trained and packed."""

    dense: float
    pruned: float
    loaded: float
    zeros: float
    sizes: tuple[int, int]


def compress(out: Path) -> Outcome:
    training, judging = digits()
    torch.manual_seed(0)
    dense = train(lenet(), training)
    net = train(dense, training, SPARSITY)
    inputs = (training[0][:8],)
    fxc.optimize(dense, inputs, "canonicalize").save(out / "float", overwrite=True)
    fxc.optimize(net, inputs, f"pack:codebook={CODEBOOK}").save(out / "packed", overwrite=True)
    loaded = fxc.load(out / "packed")
    weights = [tensor for name, tensor in loaded.program.constants.items() if name.endswith("weight")]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    before, after = (sum(file.stat().st_size for file in (out / of).glob("*.safetensors")) for of in ("float", "packed"))
    return Outcome(accuracy(dense, judging), accuracy(net, judging), accuracy(loaded, judging), zeros, (before, after))


def main(out: Path) -> None:
    made = compress(out)
    before, after = made.sizes
    print(f"accuracy on held-out digits: {made.dense:.2%} as trained, {made.pruned:.2%} pruned, {made.loaded:.2%} packed")
    print(f"{made.zeros:.1%} of the weights are zero; on disk {before:,} bytes -> {after:,}, 1/{before / after:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/lenet-digits"))
    main(parser.parse_args().out)
