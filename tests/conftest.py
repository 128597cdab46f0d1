"""Fixtures that tests of several folders use; a file asks for one with `pytestmark = pytest.mark.usefixtures(...)`."""

import os

import pytest
import torch
from tiny import tiny_model
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Folders of short texts; only read."""
    from tiny_run import write_texts  # imports transformers' Trainer

    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded model's; a module may change it."""
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def model():
    """The dense tiny model."""
    return tiny_model("dense")
