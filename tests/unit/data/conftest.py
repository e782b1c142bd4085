"""A byte-level BPE tokenizer as a Hugging Face directory, a SentencePiece model, and documents for both."""

import json
import random

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "the",
    "memory",
    "block",
    "reads",
    "what",
    "it",
    "wrote",
    "and",
    "adds",
    "bank",
    "für",
    "größe",
    "模型",
    "slot",
]


def make_text(seed, num_words):
    """Words, punctuation and line breaks, the same for the same seed."""
    chooser = random.Random(seed)
    return "".join(chooser.choice(WORDS) + chooser.choice([" ", " ", ", ", ".\n"]) for _ in range(num_words))


@pytest.fixture(scope="session")
def texts():
    """61 documents of different lengths."""
    return [make_text(seed, 3 + 7 * seed % 41) for seed in range(61)]


@pytest.fixture(scope="session")
def hf_tokenizer_dir(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("hf_tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory, texts):
    prefix = tmp_path_factory.mktemp("sentencepiece") / "sp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()),
        model_prefix=str(prefix),
        vocab_size=340,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    return f"{prefix}.model"


@pytest.fixture
def jsonl(tmp_path, texts):
    """``jsonl(texts, name="c.jsonl")`` writes a corpus and returns its path."""

    def write(documents=texts, name="corpus.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return str(path)

    return write


@pytest.fixture(scope="module")
def process_group():
    """Megatron-Core's blends ask for the rank."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
