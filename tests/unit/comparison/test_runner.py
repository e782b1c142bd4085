"""The runner, with tiny commands: what is done stays done, what fails takes nothing with it, what runs can be ended."""

import dataclasses
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_midus.comparison.results import machines_of
from megatron_midus.comparison.runner import Runner, last_line, lock
from megatron_midus.comparison.steps import FileHashes, Step, StepFailed, read_marker

COUNT = "import sys; open(sys.argv[1], 'a').write('x'); open(sys.argv[2], 'w').write('made')"


def make_step(root: Path, name: str = "one", program: str = COUNT, **changes) -> Step:
    words = ("-c", program, str(root / f"{name}.count"), str(root / name))
    step = Step(name, root, words, root, launcher=(sys.executable,), makes=(root / name,))
    return dataclasses.replace(step, **changes)


def make_runner(root: Path, jobs: int = 1) -> tuple[Runner, list[str]]:
    said: list[str] = []
    return Runner(FileHashes(root / "hashes.json"), said.append, jobs=jobs), said


def times(root: Path, name: str = "one") -> int:
    path = root / f"{name}.count"
    return len(path.read_text()) if path.is_file() else 0


def test_what_is_done_is_not_done_again(tmp_path):
    runner, said = make_runner(tmp_path)
    step = make_step(tmp_path)
    runner.run(step, "a")
    runner.run(step, "a")
    make_runner(tmp_path)[0].run(step, "a")
    assert times(tmp_path) == 1 and said == ["a: one"]
    runner.run(step, "a", force=True)
    assert times(tmp_path) == 2
    runner.run(dataclasses.replace(step, words=(*step.words, "more")), "a")
    assert times(tmp_path) == 3


def test_a_step_records_the_machine_it_ran_on(tmp_path):
    earlier, _ = make_runner(tmp_path)
    earlier.machine = {"processor": "of then"}
    step = make_step(tmp_path)
    earlier.run(step, "a")
    # Another machine finds it done, and leaves what it says.
    make_runner(tmp_path)[0].run(step, "a")
    assert read_marker(step.marker)["machine"] == {"processor": "of then"}
    later = make_step(tmp_path, "two")
    make_runner(tmp_path)[0].run(later, "a")
    assert read_marker(later.marker)["machine"]["versions"]["torch"] == torch.__version__
    chains = [SimpleNamespace(steps=(step, later)), SimpleNamespace(steps=(step,))]
    assert [m["processor"] for m in machines_of(chains)][0] == "of then" and len(machines_of(chains)) == 2


def test_what_failed_is_told_and_done_again(tmp_path):
    runner, _ = make_runner(tmp_path)
    program = "import sys; print('error: no such key'); print('more'); sys.exit(3)"
    with pytest.raises(StepFailed, match=r"one ended with 3: error: no such key \(log: .*one.log\)"):
        runner.run(make_step(tmp_path, program=program), "a")
    with pytest.raises(StepFailed, match="one did not make .*one "):
        runner.run(make_step(tmp_path, program="pass"), "a")

    def check():
        raise StepFailed("stopped after iteration 1 of 2")

    with pytest.raises(StepFailed, match="stopped after iteration 1"):
        runner.run(make_step(tmp_path, check=check), "a")
    runner.run(make_step(tmp_path), "a")
    assert times(tmp_path) == 2


def test_a_failure_does_not_stop_the_others(tmp_path):
    runner, said = make_runner(tmp_path)
    steps = [make_step(tmp_path, "a"), make_step(tmp_path, "b", "import sys; sys.exit(1)"), make_step(tmp_path, "c")]
    runner.each(steps, lambda step: runner.run(step, step.name), lambda step: step.name)
    assert times(tmp_path, "a") == times(tmp_path, "c") == 1
    assert list(runner.failures) == ["b"] and runner.failures["b"].startswith("b ended with 1: no output")
    assert any(line.startswith("b: FAILED, ") for line in said)


def test_two_chains_share_a_step_and_run_it_once(tmp_path):
    runner, _ = make_runner(tmp_path, jobs=2)
    slow = "import time; time.sleep(0.3); " + COUNT
    shared = [make_step(tmp_path, "up", slow) for _ in range(2)]
    steps = [(shared[i], make_step(tmp_path, f"train-{i}", after=(shared[i],))) for i in range(2)]

    def chain(both):
        for step in both:
            runner.run(step, "chain")

    runner.each(steps, chain, lambda both: both[1].name)
    assert not runner.failures and times(tmp_path, "up") == 1
    assert times(tmp_path, "train-0") == times(tmp_path, "train-1") == 1


def test_stop_ends_processes_and_starts_no_more(tmp_path):
    runner, _ = make_runner(tmp_path)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    errors: list[Exception] = []

    def work():
        try:
            runner.run(make_step(tmp_path, program=child), "a")
        except StepFailed as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not runner._processes:
        time.sleep(0.01)
    runner.stop()
    thread.join(60)
    assert not thread.is_alive() and "one ended with -15" in str(errors[0])
    with pytest.raises(StepFailed, match="stopped"):
        runner.run(make_step(tmp_path, "two"), "a")
    assert times(tmp_path, "two") == 0


def test_the_lock_refuses_a_second_run(tmp_path):
    refused = pytest.raises(ValueError, match="another comparison, or a process that it left, is running in")
    with lock(tmp_path), refused, lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_the_last_line_prefers_an_error(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    assert last_line(log) == "no output"
    log.write_text("a\n\nb\n")
    assert last_line(log) == "b"
    log.write_text("error: wrong\nTraceback\n")
    assert last_line(log) == "error: wrong"
