"""`nemotron-h pretrain` (or what COMMAND names, another command or a file) for `accelerate launch` with FSDP on CPU processes,
and a crash on demand: after step CRASH_AFTER, or in the middle of writing the parts of the folder KILLED_WRITING.

Each process writes the bytes of weights that it holds, before model or teacher is sharded, into the folder that HELD names.

Accelerate (1.15) leaves FSDP out on a CPU without a word. PyTorch's FSDP2 works there, over gloo, so the state that
Accelerate keeps is told that this run is one.
"""

import importlib
import os
import runpy
import signal
from pathlib import Path

import torch
from accelerate import accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint import FileSystemWriter

from nemotron_h_hf.training import distillation
from nemotron_h_hf.training.monitor import Monitor

begin_state, begin_step, write_data = AcceleratorState.__init__, Monitor.on_step_begin, FileSystemWriter.write_data
shard_model, shard_teacher = accelerator.fsdp2_prepare_model, distillation.shard_teacher


def state_with_fsdp(self, *others, fsdp_plugin=None, **named) -> None:
    begin_state(self, *others, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # where later states take it from


def crash(self, args, state, control, **named) -> None:
    if state.global_step == int(os.environ.get("CRASH_AFTER", -1)):
        os._exit(7)
    begin_step(self, args, state, control, **named)


def write_and_die(self, plan, planner):
    """Both processes are killed when the first has written its part and the second half of its own."""
    written = write_data(self, plan, planner)
    if not str(self.path).endswith(os.environ.get("KILLED_WRITING", "nothing")):
        return written
    if os.environ["RANK"] == "1":
        for part in Path(self.path).glob("__1_*.distcp"):
            os.truncate(part, part.stat().st_size // 2)
    torch.distributed.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


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
    FileSystemWriter.write_data = write_and_die
    accelerator.fsdp2_prepare_model, distillation.shard_teacher = shard_model_and_tell, shard_teacher_and_tell
    if (command := os.environ.get("COMMAND", "pretrain")).endswith(".py"):
        runpy.run_path(command, run_name="__main__")
    else:
        importlib.import_module(f"nemotron_h_hf.scripts.{command}").main()
