"""The example files of several servers behind one router: parsed, and what they name is there."""

import json
from pathlib import Path
from urllib.parse import urlsplit

import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "serving"


def check_models(config: dict, hosts: set[str]) -> None:
    for row in config["model_list"]:
        params = row["litellm_params"]
        place = urlsplit(params["api_base"])
        assert params["model"] == f"openai/{row['model_name']}" and place.path == "/v1" and place.hostname in hosts


def test_router():
    config = yaml.safe_load((FOLDER / "router.yaml").read_text())
    check_models(config, {"server-1", "server-2"})
    assert {row["model_name"] for row in config["model_list"]} == {"parent", "parent:6b"}


def test_compose():
    config = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    services = config["services"]
    check_models(yaml.safe_load(config["configs"]["router"]["content"]), set(services))
    for name in ("small", "large"):
        command = services[name]["command"]
        options = dict(zip(command[::2], command[1::2]))
        assert json.loads(options.get("--hf-overrides", "{}")) == ({"budget": "6b"} if name == "small" else {})
        assert options["--served-model-name"] == ("parent:6b" if name == "small" else "parent")
    used = {config["source"] for service in services.values() for config in service.get("configs", ())}
    assert used == set(config["configs"])
