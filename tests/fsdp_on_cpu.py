"""`nemotron-h pretrain` (or what COMMAND names) for `accelerate launch` with FSDP on CPU processes, and a crash on demand.

Accelerate (1.15) leaves FSDP out on a CPU without a word. PyTorch's FSDP2 works there, over gloo, so the state that
Accelerate keeps is told that this run is one.
"""

import importlib
import os

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from nemotron_h_hf.training.monitor import Monitor

begin_state, begin_step = AcceleratorState.__init__, Monitor.on_step_begin


def state_with_fsdp(self, *others, fsdp_plugin=None, **named) -> None:
    begin_state(self, *others, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def crash(self, args, state, control, **named) -> None:
    if state.global_step == int(os.environ.get("CRASH_AFTER", -1)):
        os._exit(7)
    begin_step(self, args, state, control, **named)


if __name__ == "__main__":
    AcceleratorState.__init__, Monitor.on_step_begin = state_with_fsdp, crash
    importlib.import_module(f"nemotron_h_hf.scripts.{os.environ.get('COMMAND', 'pretrain')}").main()
