"""Without a server: vllm.LLM with additional_config, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.demo.pipeline import Family
from benchmarks.greedy import compare

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.offline import tenant_request

if __name__ == "__main__":
    base, deltas, prompts, out = sys.argv[1:]
    llm = LLM(base, dtype="float32", max_model_len=1024, gpu_memory_utilization=0.3,
              additional_config={"prinmix": {"deltas": deltas, "max_deltas": 2}})
    try:
        tenant_request(llm, "nobody")
        raise SystemExit("an unknown tenant was accepted")
    except PrinMixError as error:
        print(error)
    prompts = json.load(open(prompts))
    names = list(llm.llm_engine.vllm_config.lora_config.catalog.tenants)
    jobs = [(name, prompt) for prompt in prompts for name in [None, *names]]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in jobs],
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        lora_request=[tenant_request(llm, name) if name else None for name, _ in jobs],
    )
    answers = [[n or "base", p, list(o.outputs[0].token_ids)] for (n, p), o in zip(jobs, outputs)]
    json.dump(answers, open(out, "w"))
"""


def test_llm(family: Family, prompts: list[list[int]], references: dict, tmp_path: Path) -> None:
    script, asked, out = tmp_path / "offline.py", tmp_path / "prompts.json", tmp_path / "out.json"
    script.write_text(SCRIPT)
    asked.write_text(json.dumps(prompts[:8]))
    command = [sys.executable, *map(str, (script, family.base, family.deltas, asked, out))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no tenant named nobody" in done.stdout
    answers = json.loads(out.read_text())
    for name, reference in references.items():
        own = [(prompt, tokens) for model, prompt, tokens in answers if model == name]
        assert len(own) == 8
        assert all(c.equal for c in compare(reference, own)), name
