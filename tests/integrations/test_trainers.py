"""Other trainers' documented entry points, where they are installed (`make test-tools`)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

BUDGETS = {"half": {"hidden_size": 32, "mamba_num_heads": 4}}
CHECK = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, config=config, budget="half")
assert type(model).__module__.startswith("nemotron_h_hf.") and model.config.hidden_size == 32, type(model)
"""
ENTRIES = {
    "axolotl": "from axolotl.integrations.base import load_plugin\n"
    "load_plugin('nemotron_h_hf.integrations.axolotl.Plugin').register({{}})\n",
    "verl": "import importlib.util\n"  # the package itself starts Ray
    "path = importlib.util.find_spec('verl').submodule_search_locations[0] + '/utils/import_utils.py'\n"
    "spec = importlib.util.spec_from_file_location('import_utils', path)\n"
    "module = importlib.util.module_from_spec(spec)\n"
    "spec.loader.exec_module(module)\n"
    "module.import_external_libs('nemotron_h_hf')\n",
    "swift": "from swift.utils import import_external_file\nimport_external_file({plugin!r})\n",
}


@pytest.mark.parametrize("program", ENTRIES)
def test_our_classes_and_budgets_are_what_it_loads(program, tmp_path):
    if importlib.util.find_spec(program) is None:
        pytest.skip(f"{program} is not installed")
    tiny_model("dense", elastic={"version": 1, "budgets": BUDGETS}).save_pretrained(tmp_path / "parent")
    Path(tmp_path / "plugin.py").write_text("import nemotron_h_hf\n")
    entry = ENTRIES[program].format(plugin=str(tmp_path / "plugin.py"))
    script = entry + CHECK.format(folder=str(tmp_path / "parent"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
