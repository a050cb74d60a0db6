"""Each op in plain torch on unpacked factors, in float64: the oracle that every kernel is tested against."""

from __future__ import annotations

import torch

from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix


def linear(x: torch.Tensor, delta: QuantizedFactors | QuantizedMatrix) -> torch.Tensor:
    """x [tokens, cols] -> x dW^T, float64 [tokens, rows]."""
    if isinstance(delta, QuantizedMatrix):
        codes = delta.codes.double() - delta.zero.double()[:, None]
        return x.double() @ (codes * delta.scale.double()[:, None]).T
    v = delta.v_codes.double() - delta.v_zero.double()[:, None]
    u = delta.u_codes.double() - delta.u_zero.double()[:, None]
    y = ((x.double() @ v.T) * delta.scale.double()) @ u
    return y if delta.row_scale is None else y * delta.row_scale.double()


def embedding(ids: torch.Tensor, delta: QuantizedFactors | QuantizedMatrix) -> torch.Tensor:
    """ids [tokens] -> rows of dW, float64 [tokens, cols]."""
    one_hot = torch.nn.functional.one_hot(ids.long(), delta.shape[0]).double()
    if isinstance(delta, QuantizedMatrix):
        codes = delta.codes.double() - delta.zero.double()[:, None]
        return one_hot @ (codes * delta.scale.double()[:, None])
    v = delta.v_codes.double() - delta.v_zero.double()[:, None]
    u = delta.u_codes.double() - delta.u_zero.double()[:, None]
    if delta.row_scale is not None:
        one_hot = one_hot * delta.row_scale.double()
    return ((one_hot @ u.T) * delta.scale.double()) @ v


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [tokens, hidden] -> RMSNorm(x) * weight, float64 [tokens, hidden]."""
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
