"""Make a trace: open-loop Poisson arrivals over tenants of uneven popularity.

The setting of the PrinMix paper's latency study (appendix C.6, after DeltaZip): requests arrive as a
Poisson process of rate lambda for a fixed time, and each picks its tenant from a uniform or a Zipf law.
"""

import math

import numpy as np

from benchmarks.records import Request, TraceSettings
from vllm_prinmix.errors import PrinMixError


def popularity_law(popularity: str, tenants: int) -> np.ndarray:
    """Probability of each popularity rank: float64 [tenants], summing to 1, most popular first.

    ``uniform``, or ``zipf:ALPHA`` for p_k proportional to k^-ALPHA, k = 1..tenants, ALPHA >= 0. Raises
    PrinMixError for anything else.
    """
    text = "zipf:0" if popularity == "uniform" else popularity
    try:
        alpha = float(text.removeprefix("zipf:")) if text.startswith("zipf:") else math.nan
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha < math.inf:
        raise PrinMixError(
            "unknown popularity law",
            where="--popularity",
            found=popularity,
            expected="uniform, or zipf:ALPHA with ALPHA >= 0",
            fix="write for example --popularity zipf:1.5",
        )
    weights = np.arange(1, tenants + 1, dtype=np.float64) ** -alpha
    return weights / weights.sum()


def rank_tenants(settings: TraceSettings) -> list[str]:
    """The tenants from the most to the least popular: a shuffle of the sorted names by the seed, so that
    neither the names nor the order in which a server lists them decides who is popular."""
    shuffler, *_ = _generators(settings.seed)
    return [str(name) for name in shuffler.permutation(sorted(settings.tenants))]


def make_trace(settings: TraceSettings) -> list[Request]:
    """Draw the requests of a trace, in order of arrival; a pure function of the settings.

    Gaps between arrivals are exponential with mean 1/rate seconds, for ``duration`` seconds; the number
    of requests is therefore itself random. Every prompt is ``prompt_tokens`` token ids, uniform in
    [0, vocab_size) and drawn anew for each request, so that no prompt shares a prefix with another.
    Raises PrinMixError for a bad popularity law.
    """
    _, gaps, ranks, tokens = _generators(settings.seed)
    law = popularity_law(settings.popularity, len(settings.tenants))
    tenants = rank_tenants(settings)
    requests: list[Request] = []
    arrival = gaps.exponential(1 / settings.rate)
    while arrival < settings.duration:
        requests.append(
            Request(
                id=len(requests),
                arrival_s=round(arrival, 6),
                tenant=tenants[ranks.choice(len(tenants), p=law)],
                prompt=tokens.integers(settings.vocab_size, size=settings.prompt_tokens).tolist(),
                output_tokens=settings.output_tokens,
            )
        )
        arrival += gaps.exponential(1 / settings.rate)
    return requests


def _generators(seed: int) -> list[np.random.Generator]:
    # One stream for each random choice: another rate keeps the popular tenants, another prompt length
    # keeps the arrivals, so that two points of a sweep differ only in what was asked.
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)]
