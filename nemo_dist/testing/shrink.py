"""Turn a transformers config into a tiny one of the same structure, by what its options are called.

Kept: which options there are, how they relate (grouped heads, experts per token, windows shorter than a row), over how
many ranks the vocabulary divides, and every kind of layer. Made small: widths, heads, layers, vocabulary, experts,
images, positions. Dropout is turned off.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from transformers import CONFIG_MAPPING, PretrainedConfig

HIDDEN, HEADS, HEAD = 64, 4, 16  # of every tower, so that what one tower hands to another fits
VOCABULARY = 128  # at most
_RANKS = 8  # a vocabulary divides over as many ranks as it did, up to these
_EXPERTS, _EXPERTS_PER_TOKEN = 4, 2
_POSITIONS = 256
_WINDOW = 8  # shorter than the rows of the tests

_HEAD_COUNT = re.compile(
    r"(num|n|swa_num|linear_num|encoder|decoder|index|indexer|mamba|num_mamba|resampler)?_?(n_)?"
    r"(attention_|self_attention_|cross_attention_|encoder_attention_|decoder_attention_|sliding_attention_|value_|mamba_)?"
    r"heads?"
)
_KEY_HEADS = re.compile(r".*(key_value_heads|kv_heads|kv_n_heads|num_key_heads)")
_HEAD_DIM = re.compile(r"(.*_)?(head_dim|d_kv|dim_head|d_head|kv_channels|attention_head_size|head_size)")
_ROTARY_HEAD_DIM = re.compile(r"qk_rope_head_dim")
_LAYERS = re.compile(
    r"(conf_)?(num|n|encoder|decoder|num_encoder|num_decoder|num_hidden)?_?(hidden_)?layers?|depth|num_blocks|num_global_layers"
    r"|resampler_depth|num_hidden_groups|num_layers_per_stack"
)
_FEW = re.compile(r"num_mtp_layers|num_nextn_predict_layers|first_k_dense_replace|num_dense_layers|n_layers_per_.*")
_PERIOD = re.compile(
    r".*_layer_period|.*layer_group_size|.*_every_n_layers|.*_interval|.*_layer_step|sliding_window_pattern|layer_group"
    r"|cross_attention_frequency"
)
_OFFSET = re.compile(r".*_layer_offset")
_VOCABULARY = re.compile(r"(.*_)?vocab(_size(_.*)?)?")
_TOKEN = re.compile(
    r".*_(token_id|token_index|token_ids|id|index)|forced_.*_id|(eos|bos|pad|unk|mask)_index|suppress_tokens"
)
_EXPERT_COUNT = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num")
_PER_TOKEN = re.compile(r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_experts_per_topk")
_GROUPS = re.compile(r"n_groups?|mamba_n_?groups|o_groups")
_INNER = re.compile(
    r".*(intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|feed_forward_size|dense_size|expert_dim|mlp_dim)(_.*)?"
    r"|d_ff|dff|dim_ff|n_inner|d_inner|hidden_dim|moe_.*_size"
)
_WIDTH = re.compile(
    r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_size|embedding_dim|output_dim|input_dim)(_.*)?"
    r"|dim|projection_dim|projector_.*_size|word_embed_proj_dim|output_proj_dims|out_hidden_size|resampler_dim|lru_width"
    r"|attention_hidden_size|image_token_embed_dim|text_hidden_size|backbone_hidden_size|adapter_.*_dim|adapter_input_size"
)
_RANK = re.compile(r".*_?(lora_rank|lowrank|_rank|rank|per_layer_input|state_size|d_state|state_dim|d_rel)")
_MOST_POSITIONS = re.compile(
    r"(max_.*position.*|n_positions|n_ctx|context_length|max_sequence_length|max_seq_len|max_source_positions"
    r"|max_target_positions|position_bias_max_distance)"
)
_WINDOWS = re.compile(
    r"(sliding_window(_size)?|.*attention_chunk_size|local_attention(_window_len)?|attention_window(_size)?|window_size"
    r"|mamba_chunk_size|chunk_size|index_topk|keep_window_size|block_size|index_block_size|.*attn_chunk_length)"
)
_DROPOUT = re.compile(r".*dropout.*|.*_pdrop|.*drop_rate|.*layerdrop|.*drop_path.*|dropout_p|dropatt")


@attrs.frozen(kw_only=True)
class Shrunk:
    """A tiny config, and what was changed that matters, a sentence for each."""

    config: Any
    changes: tuple[str, ...]


def shrink(config: Any, *, layers: int = 2) -> Shrunk:
    """Return a tiny config of the structure of *config*, with at least *layers* layers and one of every kind of layer.

    The given config is not changed. The same config always gives the same result.
    """
    ids = _Tokens()
    changes: list[str] = []
    tiny = _Shrinker(layers=layers, tokens=ids, changes=changes).config(config, "")
    return Shrunk(config=tiny, changes=tuple(dict.fromkeys(changes)))


def tiny(model_type: str, *, layers: int = 2) -> Shrunk:
    """Return the default config of the family *model_type*, made tiny."""
    return shrink(CONFIG_MAPPING[model_type](**_UNSET.get(model_type, {})), layers=layers)


# Options without which the default config of a family is no model: its class leaves them to the checkpoint.
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 512,
    "indexer_compress_ratio": 4,
}
_ONE_STREAM = {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
_SECTIONS = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
}
_SECTIONS_OF_HEADS = {"text_config": _SECTIONS["text_config"] | {"head_dim": 64}}
_UNSET: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl"), _SECTIONS_OF_HEADS),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), _SECTIONS),  # their heads are as wide as the model
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "t5": {"decoder_start_token_id": 0},
    "udop": {"decoder_start_token_id": 0},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 5e5}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "gemma4_assistant": _ONE_STREAM,
    "gemma4_unified_assistant": _ONE_STREAM,
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}


@attrs.define
class _Tokens:
    """New ids for special tokens that are not in the small vocabulary: the same for the same id, from the top down."""

    known: dict[int, int] = attrs.field(factory=dict)

    def small(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self.small(one) for one in value)
        if isinstance(value, bool) or not isinstance(value, int) or value < VOCABULARY - 32:
            return value
        return self.known.setdefault(value, VOCABULARY - _RANKS - len(self.known) % 30)


@attrs.frozen(kw_only=True)
class _Shrinker:
    layers: int
    tokens: _Tokens
    changes: list[str]

    def config(self, config: Any, where: str) -> Any:
        """Return the tiny form of *config*, which is at *where* in the whole one ("" for the whole)."""
        values = _values(config)
        kept = _kept_layers(config, values, self.layers)
        small = {name: self._value(name, value, config, values, kept, where) for name, value in values.items()}
        _agree(values, small)
        if config.is_heterogeneous:
            small["per_layer_config"] = self._layers_of_their_own(config, values, small, kept)
        self._say(config, values, small, kept, where)
        return type(config)(**small)

    def _value(self, name: str, value: Any, config: Any, values: Mapping[str, Any], kept: list[int], where: str) -> Any:
        if isinstance(value, PretrainedConfig):
            return self.config(value, f"{where}{name}.")
        if isinstance(value, Mapping) and name.endswith("config"):
            inner = dict(value)
            return {key: self._value(key, one, config, inner, kept, where) for key, one in inner.items()}
        if isinstance(value, (list, tuple)):
            return self._list(name, value, values, kept)
        return self._number(name, value, values, kept)

    def _layers_of_their_own(
        self, config: Any, values: Mapping[str, Any], small: Mapping[str, Any], kept: list[int]
    ) -> dict[str, Any]:
        """Return what differs in single layers, as large in relation to all layers as it was."""
        given = {int(index): own for index, own in config.to_dict()["per_layer_config"].items()}

        def one(name: str, value: Any, own: Mapping[str, Any]) -> Any:
            usual = values.get(name)
            if _whole(value) and _whole(usual) and usual and value % usual == 0:
                return small[name] * (value // usual)
            return self._number(name, value, {**values, **own}, kept)

        return {
            str(place): {name: one(name, value, given[index]) for name, value in given[index].items()}
            for place, index in enumerate(kept)
            if index in given
        }

    def _list(self, name: str, value: Any, values: Mapping[str, Any], kept: list[int]) -> Any:
        if _TOKEN.fullmatch(name):
            return self.tokens.small(value)
        count = _layer_count(values)
        if name == "attention_types":  # kinds, and how often they are repeated
            return [[kinds, max(1, len(kept) // len(kinds))] for kinds, _ in value]
        if count and value and _are_indices(value, count) and re.search("layer|ind?x|idx", name):
            return type(value)(place for place, index in enumerate(kept) if index in value)
        if count and len(value) == count:
            return type(value)(self._number(name, value[index], values, kept) for index in kept)
        return type(value)(self._number(name, one, values, kept) for one in value)

    def _number(self, name: str, value: Any, values: Mapping[str, Any], kept: list[int]) -> Any:
        if _DROPOUT.fullmatch(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            return type(value)(0)
        if _TOKEN.fullmatch(name):
            return self.tokens.small(value)
        if not _whole(value) or value <= 0:
            return value
        if name == _layer_name(values):
            return len(kept)
        for names, small in _RULES:
            if names.fullmatch(name):
                return small(value, name, values)
        return value

    def _say(
        self, config: Any, before: Mapping[str, Any], after: Mapping[str, Any], kept: list[int], where: str
    ) -> None:
        count = _layer_count(before)
        if count and count != len(kept):
            kinds = dict.fromkeys(map(str, after.get("layer_types") or ()))
            self.changes.append(
                f"{where}{_layer_name(before)}: {len(kept)} layers (got {count})"
                + (f", of the kinds {', '.join(kinds)}" if len(kinds) > 1 else "")
            )
        for name, value in before.items():
            if _whole(value) and value != after[name] and any(rule.fullmatch(name) for rule in _TOLD):
                self.changes.append(f"{where}{name}: {after[name]} (got {value})")


def _values(config: Any) -> dict[str, Any]:
    """Return the options of *config*: the fields of its class, and what else was given that it does not derive."""
    config = copy.deepcopy(config)
    config.allow_global_per_layer_attribute_access = True
    fields = [field.name for field in dataclasses.fields(config) if field.init and hasattr(config, field.name)]
    given = {name: getattr(config, name) for name in fields if name not in _UNRELATED}
    derived = vars(type(config)(**copy.deepcopy(given))).keys() | _UNRELATED
    more = {name: one for name, one in vars(config).items() if name not in derived and not name.startswith("_")}
    return given | more


# What a config says of files and of itself; the last two are set anew when it is made.
_UNRELATED = {"transformers_version", "dtype", "architectures", "name_or_path", "label2id"} | {
    "ignore_keys_at_rope_validation",
    "allow_global_per_layer_attribute_access",
}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_LAYER_NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "depth",
)


def _layer_name(values: Mapping[str, Any]) -> str | None:
    return next((name for name in _LAYER_NAMES if _whole(values.get(name))), None)


def _layer_count(values: Mapping[str, Any]) -> int:
    name = _layer_name(values)
    return 0 if name is None else int(values[name])


def _kept_layers(config: Any, values: Mapping[str, Any], least: int) -> list[int]:
    """Return the indices of the layers to keep, ascending: one of each kind at least, *least* in all.

    A kind is what the lists with an entry per layer say of a layer, and whether lists of indices name it. Of layers
    that share the keys and values of earlier ones there is one of each kind too.
    """
    count = _layer_count(values)
    all_lists = [v for n, v in values.items() if isinstance(v, (list, tuple)) and v and not _TOKEN.fullmatch(n)]
    named = [v for v in all_lists if _are_indices(v, count)]
    lists = [v for v in all_lists if len(v) == count and v not in named]
    dense, shared = values.get("first_k_dense_replace") or values.get("num_dense_layers") or 0, _shared(values)
    kept: dict[Any, int] = {}
    for index in range(count):
        kind = (
            *(str(one[index]) for one in lists),
            *(index in one for one in named),
            index < dense,
            index >= count - shared,
        )
        kept.setdefault(kind, index)
    chosen = set(kept.values())
    if "hybrid" in values.get("layers_block_type", ()):  # these layers share a block, which takes two of them
        chosen.update([one for one in range(count) if values["layers_block_type"][one] == "hybrid"][:2])
    wanted = max(least, _period(values))
    chosen.update(index for index in range(count) if len(chosen | set(range(index + 1))) <= wanted)
    return sorted(chosen)


def _are_indices(value: Sequence[Any], count: int) -> bool:
    """Whether *value* names some of *count* layers, in ascending order."""
    return all(map(_whole, value)) and list(value) == sorted(set(value)) and value[0] >= 0 and value[-1] < count


def _shared(values: Mapping[str, Any]) -> int:
    return int(values.get("num_kv_shared_layers") or 0)


def _period(values: Mapping[str, Any]) -> int:
    """Return how many layers show both kinds where an option says that every so many layers one is different."""
    periods = (4 for name, value in values.items() if _PERIOD.fullmatch(name) and _whole(value) and value > 1)
    patterns = (len(value) for name, value in values.items() if name == "block_types" and value)
    return max([0, *periods, *patterns])


def _heads(value: int, name: str, values: Mapping[str, Any]) -> int:
    return min(value, HEADS)


def _key_heads(value: int, name: str, values: Mapping[str, Any]) -> int:
    """Keep one head, as many as query heads, or groups."""
    return value if value <= 2 else HEADS if value == _partner(name, values) else 2


def _partner(name: str, values: Mapping[str, Any]) -> Any:
    """Return the number of heads that the key heads called *name* serve."""
    others = (name.replace("key_value_", "attention_"), name.replace("key_heads", "value_heads"), "num_attention_heads")
    found = [
        values[other] for other in (*others, "n_heads", "num_heads", "n_head") if other != name and values.get(other)
    ]
    return found[0] if found else None


def _head_dim(value: int, name: str, values: Mapping[str, Any]) -> int:
    """Keep whether the heads together are as wide as the model, wider, or narrower."""
    heads = next(
        (values[one] for one in ("num_attention_heads", "n_heads", "num_heads") if _whole(values.get(one))), None
    )
    hidden = next((values[one] for one in ("hidden_size", "d_model", "n_embd") if _whole(values.get(one))), None)
    if (
        name not in ("head_dim", "attention_head_dim")
        or heads is None
        or hidden is None
        or heads < HEADS
        or value * heads == hidden
    ):
        return HEAD
    return 2 * HEAD if value * heads > hidden else HEAD // 2


def _plain_head_dim(value: int, name: str, values: Mapping[str, Any]) -> int:
    """Keep the ratio of the values of a head without a rotation to those with one."""
    return max(1, HEAD // 2 * value // int(values.get("qk_rope_head_dim", value)))


def _width(value: int, name: str, values: Mapping[str, Any]) -> int:
    hidden = next((values[one] for one in ("hidden_size", "d_model", "n_embd") if _whole(values.get(one))), None)
    if name in ("attention_hidden_size", "lru_width") and hidden and value % hidden == 0:
        return HIDDEN * (value // int(hidden))
    narrower = name in ("embedding_size", "word_embed_proj_dim", "input_embedding_size") and hidden and value < hidden
    return HIDDEN // 2 if narrower else HIDDEN


def _at_most(most: int) -> Callable[[int, str, Mapping[str, Any]], int]:
    return lambda value, name, values: min(value, most)


def _vocabulary(value: int, name: str, values: Mapping[str, Any]) -> int:
    """Keep the rest of a division by numbers of ranks: of an uneven vocabulary some ranks have fewer rows."""
    return value if value <= VOCABULARY else VOCABULARY - -value % _RANKS


def _inner(value: int, name: str, values: Mapping[str, Any]) -> int:
    return 48 if "moe" in name or "expert" in name else 96


_RULES: tuple[tuple[re.Pattern[str], Callable[[int, str, Mapping[str, Any]], int]], ...] = (
    (_FEW, _at_most(1)),
    (re.compile("num_kv_shared_layers"), lambda value, name, values: value),
    (_PERIOD, _at_most(2)),
    (_OFFSET, _at_most(1)),
    (_VOCABULARY, _vocabulary),
    (_EXPERT_COUNT, _at_most(_EXPERTS)),
    (_PER_TOKEN, _at_most(_EXPERTS_PER_TOKEN)),
    (re.compile("topk_group"), _at_most(1)),
    (_GROUPS, _at_most(2)),
    (_KEY_HEADS, _key_heads),
    (_HEAD_COUNT, _heads),
    (_ROTARY_HEAD_DIM, _at_most(HEAD // 2)),
    (re.compile("qk_nope_head_dim"), _plain_head_dim),
    (_HEAD_DIM, _head_dim),
    (_LAYERS, _at_most(2)),
    (_INNER, _inner),
    (_RANK, _at_most(HEAD)),
    (_WIDTH, _width),
    (_WINDOWS, _at_most(_WINDOW)),
    (_MOST_POSITIONS, _at_most(_POSITIONS)),
    (re.compile("rotary_dim"), _at_most(HEAD // 2)),
    (re.compile(r".*channels?"), _at_most(HIDDEN)),
    (re.compile("image_size|img_size|force_image_size|max_image_size"), _at_most(16)),
    (re.compile("patch_size"), _at_most(4)),
)
_TOLD = (_HEAD_COUNT, _KEY_HEADS, _HEAD_DIM, _VOCABULARY, _EXPERT_COUNT, _PER_TOKEN, _WINDOWS)


def _agree(before: Mapping[str, Any], after: dict[str, Any]) -> None:
    """Make numbers fit that are products of others."""
    _fit_state_space(after)
    _fit_heads(before, after)
    if _shared(before):
        everything = _shared(before) == _layer_count(before)
        after["num_kv_shared_layers"] = _layer_count(after) if everything else _layer_count(after) // 2
    if before.get("axial_pos_embds_dim"):
        after["axial_pos_embds_dim"] = [HIDDEN // 4, HIDDEN - HIDDEN // 4]
        after["axial_pos_shape"] = [4, 6]  # rows of 24 tokens, no others
    if "num_layers_per_stack" in after:
        times = after["H_cycles"] * (after["L_cycles"] + 1)
        after["num_hidden_layers"] = after["num_layers_per_stack"] * times
    if "qk_dim_factor" in after:  # a width that is rounded up to 64 in one place, and not in another
        after["qk_dim_factor"] = 1.0


def _fit_heads(before: Mapping[str, Any], after: dict[str, Any]) -> None:
    """Make widths of heads fit that are the same, or sums of parts, and the rope that goes with them."""
    rotary = after.get("qk_rope_head_dim")
    if rotary and "qk_head_dim" in after:
        after["qk_head_dim"] = rotary + after["qk_nope_head_dim"]
    if rotary and before["qk_rope_head_dim"] == before.get("head_dim"):
        after["head_dim"] = rotary
    if _whole(before.get("indexer_head_dim")) and before["indexer_head_dim"] == before.get("head_dim"):
        after["indexer_head_dim"] = after["head_dim"]
    if _whole(before.get("query_pre_attn_scalar")):
        after["query_pre_attn_scalar"] = after.get("head_dim", HEAD)
    head = rotary or after.get("head_dim") or HEAD
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(after.get(name), Mapping):
            after[name] = _rope(after[name], after, head)


def _fit_state_space(after: dict[str, Any]) -> None:
    """Give the heads of a state-space layer the width that its expansion asks for."""
    expand = after.get("expand") or after.get("mamba_expand")
    if not expand:
        return
    for heads, dim in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("n_mamba_heads", "mamba_headdim"),
        ("num_heads", "head_dim"),
    ):
        if _whole(after.get(heads)) and dim in after:
            width = int(expand * HIDDEN)
            after[dim] = after[dim] if after[dim] == "auto" else HEAD
            after[heads] = width // HEAD
            if "mamba_d_ssm" in after:
                after["mamba_d_ssm"] = width
            return


def _rope(value: Mapping[str, Any], after: Mapping[str, Any], head: int) -> dict[str, Any]:
    """Return rope parameters for heads of *head* values; of a mapping by kind of layer, those of each kind."""
    if any(isinstance(one, Mapping) for one in value.values()):
        return {kind: _rope(one, after, head) if isinstance(one, Mapping) else one for kind, one in value.items()}
    small = dict(value)
    part = small.get("partial_rotary_factor") or after.get("partial_rotary_factor") or 1.0
    pairs = int(head * part) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(small.get(name), (list, tuple)):
            small[name] = list(small[name])[:pairs]
    if isinstance(small.get("mrope_section"), (list, tuple)):
        sections = small["mrope_section"]
        rest = [pairs * section // sum(sections) for section in sections[1:]]
        small["mrope_section"] = [pairs - sum(rest), *rest]
    return small


def leaves(config: Any) -> Iterator[Any]:
    """Yield *config* and the configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from leaves(value)
