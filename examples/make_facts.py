"""Texts and questions about invented people and places, for measuring how many facts a model learns.

``train.jsonl``      every fact in several sentences
``valid.jsonl``      every fact in one other sentence: for loss curves, and to choose a learning rate
``heldout.jsonl``    every fact in the sentence of its question
``questions.jsonl``  that sentence as prompt and answer, for ``midus evaluate --facts``
``rephrased.jsonl``  questions in words that the training text has for no fact

No sentence of one file is in another. The wording of a question is that of training sentences of other facts; in rephrased.jsonl it is new, which a small
base may not understand. The same seed gives the same facts, and fewer of them begin the list of more.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable
from pathlib import Path

from megatron_midus.cli import run
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.data.facts import NUM_PARAPHRASES, guessing_rate, make_facts, training_sentences
from megatron_midus.files import write_text_atomically


def write_lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_text_atomically(path, "\n".join(lines) + "\n")
    print(f"{path}: {len(lines)} lines")


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, required=True, help="facts")
    parser.add_argument("--output-dir", type=Path, required=True, help="receives the five files")
    parser.add_argument(
        "--paraphrases",
        type=int,
        default=NUM_PARAPHRASES,
        help=f"training sentences of a fact (default: {NUM_PARAPHRASES})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the facts (default: 0)")
    args = parser.parse_args(argv)

    facts = make_facts(args.num, seed=args.seed)
    sentences = training_sentences(facts, paraphrases=args.paraphrases, seed=args.seed)
    write_lines(args.output_dir / "train.jsonl", ({"text": text} for text in sentences))
    write_lines(args.output_dir / "valid.jsonl", ({"text": fact.say(fact.validation)} for fact in facts))
    write_lines(args.output_dir / "heldout.jsonl", ({"text": fact.say(fact.question)} for fact in facts))
    for name, asked in (("questions", "question"), ("rephrased", "rephrased")):
        prompts = ((fact.prompt(getattr(fact, asked)), fact.answer) for fact in facts)
        lines = ({"prompt": prompt, "answer": answer} for prompt, answer in prompts)
        write_lines(args.output_dir / f"{name}.jsonl", lines)
    print(f"who guesses each attribute's most frequent value is right in {guessing_rate(facts) * 100:.1f} %")
    return 0


if __name__ == "__main__":
    run(main)
