import os
import pathlib
import signal
import sys

os.environ["OMP_NUM_THREADS"] = "2"  # before torch reads it; for the programs that tests start as well

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import datasets


@pytest.fixture(scope="session")
def shapes():
    return datasets.load_shapes()


@pytest.fixture(autouse=True)
def each_test_by_itself():
    """The same random numbers whatever ran before, and what a run changed of Ctrl-C is changed back after it."""
    torch.manual_seed(0)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
