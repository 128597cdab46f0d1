"""Upload a checkpoint folder to the hub, with a model card that states the model's own facts.

    nemotron-h push path/to/checkpoint owner/name --dry-run
    nemotron-h push path/to/checkpoint owner/name --private --with-code
    nemotron-h push runs/sft/adapter owner/adapters                        # LoRA adapters, with the card they have

The folder itself is not changed. A README.md that it has is sent as it is, unless --overwrite-card is given.
HF_ENDPOINT and HF_TOKEN are honoured, as everywhere in huggingface_hub.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.hub import left_behind, other_code, plan_adapter_upload, plan_upload, size_of, upload
from nemotron_h_hf.units import human_bytes


@dataclass(frozen=True)
class PushArguments:
    """What the command line says."""

    folder: str = argument("folder of a checkpoint (config.json and safetensors weights) or of LoRA adapters")
    repo_id: str = argument("owner/name on the hub")
    private: bool = option(False, "make a new repository private")
    with_code: bool = option(False, "carry the model code, for trust_remote_code=True")
    overwrite_card: bool = option(False, "send a new card although the folder has one")
    license: str | None = option(None, "licence identifier for a new card's metadata, such as apache-2.0")
    include: list[str] = option([], "send this file too; may be given several times", action="append", metavar="NAME")
    dry_run: bool = option(False, "show what would be sent, and the card; send nothing")


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
    if others := other_code(plan):
        print(
            f"the model code in the folder is not this version's: {', '.join(others)}; it is sent as it is (without it, "
            "--with-code sends this version's)",
            file=sys.stderr,
        )
    if arguments.dry_run:
        if "README.md" in plan:
            show_card(plan["README.md"])
        print("dry run: nothing was sent", file=sys.stderr)
        return 0
    print(upload(plan, arguments.repo_id, arguments.private))
    return 0


def parse(argv: Sequence[str] | None) -> PushArguments:
    """Read the command line."""
    arguments = read_options(PushArguments, argv, "push", __doc__)
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
