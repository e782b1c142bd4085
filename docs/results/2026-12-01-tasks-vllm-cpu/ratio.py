"""``ratio.py EXPORT DATA``: seconds of both engines over the same tasks, in turn, each in a process of its own; one waits while the other works."""

import contextlib
import os
import statistics
import subprocess
import sys
import time

TASKS, LENGTH, ROUNDS = ["arc_easy", "wikitext"], 510, 6


def work(name, export, data):
    from megatron_midus.data.tokenizer import load_hf_tokenizer
    from megatron_midus.evaluation.loading import load_model
    from megatron_midus.evaluation.vllm_engine import vllm_engine
    from megatron_midus.evaluation.zero_shot import open_tasks, run_tasks, transformers_engine

    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spent = []

    def timed(function):
        def call(*args, **kwargs):
            begin = time.perf_counter(), time.process_time()
            found = function(*args, **kwargs)
            spent.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
            return found

        return call

    with contextlib.ExitStack() as stack:
        if name == "vllm":
            engine = stack.enter_context(
                vllm_engine(
                    export,
                    dtype="float32",
                    device="cpu",
                    max_length=LENGTH,
                    add_bos=False,
                    is_midus=True,
                    trust_remote_code=False,
                )
            )
        else:
            engine = transformers_engine(load_model(export), load_hf_tokenizer(export), max_length=LENGTH)
        engine.loglikelihood, engine.loglikelihood_rolling = (
            timed(engine.loglikelihood),
            timed(engine.loglikelihood_rolling),
        )
        manager = stack.enter_context(open_tasks(TASKS, data))
        print("ready", file=told, flush=True)
        for _ in sys.stdin:
            spent.clear()
            if name == "vllm":
                engine.model.reset_prefix_cache()
            run_tasks(engine, TASKS, manager)
            print(*map(sum, zip(*spent)), file=told, flush=True)


if len(sys.argv) == 4:
    work(sys.argv[3], *sys.argv[1:3])
    sys.exit()
workers = {
    name: subprocess.Popen([sys.executable, *sys.argv, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for name in ("transformers", "vllm")
}
for worker in workers.values():
    worker.stdout.readline()  # ready
rounds = []
for _ in range(ROUNDS):
    found = []
    for worker in workers.values():
        print("go", file=worker.stdin, flush=True)
        found.append([float(word) for word in worker.stdout.readline().split()])
    rounds.append([vllm / transformers for transformers, vllm in zip(*found)])
    print(f"wall and CPU seconds: transformers {found[0]}, vllm {found[1]}; ratios {rounds[-1]}", flush=True)
for kind, ratios in zip(("wall", "CPU"), zip(*rounds)):
    print(
        f"{kind} time, {ROUNDS} rounds: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    )
for worker in workers.values():
    worker.stdin.close()
    worker.wait()
