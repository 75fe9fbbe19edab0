import os
import signal
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / 'lab')]
# the models are tiny, so a second thread would only wait for the first, here and in processes that tests start
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'


@pytest.fixture(autouse=True)
def signals():
    """Give signals back to pytest, after a test has trained in this process."""
    numbers = [number for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if (number := getattr(signal, name, None))]
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A data set of 40 small documents. All tests share it, so do not change it."""
    from helpers import small_corpus
    return small_corpus(tmp_path_factory.mktemp('corpus') / 'small')
