"""Mixture of experts: sigmoid router with a selection bias, squared-ReLU experts in one tensor each, shared and latent experts.

t tokens, e experts, k experts per token
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_nemotron_h import NemotronHConfig
from .kernels import has_kernels_for
from .linear import multiply, project
from .plain import remember_forward
from .ssd import no_autocast, times, under_func, wide


@remember_forward
class NemotronHMLP(nn.Module):
    """down_proj(act(up_proj(x))), with act = relu(x)^2 in the released models."""

    def __init__(self, config: NemotronHConfig, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = SquaredReLU(config) if config.mlp_hidden_act == "relu2" else ACT2FN[config.mlp_hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return project(self.down_proj, self.act_fn(project(self.up_proj, hidden_states)))


def squared_relu(x: Tensor, implementation: str = "torch") -> Tensor:
    """relu(x)^2: our kernel on a GPU if it is asked for; otherwise with a single new tensor if no gradient is needed."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or under_func()
    if has_kernels_for(x, implementation) and x.numel() and type(x) is Tensor and not traced:
        from .triton_relu2 import squared_relu as fused  # Triton is imported only where it runs

        return fused(x)
    positive = F.relu(x)
    return times(positive, positive)


@remember_forward
class SquaredReLU(nn.Module):
    """`squared_relu` as a module, on which hooks can be registered."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return squared_relu(x, self.config.mamba_implementation)


class NemotronHTopkRouter(nn.Module):
    """Scores experts by sigmoid of fp32 logits; the bias takes part in choosing experts, never in weighting them."""

    def __init__(self, config: NemotronHConfig, layer_idx: int) -> None:
        super().__init__()
        self.top_k, self.n_group = config.size("num_experts_per_tok", layer_idx), config.n_group
        self.topk_group, self.norm_topk_prob = config.topk_group, config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        num_experts = config.size("n_routed_experts", layer_idx)
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, hidden) -> logits (t, e), weights (t, k), indices (t, k), logits and weights in fp32."""
        with no_autocast(hidden_states):
            logits = F.linear(wide(hidden_states), wide(self.weight))
        scores = logits.sigmoid()
        choice = scores + self.e_score_correction_bias
        if self.n_group > 1:
            choice = self._keep_best_groups(choice)
        indices = torch.topk(choice, self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices

    def _keep_best_groups(self, choice: Tensor) -> Tensor:
        """Experts outside the `topk_group` groups with the best two experts are out of the choice."""
        groups = choice.unflatten(-1, (self.n_group, -1))  # (t, groups, e / groups)
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(self.topk_group, dim=-1, sorted=False).indices, 1).bool()
        return groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)

    def _apply(self, fn, recurse: bool = True):
        # `.to(dtype)` must not round the bias: it decides between experts whose scores nearly tie.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32 and moved.is_floating_point():
            self.e_score_correction_bias = bias.to(device=moved.device, dtype=torch.float32)
        return self


@use_experts_implementation(has_gate=False)
class _Experts(nn.Module):
    """Routed experts, run as `config._experts_implementation` says."""

    def __init__(self, config: NemotronHConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_experts = config.size("n_routed_experts", layer_idx)
        width = config.size("moe_intermediate_size", layer_idx)
        size = config.size("moe_latent_size", layer_idx) or config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, width, size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, size, width))
        self.act_fn = SquaredReLU(config) if config.mlp_hidden_act == "relu2" else ACT2FN[config.mlp_hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.one_by_one(hidden_states, top_k_index, top_k_weights)

    def one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The plain form ("eager"): each expert runs once, on the tokens that chose it."""
        output = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        slots = top_k_index.flatten().argsort(stable=True)
        tokens = slots.div(top_k_index.shape[1], rounding_mode="floor")
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts + 1).tolist()
        start = 0
        for expert, count in enumerate(counts[: self.num_experts]):
            if count == 0:
                continue
            chosen, slot = tokens[start : start + count], slots[start : start + count]
            start += count
            hidden = multiply(hidden_states[chosen], self.up_proj[expert], None)
            hidden = multiply(self.act_fn(hidden), self.down_proj[expert], None)
            weighted = hidden * top_k_weights.flatten()[slot, None]
            output.index_add_(0, chosen, weighted.to(output.dtype))
        return output.to(hidden_states.dtype)


class NemotronHExperts(_Experts):
    """All routed experts of a layer: up_proj (e, width, in), down_proj (e, in, width)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(t, in), (t, k), (t, k) -> (t, in)."""
        # PyTorch's grouped products have no float64
        grouped = self.config._experts_implementation != "batched_mm"
        run = self.one_by_one if grouped and hidden_states.dtype == torch.float64 else super().forward
        return run(hidden_states, top_k_index, top_k_weights)


class NemotronHMoE(nn.Module):
    """Routed experts (behind two projections to a smaller size in latent models) plus experts that every token uses."""

    def __init__(self, config: NemotronHConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = NemotronHTopkRouter(config, layer_idx)
        self.experts = NemotronHExperts(config, layer_idx)
        self.shared_experts = NemotronHMLP(config, config.size("moe_shared_expert_intermediate_size", layer_idx))
        self.fc1_latent_proj = self.fc2_latent_proj = nn.Identity()
        if (latent := config.size("moe_latent_size", layer_idx)) is not None:
            self.fc1_latent_proj = nn.Linear(config.hidden_size, latent, bias=config.mlp_bias)
            self.fc2_latent_proj = nn.Linear(latent, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(b, l, hidden) -> (b, l, hidden); the router sees the full hidden state, the latent experts a projection of it."""
        tokens = hidden_states.flatten(0, -2)
        _, weights, indices = self.gate(tokens)
        if under_func() and _is_batched(indices):
            check_vmap(self.experts.config)
        routed = self.experts(project(self.fc1_latent_proj, tokens), indices, weights)
        routed = project(self.fc2_latent_proj, routed)
        return routed.view_as(hidden_states) + self.shared_experts(hidden_states)


def check_vmap(config: NemotronHConfig) -> None:
    """RuntimeError unless the experts run in operations that torch.func.vmap takes."""
    if config._experts_implementation != "batched_mm":
        raise RuntimeError(
            f"torch.func.vmap: the routed experts run as {config._experts_implementation!r}, which counts the tokens of "
            "each; call model.set_experts_implementation('batched_mm') first"
        )


def _is_batched(x: Tensor) -> bool:
    """Whether vmap is among the transforms that x has come through."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def init_experts(module: nn.Module, std: float) -> None:
    """Fresh weights for a router or a set of experts."""
    if isinstance(module, NemotronHTopkRouter):
        init.normal_(module.weight, mean=0.0, std=std)
        init.zeros_(module.e_score_correction_bias)
    elif isinstance(module, NemotronHExperts):
        init.normal_(module.up_proj, mean=0.0, std=std)
        init.normal_(module.down_proj, mean=0.0, std=std)


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: Sequence[int], real: Tensor | None = None) -> Tensor:
    """Mean over layers of e * sum over experts of (share of the choices) * (mean probability); 1 when balanced.

    Probabilities are sigmoid scores normalised over experts; router_logits: (t, e) per layer; top_k: experts per token in each;
    `real` (t) bool leaves padding out. Source: arXiv 2101.03961, eq. 4.
    """
    losses = []
    for logits, k in zip(router_logits, top_k, strict=True):
        logits = logits if real is None else logits[real.to(logits.device)]
        scores = logits.sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(k, dim=-1).indices, 1.0)
        losses.append(scores.shape[1] * (chosen.mean(0) / k * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()
