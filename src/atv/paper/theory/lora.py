"""Theorem 1: what ATV and LoRA add to a hidden state (the paper's section 3.3 and appendix A.1).

At one layer, for one input, ATV adds `scale * v A` and LoRA adds `x^T W_down W_up` (its own factor put into W_down):

    x (d,)        what enters the projection that LoRA changes
    v (d_s,)      the generator's state;  A (d_s, d)  the layer's block of the expansion
    W_down (d, r), W_up (r, d)

As functions of the input they differ. LoRA's update is linear in x. ATV's is linear in v, which comes from another
model that reads the query and need not be a linear function of x.
"""

import torch
from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to that of `expected`."""
    return float((found - expected).norm() / expected.norm())


def atv_as_lora(x: Tensor, v: Tensor, expansion: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """LoRA's factors with the same update at `x` as ATV (appendix A.1.3, step 3).

    W_up = A, and W_down = x^+ (scale v), an outer product with x^T x^+ = 1 for x other than 0. They contain x and v, so
    they are valid only for this input. At x = 0 the pseudo-inverse is 0, and so is LoRA's update with any factors.

    Args:
        x: (d,).
        v: (d_s,).
        expansion: (d_s, d).
        scale: strength of the injection.

    Returns:
        W_down (d, d_s) and W_up (d_s, d).
    """
    return torch.linalg.pinv(x[None]) * (scale * v), expansion


def lora_as_atv(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ATV's scale, v and A with the same update at `x` as LoRA (appendix A.1.3, step 4).

    The singular value decomposition of the one row x^T W_down is u S w^T, with u S = (+-norm, 0, ..., 0). ATV gets
    scale = |u S|, v = u S / |u S|, A = w^T W_up. If x^T W_down = 0, the scale is 0 and v is any unit vector.

    Args:
        x: (d,).
        down: (d, r).
        up: (r, d).

    Returns:
        Scale (), v (r,) and A (r, d).
    """
    left, size, right = torch.linalg.svd((x @ down)[None], full_matrices=True)  # (1, 1), (1,), (r, r)
    v = torch.zeros_like(right[0])
    v[0] = left[0, 0]
    return size[0], v, right @ up


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (n, k) and (k, d), k at most `rank`, of the nearest matrix of that rank (Eckart and Young)."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * sizes[:rank], right[:rank]


def best_static_lora(x: Tensor, updates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The single pair of LoRA factors nearest to the updates for many inputs: the exact minimum.

    Let U be an orthonormal basis of the columns of X. X W can reach only U U^T D of D, and every matrix of rank r with
    columns in that space is some X W of rank r. So the minimum over W of rank r truncates U^T D to rank r:

        min |X W - D|^2 = |D - U U^T D|^2 + (squares of the singular values of U^T D beyond the first r)

    The first part is 0 if the rows of X are independent, the second if D = scale V A with d_s at most r.

    Args:
        x: inputs (n, d).
        updates: the update for each of them (n, d).
        rank: r.

    Returns:
        W_down (d, k) and W_up (k, d), k at most r.
    """
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    kept = sizes > sizes[0] * max(x.shape) * torch.finfo(x.dtype).eps
    down, up = truncated(left[:, kept].mT @ updates, rank)
    return (right[kept].mT / sizes[kept]) @ down, up
