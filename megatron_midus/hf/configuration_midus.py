"""MidusConfig: a Llama-style decoder some of whose blocks are Memory blocks. Travels inside every exported model."""

from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLOCK_TYPES = ("transformer", "memory")
LAYER_TYPES = ("full_attention", "sliding_attention")
CHOICES = {
    "norm_placement": ("pre", "post", "both"),
    "memory_variant": ("hive", "full", "block"),
    "memory_query": ("attention", "token", "sum", "concat", "block"),
    "memory_query_norm": ("none", "rms"),
    "memory_score_activation": ("softmax", "sigmoid", "relu"),
    "memory_output_projection": ("none", "linear", "attention", "silu"),
    "memory_key_init": ("uniform", "normal", "calibrated"),
    "memory_attention": ("attn_prime", "full", "none"),
}
# rope_type -> entries of rope_parameters that it needs, entries that it may have, beside rope_theta
ROPE_TYPES = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
LISTS = ("short_factor", "long_factor")  # entries with one number for each pair of rotating channels
DEFAULT_ROPE_THETA = 10000.0
AUTO_MAP = {
    "AutoConfig": "configuration_midus.MidusConfig",
    "AutoModel": "modeling_midus.MidusModel",
    "AutoModelForCausalLM": "modeling_midus.MidusForCausalLM",
}


def choose_rope(rope_parameters, rope_scaling, rope_theta):
    """One of the two descriptions of rotary embeddings, with its theta, as transformers chooses.

    ``rope_scaling``, the name of transformers 4, wins where it says anything; nothing of the other counts then.
    """
    given = {
        "rope_type" if key == "type" else key: value for key, value in (rope_scaling or rope_parameters or {}).items()
    }
    if given.get("rope_theta") is None:
        given["rope_theta"] = DEFAULT_ROPE_THETA if rope_theta is None else rope_theta
    if rope_scaling and any(given.get(key) != value for key, value in (rope_parameters or {}).items() if key != "type"):
        logger.warning(f"rope_scaling={rope_scaling} takes the place of rope_parameters={rope_parameters}")
    return given


def normalise_rope(rope, max_position_embeddings):
    """``{rope_type, rope_theta, ...}`` with what this type knows; other entries are of no effect, as in transformers.

    Raises:
        ValueError: a type that is not supported, an entry that is missing or out of range.
    """
    rope = rope or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters that differ between layer types are not supported; give one set")
    given = {key: value for key, value in rope.items() if value is not None}
    rope_type = given.get("rope_type") or given.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not supported; choose one of {list(ROPE_TYPES)}")
    partial = given.pop("partial_rotary_factor", 1.0)
    if not is_positive(partial) or partial > 1:
        raise ValueError(f"partial_rotary_factor={partial!r} is out of range; give a number above 0 and at most 1")
    if rope_type in ("llama3", "yarn", "longrope"):
        given.setdefault("original_max_position_embeddings", max_position_embeddings)
    if rope_type == "yarn" and "factor" in rope and rope["factor"] is None:
        given["factor"] = max_position_embeddings / given["original_max_position_embeddings"]
    required, optional = ROPE_TYPES[rope_type]
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"rope_type={rope_type!r} needs {missing} in rope_parameters")
    unknown = sorted(set(given) - {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *required, *optional})  # fmt: skip
    if unknown:
        logger.warning(f"rope_type={rope_type!r} does not know {unknown}; they are dropped from rope_parameters")
    kept = {key: given[key] for key in ("rope_theta", *required, *optional) if key in given}
    for key, value in kept.items():
        if key in LISTS:
            ok = isinstance(value, (list, tuple)) and all(map(is_positive, value))
        else:
            # mscale may be 0, which says nothing
            ok = (
                isinstance(value, bool) if key == "truncate" else is_positive(value) or ("mscale" in key and value == 0)
            )
        if not ok:
            raise ValueError(f"{key}={value!r} of rope_type={rope_type!r} is out of range; give a positive number")
    if rope_type == "llama3" and not kept["low_freq_factor"] < kept["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor={kept['low_freq_factor']} must be smaller than high_freq_factor={kept['high_freq_factor']}"
        )
    partly = {} if partial == 1.0 else {"partial_rotary_factor": float(partial)}
    return {"rope_type": rope_type, **kept, "rope_theta": float(kept["rope_theta"]), **partly}


def is_positive(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


class MidusConfig(PretrainedConfig):
    """Configuration of a MIDUS model (Memory-Infused Depth Up-Scaling, Kim et al., arXiv 2512.13751).

    The fields of ``LlamaConfig`` mean what they mean there. ``num_hidden_layers`` counts all blocks, base and inserted;
    each of them that has an attention owns one slot of the KV cache.

    Args:
        head_dim: channels of one attention head; hidden_size / num_attention_heads when absent.
        rope_theta, rope_scaling, rope_parameters: the old and the new way to describe rotary embeddings; either will
            do, ``rope_scaling`` wins. Types ``default``, ``linear``, ``dynamic``, ``llama3``, ``yarn`` and ``longrope``; with
            ``partial_rotary_factor`` the first channels of a head rotate and the others stay.
        attention_bias: whether the query, key and value projections have a bias (Qwen2).
        attention_output_bias: whether the attention's output projection has a bias.
        qk_norm: whether queries and keys are RMS-normalised per head before they are rotated (Qwen3).
        qk_norm_width: whether ``qk_norm`` has one norm over all heads instead (OLMo 2).
        mlp_bias: whether the matrices of the MLP have biases.
        norm_placement: ``pre``, ``post`` (a norm behind each branch, none before it: OLMo 2) or ``both`` (Gemma 2, 3).
        zero_centered_norm: whether norms multiply by ``1 + weight`` (Gemma).
        wide_norm: whether norms are rounded to 16 bits after the weight is applied (OLMo).
        wide_rotary: whether queries and keys turn in fp32 and are rounded afterwards (OLMo).
        embedding_multiplier: factor on the embedding's output (Granite, Gemma).
        round_embedding_multiplier: whether it is rounded to the weights' dtype first, and a part of the embedding (Gemma).
        attention_multiplier: factor on attention scores; 1 / sqrt(head_dim) when absent.
        attn_logit_softcapping: bound c of attention scores x, which become c * tanh(x / c) (Gemma 2); ``None`` = none.
        residual_multiplier: factor on what a branch of a block adds (Granite).
        logits_scaling: what logits are divided by (Granite).
        final_logit_softcapping: bound of logits, in the same way, before they are divided (Gemma 2); ``None`` = none.
        rope_layers: per block whether queries and keys rotate (SmolLM3); all when absent.
        layer_types: per block ``full_attention`` or ``sliding_attention``; all slide when absent and ``sliding_window`` is given.
        local_rope_theta: theta of the sliding blocks, whose rotary embedding is not scaled (Gemma 3); as the others when absent.
        sliding_window: tokens that attention looks back, its own included; ``None`` = all.
        num_experts: experts of a Transformer block, which has a mixture of them in place of its MLP (Qwen3-MoE, Mixtral);
            ``None`` = one MLP.
        num_experts_per_tok: experts that one token is sent to.
        moe_intermediate_size: width of one expert; ``intermediate_size`` when absent.
        norm_topk_prob: whether the weights of the chosen experts are made to sum to 1.
        router_aux_loss_coef: of the load-balancing loss that the base was trained with; not used here.
        router_scores_in_fp32: whether weights of experts stay in fp32 (Mixtral) or take the model's dtype (Qwen3-MoE).
        block_types: ``"transformer"`` or ``"memory"`` for each block in order; all ``"transformer"`` when absent.
        memory_variant: value bank: ``hive`` (latent bank shared by the heads, one projection per head), ``full`` (a
            bank per head) or ``block`` (one memory per block, head outputs summed).
        memory_num_keys: sub-keys per half; a memory has that many squared slots.
        memory_topk: slots that one head reads for one token.
        memory_latent_size: width of the latent value bank (``hive``).
        memory_num_heads: query slices of variant ``block``; ``num_attention_heads`` when absent.
        memory_query: what a head asks with: ``attention`` (its output), ``token`` (its slice of the block's normed input),
            ``sum`` or ``concat`` (both, each of RMS 1), ``block`` (its slice of the norm of input + attention).
        memory_query_norm: ``none`` or ``rms``.
        memory_query_scale: start of the scale of ``rms``, in a model made from scratch.
        memory_query_temperature: whether each head has a learnt temperature.
        memory_score_activation: ``softmax``, ``sigmoid`` or ``relu``.
        memory_output_projection: ``none``, ``linear`` (mixer of what memory heads read), ``attention`` (of what attention
            heads put out) or ``silu`` (gate).
        memory_domain_gate: whether what the memory says is weighted by the probability, a fixed function of the block's
            normed input, that the token belongs to the new domain.
        memory_key_init: how sub-keys start in a model made from scratch (``calibrated`` ones come with the weights).
        memory_attention: ``attn_prime`` (no output projection), ``full`` or ``none`` (no attention).

    Raises:
        ValueError: a field is out of range or does not fit the others; one line that names the value and the remedy.
    """

    model_type = "midus"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Memory blocks stay whole on every rank: their attention is named mem_attn so that these patterns miss it.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        rope_theta=None,
        rope_scaling=None,
        rope_parameters=None,
        attention_bias=False,
        attention_output_bias=False,
        attention_dropout=0.0,
        qk_norm=False,
        qk_norm_width=False,
        mlp_bias=False,
        norm_placement="pre",
        zero_centered_norm=False,
        wide_norm=False,
        wide_rotary=False,
        embedding_multiplier=1.0,
        round_embedding_multiplier=False,
        attention_multiplier=None,
        attn_logit_softcapping=None,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        final_logit_softcapping=None,
        rope_layers=None,
        layer_types=None,
        local_rope_theta=None,
        sliding_window=None,
        num_experts=None,
        num_experts_per_tok=2,
        moe_intermediate_size=None,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        router_scores_in_fp32=False,
        block_types=None,
        memory_variant="hive",
        memory_num_keys=64,
        memory_topk=8,
        memory_latent_size=32,
        memory_num_heads=None,
        memory_query="attention",
        memory_query_norm="none",
        memory_query_scale=1.0,
        memory_query_temperature=False,
        memory_score_activation="softmax",
        memory_output_projection="none",
        memory_domain_gate=False,
        memory_key_init="uniform",
        memory_attention="attn_prime",
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // max(num_attention_heads, 1) if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        rope = choose_rope(rope_parameters, rope_scaling, rope_theta)
        # Beside the description, as Phi-3 has it, it wins over the one in it.
        original = kwargs.pop("original_max_position_embeddings", None)
        partial = kwargs.pop("partial_rotary_factor", None)
        if partial is not None:
            rope.setdefault("partial_rotary_factor", partial)
        self.rope_parameters = rope if original is None else {**rope, "original_max_position_embeddings": original}
        self.attention_bias = attention_bias
        self.attention_output_bias = attention_output_bias
        self.attention_dropout = attention_dropout
        self.qk_norm = qk_norm
        self.qk_norm_width = qk_norm_width
        self.mlp_bias = mlp_bias
        self.norm_placement = norm_placement
        self.zero_centered_norm = zero_centered_norm
        self.wide_norm = wide_norm
        self.wide_rotary = wide_rotary
        self.embedding_multiplier = embedding_multiplier
        self.round_embedding_multiplier = round_embedding_multiplier
        self.attention_multiplier = attention_multiplier
        self.attn_logit_softcapping = attn_logit_softcapping
        self.residual_multiplier = residual_multiplier
        self.logits_scaling = logits_scaling
        self.final_logit_softcapping = final_logit_softcapping
        self.rope_layers = rope_layers
        if layer_types is not None:
            self.layer_types = layer_types  # where there is none, transformers takes the attribute's absence for it
        self.local_rope_theta = local_rope_theta
        self.sliding_window = sliding_window
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = intermediate_size if moe_intermediate_size is None else moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_scores_in_fp32 = router_scores_in_fp32
        self.block_types = ["transformer"] * num_hidden_layers if block_types is None else list(block_types)
        self.memory_variant = memory_variant
        self.memory_num_keys = memory_num_keys
        self.memory_topk = memory_topk
        self.memory_latent_size = memory_latent_size
        self.memory_num_heads = memory_num_heads
        self.memory_query = memory_query
        self.memory_query_norm = memory_query_norm
        self.memory_query_scale = memory_query_scale
        self.memory_query_temperature = memory_query_temperature
        self.memory_score_activation = memory_score_activation
        self.memory_output_projection = memory_output_projection
        self.memory_domain_gate = memory_domain_gate
        self.memory_key_init = memory_key_init
        self.memory_attention = memory_attention
        self.check()

        kwargs.pop("auto_map", None)  # a hub prefix in it would make a local copy load its code from the hub
        if kwargs.get("architectures") is None:
            kwargs["architectures"] = ["MidusForCausalLM"]
        # transformers 4 takes these as arguments, 5.0 as extra attributes, later 5.x as fields of its own: both ways.
        tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **tokens, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        for name, value in tokens.items():
            setattr(self, name, value)
        self.auto_map = dict(AUTO_MAP)

    # -- rotary embedding: rope_parameters is the one truth, the names of transformers 4 are views of it --------------
    def __setattr__(self, key, value):
        # from_pretrained(..., rope_parameters=...) sets the attribute; one without theta leaves theta as it is.
        if key == "rope_parameters":
            value = dict(value or {})
            if value.get("rope_theta") is None:
                value["rope_theta"] = self.__dict__.get(key, {}).get("rope_theta", DEFAULT_ROPE_THETA)
            value = normalise_rope(value, self.max_position_embeddings)
        super().__setattr__(key, value)

    @property
    def rope_theta(self):
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value):
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    @property
    def rope_scaling(self):
        """The entries of ``rope_parameters`` but for theta; ``None`` without scaling."""
        scaling = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        return None if scaling["rope_type"] == "default" else scaling

    @rope_scaling.setter
    def rope_scaling(self, value):
        self.rope_parameters = value

    def rotary_channels(self):
        """Channels of a head that rotate, its first ones."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def logit_scale(self):
        """What vLLM, which computes the logits itself, multiplies them by."""
        return 1.0 / self.logits_scaling

    def to_dict(self):
        """As the base class; with rope_theta and rope_scaling for readers that know the names of transformers 4."""
        return {**super().to_dict(), "rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}

    # -- what differs between blocks --------------------------------------------------------------------------------------
    @property
    def is_mixed(self):
        """Whether some blocks slide and others do not."""
        return getattr(self, "layer_types", None) is not None

    def slides(self, block):
        """Whether the attention of block ``block`` has a window."""
        if not self.is_mixed:
            return self.sliding_window is not None
        return self.layer_types[block] == "sliding_attention"

    def rotates(self, block):
        """Whether queries and keys of block ``block`` rotate."""
        return self.rope_layers is None or bool(self.rope_layers[block])

    # -- memory ------------------------------------------------------------------------------------------------------
    @property
    def num_memory_blocks(self):
        return self.block_types.count("memory")

    def num_lookup_heads(self):
        """Heads of one memory that look something up."""
        return self.memory_num_heads or self.num_attention_heads

    def memory_context_width(self):
        """Channels that the attention hands to the memory, all heads together; without an attention none."""
        widths = {"attn_prime": self.num_attention_heads * self.head_dim, "full": self.hidden_size, "none": 0}
        return widths[self.memory_attention]

    def memory_query_width(self):
        """Channels that all memory heads cut into their queries; those of ``concat`` see this many of either kind."""
        return self.hidden_size if self.memory_query in ("token", "block") else self.memory_context_width()

    def memory_query_size(self):
        """Channels of the query of one of these heads."""
        return self.memory_query_width() // self.num_lookup_heads() * (2 if self.memory_query == "concat" else 1)

    def has_attention(self, block):
        """Whether block ``block`` has an attention."""
        return self.block_types[block] != "memory" or self.memory_attention != "none"

    def memory_parameter_shapes(self):
        """``{name: shape}`` of the parameters of one memory."""
        heads, query, out = (
            self.num_lookup_heads(),
            self.memory_query_size(),
            self.hidden_size // self.num_attention_heads,
        )
        num_keys, latent = self.memory_num_keys, self.memory_latent_size
        shapes = {"row_keys": (heads, num_keys, query // 2), "col_keys": (heads, num_keys, query // 2)}
        if self.memory_variant == "hive":
            shapes.update(value_bank=(num_keys**2, latent), head_proj=(heads, latent, out))
        elif self.memory_variant == "full":
            shapes.update(value_bank=(heads, num_keys**2, out))
        else:
            shapes.update(value_bank=(num_keys**2, self.hidden_size))
        if self.memory_attention == "full":
            shapes["attn_proj"] = (self.hidden_size, self.num_attention_heads * self.head_dim)
        if self.memory_query == "block":
            shapes["block_norm"] = (self.hidden_size,)
        if self.memory_query_norm == "rms":
            shapes["query_norm"] = (heads, query)
        if self.memory_query_temperature:
            shapes["log_temperature"] = (heads,)
        if self.memory_output_projection == "linear":
            shapes["mixer"] = (self.hidden_size, self.hidden_size)
        elif self.memory_output_projection == "attention":
            shapes["mixer"] = (self.memory_context_width(), self.hidden_size)
        elif self.memory_output_projection == "silu":
            shapes["gate"] = (heads, query, out)
        if self.memory_domain_gate:
            shapes.update(domain_gate=(self.hidden_size,), domain_gate_bias=(1,))
        return shapes

    # -- validation --------------------------------------------------------------------------------------------------
    def check(self):
        """Raises ``ValueError`` when the fields do not describe a model."""
        self.rope_parameters = self.rope_parameters  # its entries may have been changed
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "moe_intermediate_size", "memory_num_keys", "memory_latent_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.num_experts is not None and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is out of range; choose 1 to num_experts={self.num_experts}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs of channels")
        channels = self.rotary_channels()
        if channels < 2:
            raise ValueError(
                f"partial_rotary_factor leaves {channels} channels of {self.head_dim} to rotate; give more"
            )
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None and not is_positive(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number above 0, or None for no bound")
        for name in LISTS:
            if name in self.rope_parameters and len(self.rope_parameters[name]) != channels // 2:
                raise ValueError(f"{name} has {len(self.rope_parameters[name])} entries; give {channels // 2}, one for each pair of rotating channels")  # fmt: skip
        if self.head_dim == 2 and self.rope_parameters["rope_type"] == "dynamic":
            raise ValueError("head_dim=2 does not go with rope_type='dynamic'; choose another type")
        unknown = sorted(set(self.block_types) - set(BLOCK_TYPES))
        if unknown:
            raise ValueError(f"block_types has {unknown}; choose from {list(BLOCK_TYPES)}")
        if len(self.block_types) != self.num_hidden_layers:
            raise ValueError(
                f"block_types names {len(self.block_types)} blocks and num_hidden_layers={self.num_hidden_layers}; "
                "they must agree"
            )
        for name in ("rope_layers", "layer_types"):
            layers = getattr(self, name, None)
            if layers is not None and len(layers) != self.num_hidden_layers:
                raise ValueError(f"{name} names {len(layers)} blocks and num_hidden_layers={self.num_hidden_layers}; they must agree")  # fmt: skip
        kinds = getattr(self, "layer_types", None) or ()
        unknown = sorted(set(kinds) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types has {unknown}; choose from {list(LAYER_TYPES)}")
        if "sliding_attention" in kinds and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention and sliding_window=None; give the window")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {list(choices)}")
        self._check_memory()

    def _check_memory(self):
        if not 1 <= self.memory_topk <= self.memory_num_keys:
            raise ValueError(
                f"memory_topk={self.memory_topk} is out of range; choose 1 to memory_num_keys={self.memory_num_keys}"
            )
        if self.memory_num_heads is not None and self.memory_num_heads < 1:
            raise ValueError(f"memory_num_heads={self.memory_num_heads} must be at least 1")
        if self.memory_num_heads is not None and self.memory_variant != "block":
            raise ValueError(
                f"memory_num_heads={self.memory_num_heads} is a setting of variant block; "
                f"variant {self.memory_variant} has one memory head per attention head"
            )
        if self.memory_variant == "block" and self.memory_output_projection != "none":
            raise ValueError(
                f"memory_output_projection={self.memory_output_projection} does not apply to variant block; choose none"
            )
        self._check_query()
        if not self.num_memory_blocks:
            return
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                "a Memory block writes hidden_size / num_attention_heads channels per head"
            )
        if self.memory_query in ("sum", "concat") and self.memory_context_width() != self.hidden_size:
            raise ValueError(
                f"memory_query={self.memory_query} needs heads of hidden_size / num_attention_heads channels, and "
                f"head_dim={self.head_dim}; choose memory_attention=full or another memory_query"
            )
        heads, width = self.num_lookup_heads(), self.memory_query_width()
        if width % heads or self.memory_query_size() % 2:
            raise ValueError(
                f"memory_num_heads={heads} does not cut the query of {width} channels into even slices; "
                "choose a divisor of half of it"
            )

    def _check_query(self):
        mixes_attention = self.memory_output_projection == "attention"
        reads_attention = self.memory_query != "token" or mixes_attention
        if reads_attention != (self.memory_attention != "none"):
            raise ValueError(
                f"memory_attention={self.memory_attention} does not go with memory_query={self.memory_query} and "
                f"memory_output_projection={self.memory_output_projection}; choose memory_attention=none exactly where "
                "neither of them reads the attention"
            )
        if self.memory_domain_gate and self.norm_placement != "pre":
            raise ValueError(f"memory_domain_gate does not go with norm_placement={self.norm_placement}, whose norm undoes it; leave it out")  # fmt: skip
        if self.memory_query == "block" and (self.norm_placement != "pre" or self.residual_multiplier != 1.0):
            raise ValueError(
                f"memory_query=block does not go with norm_placement={self.norm_placement} and residual_multiplier="
                f"{self.residual_multiplier}; choose another memory_query"
            )
        if self.memory_query == "block" and self.memory_attention != "full":
            raise ValueError(
                f"memory_query=block does not go with memory_attention={self.memory_attention}; choose memory_attention=full"
            )


MidusConfig.register_for_auto_class()
