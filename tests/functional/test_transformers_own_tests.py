"""transformers' own common and generation tests over the exported class; see CONTRIBUTING.md for how to run them."""

import importlib.util
import os
import sys
import unittest
from pathlib import Path

import pytest
import torch

from megatron_midus.hf import MidusConfig, MidusForCausalLM, MidusModel, register

DIRECTORY = os.environ.get("MIDUS_TRANSFORMERS_TESTS")
if DIRECTORY is None:
    pytest.skip("MIDUS_TRANSFORMERS_TESTS names no directory of transformers' tests", allow_module_level=True)
# They import each other as one package; its name must not be that of our own tests.
_spec = importlib.util.spec_from_file_location("their_tests", Path(DIRECTORY).resolve() / "__init__.py")
sys.modules["their_tests"] = importlib.util.module_from_spec(_spec)
common = importlib.import_module("their_tests.test_modeling_common")


class Tester:
    """What the mixins ask of a model's tester."""

    batch_size, seq_length, key_length = 3, 7, 7
    vocab_size, hidden_size, intermediate_size = 99, 32, 37
    num_hidden_layers, num_attention_heads = 2, 4
    is_training = True

    def get_config(self):
        return MidusConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            block_types=["transformer", "memory"],
            memory_num_keys=7,
            memory_topk=3,
            memory_latent_size=5,
        )

    def prepare_config_and_inputs_for_common(self):
        tokens = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class TestMidus(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MidusModel, MidusForCausalLM)
    all_generative_model_classes = (MidusForCausalLM,)

    def setUp(self):
        register()
        self.model_tester = Tester()

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = dict(super()._prepare_for_class(inputs, model_class, return_labels=return_labels))
        if return_labels and model_class is MidusForCausalLM:  # transformers knows the labels of its own classes alone
            inputs["labels"] = inputs["input_ids"]
        return inputs
