"""Near-duplicates out of a corpus by MinHash, then Megatron-Core datasets of the rest: a pipeline of datatrove, here or under Slurm.

    python examples/datatrove/deduplicate.py --input corpus/ --tokenizer-model base --output-prefix data/corpus --tasks 8 --workers 4
    python examples/datatrove/deduplicate.py ... --tasks 1000 --slurm cpu --time 24:00:00      (then midus merge, when all jobs are done)

Started again with the same --work, it repeats only tasks that have not ended well. Files of a folder are dealt out to the tasks in turn.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from megatron_midus import cli
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.preprocess import MergeConfig
from megatron_midus.data.shards import merge
from megatron_midus.errors import UserError
from megatron_midus.integrations.datatrove import MegatronDatasetWriter
from megatron_midus.verbs.preprocess import print_datasets


class Words(WordTokenizer):
    """Runs of letters and digits: for languages with blanks between words. Needs no package and no download."""

    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder of .jsonl files (also .gz, .zst) or of .parquet files")
    parser.add_argument("--glob", default="**/*.jsonl*", help="which files of it (default: **/*.jsonl*)")
    parser.add_argument("--work", default="dedup", help="folder for signatures, clusters and logs (default: dedup)")
    parser.add_argument("--output-prefix", required=True, help="P of P_text_document.bin and .idx")
    parser.add_argument("--tokenizer-model", required=True, help="directory of the model's tokenizer")
    parser.add_argument("--tasks", type=int, default=1, help="parts of the corpus, at most its files (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="tasks at once (default: 1); under Slurm -1 is no limit")
    parser.add_argument(
        "--language", help="such as eng_Latn: words by datatrove's tokenizer of it (default: letters and digits)"
    )
    parser.add_argument("--n-grams", type=int, default=5, help="words of a shingle (default: 5)")
    parser.add_argument("--buckets", type=int, default=14, help="of the signature (default: 14)")
    parser.add_argument("--hashes-per-bucket", type=int, default=8, help="(default: 8; with 14: about 0.72 alike)")
    parser.add_argument("--slurm", metavar="PARTITION", help="submit job arrays instead of working here")
    parser.add_argument("--time", default="24:00:00", help="of a Slurm job (default: 24:00:00)")
    parser.add_argument("--mem-per-cpu-gb", type=int, default=4, help="of a Slurm job (default: 4)")
    parser.add_argument("--env-command", default="source tools/setup_environment.sh data", help="first in a Slurm job")
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: print the batch files, submit nothing")
    return parser.parse_args(arguments)


def stages(arguments: argparse.Namespace) -> list[tuple[str, list[Any], int]]:
    """``(name, pipeline, tasks)``, each after the one before."""
    work = Path(arguments.work)
    config = MinhashConfig(
        n_grams=arguments.n_grams,
        num_buckets=arguments.buckets,
        hashes_per_bucket=arguments.hashes_per_bucket,
        # datatrove's default, xxhash, does not take the strings that it is given from version 4 on.
        hash_config=HashConfig(hash_fc="sha1"),
    )
    kind = ParquetReader if arguments.glob.endswith(".parquet") else JsonlReader

    def folder(name: str) -> str:
        return str(work / name)

    def reader() -> Any:
        # The filter knows documents by their number, so both readers give the same ones in the same order.
        return kind(arguments.input, glob_pattern=arguments.glob)

    language = arguments.language or Words()
    writer = MegatronDatasetWriter(arguments.output_prefix, arguments.tokenizer_model)
    return [
        (
            "signatures",
            [reader(), MinhashDedupSignature(folder("signatures"), config=config, language=language)],
            arguments.tasks,
        ),
        (
            "buckets",
            [MinhashDedupBuckets(folder("signatures"), folder("buckets"), config=config)],
            arguments.buckets,
        ),
        ("clusters", [MinhashDedupCluster(folder("buckets"), folder("removed"), config=config)], 1),
        ("write", [reader(), MinhashDedupFilter(folder("removed")), writer], arguments.tasks),
    ]


def executors(arguments: argparse.Namespace) -> list[Any]:
    """Of datatrove, one a stage; the last one starts those before it."""
    made: list[Any] = []
    for name, pipeline, tasks in stages(arguments):
        common = {
            "pipeline": pipeline,
            "tasks": tasks,
            "logging_dir": str(Path(arguments.work).resolve() / "logs" / name),
            "depends": made[-1] if made else None,
        }
        if arguments.slurm is None:
            made.append(LocalPipelineExecutor(**common, workers=min(arguments.workers, tasks)))
        else:
            made.append(
                SlurmPipelineExecutor(
                    **common,
                    workers=arguments.workers,
                    job_name=f"dedup-{name}",
                    partition=arguments.slurm,
                    time=arguments.time,
                    mem_per_cpu_gb=arguments.mem_per_cpu_gb,
                    env_command=arguments.env_command,
                    qos="",
                )
            )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.dry_run and arguments.slurm is None:
        raise UserError("--dry-run prints the batch files of --slurm PARTITION; give it")
    if not any(Path(arguments.input).glob(arguments.glob)):
        raise UserError(f"no file of {arguments.input} matches --glob {arguments.glob}")
    made = executors(arguments)
    merging = f"midus merge --output-prefix {arguments.output_prefix} --delete-shards"
    if arguments.dry_run:
        for executor in made:
            command = f"srun -l -n 1 launch_pickled_pipeline {executor.logging_dir.resolve_paths('executor.pik')}"
            print(executor.get_launch_file_contents(executor.get_sbatch_args(executor.tasks), command))
        return
    made[-1].run()
    if arguments.slurm is not None:
        print(f"when all jobs are done: {merging}")
        return
    missing = [executor for executor in made if executor.get_incomplete_ranks()]
    if missing:
        raise UserError(f"tasks of {missing[0].logging_dir.path} failed; run the same command again to repeat them")
    print_datasets(merge(MergeConfig(arguments.output_prefix, delete_shards=True, overwrite=True)))


if __name__ == "__main__":
    cli.run(main)
