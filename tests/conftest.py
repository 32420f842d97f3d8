import os
import pathlib
import signal
import sys

os.environ["OMP_NUM_THREADS"] = "2"  # before torch reads it; for the programs that tests start as well

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def no_signal_is_left_over():
    """A test that runs the command line in this process must not change what Ctrl-C does afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
