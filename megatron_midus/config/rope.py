"""Rotary position embeddings as config.json describes them: one dictionary out of every spelling, as transformers reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_midus.errors import UserError

DEFAULT_ROPE_THETA = 10000.0
# rope_type -> entries that it must have, entries that it may have. Others are of no effect in transformers.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
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
# Types whose original_max_position_embeddings may lie beside the entry.
_WITH_ORIGINAL = ("llama3", "yarn", "longrope")
_LISTS = ("short_factor", "long_factor")


def chosen_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers takes of a ``config.json``: ``rope_scaling`` where there is one, else ``rope_parameters``.

    Nothing of the other counts. Of theta: the entry in it, else ``rope_theta``, else 10000. For ``llama3``, ``yarn`` and
    ``longrope`` an ``original_max_position_embeddings`` beside it wins over one in it. ``partial_rotary_factor`` is left to
    ``rotary_percent``.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise UserError("rope_parameters that differ between layer types are not supported; only one set is")
    rope = {name: value for name, value in given.items() if value is not None and name != "type"}
    rope.setdefault("rope_type", given.get("type") or "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_ROPE_THETA)
    rope.pop("partial_rotary_factor", None)
    # Names of longrope in early files of Phi-3.
    if rope["rope_type"] == "su" or (rope["rope_type"] == "yarn" and "short_factor" in rope):
        rope["rope_type"] = "longrope"
    if rope["rope_type"] in _WITH_ORIGINAL:
        longest = config.get("max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", longest)
        if config.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        if rope["rope_type"] == "yarn" and "factor" in given and given["factor"] is None:
            rope["factor"] = longest / rope["original_max_position_embeddings"]
    return rope


def rotary_percent(config: Mapping[str, Any]) -> float:
    """Share of a head's channels that a ``config.json`` lets rotate, wherever it says so."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def check_factors(rope: Mapping[str, Any], channels: int) -> None:
    """Raises ``ValueError`` where ``longrope`` has not one factor for each pair of rotating ``channels``."""
    for name in _LISTS:
        if name in rope and len(rope[name]) != channels // 2:
            raise UserError(f"{name} of the rope scaling has {len(rope[name])} entries; {channels} channels of a head rotate, so give {channels // 2}")  # fmt: skip


def normalise_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """``rope`` with ``rope_type`` and the entries that this type knows.

    Raises:
        ValueError: a type that is not known, an entry that is missing or out of range.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UserError(f"rope scaling {kind!r} is not supported; only {', '.join(ROPE_TYPES)} are")
    required, optional = ROPE_TYPES[kind]
    missing = [name for name in required if rope.get(name) is None]
    if missing:
        raise UserError(f"rope scaling {kind!r} has no {', '.join(missing)}; the base's config.json must say it")
    kept = {name: rope[name] for name in ("rope_theta", *required, *optional) if rope.get(name) is not None}
    for name, value in kept.items():
        if name == "truncate":
            ok = isinstance(value, bool)
        elif name in _LISTS:
            ok = isinstance(value, (list, tuple)) and all(map(_is_positive, value))
        else:
            ok = _is_positive(value)
        if not ok and not (name.startswith("mscale") and value == 0):
            raise UserError(f"rope scaling {kind!r} with {name}={value!r} is not supported; it must be {'a list of positive numbers' if name in _LISTS else 'a positive number'}")  # fmt: skip
    if kind == "llama3" and not kept["low_freq_factor"] < kept["high_freq_factor"]:
        raise UserError(
            f"rope scaling 'llama3' with low_freq_factor={kept['low_freq_factor']} and high_freq_factor="
            f"{kept['high_freq_factor']} is not supported; the first must be the smaller"
        )
    return {"rope_type": kind, **kept}


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def ignored_entries(rope: Mapping[str, Any]) -> list[str]:
    """Entries of ``rope`` that its type does not know, and transformers ignores."""
    required, optional = ROPE_TYPES.get(rope.get("rope_type", "default"), ((), ()))
    known = {"rope_type", "rope_theta", *required, *optional}
    # Files of transformers 5 carry original_max_position_embeddings with every type.
    return sorted(set(rope) - known - {"original_max_position_embeddings"})
