"""transformers' own tests of a model, from its source distribution, run on our classes; what differs, and why.

`make test-slow` fetches the distribution of the installed release through pip, into .range/; without a registry, and without the
`parameterized` that these tests import, they are skipped. The distribution has the tests every model shares; those of
generation are in none of the distributions 5.0.0, 5.10.4, 5.16.1, 5.20.0, 5.23.0 and 5.24.0, and stay out here.
"""

import importlib
import subprocess
import sys
import tarfile
import types
import unittest
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny import COMMON, EXPERTS

from nemotron_h_hf import (
    NemotronHConfig,
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHModel,
)

pytestmark = pytest.mark.slow
pytest.importorskip("parameterized")
RANGE = Path(__file__).parents[2] / ".range"

# Test -> why ours differs.
DIFFERS = {
    "test_attention_outputs": "wants attention weights of every layer; only attention layers have them",
    "test_generation_tester_mixin_inheritance": "the tests of generation are not in the distribution",
    "test_model_weights_reload_no_missing_tied_weights": "writes an integer in place of the weights; integers are refused",
    "test_num_layers_is_small": "four kinds of layers are four layers",
    "test_reverse_loading_mapping": "backbone.embedding.weight, an older name, is read and never written",
}


def shared_tests() -> types.ModuleType:
    """transformers' test_modeling_common, with nothing where the distribution leaves its neighbours out."""
    release = f"transformers-{version('transformers')}"
    folder = RANGE / release
    if not (folder / "tests").is_dir():
        RANGE.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "--dest", str(RANGE), release.replace("-", "==")]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("transformers' source distribution cannot be fetched", allow_module_level=True)
        with tarfile.open(RANGE / f"{release}.tar.gz") as archive:
            members = [member for member in archive.getmembers() if "/tests/" in member.name]
            archive.extractall(RANGE, members, filter="data")
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(folder / "tests")]
    sys.modules["transformers_tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent, module = types.ModuleType(name.split(".")[0]), types.ModuleType(name)
        parent.__path__, module.__dict__[mixin] = [], type(mixin, (), {})
        sys.modules[f"transformers_tests.{name.split('.')[0]}"] = parent
        sys.modules[f"transformers_tests.{name}"] = module
    return importlib.import_module("transformers_tests.test_modeling_common")


common = shared_tests()


class Inputs:
    """A model of four kinds of layers, and inputs for it, as these tests ask for them."""

    is_training, batch_size, seq_length = True, 3, 7

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        for name in ("hidden_size", "num_attention_heads", "vocab_size"):
            setattr(self, name, COMMON[name])
        self.num_hidden_layers = 4

    def get_config(self) -> NemotronHConfig:
        return NemotronHConfig(
            **{**COMMON, **EXPERTS, "hybrid_override_pattern": "ME*-"}, pad_token_id=0, eos_token_id=1
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[NemotronHConfig, dict]:
        ids = torch.randint(2, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestNemotronH(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (NemotronHModel, NemotronHForCausalLM, NemotronHForSequenceClassification)
    pipeline_model_mapping: dict = {}

    def setUp(self) -> None:
        self.model_tester = Inputs(self)
        if self._testMethodName in DIFFERS:
            self.skipTest(DIFFERS[self._testMethodName])

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        """transformers has no classifier of this family, and no labels for it."""
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        if return_labels and model_class is NemotronHForSequenceClassification:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs
