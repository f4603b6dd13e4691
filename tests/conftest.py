import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_resnet9 as m
from support import winograd

# No deadline: a machine with two busy cores is slow now and then. In CI the examples are always the
# same ones.
settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("ci" if "CI" in os.environ else "dev")


@pytest.fixture(scope="session", autouse=True)
def project_folder():
    """The tests run there, wherever pytest was started: paths in flags begin at the user's
    folder."""
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture(scope="session")
def sample():
    """Real digits; the sample is in git, so they are there on every machine."""
    return m.load_mnist("data/sample")


@pytest.fixture
def plain(monkeypatch):
    """Calling it makes every convolution take the plain way until the test ends."""
    return lambda: monkeypatch.setattr(winograd, "MIN_CHANNELS", 10**9)
