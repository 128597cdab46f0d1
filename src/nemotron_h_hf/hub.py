"""Ship a checkpoint folder, which is only read: its model card, the model code next to the weights, the upload."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from .checkpoint_summary import LAYER_NAMES, Facts, describe, load_target
from .manifest import NAME as MANIFEST_NAME
from .model.configuration_nemotron_h import with_plain_limit
from .model.configuration_nemotron_h_vl import NemotronHNanoVLConfig, NemotronHOmniConfig, NemotronHVLConfig
from .model.json_files import read_json
from .model.weights import read_index
from .tokenizer_files import TOKENIZER_FILES, portable_config
from .units import human_bytes, human_count
from .vision_summary import VisionFacts

LOCAL_PATH = re.compile(
    r"""(^|[\s"'(=:,`\[])((?:file:/|~|\.{1,2})?/(?!/)[^\s"'),;:`\]]+|[A-Za-z]:\\[^\s"'),;`]+)""", re.M
)
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.M)
PACKAGE = Path(__file__).parent
CARD_TEMPLATE = PACKAGE / "assets" / "model_card_template.md"
AUTO_MAPS = {
    model_type: {
        "AutoConfig": f"configuration_nemotron_h.{name}Config",
        "AutoModel": f"modeling_nemotron_h.{name}Model",
        "AutoModelForCausalLM": f"modeling_nemotron_h.{name}ForCausalLM",
        "AutoModelForSequenceClassification": f"modeling_nemotron_h.{name}ForSequenceClassification",
    }
    for model_type, name in (("nemotron_h", "NemotronH"), ("nemotron_h_puzzle", "NemotronHPuzzle"))
}
"""The `auto_map` of config.json, by its `model_type`, with which `trust_remote_code=True` finds the classes in the files next to
the weights."""
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": "image_processing_nemotron_h_vl.NemotronHVLImageProcessor",
    "AutoProcessor": "processing_nemotron_h_vl.NemotronHVLProcessor",
}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
VISION_AUTO_MAPS = {
    config_class.model_type: {
        "AutoConfig": f"configuration_nemotron_h_vl.{config_class.__name__}",
        "AutoModel": f"modeling_nemotron_h_vl.{base}",
        "AutoModelForImageTextToText": f"modeling_nemotron_h_vl.{whole}",
        **PROCESSOR_AUTO_MAP,
    }
    for config_class, base, whole in (
        (NemotronHVLConfig, "NemotronHVLModel", "NemotronHVLForConditionalGeneration"),
        (NemotronHNanoVLConfig, "NemotronH_Nano_VL_V2", "NemotronH_Nano_VL_V2"),
        (NemotronHOmniConfig, "NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Nano_Omni_Reasoning_V3"),
    )
}
"""The same for a vision-language model, by its `model_type`."""
BELONGS = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", MANIFEST_NAME,
    "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "hf_quant_config.json", "conversion_report.json",
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt", ".gitattributes",
    "additional_chat_templates/*.jinja", *TOKENIZER_FILES,
)  # fmt: skip
"""What a model repository holds, as patterns; besides it the shards that the index names and the code that config.json names."""
USE_OF_TEXT = """tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}"{arguments})
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
USE_OF_PICTURES = """processor = AutoProcessor.from_pretrained("{repo_id}"{arguments})
model = AutoModelForImageTextToText.from_pretrained("{repo_id}"{arguments})
inputs = processor(images="photo.png", text="<image>", return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
PATH_FIELDS = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def code_files(vision: bool = False) -> dict[str, bytes]:
    """The files of the flat `model/` folder by name, as they are pushed with the weights; those of vision only with such a model."""
    paths = sorted((PACKAGE / "model").glob("[a-z]*.py"))
    return {path.name: path.read_bytes() for path in paths if vision or not path.stem.endswith("_vl")}


def with_auto_map(config_text: str) -> bytes:
    """`config.json` with our classes in its `auto_map`; other entries of the map are kept."""
    config = json.loads(config_text)
    sees = _sees(config_text)
    config = config if sees else with_plain_limit(config)
    config["auto_map"] = {
        **config.get("auto_map", {}),
        **(VISION_AUTO_MAPS if sees else AUTO_MAPS)[config.get("model_type", "nemotron_h")],
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def with_processor_map(text: str) -> bytes:
    """A processor's configuration with our classes in its `auto_map`, and in that of the image processor inside it."""
    fields = json.loads(text)
    for part in (fields, fields.get("image_processor")):
        if part is not None:
            part["auto_map"] = {**part.get("auto_map", {}), **PROCESSOR_AUTO_MAP}
    return (json.dumps(fields, indent=2) + "\n").encode()


def model_card(
    folder: str | os.PathLike,
    repo_id: str,
    with_code: bool = False,
    license: str | None = None,
    training: str = "Not described by the uploader.",
) -> str:
    """The card of a checkpoint folder: our template with the model's own facts, and `training` if told."""
    config, contents = load_target(folder)
    facts = describe(repo_id, config, contents)
    dtypes = ", ".join(f"{dtype} ({human_count(count)})" for dtype, count in contents.elements_by_dtype().items())
    code_note = (
        "The model code is stored with the weights; `trust_remote_code=True` runs it where the package is not installed. "
        "It runs on transformers 5.16 and newer; code that a version up to 0.1.0 pushed gives wrong text on 5.24, and must be "
        "pushed again."
        if with_code
        else "Importing `nemotron_h_hf` is optional: transformers has its own `nemotron_h`."
    )
    sees, arguments = facts.vision is not None, ", trust_remote_code=True" if with_code else ""
    classes = "AutoModelForImageTextToText, AutoProcessor" if sees else "AutoModelForCausalLM, AutoTokenizer"
    imports = [f"from transformers import {classes}"]
    return string.Template(CARD_TEMPLATE.read_text(encoding="utf-8")).substitute(
        _card_numbers(facts),
        license_line=f"license: {license}\n" if license else "",
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        dtypes=dtypes,
        imports="\n".join(
            imports if with_code else [f"import nemotron_h_hf{'' if sees else '  # optional'}", *imports]
        ),
        use=(USE_OF_PICTURES if sees else USE_OF_TEXT).format(repo_id=repo_id, arguments=arguments),
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        kind="vision-language model" if sees else "language model",
        vision_rows=_vision_rows(facts.vision) if sees else "",
        code_note=code_note,
        training=training,
        limits="Not evaluated by the uploader. A language model's text can be wrong.",
    )


def _vision_rows(vision: VisionFacts) -> str:
    rows = {
        "vision tower": f"{vision.tower}, {vision.tower_layers} layers of {vision.tower_width}, {vision.tower_parameters:,} parameters",
        "projector": f"{vision.projector}, {vision.projector_parameters:,} parameters",
        "tokens per image": vision.tokens_per_image,
    }  # fmt: skip
    return "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def plan_upload(
    folder: str | os.PathLike,
    repo_id: str,
    with_code: bool = False,
    overwrite_card: bool = False,
    license: str | None = None,
    include: Iterable[str] = (),
) -> dict[str, Path | bytes]:
    """What an upload of `folder` holds: path in the repository -> the file, or the bytes sent instead.

    What a model repository holds is sent (`BELONGS`), anything else only if `include` names it, nothing through a link that
    leads out of the folder. Paths of this machine in configurations and reports are shortened to their last name.

    Raises:
        ValueError: if weights are missing or damaged, a link leads out of the folder, or `include` names what is not there.
    """
    folder = Path(folder)
    _refuse_incomplete(folder)
    plan = _files(folder, include)
    if overwrite_card or "README.md" not in plan:
        plan["README.md"] = model_card(folder, repo_id, with_code, license).encode()
    if "tokenizer_config.json" in plan:
        plan["tokenizer_config.json"] = portable_config(_text_of(plan["tokenizer_config.json"]), folder)
    if with_code:
        text = _text_of(plan["config.json"])
        plan["config.json"] = with_auto_map(text)
        plan.update(
            {name: content for name, content in code_files(_sees(text)).items() if _is_new(folder / name, content)}
        )
        for name in PROCESSOR_FILES:
            if _sees(text) and name in plan:
                plan[name] = with_processor_map(_text_of(plan[name]))
    text = _text_of(plan["config.json"])
    if (kept := _without_absent_code(text, plan)) != text:
        plan["config.json"] = kept.encode()
    return plan


def plan_adapter_upload(folder: str | os.PathLike, include: Iterable[str] = ()) -> dict[str, Path | bytes]:
    """What an upload of adapters holds, as `plan_upload`: their weights and configuration, tokenizer and card."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, nothing was sent")
    plan = _files(folder, include)
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if "README.md" in plan and _is_local(base):  # PEFT's own card names it
        plan["README.md"] = _read_text(folder / "README.md").replace(base, Path(base).name).encode()
    if "tokenizer_config.json" in plan:
        plan["tokenizer_config.json"] = portable_config(_text_of(plan["tokenizer_config.json"]), folder)
    return plan


def left_behind(folder: str | os.PathLike, plan: Mapping[str, Path | bytes]) -> list[str]:
    """Names in the folder that a plan does not send; a folder of which nothing is sent counts as one name."""
    first = {name.split("/")[0] for name in plan}
    return [path.name + "/" * path.is_dir() for path in sorted(Path(folder).iterdir()) if path.name not in first]


def without_local_paths(name: str, text: str) -> str:
    """A JSON file of a checkpoint as text, with the paths of this machine cut down to their last name."""
    content = json.loads(text)
    if name == "conversion_report.json":
        shortened = _shorten_all(content)
        for field in ("source", "target"):
            if isinstance(shortened.get(field), str):
                shortened[field] = Path(shortened[field]).name
    else:
        shortened = {
            field: Path(value).name if field in PATH_FIELDS and _is_local(value) else value
            for field, value in content.items()
        }
    return text if shortened == content else json.dumps(shortened, indent=2, ensure_ascii=False) + "\n"


def _shorten_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shorten_all(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shorten_all(item) for item in value]
    return LOCAL_PATH.sub(lambda match: match[1] + Path(match[2]).name, value) if isinstance(value, str) else value


def _is_local(value: Any) -> bool:
    """Whether a name of a model is a path here and no hub id (owner/name)."""
    if not isinstance(value, str) or not value:
        return False
    return not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) or value.startswith(".") or Path(value).exists()


def _files(folder: Path, include: Iterable[str]) -> dict[str, Path | bytes]:
    names = {path.relative_to(folder).as_posix() for pattern in BELONGS for path in folder.glob(pattern)}
    names |= {Path(file).name for file in _shards(folder)} | _code_named_in(folder / "config.json")
    for name in include:
        if not (folder / name).is_file():
            raise ValueError(f"include={name!r}: allowed are files of {folder}")
        names.add(Path(name).as_posix())
    plan: dict[str, Path | bytes] = {}
    for name in sorted(name for name in names if (folder / name).is_file()):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{folder / name} is a link out of the folder, nothing was sent; put the file itself there"
            )
        plan[name] = folder / name
        if name.endswith("config.json") or name == "conversion_report.json":
            text = _read_text(folder / name)
            if (shortened := without_local_paths(name, text)) != text:
                plan[name] = shortened.encode()
    return plan


def _shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    return sorted(set(read_index(index).values())) if index.is_file() else []


def _code_named_in(config: Path) -> set[str]:
    """Files next to the weights that hold the classes of `auto_map`, and what these import from files next to them; with
    ours, all of ours. An older copy of ours may have other files."""
    if not config.is_file():
        return set()
    named = _files_of_classes((read_json(config).get("auto_map") or {}).values())
    ours = set(code_files(vision=any(name.endswith("_vl.py") for name in named)))
    files, left = set(), named | ours if named & ours else set(named)
    while left:
        name = left.pop()
        files.add(name)
        if (config.parent / name).is_file():
            imported = RELATIVE_IMPORT.findall(_read_text(config.parent / name))
            left |= {f"{module}.py" for module in imported} - files
    return files


def _files_of_classes(values: Iterable[Any]) -> set[str]:
    """The files that values of an `auto_map` name, but for those in another repository (`owner/name--file.Class`)."""
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return {name.split(".")[0] + ".py" for name in classes if isinstance(name, str) and "--" not in name}


def _without_absent_code(config_text: str, plan: Mapping[str, Any]) -> str:
    """`config.json` with an `auto_map` of the code alone that goes along: a save keeps the map and leaves the code behind."""
    config = json.loads(config_text)
    found = config.get("auto_map") or {}
    kept = {name: value for name, value in found.items() if _files_of_classes([value]) <= plan.keys()}
    if kept == found:
        return config_text
    config["auto_map"] = kept
    return json.dumps(config if kept else {k: v for k, v in config.items() if k != "auto_map"}, indent=2) + "\n"


def other_code(plan: Mapping[str, Path | bytes]) -> list[str]:
    """Files of a plan that have the name of one of ours and other content: an older copy, or someone's own."""
    return [
        name
        for name, content in code_files(vision=True).items()
        if isinstance(plan.get(name), Path) and plan[name].read_bytes() != content
    ]


def _sees(config_text: str) -> bool:
    """Whether it is the config.json of a vision-language model."""
    return json.loads(config_text).get("model_type") in VISION_AUTO_MAPS


def upload(plan: dict[str, Path | bytes], repo_id: str, private: bool = False) -> str:
    """Send a plan to the hub (`HF_ENDPOINT`, `HF_TOKEN`) as one commit, making the repository if new; its address."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=source if isinstance(source, bytes) else str(source))
        for name, source in plan.items()
    ]
    api.create_commit(repo.repo_id, operations=operations, commit_message="Upload Nemotron-H checkpoint")
    return str(repo)


def upload_folder(folder: str | os.PathLike, repo_id: str, private: bool = False) -> str:
    """Send a finished checkpoint, or adapters; the address."""
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    return upload(plan_adapter_upload(folder) if is_adapter else plan_upload(folder, repo_id), repo_id, private)


def size_of(source: Path | bytes) -> int:
    """Bytes that one entry of a plan sends."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _card_numbers(facts: Facts) -> dict[str, str]:
    mixers = [name for name in facts.layer_counts if name in ("MLP", "MoE")]
    return {
        "feed_forward": {"MLP": "MLP layers", "MoE": "mixture-of-experts layers"}[mixers[0]]
        if len(mixers) == 1
        else "feed-forward layers",
        "num_parameters": f"{facts.num_parameters:,} ({human_count(facts.num_parameters)})",
        "num_active_parameters": f"{facts.num_active_parameters:,} ({human_count(facts.num_active_parameters)})",
        "num_layers": str(len(facts.pattern)),
        "layer_counts": ", ".join(f"{count} {name}" for name, count in facts.layer_counts.items()),
        "pattern": facts.pattern,
        "hidden_size": f"{facts.hidden_size:,}",
        "vocab_size": f"{facts.vocab_size:,}",
        "weight_bytes": human_bytes(facts.weight_bytes),
        "kv_bytes_per_token": human_bytes(facts.kv_bytes_per_token),
        "ssm_state_bytes": human_bytes(facts.ssm_state_bytes),
        "conv_state_bytes": human_bytes(facts.conv_state_bytes),
        "dtype": facts.dtype,
        "legend": ", ".join(f"`{letter}` {name}" for letter, name in LAYER_NAMES.items() if letter in facts.pattern),
    }


def _refuse_incomplete(folder: Path) -> None:
    _, contents = load_target(folder)
    broken = [*contents.missing_files, *contents.damaged_files, *contents.missing_tensors]
    if broken:
        raise ValueError(f"{folder} is not whole, nothing was sent; missing or damaged: {', '.join(broken)}")


def _is_new(path: Path, content: bytes) -> bool:
    """Whether `content` is still to be written there; another file of that name is in the way."""
    if not path.exists():
        return True
    if path.read_bytes() != content:
        raise ValueError(f"{path} exists with other content than this package's; remove or rename it")
    return False


def _text_of(source: Path | bytes) -> str:
    return source.decode() if isinstance(source, bytes) else _read_text(source)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
