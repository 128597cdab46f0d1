"""Merge LoRA adapters into their base: an ordinary checkpoint that needs neither PEFT nor this package.

    nemotron-h merge runs/sft/adapter --output merged
    nemotron-h merge owner/adapters --base path/to/checkpoint --output merged --dtype bfloat16
    nemotron-h push merged owner/name

The sum W + (alpha / rank) * B A is formed in float32 and rounded once, to the dtype that each weight has in the base. The
command compares logits before and after and says how far apart they are. Adapters trained on a base in 4 bits are merged
into the base in full, as it was before.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel

from nemotron_h_hf import NemotronHVLConfig
from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.elastic.budgets import mark_untrained
from nemotron_h_hf.inputs import load_tokenizer
from nemotron_h_hf.model.saving import saving
from nemotron_h_hf.output_folders import is_made, note_made, stamps, writing
from nemotron_h_hf.tokenizer_files import save_tokenizer

NUM_COMPARED_TOKENS = 32


@dataclass(frozen=True)
class MergeArguments:
    """What the command line says."""

    adapter: str = argument("folder or hub id of LoRA adapters")
    output: str = option(None, "folder for the merged checkpoint; new or empty", required=True)
    base: str | None = option(None, "folder or hub id of the base; default: what the adapters name")
    dtype: str | None = option(None, "of all weights; default: the base's", choices=("float32", "bfloat16", "float16"))


def main(argv: Sequence[str] | None = None) -> int:
    """Load base and adapters, merge, compare, save."""
    arguments = parse(argv)
    if importlib.util.find_spec("peft") is None:
        raise ValueError("merging needs peft: pip install 'nemotron-h-hf[peft]'")
    from peft import PeftConfig

    base_name = arguments.base or PeftConfig.from_pretrained(arguments.adapter).base_model_name_or_path
    with writing(arguments.output, arguments.adapter, base_name) as output:
        sources = [stamps(arguments.adapter), stamps(base_name)]
        made_from = {"command": "merge", "sources": sources, "dtype": arguments.dtype}
        if is_made(output, made_from):
            print(f"{output} is already there and whole")
            return 0
        with saving(output) as staging:
            merge(arguments, base_name, staging)
            note_made(staging, made_from)
    print(f"saved {arguments.output}")
    return 0


def merge(arguments: MergeArguments, base_name: str, folder: Path) -> None:
    """Merge, compare, and write weights and tokenizer to `folder`."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(base_name).eval()
    dtypes = {name: weight.dtype for name, weight in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base.float(), arguments.adapter)
    before = logits_of(adapted)
    merged = adapted.merge_and_unload()
    after = logits_of(merged)
    give_dtypes(merged, dtypes, arguments.dtype)
    mark_untrained(merged.config.get_text_config())
    merged.save_pretrained(folder)
    if isinstance(merged.config, NemotronHVLConfig):
        find(AutoProcessor.from_pretrained, arguments.adapter, base_name).save_pretrained(folder)
    save_tokenizer(find(load_tokenizer, arguments.adapter, base_name), folder)
    difference, size = (after - before).abs().max().item(), before.abs().max().item()
    print(f"largest difference of logits {difference:.1e} in float32, the largest logit is {size:.3g}")


def parse(argv: Sequence[str] | None) -> MergeArguments:
    """Read the command line."""
    arguments = read_options(MergeArguments, argv, "merge", __doc__)
    folder = Path(arguments.adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"adapter={arguments.adapter!r}: allowed is a folder with an adapter_config.json")
    return arguments


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """(1, l, vocabulary) for a few random tokens of text."""
    generator, size = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (1, NUM_COMPARED_TOKENS), generator=generator)
    if isinstance(model.config, NemotronHVLConfig):
        ids = ids.masked_fill(ids == model.config.image_token_id, 0)
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def give_dtypes(model: PreTrainedModel, dtypes: dict[str, torch.dtype], wanted: str | None) -> None:
    """Round every weight to the dtype it had, or to `wanted`."""
    if wanted is not None:
        model.to(getattr(torch, wanted))
        return
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        weight.data = weight.data.to(dtypes.get(name, weight.dtype))
    model.config.dtype = max(set(dtypes.values()), key=list(dtypes.values()).count)


def find(load: Callable[[str], Any], adapter: str, base: str) -> Any:
    """The adapters' own tokenizer or processor, if they have one, or the base's."""
    own = not Path(adapter).is_dir() or Path(adapter, "tokenizer_config.json").is_file()
    return load(adapter if own else base)


if __name__ == "__main__":
    sys.exit(main())
