"""A tiny random Llama with a byte tokenizer, in memory and as a directory."""

import pytest
from llama_of_bytes import ByteTokenizer, make_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def llama():
    return make_llama()


@pytest.fixture(scope="session")
def byte_tokenizer():
    return ByteTokenizer()


@pytest.fixture
def model_directory(tmp_path):
    """``model_directory(name, seed=0, shard="1GB", **config changes)`` saves a model and its tokenizer."""

    def make(name="model", *, seed=0, shard="1GB", **changes):
        directory = tmp_path / name
        make_llama(seed, **changes).save_pretrained(directory, max_shard_size=shard)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: index for index, character in enumerate([*alphabet, "<s>", "</s>"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(directory)
        return directory

    return make
