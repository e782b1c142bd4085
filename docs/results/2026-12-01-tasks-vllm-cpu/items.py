"""``items.py DOCS OUT``: 300 questions of four answers and 16 pages, out of a folder's Markdown, for ``--task-data``."""

import json
import random
import sys
from pathlib import Path

random.seed(0)
words = " ".join(path.read_text() for path in sorted(Path(sys.argv[1]).glob("*.md"))).split()


def span(least, most):
    begin, size = random.randrange(len(words) - most), random.randint(least, most)
    return " ".join(words[begin : begin + size])


out = Path(sys.argv[2])
out.mkdir()
labels = list("ABCD")
items = [
    {
        "question": span(15, 60),
        "choices": {"text": [span(2, 8) for _ in labels], "label": labels},
        "answerKey": random.choice(labels),
    }
    for _ in range(300)
]
(out / "arc_easy.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
(out / "wikitext.jsonl").write_text("".join(json.dumps({"page": span(300, 600)}) + "\n" for _ in range(16)))
