"""Real launchers: a rank that dies is started again by torchrun, and two hosts train, fall apart and go on.

The hosts are network namespaces with addresses of their own where the machine allows them, and loopback addresses, so that
rendezvous is exercised everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver import TINY_RUN, Run, train
from upscaled import write_upscaled

PROGRAM = Path(__file__).parents[2] / "pretrain_midus.py"
ITERATIONS = 24
STEPS = f"--train-iters {ITERATIONS} --lr-warmup-iters 2 --save-interval 4 --pretrained-checkpoint"
# Seconds; hosts import Megatron in four processes, and again after a failure.
TIMEOUT = 240.0


@dataclasses.dataclass
class Launcher:
    """A torchrun in a process group of its own, with its output in files."""

    process: subprocess.Popen
    directory: Path

    @property
    def log(self) -> Run:
        return Run([], (self.directory / "out").read_text(), (self.directory / "err").read_text())

    def kill_all(self) -> None:
        """As a host does that loses its power."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as stream:
                children += [int(child) for child in stream.read().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


@contextlib.contextmanager
def launchers(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """A function that starts torchrun; whatever still runs at the end is killed."""
    started: list[Launcher] = []

    def start(flags: str, words: str, *, prefix: list[str] | None = None, **environment: str) -> Launcher:
        directory = tmp_path / f"launcher{len(started)}"
        directory.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", *flags.split(), str(PROGRAM), *words.split()]
        with open(directory / "out", "w") as out, open(directory / "err", "w") as err:
            process = subprocess.Popen(
                [*(prefix or []), *command],
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent), **environment},
            )
        started.append(Launcher(process, directory))
        return started[-1]

    try:
        yield start
    finally:
        for launcher in started:
            launcher.kill_all()


def wait_until(condition: Callable[[], bool], what: str, *watched: Launcher) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        logs = "\n".join(launcher.log.out + launcher.log.err for launcher in watched)
        assert time.monotonic() < deadline, f"{what} did not come about\n{logs}"
        time.sleep(0.02)


def last_iteration(*watched: Launcher) -> int:
    return max((iteration for launcher in watched for iteration in launcher.log.losses), default=0)


def rank_pids(launcher: Launcher) -> list[int]:
    """Processes of the training program, one per rank."""
    found = []
    for pid in descendants(launcher.process.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"LOCAL_RANK=" in environment and str(PROGRAM).encode() in command:
                found.append(pid)
    return found


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def all_losses(*watched: Launcher) -> list[tuple[int, str]]:
    """``(iteration, loss)`` of every line of every start."""
    pattern = r"\] iteration +(\d+)/ *\d+ \|.* lm loss: (\S+)"
    return [(int(i), loss) for launcher in watched for i, loss in re.findall(pattern, launcher.log.out)]


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory) -> Path:
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.mark.slow
def test_torchrun_starts_a_dead_rank_again_and_the_run_goes_on(upscaled, tmp_path):
    layout = "--tensor-model-parallel-size 2"
    whole = train(*TINY_RUN, STEPS, upscaled, "--save", tmp_path / "whole", layout, processes=2).check()
    root = tmp_path / "run"
    words = " ".join([*TINY_RUN, f"{STEPS} {upscaled} {layout} --load {root} --save {root}"])
    with launchers(tmp_path) as start:
        torchrun = start(f"--nproc-per-node 2 --master-port {free_port()} --max-restarts 2", words)
        wait_until((root / "latest_checkpointed_iteration.txt").exists, "the first checkpoint", torchrun)
        os.kill(rank_pids(torchrun)[1], signal.SIGKILL)
        wait_until(lambda: last_iteration(torchrun) >= 14, "iteration 14", torchrun)
        os.kill(rank_pids(torchrun)[0], signal.SIGKILL)
        assert torchrun.process.wait(TIMEOUT) == 0, torchrun.log.err
        log = torchrun.log
        assert log.out.count("resuming after iteration") == 2
        losses = all_losses(torchrun)
        assert {iteration for iteration, _ in losses} == set(range(1, ITERATIONS + 1))
        assert [entry for entry in losses if entry[1] != whole.losses[entry[0]]] == []
        assert "Traceback" not in log.err.split("torch.distributed.elastic", 1)[0]


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_and_the_same_command_goes_on(upscaled, tmp_path):
    """To torchrun alone, as a terminal does: its ranks are in sessions of their own."""
    root = tmp_path / "run"
    flags = f"--tensor-model-parallel-size 2 --load {root} --save {root} --pretrained-checkpoint {upscaled}"
    words = " ".join([*TINY_RUN, "--train-iters 100000 --lr-decay-style constant", flags])
    with launchers(tmp_path) as start:
        torchrun = start(f"--nproc-per-node 2 --master-port {free_port()}", words)
        wait_until(lambda: last_iteration(torchrun) >= 3, "iteration 3", torchrun)
        torchrun.process.send_signal(signal.SIGINT)
        # torchrun makes a failure of its own of the signal.
        assert torchrun.process.wait(TIMEOUT) == 1
        last = last_iteration(torchrun)
        assert int((root / "latest_checkpointed_iteration.txt").read_text()) == last
        assert f"exiting after iteration {last}: SIGINT was received" in torchrun.log.out
        assert "what torchrun reports after this is the signal that it received itself" in torchrun.log.out
        assert torchrun.log.err.count("interrupted: ") == 1
        # The one traceback is torchrun's.
        assert torchrun.log.err.count("Traceback") == 1 and "SignalException" in torchrun.log.err
        again = start(f"--nproc-per-node 2 --master-port {free_port()}", words)
        wait_until(lambda: last_iteration(again) > last, "the next iteration", again)
        assert f"resuming after iteration {last}" in again.log.out and min(again.log.losses) == last + 1


# -- two hosts -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Host:
    address: str
    prefix: list[str] = dataclasses.field(default_factory=list)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: Callable[[], None] | None = None
    mend: Callable[[], None] | None = None


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def namespaces() -> Iterator[list[Host]]:
    """Two network namespaces that see each other over a pair of virtual devices, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("the program ip (iproute2) is not installed, so no network namespaces can be made")
    token = uuid.uuid4().hex[:6]
    names = [f"midus{token}{letter}" for letter in "ab"]
    try:
        try:
            for name in names:
                run("ip", "netns", "add", name)
            devices = [f"v{token}{letter}" for letter in "ab"]
            run("ip", "link", "add", devices[0], "netns", names[0], "type", "veth", "peer", "name", devices[1], "netns", names[1])  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        hosts = []
        for index, (name, device) in enumerate(zip(names, devices)):
            address = f"10.231.77.{index + 1}"
            inside = ["ip", "-n", name]
            run(*inside, "addr", "add", f"{address}/24", "dev", device)
            run(*inside, "link", "set", device, "up")
            run(*inside, "link", "set", "lo", "up")
            hosts.append(
                Host(
                    address,
                    ["ip", "netns", "exec", name],
                    {"GLOO_SOCKET_IFNAME": device},
                    lambda inside=inside, device=device: run(*inside, "link", "set", device, "down"),
                    lambda inside=inside, device=device: run(*inside, "link", "set", device, "up"),
                )
            )
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def loopback() -> Iterator[list[Host]]:
    yield [Host("127.0.0.2"), Host("127.0.0.3")]


def join(start: Callable[..., Launcher], hosts: list[Host], index: int, port: int, words: str, flags: str) -> Launcher:
    host = hosts[index]
    # A name service would tell the first host that the endpoint is its own address.
    rendezvous = f"--rdzv-backend c10d --rdzv-endpoint {hosts[0].address}:{port} --rdzv-conf is_host={int(index == 0)}"
    return start(
        f"--nnodes 2 --nproc-per-node 2 --rdzv-id midus {rendezvous} --local-addr {host.address} {flags}",
        words,
        prefix=host.prefix,
        # torchrun tells a host that comes later no address of the store that it shares with the ranks.
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        **host.environment,
    )


# Tensor parallel inside a host; data parallel, or the stages of a pipeline, across.
ACROSS = {
    "data": "--tensor-model-parallel-size 2 --use-distributed-optimizer",
    "pipeline": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "across", "failure"),
    [(namespaces, "data", "cut"), (loopback, "pipeline", "kill")],
)
def test_two_hosts_train_fall_apart_and_go_on(network, across, failure, tmp_path):
    """The launcher of the first host stays, or all is started again as a scheduler would; then the losses are those of one
    host."""
    upscaled = write_upscaled(tmp_path / "upscaled", insert_after=(0, 1))
    layout = f"{ACROSS[across]} --distributed-timeout-minutes 0.5"
    whole = train(*TINY_RUN, STEPS, upscaled, "--save", tmp_path / "whole", layout, processes=4).check()
    root = tmp_path / "run"
    words = " ".join([*TINY_RUN, f"{STEPS} {upscaled} {layout} --load {root} --save {root}"])
    with network() as hosts, launchers(tmp_path) as start:
        port = free_port() if network is loopback else 29411
        first = [join(start, hosts, index, port, words, "--max-restarts 3") for index in (0, 1)]
        wait_until(lambda: last_iteration(*first) >= 6, "iteration 6", *first)
        if failure == "kill":
            # The first host's launcher waits for another second host, and begins again with it.
            first[1].kill_all()
            second = [join(start, hosts, 1, port, words, "--max-restarts 3")]
        else:
            hosts[1].cut()
            # Nothing tells a host that the other one is gone: its collectives run into their timeout.
            wait_until(lambda: "lost another rank" in "".join(h.log.err for h in first), "the timeout", *first)
            for launcher in first:
                launcher.kill_all()
            hosts[1].mend()
            second = [join(start, hosts, index, port, words, "--max-restarts 0") for index in (0, 1)]
        everyone = [*first, *second]
        survivors = [first[0], *second] if failure == "kill" else second
        wait_until(lambda: all(s.process.poll() is not None for s in survivors), "the end", *everyone)
        assert [s.process.returncode for s in survivors] == [0] * len(survivors), survivors[0].log.err
        assert sum(launcher.log.out.count("resuming after iteration") for launcher in everyone) >= 1
        losses = all_losses(*everyone)
        assert {iteration for iteration, _ in losses} == set(range(1, ITERATIONS + 1))
        assert [entry for entry in losses if entry[1] != whole.losses[entry[0]]] == []
