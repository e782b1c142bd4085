"""The texts that calibration reads."""

import json
import logging
from pathlib import Path

from transformers import AutoTokenizer

from megatron_midus.upscaling.calibration import calibration_tokens

BASE = Path(__file__).parents[3] / "examples" / "tiny_base"


def test_a_document_longer_than_the_context_is_cut_without_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "hello world " * 600}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert tokenizer.model_max_length == 512
    pieces = calibration_tokens(tmp_path / "text.jsonl", tokenizer, num_tokens=1100, seq_length=512)
    assert [piece.shape for piece in pieces] == [(1, 512), (1, 512), (1, 76)]
    assert not caplog.records
