"""The dense tiny model that most tests of a cache share."""

import pytest
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("dense")
