"""examples/slurm/cpt.sbatch with stand-ins for the two commands of Slurm that it calls: every "node" is this machine."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from test_launch_scripts import EXAMPLES, SCRIPTS, environment, free_port, script

import megatron_midus as midus
from megatron_midus.progress import SILENT

SRUN = """#!/usr/bin/env bash
options=() log=/dev/stdout
while [[ "$1" == --* ]]; do
    [[ "$1" == --output=* ]] && log="${1#--output=}"
    options+=("$1"); shift
done
if [[ " ${options[*]} " == *" --overlap "* ]]; then exec "$@"; fi
ls "$MIDUS_VENV"/.midus-*-eval >/dev/null # the environment is there before the nodes start
echo "${options[*]}" >>"$WORK/srun"
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
# Makes an environment that is the one at hand, and counts what pip would install.
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/activate"
elif [ "$1 $2 $3" = "-m pip install" ]; then
    sleep 0.2; echo "${@: -1}" >>"$INSTALLED"
fi
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
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "pkill": PKILL, "python-to-make": PYTHON}.items():
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
            SLURM_CPUS_PER_TASK="64",
            MIDUS_VENV=str(directory / "environments" / "venv"),
            MIDUS_PYTHON=str(commands / "python-to-make"),
            INSTALLED=str(directory / "installed"),
            GPUS_PER_NODE="1",
            RECIPE=str(EXAMPLES / "llama3.2_1b" / "03_cpt.sh"),
            RECIPE_ARGUMENTS=f"--tiny -- --tensorboard-dir '{directory}/logs of the run' --seed 77",
            TRAIN_ITERS="100000",
        )

    def start(self, *arguments: str) -> subprocess.Popen:
        self.environment["MASTER_PORT"] = free_port()
        command = ["bash", str(EXAMPLES / "slurm" / "cpt.sbatch"), *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.directory / "logs").glob("job-77-node*.log")))

    def wait_for(self, text: str, job: subprocess.Popen) -> None:
        end = time.monotonic() + 600
        while text not in self.log():
            assert job.poll() is None and time.monotonic() < end, self.log()[-3000:]
            time.sleep(0.1)


@pytest.mark.slow
def test_slurm_saves_before_the_time_limit_requeues_and_resumes(tmp_path, warm_path):
    work = tmp_path / "work"
    for name in SCRIPTS[:2]:
        done = script("llama3.2_1b", name, work, "--tiny", PATH=warm_path)
        assert done.returncode == 0, done.stderr
    slurm = Slurm(tmp_path)
    iterations = []
    for start in range(2):
        job = slurm.start()
        try:
            # Somewhere after the first checkpoint of this start.
            slurm.wait_for(f"iteration {iterations[-1] + 2 if iterations else 4:8}/", job)
            job.send_signal(signal.SIGUSR1)
            output, _ = job.communicate(timeout=600)
        finally:
            job.kill()
        assert job.returncode == 0, output + slurm.log()[-3000:]
        assert "saving" in output and "back into the queue" in output
        assert (work / "requeued").read_text() == "77\n" * (start + 1)
        iterations.append(int((work / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()))
    assert iterations[1] > iterations[0] >= 4
    assert (work / "srun").read_text().count("--cpus-per-task=64 ") == 2
    assert len((tmp_path / "installed").read_text().splitlines()) == 2  # torch and this package, for both starts
    settings = yaml.safe_load((work / "checkpoints" / "run.yaml").read_text())
    assert settings["seed"] == 77 and settings["tensorboard_dir"] == f"{tmp_path}/logs of the run"
    done = [int(x) for x in re.findall(r" iteration +(\d+)/", slurm.log())]
    assert sorted(set(done)) == list(range(1, iterations[1] + 1)) and len(done) == len(
        set(done)
    )  # none twice, none left out
    assert len(list((tmp_path / "logs").glob("job-77-node*.log"))) == 2


def test_slurm_hands_every_node_cores_arguments_and_one_environment(tmp_path):
    """With a recipe that only says what it was given."""
    recipe = tmp_path / "examples" / "mine" / "03_cpt.sh"
    recipe.parent.mkdir(parents=True)
    recipe.write_text('printf "%s|" node $NODE_RANK of $NNODES debug $NCCL_DEBUG "$@"\n')
    for name in ("tools", "setup.py", "constraints.txt"):
        (tmp_path / name).symlink_to(EXAMPLES.parent / name)
    (tmp_path / "work").mkdir()
    slurm = Slurm(tmp_path)
    slurm.environment |= {"RECIPE": "examples/mine/03_cpt.sh", "RECIPE_ARGUMENTS": "-- --lr 1 --save 'a b'"}
    job = slurm.start("--tiny")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    said = slurm.log().split("node|")[1:]
    assert said == [f"{node}|of|2|debug|WARN|--tiny|--|--lr|1|--save|a b|" for node in range(2)]
    assert "--cpus-per-task=64 " in (tmp_path / "work" / "srun").read_text()
    assert len((tmp_path / "installed").read_text().splitlines()) == 2  # torch and this package


def test_slurm_can_open_the_log_before_the_job_has_made_a_directory():
    """Slurm makes no directory: a job whose --output lies in one that is not there ends without a word."""
    lines = (EXAMPLES / "slurm" / "cpt.sbatch").read_text().splitlines()
    (output,) = [line for line in lines if line.startswith("#SBATCH --output=")]
    assert "/" not in output
    made, written = (next(i for i, line in enumerate(lines) if text in line) for text in ("mkdir -p logs", "logs/%x"))
    assert made < written


def test_starts_at_the_same_time_make_one_environment(tmp_path):
    slurm = Slurm(tmp_path)
    slurm.environment["INSTALLED"] = str(tmp_path / "counted")
    command = ["bash", "-c", f"source {EXAMPLES.parent}/tools/setup_environment.sh && echo entered"]
    started = [subprocess.Popen(command, env=slurm.environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert all(output.endswith("entered\n") for output in outputs)
    assert len((tmp_path / "counted").read_text().splitlines()) == 2
    assert sum("Installing" in output for output in outputs) == 1


def test_an_array_encodes_a_corpus_in_shards(tmp_path, warm_path):
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / f"corpus/{number}.jsonl").write_text("".join(f'{{"text": "{n} {number}"}}\n' for n in range(40)))
    flags = f"--input {tmp_path}/corpus --tokenizer-type NullTokenizer --tokenizer-model 100"
    variables = {"PATH": warm_path, "MIDUS_VENV": "none", "SLURM_SUBMIT_DIR": str(EXAMPLES.parent), "SHARDS": "2"}
    for task in ("1", "0"):
        command = ["bash", EXAMPLES / "slurm/preprocess.sbatch", *flags.split(), "--output-prefix", f"{tmp_path}/many"]
        more = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "9", "SLURM_CPUS_PER_TASK": "1"}
        done = subprocess.run(command, env={**os.environ, **variables, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    midus.merge(output_prefix=f"{tmp_path}/many", progress=SILENT)
    inputs = [str(tmp_path / "corpus")]
    tokens = {"tokenizer_type": "NullTokenizer", "tokenizer_model": "100"}
    midus.preprocess(input=inputs, output_prefix=f"{tmp_path}/one", progress=SILENT, **tokens)
    assert (tmp_path / "many_text_document.bin").read_bytes() == (tmp_path / "one_text_document.bin").read_bytes()


def test_other_scripts_refuse_flags_of_training(tmp_path):
    done = script("llama3.2_1b", "01_preprocess.sh", tmp_path, "--", "--lr", "1")
    assert done.returncode == 1 and "03_cpt.sh alone takes flags" in done.stderr


@pytest.mark.parametrize("builds", [True, False])
def test_transformer_engine_is_installed_where_there_is_a_gpu_or_its_absence_is_told(tmp_path, builds):
    slurm = Slurm(tmp_path)
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text('#!/usr/bin/env bash\necho "GPU 0: of a test"\n')
    smi.chmod(0o755)
    if not builds:
        python = tmp_path / "bin" / "python-to-make"
        python.write_text(PYTHON + 'if [[ "${@: -1}" == *"[gpu]" ]]; then echo "no nvcc"; exit 1; fi\n')
    command = ["bash", "-c", f"source {EXAMPLES.parent}/tools/setup_environment.sh 'eval,gpu?' && echo entered"]
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("entered\n"), done.stderr
    installed = (tmp_path / "installed").read_text().splitlines()
    assert [line.partition("[")[2] for line in installed[1:]] == ["eval]", "gpu]"]
    assert ("WARNING: Training goes on with layers of plain torch: slower" in done.stderr) is not builds
