"""What all tests share: fixed threads and seeds, and a registry that forgets test layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from layerzoo import layer, list_layers


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # tensors are tiny, and two threads crawl when a core is busy


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def registry() -> Iterator[dict[str, type[layer.Layer]]]:
    """The registry, put back as it was after the test."""
    list_layers()  # discover first, else the snapshot would drop real layers
    before = dict(layer._REGISTRY)
    yield layer._REGISTRY
    layer._REGISTRY.clear()
    layer._REGISTRY.update(before)
