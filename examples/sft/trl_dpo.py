"""Preference tuning of an export with TRL: DPO on pairs of a right and a wrong answer to the questions of make_conversations.py.

    python examples/sft/trl_dpo.py MODEL_DIR CONVERSATIONS_DIR OUTPUT_DIR [STEPS]

Needs `trl` (pip install trl). The memory is part of the model like any other weight; OUTPUT_DIR is an export again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def pairs(directory: Path) -> Dataset:
    """Of every held-out question its answer, and the answer to another question as the one to avoid."""
    records = [json.loads(line) for line in (directory / "heldout.jsonl").open(encoding="utf-8")]
    answers = [record["completion"] for record in records]
    rows = []
    for index, record in enumerate(records):
        wrong = next(answer for answer in answers[index + 1 :] + answers if answer != record["completion"])
        rows.append(
            {
                "prompt": [{"role": "user", "content": record["prompt"]}],
                "chosen": [{"role": "assistant", "content": record["completion"]}],
                "rejected": [{"role": "assistant", "content": wrong}],
            }
        )
    return Dataset.from_list(rows)


def main() -> None:
    model_directory, conversations, output = map(Path, sys.argv[1:4])
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 10
    model, reference = (
        AutoModelForCausalLM.from_pretrained(model_directory, trust_remote_code=True, dtype=torch.float32)
        for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(model_directory, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=pairs(conversations),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output))


if __name__ == "__main__":
    main()
