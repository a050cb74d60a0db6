"""Asking a server: every question of every tenant at once, over the OpenAI API."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from openai import AsyncOpenAI
from rich.progress import Progress

from benchmarks.demo.tasks import Question

MAX_TOKENS = 24
CONCURRENT = 48


@dataclass(frozen=True)
class Answer:
    """What a model said: text, and the token ids of prompt and answer."""

    text: str
    prompt_ids: list[int]
    token_ids: list[int]


def ask_all(url: str, questions: dict[str, list[Question]], base: str) -> dict[str, dict[str, list[Answer]]]:
    """Ask the tenant and the base every question of each tenant: {"tenant" | "base": {tenant: answers}}.

    All requests are under way together, tenants and base mixed; greedy decoding.
    """
    return asyncio.run(_ask_all(url, questions, base))


async def _ask_all(
    url: str, questions: dict[str, list[Question]], base: str
) -> dict[str, dict[str, list[Answer]]]:
    gate = asyncio.Semaphore(CONCURRENT)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        with Progress() as progress:
            task = progress.add_task("Asking", total=2 * sum(map(len, questions.values())))

            async def ask(model: str, question: Question) -> Answer:
                async with gate:
                    reply = await client.chat.completions.create(
                        model=model,
                        messages=question.messages,  # type: ignore[arg-type]
                        max_tokens=MAX_TOKENS,
                        temperature=0,
                        extra_body={"return_token_ids": True},
                    )
                progress.advance(task)
                choice = reply.choices[0]
                extra, whole = choice.model_extra or {}, reply.model_extra or {}
                return Answer(choice.message.content or "", whole["prompt_token_ids"], extra["token_ids"])

            # One tenant's question, the next tenant's, the base's, and so on: batches are as mixed as can be.
            jobs, names = [], []
            for row in range(max(map(len, questions.values()))):
                for tenant, own in questions.items():
                    if row < len(own):
                        for kind, model in (("tenant", tenant), ("base", base)):
                            names.append((kind, tenant))
                            jobs.append(ask(model, own[row]))
            answers = await asyncio.gather(*jobs)
    found: dict[str, dict[str, list[Answer]]] = {"tenant": {}, "base": {}}
    for (kind, tenant), answer in zip(names, answers, strict=True):
        found[kind].setdefault(tenant, []).append(answer)
    return found


def exact_match(answers: list[Answer], questions: list[Question]) -> float:
    """Share of answers that are right to the letter."""
    right = sum(a.text.strip() == q.answer for a, q in zip(answers, questions, strict=True))
    return right / len(questions)
