"""A small ResNet and a small ViT that read the handwritten digits of scikit-learn, with their weights.

    python examples/digits.py resnet vit

trains both again, in half a minute each, and writes examples/digits-NAME.safetensors; the same machine and torch give the same
weights. A quarter of the 1797 images, every fourth, is not trained on. In Python, from the repository:

    from examples import digits
    compiled = fxc.optimize(*digits.resnet(), "int8:mode=static", calib=digits.calibration())
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
CLASSES = 10
HELD_OUT = 4
"""Every image whose number this divides is held out."""


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class ResNet(nn.Module):
    """Images [B, 1, 8, 8] of numbers 0 to 1 -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Images [B, 1, 8, 8] of numbers 0 to 1 -> logits [B, 10]; patches of 2 x 2."""

    def __init__(self, width: int = 32, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.5)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


NOISE = 0.2
MODELS = {"resnet": ResNet, "vit": ViT}


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images to train on, their digits, held-out images, their digits)"""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    held_out = torch.arange(len(x)) % HELD_OUT == 0
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def calibration(batches: int = 8, size: int = 32) -> list[Tensor]:
    """Batches of images that were trained on."""
    return list(images()[0][: batches * size].split(size))


def accuracy(model: nn.Module) -> float:
    """The share of held-out images that `model`, logits of images, reads right."""
    *_, x, y = images()
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def resnet() -> tuple[nn.Module, tuple[Tensor]]:
    return _trained("resnet")


def vit() -> tuple[nn.Module, tuple[Tensor]]:
    return _trained("vit")


def _trained(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    model = MODELS[name]().eval()
    model.load_state_dict(load_file(HERE / f"digits-{name}.safetensors"))
    return model, (torch.zeros(2, 1, 8, 8),)


def train(name: str) -> nn.Module:
    """A model trained from nothing."""
    torch.manual_seed(0)
    return fitted(MODELS[name]())


def fitted(model: nn.Module, epochs: int = 40, batch: int = 64) -> nn.Module:
    """`model` trained on the digits: AdamW, one cycle, noise on the images; by torch's own generator."""
    x, y, *_ = images()
    steps = epochs * -(-len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(epochs):
        for some in torch.randperm(len(x)).split(batch):
            noisy = x[some] + NOISE * torch.randn_like(x[some])
            loss = F.cross_entropy(model(noisy), y[some], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=sorted(MODELS))
    for name in parser.parse_args().models:
        start = time.perf_counter()
        model = train(name)
        save_file(model.state_dict(), HERE / f"digits-{name}.safetensors")
        seconds = time.perf_counter() - start
        print(f"{name}: {accuracy(model):.1%} of the held-out images, trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
