"""A backbone's classifier and the features of a client."""

import pytest
import torch
from torch import nn

from tests.making.cloud import D, K, S


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(D, K)


@pytest.fixture
def x():
    return torch.randn(S, D, generator=torch.Generator().manual_seed(1))
