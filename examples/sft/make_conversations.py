"""A hundred conversations about twenty invented facts, for supervised fine-tuning, and the same questions in other words.

``text.jsonl``       every fact in several sentences: for the continual pre-training before it
``train.jsonl``      five conversations a fact, each asking in other words, in the four shapes that midus preprocess --sft reads
``heldout.jsonl``    two more ways to ask each question, as ``{"prompt": …, "completion": …}``; no wording of them is in train.jsonl
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from megatron_midus.cli import run
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.data.facts import make_facts, training_sentences
from megatron_midus.files import write_text_atomically

NUM_FACTS = 20
TRAINED = 5

# Ways to ask, the held-out ones last. They go by the attribute's name in megatron_midus.data.facts.
QUESTIONS = {
    "birthplace": "Where was {} born?|In which town was {} born?|What is the birthplace of {}?|Tell me where {} was born.|"
    "Which town is {} from?|Name the town where {} was born.|Can you tell me the birthplace of {}?",
    "profession": "What does {} work as?|What is the profession of {}?|What is the job of {}?|Tell me the profession of {}.|"
    "Which profession has {}?|Name the profession of {}.|Can you tell me the job of {}?",
    "year of birth": "When was {} born?|In which year was {} born?|What is the year of birth of {}?|Tell me when {} was born.|"
    "Which year was {} born in?|Name the year when {} was born.|Can you tell me the year of birth of {}?",
    "employer": "Who does {} work for?|What is the employer of {}?|Which company employs {}?|Tell me who {} works for.|"
    "Where does {} have a job?|Name the employer of {}.|Can you tell me which company employs {}?",
    "dish": "What does {} like to eat?|What is the favourite dish of {}?|Which food does {} like best?|Tell me what {} likes to eat.|"
    "What dish does {} like?|Name the favourite dish of {}.|Can you tell me which food {} likes best?",
    "instrument": "What does {} play?|Which instrument does {} play?|What is the instrument of {}?|Tell me what {} plays.|"
    "What instrument is {} playing?|Name the instrument of {}.|Can you tell me which instrument {} plays?",
    "region": "Where is {}?|In which region is {}?|What is the region of {}?|Tell me where {} is.|"
    "Which region is {} in?|Name the region of {}.|Can you tell me in which region {} is?",
    "founded": "When was {} founded?|In which year was {} founded?|What is the year of {}?|Tell me when {} was founded.|"
    "How old is {}?|Name the year when {} was founded.|Can you tell me in which year {} was founded?",
    "product": "What is {} known for?|What is made in {}?|What does {} sell?|Tell me what {} is known for.|"
    "Which goods come from {}?|Name what {} is known for.|Can you tell me what is made in {}?",
    "river": "Which river is {} on?|What is the river of {}?|Which river flows past {}?|Tell me the river of {}.|"
    "On which river is {}?|Name the river of {}.|Can you tell me which river flows past {}?",
}


def conversation(number: int, question: str, answer: str) -> dict[str, Any]:
    """A record in one of the four shapes, by its number in turn."""
    shapes: tuple[dict[str, Any], ...] = (
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
        {"prompt": question, "completion": answer},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"instruction": question, "input": "", "output": answer},
    )
    return shapes[number % len(shapes)]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    write_text_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"{path}: {len(records)} lines")


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="receives the three files")
    args = parser.parse_args(argv)
    facts = make_facts(NUM_FACTS)
    trained, heldout = [], []
    for fact in facts:
        for number, question in enumerate(QUESTIONS[fact.attribute.name].split("|")):
            asked = question.format(fact.subject)
            if number < TRAINED:
                trained.append(conversation(len(trained), asked, f"{fact.value}."))
            else:
                heldout.append({"prompt": asked, "completion": f"{fact.value}."})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_lines(args.output_dir / "text.jsonl", [{"text": text} for text in training_sentences(facts)])
    write_lines(args.output_dir / "train.jsonl", trained)
    write_lines(args.output_dir / "heldout.jsonl", heldout)
    return 0


if __name__ == "__main__":
    run(main)
