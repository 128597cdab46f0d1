"""The optimizers: AdamW with two groups, or torch's Muon for the matrices inside the layers and AdamW for the rest.

Weight decay acts on matrices: linear layers, experts, the router, and, as in Megatron, embeddings and lm_head. It does
not act on vectors (norms, biases, A_log, D, dt_bias) or convolutions, whose few taps set a scale.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

OPTIMIZERS = ("adamw", "muon")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without decay, that hold every parameter with a gradient once (tied ones count as one)."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if decays(name, parameter)]
    undecayed = [parameter for name, parameter in trained if not decays(name, parameter)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on the parameter of this name."""
    return parameter.ndim >= 2 and "conv1d" not in name.split(".")


def make_optimizer(
    model: nn.Module,
    name: str = "adamw",
    lr: float = 8e-4,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """The optimizer called `name` over all parameters of `model` that have a gradient.

    Raises:
        ValueError: for an unknown name, or Muon with sharded parameters: it needs whole matrices.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r}: allowed are {', '.join(OPTIMIZERS)}")
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ValueError("model: no parameter has requires_grad, there is nothing to train")
    matrices = inner_matrices(model) if name == "muon" else []
    if not matrices:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    taken = {id(matrix) for matrix in matrices}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)
    # The update gets the size that AdamW's would have (arXiv 2502.16982), and both share one learning rate.
    muon = torch.optim.Muon(matrices, lr, weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW(muon, adamw)


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon takes: trained matrices (2 dimensions) but for embeddings and the output head."""
    outer = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    outer |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outer]


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers behind the interface of one: groups in one list, states in one dictionary."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if any(isinstance(matrix, DTensor) for group in self.parts[0].param_groups for matrix in group["params"]):
            raise ValueError("optimizer='muon' with sharded parameters (FSDP): allowed is 'adamw'")
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts see this object's groups and state (loading replaces both)."""
        groups: Iterable[dict] = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
