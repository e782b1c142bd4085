"""What a recipe says of one model, and how it is shown or run."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal

from megatron_midus.config.fields import part
from megatron_midus.config.run_file import read_yaml
from megatron_midus.config.values import build, did_you_mean
from megatron_midus.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
COMMON = "common"
Step = Literal["preprocess", "upscale", "pretrain", "convert", "evaluate"]
STEPS: tuple[Step, ...] = ("preprocess", "upscale", "pretrain", "convert", "evaluate")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The machines that a recipe's layout is for."""

    nodes: int = 1
    gpus_per_node: int = 8
    hardware: str = "h100"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One model from text to evaluation.

    Attributes:
        title: what to call it.
        base: ``org/name`` on the Hugging Face hub, or a directory.
        cluster: that the layout is for.
        preprocess, upscale, pretrain, convert, evaluate: flags of the verb of that name.
    """

    title: str
    base: str
    cluster: Cluster
    preprocess: dict[str, Any]
    upscale: dict[str, Any]
    pretrain: dict[str, Any]
    convert: dict[str, Any]
    evaluate: dict[str, Any]


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != COMMON)


def name_of(recipe: str) -> str:
    """``qwen3_4b`` of ``qwen3_4b`` and of ``mine/qwen3_4b.yaml``."""
    return re.sub(r"\.ya?ml$", "", Path(recipe).name)


def read_recipe(name: str, *, tiny: bool = False) -> Recipe:
    """The recipe of that name, or in a YAML file of your own, with what all share.

    Args:
        name: one of ``recipe_names()``, or a path that ends in .yaml.
        tiny: with the entries of ``tiny`` in place of others.

    Raises:
        UserError: no such recipe, a key or value that it cannot have.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if path.parent == RECIPES and name not in recipe_names():
        remedy = did_you_mean(name, recipe_names(), otherwise=f"choose one of {', '.join(recipe_names())}")
        raise UserError(f"there is no recipe {name!r}{remedy}, or a .yaml file of your own")
    layers = [read_yaml(RECIPES / f"{COMMON}.yaml"), read_yaml(path, what="recipe")]
    shrunk = [layer.pop("tiny", {}) for layer in layers]
    merged: dict[str, Any] = {}
    for layer in [*layers, *(shrunk if tiny else [])]:
        _merge(merged, layer)
    return build(Recipe, merged, str(path))


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Later entries win; ``null`` takes an entry away."""
    for key, value in values.items():
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        elif value is None:
            into.pop(key, None)
        else:
            into[key] = value


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Processes of pretraining (torchrun)"""

    gpus_per_node: int | None = None
    """Processes on each node. When absent: the GPUs that nvidia-smi lists; with --tiny, and where the recipe is for CPUs, the
    recipe's."""

    nodes: int = 1
    """Nodes; the same command is called on each."""

    node_rank: int = 0
    """Which of them this is, from 0."""

    master_addr: str = "127.0.0.1"
    """Host of node 0."""

    master_port: int = 29500
    """Port there."""

    max_restarts: int = 0
    """Times that torchrun starts again by itself after a process died; it resumes from the last checkpoint."""


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Recipes

    Shows or runs the settings of one model for every step: preprocess, upscale, pretrain, convert, evaluate. A recipe is a
    YAML file of the package (megatron_midus/recipes), or one of your own. pretrain is started with torchrun.

    Examples:
      midus recipe show llama3.2_1b
      midus recipe run llama3.2_1b --tiny
      midus recipe run llama3.1_8b --step pretrain --nodes 4 --node-rank 0 --master-addr node0
      midus recipe run llama3.1_8b --step pretrain --flags --lr 5e-4 --save-interval 100
    """

    action: Literal["show", "run"] = dataclasses.field(metadata={"positional": True})
    """show = print the command of every step; run = do them."""

    recipe: str = dataclasses.field(metadata={"positional": True})
    """Name of a recipe (tiny_base, llama3.2_1b, llama3.1_8b, qwen3_4b), or a .yaml file of your own."""

    step: Step | None = None
    """This step alone; all of them in order when absent."""

    tiny: bool = False
    """The same commands in a minute on a CPU: a random model in the shape of the real one, a little text of this machine. Zero-shot
    tasks only where lm-eval is installed."""

    work: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Everything is read and written below it ({work}). When absent: runs/RECIPE; with --tiny runs/RECIPE-tiny."""

    base_model: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """The base ({base}). When absent: WORK/base, or the recipe's model in the local Hugging Face cache."""

    train_text: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "FILE"})
    """Text to train on ({train_text}): files, directories or globs. When absent: WORK/text/train; with --tiny
    WORK/text/train.jsonl."""

    heldout_text: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "FILE"})
    """Texts that are never trained on ({heldout_text}): training is validated on the first, evaluation reads all. When absent:
    WORK/text/heldout.jsonl."""

    train_iters: int | None = None
    """Optimizer steps instead of the recipe's."""

    workers: int | None = None
    """Processes that tokenise. When absent: the recipe's, else as many as there are cores."""

    launch: LaunchConfig = part(LaunchConfig)

    flags: list[str] = dataclasses.field(default_factory=list, metadata={"nargs": "...", "metavar": "FLAG"})
    """Everything behind it goes to the step as flags, which win over the recipe's. Needs --step."""

    def __post_init__(self) -> None:
        if self.flags and self.step is None:
            raise UserError(f"--flags {self.flags[0]} needs --step, because each step has flags of its own")

    def work_directory(self) -> str:
        return self.work or os.path.join("runs", name_of(self.recipe) + ("-tiny" if self.tiny else ""))
