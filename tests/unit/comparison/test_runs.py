"""The steps of an experiment: every arm of a seed is told to read the same data, whichever arms run."""

import experiments

from megatron_midus.comparison.arms import resolve
from megatron_midus.comparison.runner import choose_rate, chosen_chains
from megatron_midus.comparison.runs import Runs, command_line, one_of_each_architecture
from megatron_midus.comparison.steps import FileHashes
from megatron_midus.training.arguments import build_parser

DATA_FLAGS = (
    "--train-data-path",
    "--valid-data-path",
    "--train-iters",
    "--seed",
    "--seq-length",
    "--global-batch-size",
)


def flags(words) -> dict[str, list[str]]:
    """``{flag: its values}``."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = [value] if value else []
        elif name:
            found[name].append(word)
    return found


def test_arms_of_a_seed_read_the_same_data(tmp_path):
    runs = experiments.make_runs(tmp_path)
    pro, midus, base = runs.arms
    one, other = (flags(runs.chain(arm, 1, 1e-3).train.words) for arm in (pro, midus))
    assert [one[name] for name in DATA_FLAGS] == [other[name] for name in DATA_FLAGS]
    assert other["--value-lr-mult"] == ["30"] and "--value-lr-mult" not in one
    assert flags(runs.chain(pro, 2, 1e-3).train.words)["--seed"] == ["2"]
    assert runs.seeds_of(pro) == [1, 2] and runs.seeds_of(base) == [1]
    untrained = runs.chain(base, 1, None)
    assert [step.name for step in untrained.steps] == ["upscale", "evaluate"] and untrained.train is None
    assert "--save-format" in untrained.steps[0].words


def test_the_tools_understand_their_words(tmp_path):
    runs = experiments.make_runs(tmp_path)
    namespace = build_parser().parse_args(runs.chain(runs.arms[1], 1, 1e-2).train.words[1:])
    assert namespace.load == namespace.save != namespace.pretrained_checkpoint
    assert (namespace.lr, namespace.min_lr, namespace.train_iters, namespace.seed) == (1e-2, 1e-3, 30, 1)
    upscale = flags(runs.chain(runs.arms[1], 1, 1e-2).steps[0].words)
    assert upscale["--memory-num-keys"] == ["8"] and upscale["--num-blocks"] == ["2"]


def test_rates_share_their_up_scaling(tmp_path):
    runs = experiments.make_runs(tmp_path)
    slow, fast = (runs.chain(runs.arms[1], 1, rate) for rate in (1e-3, 1e-2))
    assert slow.steps[0] == fast.steps[0] and slow.directory != fast.directory


def test_part_of_the_arms_of_a_budget_in_flops_are_the_same_runs(tmp_path):
    entries = experiments.values(budget={"flops": 1e9})
    whole = experiments.make_runs(tmp_path, entries)
    longest = max(whole.arms, key=lambda arm: arm.iterations)
    short = next(arm for arm in whole.arms if 0 < arm.iterations < longest.iterations)
    part = Runs(whole.experiment, [short], whole.output, whole.driver, data_iterations=longest.iterations)
    words = whole.chain(short, 1, 1e-3).train.words
    assert part.chain(short, 1, 1e-3).train.words == words
    assert flags(words)["--train-iters"] == [str(longest.iterations)]
    assert flags(words)["--exit-interval"] == flags(words)["--lr-decay-iters"] == [str(short.iterations)]


def test_fingerprints_of_a_whole_chain(tmp_path):
    def marks(output="out", **changes):
        runs = experiments.make_runs(tmp_path, experiments.values(**changes), output)
        hashes = FileHashes(tmp_path / "hashes.json")
        return [step.fingerprint(hashes) for step in runs.chain(runs.arms[0], 1, 1e-3).steps]

    here = marks()
    assert marks("moved") == here
    assert marks(description="other words", seeds=[1, 3], reference="midus", latency={"rounds": 0}) == here
    longer = marks(budget={"tokens": 8192})
    assert longer[0] == here[0] and not set(longer[1:]) & set(here)
    windows = marks(evaluation={"seq_length": 16})
    assert windows[:3] == here[:3] and windows[3] != here[3]


def test_questions_about_facts_are_read_by_the_evaluation(tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "a", "answer": " b."}\n')
    data = {**experiments.VALUES["data"], "facts": "questions.jsonl"}
    runs = experiments.make_runs(tmp_path, experiments.values(data=data))
    evaluate = runs.chain(runs.arms[0], 1, 1e-3).steps[-1]
    assert flags(evaluate.words)["--facts"] == [str(questions)] and str(questions) in evaluate.reads
    hashes = FileHashes(tmp_path / "hashes.json")
    before = evaluate.fingerprint(hashes)
    questions.write_text('{"prompt": "a", "answer": " other."}\n')
    assert evaluate.fingerprint(hashes) != before
    made = {**data, "facts": "{output}/questions.jsonl"}
    runs = experiments.make_runs(tmp_path, experiments.values(data=made, prepare=["python -c pass"]))
    assert runs.prepared_paths() == [str(tmp_path / "out/questions.jsonl")]


def test_processes_start_with_a_free_port(tmp_path):
    runs = experiments.make_runs(tmp_path, experiments.values(layout={"nproc": 2}))
    words = command_line(runs.chain(runs.arms[0], 1, 1e-3).train)
    assert words[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"] and words[6].isdigit()
    assert words[7:10] == ["-m", "megatron_midus", "pretrain"]


def test_padding_is_known_to_the_up_scaling(tmp_path):
    driver = {"tensor-model-parallel-size": 2, "make_vocab_size_divisible_by": 4}
    runs = experiments.make_runs(tmp_path, experiments.values(driver=driver))
    words = flags(runs.chain(runs.arms[0], 1, 1e-3).steps[0].words)
    assert words["--target-tensor-parallel-size"] == ["2"] and words["--make-vocab-size-divisible-by"] == ["4"]


def test_learning_rates_of_other_settings_are_not_chosen_from(tmp_path, monkeypatch):
    runs = experiments.make_runs(tmp_path)
    hashes, midus = FileHashes(tmp_path / "hashes.json"), runs.arms[1]
    monkeypatch.setattr("megatron_midus.comparison.runner.read_scalars", lambda path: scalars_of(path))

    def scalars_of(path):
        loss = 1.0 if "lr-0.01" in str(path) else 2.0
        return {"iteration-time": {1: 0.1}, "lm loss validation": {1: loss}}

    assert choose_rate(runs, midus, hashes) == 1e-3
    for rate in (1e-3, 1e-2):
        train = runs.chain(midus, 1, rate).train
        for path in train.makes:
            path.mkdir(parents=True)
        train.finish(train.fingerprint(hashes), seconds=1.0, machine={})
    assert choose_rate(runs, midus, hashes) == 1e-2
    assert [(c.arm.arm.name, c.seed, c.rate) for c in chosen_chains(runs, hashes)] == [
        ("pro", 1, 1e-3), ("midus", 1, 1e-2), ("base", 1, None), ("pro", 2, 1e-3), ("midus", 2, 1e-2)]  # fmt: skip
    changed = experiments.make_runs(tmp_path, experiments.values(min_lr_ratio=0.5))
    assert choose_rate(changed, changed.arms[1], hashes) == 1e-3


def test_one_latency_for_each_architecture(tmp_path):
    entries = experiments.values()
    entries["arms"].append({"name": "pro-all", "policy": "llama_pro", "train": "all"})
    runs = experiments.make_runs(tmp_path, entries)
    chains = [runs.chain(arm, 1, 1e-3 if arm.iterations else None) for arm in runs.arms]
    assert [chain.arm.arm.name for chain in one_of_each_architecture(chains)] == ["pro", "midus", "base"]
    assert runs.latency([]) is None and len(runs.latency(chains).after) == 4


def test_what_prepare_has_to_make(tmp_path):
    entries = experiments.values(prepare=["python make.py {output}/t.jsonl", "cp a b"])
    entries["data"]["train"] = [{"text": "{output}/t.jsonl"}]
    runs = experiments.make_runs(tmp_path, entries)
    assert runs.prepared_paths() == [str(tmp_path / "out/t.jsonl")]
    first, second = runs.prepare
    assert first.words[0] == "make.py" and first.launcher and second.words[0] == "cp" and second.after == (first,)
    assert runs.datasets[0].after == (second,) and runs.datasets[0].reads == (runs.experiment.base,)


def test_no_training_needs_no_data(tmp_path):
    experiment = experiments.read(tmp_path, experiments.values(arms=[{"name": "b", "policy": "none", "train": "none"}]))
    driver = build_parser()
    runs = Runs(experiment, resolve(experiment, experiments.MODEL, driver), tmp_path / "out", driver, data_iterations=9)
    assert runs.datasets == [] and runs.data_iterations == 0
