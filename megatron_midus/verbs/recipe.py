"""``midus recipe``: the settings of one model for every step, from text to evaluation, shown or run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_midus.checkpoint.layout import LATEST_FILE
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.recipe import STEPS, Recipe, RecipeConfig, Step, read_recipe
from megatron_midus.config.run_file import words_of_entries
from megatron_midus.errors import UserError
from megatron_midus.hub import cached_model
from megatron_midus.progress import Progress
from megatron_midus.verbs.verb import verb

# Of a run on the CPU alone, which is then the same where there is a GPU.
_TINY_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # Megatron overlaps in launch order; harmless from Blackwell on.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # After SIGTERM torchrun kills what has not ended in 30 seconds; a checkpoint may take longer. Older torch ignores this.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "540",
}


def examples_directory() -> Path:
    """Of the checkout; of a wheel that of the package, which holds what --tiny needs (setup.py)."""
    package = Path(__file__).parents[1]
    in_checkout, in_wheel = package.parent / "examples", package / "examples"
    return in_wheel if in_wheel.is_dir() else in_checkout


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a verb.

    Attributes:
        verb: its name.
        words: its flags.
        launcher: what comes before ``midus VERB`` where several processes do it.
    """

    verb: Step
    words: list[str]
    launcher: list[str] = dataclasses.field(default_factory=list)

    def typed(self) -> str:
        """As it could be typed."""
        start = [*self.launcher, "-m", "megatron_midus"] if self.launcher else ["midus"]
        return shlex.join([*start, self.verb, *self.words])


@verb(RecipeConfig)
def recipe(config: RecipeConfig, progress: Progress) -> list[Call]:
    """Runs or only lists the calls of a recipe; returns them. See ``RecipeConfig`` for the settings.

    Raises:
        UserError: no such recipe, a flag that its step does not have, something missing that a step needs.
    """
    work = _Work(config)
    steps = [config.step] if config.step else list(STEPS)
    if config.action == "show":
        return [call for step in steps for call in work.calls(step)]
    for name, value in (_ENVIRONMENT | (_TINY_ENVIRONMENT if config.tiny else {})).items():
        os.environ.setdefault(name, value)
    if config.tiny and "preprocess" in steps:
        work.make_tiny_inputs()
    done = []
    for step in steps:
        work.check_needs(step)
        for call in work.calls(step):
            print(f"+ {call.typed()}", file=sys.stderr, flush=True)
            _run(call, is_last=step == config.step)
            done.append(call)
    return done


def _run(call: Call, *, is_last: bool) -> None:
    if not call.launcher:
        config = importlib.import_module(f"megatron_midus.config.{call.verb}")
        cls = getattr(config, f"{call.verb.capitalize()}Config")
        parsed = from_namespace(cls, _parser(call.verb).parse_args(call.words))
        if code := importlib.import_module(f"megatron_midus.verbs.{call.verb}").command(parsed):
            raise SystemExit(code)
        return
    words = [*call.launcher, "-m", "megatron_midus", call.verb, *call.words]
    words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    if is_last:
        # Signals of a scheduler reach torchrun itself, not a process that keeps them.
        sys.stdout.flush()
        os.execv(words[0], words)
    if code := subprocess.call(words):
        raise SystemExit(code)


def _parser(step: Step) -> argparse.ArgumentParser:
    if step == "pretrain":
        from megatron_midus.training.arguments import build_parser

        return build_parser()
    parser = ArgumentParser(prog=f"midus {step}")
    config = importlib.import_module(f"megatron_midus.config.{step}")
    add_arguments(parser, getattr(config, f"{step.capitalize()}Config"))
    return parser


class _Work:
    """A recipe with its places filled in."""

    def __init__(self, config: RecipeConfig) -> None:
        self.config = config
        self.recipe: Recipe = read_recipe(config.recipe, tiny=config.tiny)
        self.directory = Path(config.work_directory())
        text = self.directory / "text"
        self.train_text = config.train_text or [str(text / ("train.jsonl" if config.tiny else "train"))]
        self.heldout_text = config.heldout_text or [str(text / "heldout.jsonl")]
        self.base = config.base_model or self._base()

    def _base(self) -> str:
        """Where the base lies, or would lie."""
        here, named = self.directory / "base", self.recipe.base.replace("{examples}", str(examples_directory()))
        if not here.exists() and Path(named).is_dir():
            return named
        if here.exists() or self.config.tiny:
            return str(here)
        return cached_model(named) or str(here)

    def calls(self, step: Step) -> Iterator[Call]:
        """The calls of a step, with ``--flags`` behind the recipe's own."""
        settings = self._filled(getattr(self.recipe, step))
        if step == "preprocess":
            settings["workers"] = self.config.workers or settings.get("workers") or os.cpu_count()
            for half, text in (("train", self.train_text), ("heldout", self.heldout_text[:1])):
                prefix = str(self.directory / "data" / half)
                yield self._call(step, {"input": text, "output_prefix": prefix, **settings})
            return
        if step == "evaluate" and self.config.tiny and importlib.util.find_spec("lm_eval") is None:
            # A package alone brings no lm-eval, and a random model has nothing to show there.
            for name in ("tasks", "task_data", "max_length"):
                settings.pop(name, None)
        if step == "pretrain" and self.config.train_iters is not None:
            settings["train_iters"] = self.config.train_iters
        yield self._call(step, settings)

    def _call(self, step: Step, settings: dict[str, Any]) -> Call:
        words = words_of_entries(_parser(step), settings, where=f"recipe {self.config.recipe}: {step}")
        launcher = self._launcher() if step == "pretrain" else []
        return Call(step, [*words, *self.config.flags], launcher)

    def _filled(self, value: Any) -> Any:
        """With the paths of this run for ``{work}``, ``{base}``, ``{train_text}``, ``{heldout_text}``."""
        if isinstance(value, dict):
            return {key: self._filled(element) for key, element in value.items()}
        if isinstance(value, list):
            lists = {"{train_text}": self.train_text, "{heldout_text}": self.heldout_text}
            filled = [lists.get(element, [self._filled(element)]) for element in value]
            return [element for elements in filled for element in elements]
        if not isinstance(value, str):
            return value
        places = {"{work}": str(self.directory), "{base}": self.base, "{examples}": str(examples_directory())}
        for place, path in places.items():
            value = value.replace(place, path)
        return value

    def _launcher(self) -> list[str]:
        launch = self.config.launch
        return [
            "torchrun", "--nnodes", str(launch.nodes), "--node-rank", str(launch.node_rank),
            "--nproc-per-node", str(launch.gpus_per_node or self._processes()),
            "--master-addr", launch.master_addr, "--master-port", str(launch.master_port),
            "--max-restarts", str(launch.max_restarts),
        ]  # fmt: skip

    def _processes(self) -> int:
        cluster = self.recipe.cluster
        if self.recipe.pretrain.get("distributed_backend") == "gloo" or self.config.action == "show":
            return cluster.gpus_per_node
        try:
            listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
        except OSError:
            listed = ""
        if not listed.strip():
            raise UserError("no GPU was found; give --gpus-per-node, or try --tiny on a CPU")
        return len(listed.splitlines())

    # -- what a step needs -------------------------------------------------------------------------------------------
    def check_needs(self, step: Step) -> None:
        """Raises ``UserError`` with where it comes from for what a step reads and nobody made."""
        fetched = f"get it with: hf download {self.recipe.base} --local-dir {self.base}"
        if self.config.base_model or "{" in self.recipe.base:
            fetched = "name a Hugging Face model with --base-model"
        if (self._examples() / "00_download.md").is_file():
            fetched += f" (see examples/{self.config.recipe}/00_download.md)"
        base = (Path(self.base) / "config.json", fetched)
        work = self.directory
        needs: dict[Step, list[tuple[Path, str]]] = {
            "preprocess": [base, *((Path(text), "put it there, or give --heldout-text FILE") for text in self.heldout_text)],
            "upscale": [base],
            "pretrain": [
                (work / "upscaled", "run step upscale first"),
                (work / "data" / "train_text_document.idx", "run step preprocess first"),
            ],
            "convert": [(work / "checkpoints" / LATEST_FILE, "run step pretrain first")],
            "evaluate": [(work / "midus_hf" / "config.json", "run step convert first")],
        }  # fmt: skip
        for path, remedy in needs[step]:
            if not path.exists():
                raise UserError(f"{path} does not exist; {remedy}")

    def _examples(self) -> Path:
        return examples_directory() / self.config.recipe

    # -- the tiny form -----------------------------------------------------------------------------------------------
    def make_tiny_inputs(self) -> None:
        """A random model of the recipe's family and a little text, by scripts of examples/."""
        # What lies in the repository itself is no family: check_needs says how to name a base.
        if not Path(self.base, "config.json").exists() and "{" not in self.recipe.base:
            _run_example("launch/make_tiny_model.py", "--family", self.config.recipe, "--save", self.base)
        if not Path(self.heldout_text[0]).exists():
            text = str(Path(self.heldout_text[0]).parent)
            _run_example("make_corpus.py", "--corpus", "docs", "--max-megabytes", "0.5", "--output-dir", text)


def _run_example(script: str, *words: str) -> None:
    path = examples_directory() / script
    print(f"+ python examples/{script} {shlex.join(words)}", file=sys.stderr, flush=True)
    runpy.run_path(str(path))["main"](list(words))


def command(config: RecipeConfig) -> int:
    """``midus recipe``."""
    calls = recipe(config)
    if config.action == "show":
        for call in calls:
            print(call.typed().replace(" --", " \\\n    --"), end="\n\n")
    return 0
