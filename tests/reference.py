"""The whole model as a token-by-token recurrence in float64, written from the formulas and from nothing else.

Slow on purpose: explicit windows, explicit states, a softmax per position, one expert after the other. It takes a state
dict with transformers' names and a configuration, and uses nothing of the package.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor


def reference_logits(weights: dict[str, Tensor], config, ids: Tensor) -> Tensor:
    """Logits (l, vocab) in float64 of one document, ids (l)."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    return torch.stack([head_of(weights) @ x for x in reference_hidden(weights, config, ids)])


def reference_hidden(weights: dict[str, Tensor], config, ids: Tensor) -> list[Tensor]:
    """What lm_head reads: the stack's output after norm_f, one (hidden) for each of ids (l)."""
    stream = [weights["model.embeddings.weight"][int(token)] for token in ids]
    for index, letter in enumerate(config.hybrid_override_pattern):
        stream = block(weights, f"model.layers.{index}.", letter, config, sizes_at(config, index), stream)
    return [rms_norm(x, weights["model.norm_f.weight"], config.layer_norm_epsilon) for x in stream]


def reference_mtp(weights: dict[str, Tensor], config, ids: Tensor, num_depths: int) -> list[Tensor]:
    """For each depth d from 1, logits (l - d, vocab) of token t + d + 1 from the tokens up to t + d (arXiv 2412.19437, 2.2)."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    pattern, eps, logits = config.mtp_hybrid_override_pattern, config.layer_norm_epsilon, []
    hidden = reference_hidden(weights, config, ids)
    for depth in range(1, num_depths + 1):
        start = (min(depth, config.num_nextn_predict_layers) - 1) * len(pattern)
        first, last = f"mtp.layers.{start}.", f"mtp.layers.{start + len(pattern) - 1}."
        stream = []
        for t in range(len(ids) - depth):
            token = weights["model.embeddings.weight"][int(ids[t + depth])]
            pair = [
                rms_norm(token, weights[first + "enorm.weight"], eps),
                rms_norm(hidden[t], weights[first + "hnorm.weight"], eps),
            ]
            stream.append(weights[first + "eh_proj.weight"] @ torch.cat(pair))
        for index, letter in enumerate(pattern):
            fields = config.to_dict()
            own = (fields.get("mtp_block_configs") or [{}] * len(pattern))[index]
            sizes = SimpleNamespace(**{"moe_latent_size": None, "sliding_window": None, **fields, **own})
            stream = block(weights, f"mtp.layers.{start + index}.", letter, config, sizes, stream)
        hidden = [rms_norm(x, weights[last + "final_layernorm.weight"], eps) for x in stream]
        logits.append(torch.stack([head_of(weights) @ x for x in hidden]))
    return logits


def head_of(weights: dict[str, Tensor]) -> Tensor:
    return weights.get("lm_head.weight", weights["model.embeddings.weight"])


def block(weights: dict[str, Tensor], prefix: str, letter: str, config, sizes, stream: list[Tensor]) -> list[Tensor]:
    """x + mixer(norm(x)) for every token."""
    mixers = {"M": mamba, "*": attention, "-": mlp, "E": experts}
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    normed = [rms_norm(x, own["norm.weight"], config.layer_norm_epsilon) for x in stream]
    mixer = {name.removeprefix("mixer."): tensor for name, tensor in own.items()}
    return [x + y for x, y in zip(stream, mixers[letter](mixer, sizes, normed))]


def sizes_at(config, index: int) -> SimpleNamespace:
    """The configuration as layer `index` sees it: its own entry of a list of sizes, or what its block says."""
    pattern, sizes = config.hybrid_override_pattern, config.to_dict()
    number = pattern[:index].count(pattern[index])
    lists = {"M": ("mamba_num_heads", "mamba_head_dim"), "*": ("num_attention_heads",)}.get(pattern[index], ())
    own = {field: sizes[field][number] for field in lists if isinstance(sizes.get(field), list)}
    blocks = sizes.get("block_configs") or [{}] * len(pattern)
    return SimpleNamespace(**{"moe_latent_size": None, "sliding_window": None, **sizes, **own, **blocks[index]})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def mamba(weights: dict[str, Tensor], config, inputs: list[Tensor]) -> list[Tensor]:
    heads, dim, groups, size = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size
    inner, taps = heads * dim, config.conv_kernel
    low, high = vars(config).get("time_step_limit") or (0.0, math.inf)  # not in a file that sets no limit
    state = torch.zeros(heads, dim, size, dtype=torch.float64)
    window: list[Tensor] = []
    outputs = []
    for token in inputs:
        rows = linear(weights, "in_proj", token)
        gate, conv_in, steps = rows[:inner], rows[inner:-heads], rows[-heads:]
        window.append(conv_in)
        convolved = torch.zeros_like(conv_in)
        for back in range(min(taps, len(window))):
            convolved = convolved + weights["conv1d.weight"][:, 0, taps - 1 - back] * window[-1 - back]
        if "conv1d.bias" in weights:
            convolved = convolved + weights["conv1d.bias"]
        convolved = silu(convolved)
        x, B, C = convolved[:inner], convolved[inner : inner + groups * size], convolved[inner + groups * size :]
        out = torch.zeros(inner, dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // groups)
            dt = torch.log1p(torch.exp(steps[head] + weights["dt_bias"][head])).clamp(low, high)
            decay = torch.exp(-dt * torch.exp(weights["A_log"][head]))
            b, c = (t[group * size : (group + 1) * size] for t in (B, C))
            here = slice(head * dim, (head + 1) * dim)
            state[head] = decay * state[head] + dt * torch.outer(x[here], b)
            out[here] = state[head] @ c + weights["D"][head] * x[here]
        out = out * silu(gate)
        width = inner // groups
        normed = [
            rms_norm(
                out[g * width : (g + 1) * width],
                weights["norm.weight"][g * width : (g + 1) * width],
                config.layer_norm_epsilon,
            )
            for g in range(groups)
        ]
        outputs.append(linear(weights, "out_proj", torch.cat(normed)))
    return outputs


def attention(weights: dict[str, Tensor], config, inputs: list[Tensor]) -> list[Tensor]:
    dim, share = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    keys, values, outputs = [], [], []
    for token in inputs:
        query = linear(weights, "q_proj", token)
        keys.append(linear(weights, "k_proj", token))
        values.append(linear(weights, "v_proj", token))
        out = []
        for head in range(config.num_attention_heads):
            own = slice(head * dim, (head + 1) * dim)
            shared = slice(head // share * dim, (head // share + 1) * dim)
            seen = slice(-(config.sliding_window or len(keys)), None)
            scores = torch.stack([query[own] @ key[shared] / math.sqrt(dim) for key in keys[seen]])
            chances = torch.exp(scores - scores.max())
            chances = chances / chances.sum()
            out.append(sum(chance * value[shared] for chance, value in zip(chances, values[seen])))
        outputs.append(linear(weights, "o_proj", torch.cat(out)))
    return outputs


def feed_forward(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    return linear(weights, f"{prefix}down_proj", linear(weights, f"{prefix}up_proj", x).clamp(min=0) ** 2)


def mlp(weights: dict[str, Tensor], config, inputs: list[Tensor]) -> list[Tensor]:
    return [feed_forward(weights, "", token) for token in inputs]


def experts(weights: dict[str, Tensor], config, inputs: list[Tensor]) -> list[Tensor]:
    outputs = []
    for token in inputs:
        chosen = route(weights, config, token)
        small = linear(weights, "fc1_latent_proj", token) if config.moe_latent_size else token
        routed = torch.zeros_like(small)
        for expert, weight in chosen.items():
            hidden = (weights["experts.up_proj"][expert] @ small).clamp(min=0) ** 2
            routed = routed + weight * (weights["experts.down_proj"][expert] @ hidden)
        if config.moe_latent_size:
            routed = linear(weights, "fc2_latent_proj", routed)
        outputs.append(routed + feed_forward(weights, "shared_experts.", token))
    return outputs


def route(weights: dict[str, Tensor], config, token: Tensor) -> dict[int, Tensor]:
    """Expert -> weight, for the experts that this token uses."""
    scores = 1 / (1 + torch.exp(-weights["gate.weight"] @ token))
    choice = (scores + weights["gate.e_score_correction_bias"]).tolist()
    per_group = config.n_routed_experts // config.n_group
    groups = [range(g * per_group, (g + 1) * per_group) for g in range(config.n_group)]
    best = sorted(groups, key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
    allowed = [expert for group in best[: config.topk_group] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[: config.num_experts_per_tok]
    total = sum(scores[expert] for expert in chosen) + 1e-20 if config.norm_topk_prob else 1.0
    return {expert: scores[expert] / total * config.routed_scaling_factor for expert in chosen}
