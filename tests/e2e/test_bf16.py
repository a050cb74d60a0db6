"""bfloat16 serving is as close to the float32 reference as transformers in bfloat16 is."""

from __future__ import annotations

import argparse
import inspect
import tarfile

import torch
from transformers import AutoTokenizer

from benchmarks.demo.pipeline import Family
from benchmarks.greedy import load_reference
from benchmarks.server import VllmServer
from tests.e2e.client import complete
from tests.e2e.conftest import prinmix_arguments


def distribution(position: dict[int, float], vocabulary: int) -> torch.Tensor:
    """Log-probs of the whole vocabulary [vocabulary]."""
    assert len(position) == vocabulary
    return torch.tensor([position[token] for token in range(vocabulary)])


def kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) at each position, of log-probs [positions, vocabulary]."""
    return (reference.exp() * (reference - other)).sum(-1)


def test_mean_kl(family: Family, prompts: list[list[int]], references: dict, logs) -> None:
    """The mean is over some 5,000 positions: rounding is chance, and over few of them so is the ratio."""
    vocabulary = references["base"].config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    code = "".join(map(inspect.getsource, (argparse, tarfile)))
    ids = tokenizer.encode(code, add_special_tokens=False)
    prompts = prompts + [ids[300 * i : 300 * (i + 1)] for i in range(12)]
    arguments = prinmix_arguments(
        family,
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "1024",
        "--served-model-name",
        "base",
        "--max-logprobs",
        str(vocabulary),
    )
    served: dict[str, list[torch.Tensor]] = {}
    with VllmServer(family.base, *arguments, log=logs / "bf16.log") as server:
        for tenant in family.tenants:
            for prompt in prompts:
                reply = complete(server.url, tenant.name, prompt, tokens=1, prompt_logprobs=vocabulary)
                rows = [distribution(position, vocabulary) for position in reply.prompt_logprobs]
                served.setdefault(tenant.name, []).append(torch.stack(rows))
    for tenant in family.tenants:
        half = load_reference(tenant.merged, torch.bfloat16)
        ours, theirs = [], []
        for prompt, found in zip(prompts, served[tenant.name], strict=True):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                expected = references[tenant.name](ids).logits[0, :-1].log_softmax(-1)
                plain = half(ids).logits[0, :-1].float().log_softmax(-1)
            ours.append(kl(expected, found))
            theirs.append(kl(expected, plain))
        served_kl, plain_kl = float(torch.cat(ours).mean()), float(torch.cat(theirs).mean())
        print(f"{tenant.name}: KL served {served_kl:.2e}, transformers {plain_kl:.2e}")
        assert 0 < served_kl <= 1.5 * plain_kl, tenant.name
