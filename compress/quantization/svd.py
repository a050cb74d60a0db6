"""Thin singular value decomposition of a delta."""

from __future__ import annotations

import torch

from vllm_prinmix.compress.quantization.threads import one_thread_if_small

CHUNK = 8192  # columns converted to float64 at once: an lm_head's would not fit


def thin_svd(
    matrix: torch.Tensor, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """matrix = U diag(S) V: float32 [rows, cols] -> U [rows, r], S [r] descending and above 0, V [r, cols].

    r is at most ``most`` (None: all).

    From the eigenvectors of the smaller Gram matrix in float64, several times faster than a float32 SVD of
    a wide matrix and as accurate: singular values below 1e-8 times sqrt(size) of the largest, which float32
    weights cannot express, are left out, so r may be less than min(rows, cols), and 0 for a zero matrix.
    """
    rows, cols = matrix.shape
    if rows > cols:
        u, sigma, v = thin_svd(matrix.T, most)
        return v.T, sigma, u.T
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=matrix.device)
    for chunk in matrix.split(CHUNK, dim=1):
        wide = chunk.double()
        gram += wide @ wide.T
    with one_thread_if_small(rows):
        values, vectors = torch.linalg.eigh(gram)
    keep = values > torch.finfo(torch.float64).eps * max(rows, cols) * values[-1]
    u = vectors[:, keep].flip(1)[:, :most]
    v = torch.empty(u.shape[1], cols, device=matrix.device)
    for start in range(0, cols, CHUNK):
        v[:, start : start + CHUNK] = u.T @ matrix[:, start : start + CHUNK].double()
    sigma = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).float()
    return u.float(), sigma, v.div_(sigma[:, None])
