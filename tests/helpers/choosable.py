"""A small model of several kinds of layers, and formats to choose from."""

import torch
from torch import nn

FORMATS = "int8:mode=weight_only;int4:group=32;int4:group=64:algorithm=gptq;int4:bits=2:group=32"


class Small(nn.Module):
    """A table that is tied to the head, two layers that read the same, one whose rows no group divides, one of few outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 64)
        self.left, self.right, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.odd, self.back = nn.Linear(64, 48), nn.Linear(48, 64)
        self.few = nn.Linear(64, 2)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        x = x + self.down(torch.tanh(self.left(x)) * self.right(x))
        x = x + self.back(torch.relu(self.odd(x)))
        return self.head(x), self.few(x)
