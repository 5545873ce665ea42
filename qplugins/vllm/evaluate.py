"""What a model says under one KV dtype, asked of vLLM in a process of its own: `python -m qplugins.vllm.evaluate REQUEST RESULT`.

REQUEST is a JSON file with the fields of `Request`, RESULT an .npz to be written. Lines "done total" on stdout tell how far it is.

Prompts go through in chunks of `chunk` tokens. A chunk attends to what is before it through the cache, and to itself through whatever the
backend does: vLLM's own read the cache for that too, ours take the keys and values as they are. With chunks of one page, half a page on average
is thus spared, and the first page altogether, so that the cache is what is measured, as it works when serving.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Request:
    """windows: token ids, each to be judged at every position; prompts: text to be continued by `answer_tokens` tokens."""

    model: str
    kv_cache_dtype: str
    windows: list[list[int]]
    prompts: list[list[int]]
    top: int
    chunk: int
    answer_tokens: int = 24
    engine: dict[str, Any] = field(default_factory=dict)  # further arguments of vllm.LLM


def run(r: Request) -> dict[str, np.ndarray]:
    """ids, logprobs [window, position, top] of the likeliest next tokens (-1 and -inf where a window is shorter), next [window, position]: the
    text's own token's log-probability; answers; bytes_per_token; tokens: how many fit."""
    from vllm import LLM, SamplingParams

    longest = max(len(p) for p in [*r.windows, *r.prompts]) + r.answer_tokens
    options = {"max_model_len": longest, "max_num_seqs": 4, "max_num_batched_tokens": r.chunk, "enforce_eager": True, **r.engine}
    llm = LLM(r.model, kv_cache_dtype=r.kv_cache_dtype, enable_chunked_prefill=True, max_logprobs=r.top, **options)
    total = len(r.windows) + len(r.prompts)
    size = max(map(len, r.windows), default=1) - 1
    ids = np.full((len(r.windows), size, r.top), -1, dtype=np.int32)
    logprobs = np.full(ids.shape, -np.inf, dtype=np.float32)
    following = np.zeros(ids.shape[:2], dtype=np.float32)
    ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=r.top, detokenize=False)
    for w, window in enumerate(r.windows):
        print(w, total, flush=True)
        (out,) = llm.generate([{"prompt_token_ids": window}], ask, use_tqdm=False)
        for i, said in enumerate(out.prompt_logprobs[1:]):  # nothing is said of the first token
            following[w, i] = said[window[i + 1]].logprob
            best = sorted(said.items(), key=lambda x: x[1].rank)[: r.top]
            ids[w, i, : len(best)] = [token for token, _ in best]
            logprobs[w, i, : len(best)] = [x.logprob for _, x in best]
    answers = []
    for i, prompt in enumerate(r.prompts):
        print(len(r.windows) + i, total, flush=True)
        (out,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=r.answer_tokens), use_tqdm=False)
        answers.append(out.outputs[0].text)
    specs = llm.collective_rpc("get_kv_cache_spec")[0].values()
    return {
        "ids": ids,
        "logprobs": logprobs,
        "next": following,
        "answers": np.array(answers, dtype=str),
        "bytes_per_token": np.array(sum(s.page_size_bytes / s.block_size for s in specs)),
        "tokens": np.array(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens or 0),
    }


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what the workers tell of their caches does not pass between vLLM's processes
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; on a CPU vLLM would take most of the memory
    np.savez(sys.argv[2], **run(Request(**json.loads(Path(sys.argv[1]).read_text()))))
