"""examples/slurm/cpt.sbatch with stand-ins for the two commands of Slurm that it calls: every "node" is this machine."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_launch_scripts import EXAMPLES, SCRIPTS, environment, free_port, script

SRUN = """#!/usr/bin/env bash
options=() log=/dev/stdout
while [[ "$1" == --* ]]; do
    [[ "$1" == --output=* ]] && log="${1#--output=}"
    options+=("$1"); shift
done
if [[ " ${options[*]} " == *" --overlap "* ]]; then exec "$@"; fi
log="${log//%x/job}"; log="${log//%j/$SLURM_JOB_ID}"
status=0 pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" >>"${log//%n/$node}" 2>&1 & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "$2" >>"$WORK/requeued"; else echo 127.0.0.1; echo 127.0.0.1; fi
"""
# The real one, narrowed to the processes of this test.
PKILL = """#!/usr/bin/env bash
exec "$REAL_PKILL" "$1" -f "$3.*$WORK/"
"""


class Slurm:
    """Runs examples/slurm/cpt.sbatch as two nodes of one process each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        commands = directory / "bin"
        commands.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "pkill": PKILL}.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.environment = environment(
            directory / "work",
            PATH=f"{commands}:{os.environ['PATH']}",
            REAL_PKILL=subprocess.check_output(["bash", "-c", "command -v pkill"], text=True).strip(),
            SLURM_SUBMIT_DIR=str(directory),
            SLURM_JOB_ID="77",
            SLURM_JOB_NUM_NODES="2",
            SLURM_JOB_NODELIST="n[0-1]",
            GPUS_PER_NODE="1",
            RECIPE=str(EXAMPLES / "llama3.2_1b" / "03_cpt.sh"),
            RECIPE_ARGUMENTS="--tiny",
            TRAIN_ITERS="100000",
        )

    def start(self) -> subprocess.Popen:
        self.environment["MASTER_PORT"] = free_port()
        command = ["bash", str(EXAMPLES / "slurm" / "cpt.sbatch")]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.directory / "logs").glob("job-77-node*.log")))

    def wait_for(self, text: str, job: subprocess.Popen) -> None:
        end = time.monotonic() + 240
        while text not in self.log():
            assert job.poll() is None and time.monotonic() < end, self.log()[-3000:]
            time.sleep(0.1)


@pytest.mark.slow
def test_slurm_saves_before_the_time_limit_requeues_and_resumes(tmp_path):
    work = tmp_path / "work"
    for name in SCRIPTS[:2]:
        done = script("llama3.2_1b", name, work, "--tiny")
        assert done.returncode == 0, done.stderr
    slurm = Slurm(tmp_path)
    iterations = []
    for start in range(2):
        job = slurm.start()
        try:
            # Somewhere after the first checkpoint of this start.
            slurm.wait_for(f"iteration {iterations[-1] + 2 if iterations else 4:8}/", job)
            job.send_signal(signal.SIGUSR1)
            output, _ = job.communicate(timeout=240)
        finally:
            job.kill()
        assert job.returncode == 0, output + slurm.log()[-3000:]
        assert "saving" in output and "back into the queue" in output
        assert (work / "requeued").read_text() == "77\n" * (start + 1)
        iterations.append(int((work / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()))
    assert iterations[1] > iterations[0] >= 4
    done = [int(x) for x in re.findall(r" iteration +(\d+)/", slurm.log())]
    assert sorted(set(done)) == list(range(1, iterations[1] + 1)) and len(done) == len(
        set(done)
    )  # none twice, none left out
    assert len(list((tmp_path / "logs").glob("job-77-node*.log"))) == 2
