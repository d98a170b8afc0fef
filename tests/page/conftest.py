"""One small compiled model with its manifest, and what a page says in a form that tests can ask."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fxc
from fxc.artifact import store

VOID = {"meta", "input", "br", "hr", "img", "link"}


class Dom(HTMLParser):
    """Every element with its attributes and the text right in it; `wrong` are tags that do not close what is open."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[int] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        if not self.open or self.elements[self.open[-1]][0] != tag:
            self.wrong.append(tag)
        else:
            self.open.pop()

    def handle_data(self, text):
        if self.open:
            self.elements[self.open[-1]][2].append(text)

    def all(self, tag: str, **attributes: str) -> list[tuple[str, dict, list[str]]]:
        return [e for e in self.elements if e[0] == tag and all(e[1].get(k) == v for k, v in attributes.items())]

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return ["".join(text).strip() for _, _, text in self.all(tag, **attributes)]


@pytest.fixture(scope="session")
def dom():
    return Dom


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """An artifact: two linear layers in int8, and one that was left alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    out = tmp_path_factory.mktemp("page") / "out"
    fxc.optimize(net, (torch.randn(4, 64),), passes="int8", skip=["4"]).save(out)
    return out


@pytest.fixture(scope="session")
def outline(saved) -> store.Artifact:
    return store.read_outline(saved)
