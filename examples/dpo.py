"""Teach preferences with TRL's DPO: answers that were chosen become likelier than those that were rejected.

python examples/dpo.py                                                      (the embedded model learns to return, not to pass)
accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/dpo.py --config examples/recipes/align_2_dpo.yaml

Needs TRL: pip install trl. Any option of TRL's DPOConfig is a flag and a key of the file.
"""

import sys
import tempfile
from dataclasses import dataclass

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, TrlParser

from nemotron_h_hf import EMBEDDED_MODEL

PAIRS = [
    (f"def {name}(a, b):", f"\n    return {name}er(a, b)\n", "\n    pass\n") for name in ("add", "scale", "join", "mix")
]
DEMO = (
    "--max_steps 10 --learning_rate 1e-4 --save_strategy no --report_to none --logging_steps 5 --disable_tqdm true "
    "--bf16 false --gradient_checkpointing false --dataloader_pin_memory false --precompute_ref_log_probs true"
)


@dataclass
class Choices:
    model: str = EMBEDDED_MODEL
    data: str | None = None  # JSON lines with prompt, chosen, rejected


parser = TrlParser((Choices, DPOConfig))
with tempfile.TemporaryDirectory() as scratch:
    choices, training = parser.parse_args_and_config(sys.argv[1:] or [*DEMO.split(), "--output_dir", scratch])
    if choices.data is None:
        data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in PAIRS])
    else:
        data = load_dataset("json", data_files=choices.data, split="train")
    tokenizer = AutoTokenizer.from_pretrained(choices.model)
    model = AutoModelForCausalLM.from_pretrained(choices.model, dtype="float32")
    # TRL would make the reference of transformers' own class, which clamps the step size of Mamba: hand over one of ours, and
    # let it go when it has spoken.
    reference = AutoModelForCausalLM.from_pretrained(choices.model, dtype="float32")
    trainer = DPOTrainer(model, reference, args=training, train_dataset=data, processing_class=tokenizer)
    if training.precompute_ref_log_probs:
        reference = trainer.ref_model = None
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    for line in trainer.state.log_history:
        if "loss" in line and trainer.is_world_process_zero():
            print(f"step {line['step']}  loss {line['loss']:.3f}  margin {line['rewards/margins']:.3f}")
    if sys.argv[1:]:
        if trainer.is_fsdp_enabled:  # of sharded weights save_model writes nothing
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(f"{training.output_dir}/model")
