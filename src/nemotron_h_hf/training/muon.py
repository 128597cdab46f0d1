"""Muon: momentum whose matrix updates are orthogonalised, for the weight matrices inside the layers of a small model.

For a matrix W with gradient G (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):
    M <- beta M + (1 - beta) G          momentum
    U <- (1 - beta) G + beta M          Nesterov look-ahead
    O <- U's nearest semi-orthogonal matrix, roughly, by five Newton-Schulz steps
    W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(rows, columns)) O
The factor gives the update the size that AdamW's would have (Liu et al. 2025, arXiv 2502.16982), so both share one
learning rate. Matrices of one shape are orthogonalised as one batch. Embeddings, the output head, convolutions and
vectors are not for Muon: they stay with AdamW.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero: singular values land in about 0.7 .. 1.2
UPDATE_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Steps matrices (2 dimensions) only; state per matrix: `momentum`, same shape and dtype."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        matrices = list(matrices)
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(f"matrices: got a parameter of shape {tuple(matrix.shape)}, allowed are 2 dimensions")
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                updates = torch.stack([self._look_ahead(matrix, group["momentum"]) for matrix in matrices])
                scale = UPDATE_RMS * max(shape) ** 0.5
                for matrix, update in zip(matrices, orthogonalise(updates), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * scale)

    def _look_ahead(self, matrix: nn.Parameter, beta: float) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - beta)
        return matrix.grad.lerp(state["momentum"], beta)


def orthogonalise(matrices: Tensor) -> Tensor:
    """(k, rows, columns) -> the same shape, each matrix with its singular values pushed towards 1."""
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
