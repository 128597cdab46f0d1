"""An elastic parent and its nested models in one memory: every budget a complete model whose weights are views into the parent.

    parent = NemotronHElasticForCausalLM.from_pretrained("path/to/parent")     # an ordinary checkpoint with budgets
    small = parent.submodel("6b")                                              # no second copy of the weights
    parent.generate(**prompt, assistant_model=small)
    parent.generate(**prompt, budget="6b")                                     # generating.py

The parent keeps some weights in another order (prefix_order.py), established on loading and undone on saving:
`save_pretrained` and `state_dict` give the ordinary tensors. It computes the same function, with the same modules, cache and
kernels, and adapters made for the ordinary model fit it.

A submodel shares every matrix and most vectors. What the Mamba layers read in the ordinary order (convolution, gated norm,
A_log, D, dt_bias) is copied, well under 1 % of the weights.

A token of a submodel is one compiled call, as a separate model's. In fp32 it makes 0.79 times the tokens of one, 8 rows 0.86 times
(1.2 million parameters, docs/results/serving). In bfloat16 without Numba a token took 1.1 to 1.8 times as long, because
PyTorch's kernels read whole rows (docs/results/elastic_sharing).

- When the parent moves (`to`, `half`, `cuda`), its submodels follow; meanwhile old and new weights are both in memory.
- When the parent's weights are replaced in another way, or a submodel is moved, the submodel's next forward raises.
- When the parent trains, its submodels see each step; copies are refreshed before the next forward.
- A submodel is not trained: its weights belong to the parent. Train the parent under masks (masks.py).
"""

import copy
import os
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ...model.configuration_nemotron_h import NemotronHConfig
from ...model.modeling_nemotron_h import NemotronHForCausalLM
from ..budgets import Budget
from ..child import Child
from ..cut.other_readers import nearest_expressible
from ..resolve import Request, resolve
from .generating import BudgetSchedule, generate_by, generate_rows, generate_schedule
from .ordered_linear import arranged, ordered
from .prefix_order import live_orders
from .saving import check_plain, write_ordinary
from .tied_tensors import Tie, tie_tensors

logger = logging.get_logger(__name__)

# of transformers' `generate`, behind `inputs`
POSITIONS = ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
             "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate")  # fmt: skip


class NemotronHElasticForCausalLM(NemotronHForCausalLM):
    """A parent in memory, and each of its submodels."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config)
        lay_out(self)
        self._submodels: WeakValueDictionary[Budget, NemotronHElasticForCausalLM] = WeakValueDictionary()
        self._ties: list[Tie] = []  # of a submodel, as is this:
        self._cut_from: Child | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "NemotronHElasticForCausalLM":
        """As `NemotronHForCausalLM.from_pretrained`; then the weights are laid out, one layer's copy at a time."""
        model = NemotronHForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, *told = model if isinstance(model, tuple) else (model,)  # with output_loading_info
        loaded = {tensor.data_ptr() for tensor in model.state_dict().values()}
        parent = cls.from_model(model)
        for tensor in [*parent.parameters(), *parent.buffers()]:
            if tensor.device.type == "cpu" and tensor.data_ptr() in loaded:
                tensor.data = tensor.data.clone()  # a view into the mapped file would keep all of it in memory
        return (parent, *told) if told else parent

    @classmethod
    def from_model(cls, model: NemotronHForCausalLM) -> "NemotronHElasticForCausalLM":
        """Take over an ordinary model: its weights become this one's. `model` itself still computes the same.

        Raises:
            ValueError: for quantised, sharded or offloaded weights, and for adapters that are not merged.
        """
        check_plain(model)
        with torch.device("meta"):
            parent = cls(model.config)
        lay_out(model)
        for name, child in model.named_children():
            setattr(parent, name, child)
        parent.generation_config = model.generation_config
        parent.name_or_path = model.name_or_path
        return parent.train(model.training)

    def submodel(self, budget: Request) -> "NemotronHElasticForCausalLM":
        """The complete model of a budget, without gradients; the same object as long as it is referenced.

        Args:
            budget: a name, a fraction, a need or sizes, as for `resolve`.

        Raises:
            ValueError: for an unknown budget, or a parent whose weights cannot be viewed (see `from_model`).
        """
        return self.submodel_of(self.resolve(budget))

    def submodel_of(self, child: Child) -> "NemotronHElasticForCausalLM":
        """As `submodel`, of a budget that was resolved before."""
        if child.is_whole():
            return self
        found = self._submodels.get(child.budget)
        if found is None or not all(tie.check() for tie in found._ties):
            found = self._submodels[child.budget] = self._make_submodel(child)
        return found

    def resolve(self, request: Request) -> Child:
        """The child that is asked for (resolve.py); bytes are those of this model's dtype."""
        return resolve(self.config, request, self.dtype)

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        budget: Request | BudgetSchedule | list | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', by the model of `budget`: one for all rows, a list with one for each row, or a schedule.

        The parent's `generation_config` holds, whichever model answers.

        Raises:
            ValueError: for what a mixed batch or a schedule has no meaning for (streamer, a given cache, ...).
        """
        if budget is None:
            return super().generate(inputs, *args, **kwargs)
        kwargs |= dict(zip(POSITIONS, args))
        if isinstance(budget, list):
            return generate_rows(self, inputs, budget, kwargs)
        if isinstance(budget, BudgetSchedule):
            return generate_schedule(self, inputs, budget, kwargs)
        return generate_by(self, self.resolve(budget), inputs, kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        is_main_process: bool = True,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """An ordinary checkpoint with released names, written a tensor at a time, by the main process.

        Raises:
            TypeError: for an argument that transformers' `save_pretrained` does not have.
            ValueError: for `push_to_hub`; save, then `nemotron-h push`. For other forms of files than this one, and for
                adapters that are not merged.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True: allowed is False; save, then upload the folder with `nemotron-h push`")
        refuse_other_forms(kwargs)
        if not is_main_process:
            return
        write_ordinary(self, save_directory, state_dict, max_shard_size)
        if self._cut_from is not None:
            nearest = nearest_expressible(self._cut_from)
            if nearest is not self._cut_from:
                logger.warning(f"the nearest budget that those readers express: {nearest.budget.describe()}")

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As the ordinary model's."""
        if self._ties:
            raise ValueError("a submodel's weights are its parent's: load them into the parent")
        return super().load_state_dict(state_dict, strict, assign)

    def shared_bytes(self) -> dict[str, int]:
        """Bytes of a submodel's tensors: `views` into the parent's, and `copies`."""
        sizes = {"views": 0, "copies": 0}
        for tie in self._ties:
            sizes["views" if tie.kept is None else "copies"] += tie.tensor().nbytes
        return sizes

    def _make_submodel(self, child: Child) -> "NemotronHElasticForCausalLM":
        check_plain(self)
        with torch.device("meta"):
            small = type(self)(child.config)
        small._ties = tie_tensors(self, small, child)
        small._cut_from = child
        small.generation_config = copy.deepcopy(self.generation_config)  # drafting changes it
        small.name_or_path = self.name_or_path
        large = [tie for tie in small._ties if tie.kept is not None and tie.tensor().dim() == 2]
        if large:
            size = sum(tie.tensor().nbytes for tie in large) / 2**20
            logger.warning(
                f"budget {child.name!r}: {len(large)} matrices ({size:.1f} MiB) are copies, as what it keeps of them is "
                f"no prefix together with the parent's other budgets: {large[0].path}{', ...' * (len(large) > 1)}"
            )
        small.model.register_forward_pre_hook(partial(_check_ties, small._ties))
        return small.eval()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, makes submodels of its own weights."""
        return {**vars(self), "_submodels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._submodels = WeakValueDictionary()
        for tie in self._ties:  # pickle makes two tensors of a tensor and its view
            tie.tie()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if not self._ties:
            arrange(self)
        for child in self._submodels.values():
            for tie in child._ties:
                tie.tie()
        return self


def lay_out(model: NemotronHForCausalLM) -> None:
    """Bring the weights of a model into the live order, in place, one matrix after the other."""
    for path, order in live_orders(model.config).items():
        place, _, name = path.rpartition(".")
        module = model.get_submodule(place)
        setattr(module, name, ordered(module.get_submodule(name), order))
    arrange(model)


def arrange(model: NemotronHForCausalLM) -> None:
    """Store each matrix in the memory layout that its device and dtype read fastest; tied embeddings are looked up by row."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (name == "lm_head" and model.config.tie_word_embeddings):
            module.weight.data = arranged(module.weight.data)


def refuse_other_forms(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of transformers' `save_pretrained` that ask for anything but what it does by default."""
    known = signature(PreTrainedModel.save_pretrained).parameters
    for name, value in arguments.items():
        if name not in known:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r}")
        if value != known[name].default:
            raise ValueError(f"{name}={value!r}: allowed is {known[name].default!r}; an ordinary model saves otherwise")


def _check_ties(ties: list[Tie], *_: object) -> None:
    """What a submodel asks before each forward.

    Raises:
        RuntimeError: if its weights are no longer the parent's.
        ValueError: if they ask for gradients.
    """
    if torch.compiler.is_compiling():
        return
    for tie in ties:
        if not tie.check():
            raise RuntimeError(
                f"{tie.path} of a submodel is no longer its parent's: one of them was moved, copied or given other weights; "
                "ask the parent for submodel() again, and move the parent instead of the submodel"
            )
        if tie.tensor().requires_grad:
            raise ValueError(f"{tie.path}.requires_grad=True: a submodel's weights are its parent's; train the parent")
