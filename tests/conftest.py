"""Fixtures that tests of several folders use; a file asks for one with `pytestmark = pytest.mark.usefixtures(...)`."""

import os

import pytest
import torch


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
