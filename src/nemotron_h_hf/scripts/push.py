"""Upload a checkpoint folder to the hub, with a model card that states the model's own facts.

    nemotron-h push path/to/checkpoint owner/name --dry-run
    nemotron-h push path/to/checkpoint owner/name --private --with-code
    nemotron-h push runs/sft/adapter owner/adapters                        # LoRA adapters, with the card they have

The folder itself is not changed. A README.md that it has is sent as it is, unless --overwrite-card is given.
HF_ENDPOINT and HF_TOKEN are honoured, as everywhere in huggingface_hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h_hf.hub import left_behind, plan_adapter_upload, plan_upload, size_of, upload
from nemotron_h_hf.units import human_bytes


@dataclass(frozen=True)
class PushArguments:
    """What the command line says."""

    folder: str
    repo_id: str
    private: bool
    with_code: bool
    overwrite_card: bool
    license: str | None
    include: list[str]
    dry_run: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Plan the upload, show it, and unless it is a dry run do it."""
    arguments = parse(argv)
    if Path(arguments.folder, "adapter_config.json").is_file():
        plan = plan_adapter_upload(arguments.folder, arguments.include)
    else:
        plan = plan_upload(
            arguments.folder,
            arguments.repo_id,
            arguments.with_code,
            arguments.overwrite_card,
            arguments.license,
            arguments.include,
        )
    for name, source in plan.items():
        made = "  (written by this command)" if isinstance(source, bytes) else ""
        print(f"{human_bytes(size_of(source)):>12}  {name}{made}")
    if behind := left_behind(arguments.folder, plan):
        print(f"not sent: {', '.join(behind)} (--include NAME sends a file that no checkpoint needs)", file=sys.stderr)
    if arguments.dry_run:
        if "README.md" in plan:
            show_card(plan["README.md"])
        print("dry run: nothing was sent", file=sys.stderr)
        return 0
    print(upload(plan, arguments.repo_id, arguments.private))
    return 0


def parse(argv: Sequence[str] | None) -> PushArguments:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="nemotron-h push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", help="folder of a checkpoint (config.json and safetensors weights) or of LoRA adapters"
    )
    parser.add_argument("repo_id", help="owner/name on the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--with-code", action="store_true", help="carry the model code, for trust_remote_code=True")
    parser.add_argument("--overwrite-card", action="store_true", help="send a new card although the folder has one")
    parser.add_argument("--license", help="licence identifier for a new card's metadata, such as apache-2.0")
    parser.add_argument(
        "--include", action="append", default=[], metavar="NAME", help="send this file too; may be given several times"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and the card; send nothing")
    arguments = PushArguments(**vars(parser.parse_args(argv)))
    if not any(Path(arguments.folder, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"folder={arguments.folder!r}: allowed is a folder with a config.json or adapter_config.json")
    if "/" not in arguments.repo_id:
        raise ValueError(f"repo_id={arguments.repo_id!r}: allowed is owner/name")
    return arguments


def show_card(source: Path | bytes) -> None:
    """Print the card that would be sent."""
    print("\n" + (source.decode() if isinstance(source, bytes) else source.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
