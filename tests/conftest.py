import pathlib
import signal
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def no_signal_is_left_over():
    """A test that runs the command line in this process must not change what Ctrl-C does afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
