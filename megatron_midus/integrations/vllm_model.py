"""The model that vLLM builds for MIDUS: its own wrapper around transformers, for decoders with attention-free blocks too."""

from __future__ import annotations

from unittest import mock

from vllm.model_executor.models.transformers import TransformersForCausalLM, base


class MidusForCausalLM(TransformersForCausalLM):
    """As vLLM's; blocks without an attention get no key/value cache."""

    def _create_attention_instances(self, prefix: str = "") -> None:
        # vLLM's loop takes every layer of this stage to have an attention. It is asked for one layer at a time.
        create = super()._create_attention_instances
        rank, ranks = self.pp_group.rank_in_group, self.pp_group.world_size
        for layer in range(*base.get_pp_indices(self.text_config.num_hidden_layers, rank, ranks)):
            if self.text_config.has_attention(layer):
                with mock.patch.object(base, "get_pp_indices", return_value=(layer, layer + 1)):
                    create(prefix)
