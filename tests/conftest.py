"""Read by pytest before any test: no test may try the network, and Ctrl-C stays with pytest."""

import os
import signal

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in two processes


@pytest.fixture(autouse=True)
def interrupt_handler():
    """Training in this process takes Ctrl-C over: give it back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
