"""`nemotron-h pretrain` (or what COMMAND names) for `accelerate launch` with FSDP on CPU processes, and a crash on demand.

Each process writes the bytes of weights that it holds, before model or teacher is sharded, into the folder that HELD names.

Accelerate (1.15) leaves FSDP out on a CPU without a word. PyTorch's FSDP2 works there, over gloo, so the state that
Accelerate keeps is told that this run is one.
"""

import importlib
import os
from pathlib import Path

from accelerate import accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from nemotron_h_hf.training import distillation
from nemotron_h_hf.training.monitor import Monitor

begin_state, begin_step = AcceleratorState.__init__, Monitor.on_step_begin
shard_model, shard_teacher = accelerator.fsdp2_prepare_model, distillation.shard_teacher


def state_with_fsdp(self, *others, fsdp_plugin=None, **named) -> None:
    begin_state(self, *others, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def crash(self, args, state, control, **named) -> None:
    if state.global_step == int(os.environ.get("CRASH_AFTER", -1)):
        os._exit(7)
    begin_step(self, args, state, control, **named)


def shard_model_and_tell(accelerator, model):
    tell_held(model, "model")
    return shard_model(accelerator, model)


def shard_teacher_and_tell(teacher) -> None:
    tell_held(teacher, "teacher")
    shard_teacher(teacher)


def tell_held(model, name: str) -> None:
    if folder := os.environ.get("HELD"):
        held = sum(tensor.nbytes for tensor in model.state_dict().values() if not tensor.is_meta)
        Path(folder, f"{name}-{os.environ['RANK']}").write_text(str(held))


if __name__ == "__main__":
    AcceleratorState.__init__, Monitor.on_step_begin = state_with_fsdp, crash
    accelerator.fsdp2_prepare_model, distillation.shard_teacher = shard_model_and_tell, shard_teacher_and_tell
    importlib.import_module(f"nemotron_h_hf.scripts.{os.environ.get('COMMAND', 'pretrain')}").main()
