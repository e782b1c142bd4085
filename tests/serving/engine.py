"""Runs requests in a real vLLM: engine.py JOBS.json RESULTS.json. A process of its own, whose path says what is installed.

A job: ``{"model": path, "options": arguments of LLM, "rounds": [[prompt, ...], ...], "adapter": path or null}``.
Its result: per round and prompt ``{"tokens", "logprobs", "prompt_logprobs", "cached"}``.
"""

import gc
import json
import sys
from pathlib import Path

OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "enable_prefix_caching": False,
}


def main(jobs, results):
    found = [run(job) for job in json.loads(Path(jobs).read_text())]
    Path(results).write_text(json.dumps(found))


def run(job):
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    engine = LLM(job["model"], **{**OPTIONS, **job["options"]})
    settings = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, detokenize=False,
        prompt_logprobs=None if job["options"].get("enable_prefix_caching") else 0,
    )  # fmt: skip
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job.get("adapter") else None
    rounds = []
    for prompts in job["rounds"]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(requests, settings, use_tqdm=False, lora_request=adapter)
        rounds.append([describe(prompt, output) for prompt, output in zip(prompts, outputs)])
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return rounds


def describe(prompt, output):
    (best,) = output.outputs
    tokens = list(best.token_ids)
    known = output.prompt_logprobs or []
    return {
        "tokens": tokens,
        "logprobs": [step[token].logprob for step, token in zip(best.logprobs, tokens)],
        "prompt_logprobs": [step[token].logprob for step, token in zip(known[1:], prompt[1:])],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
