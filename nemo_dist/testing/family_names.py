"""The families that transformers has for each loader, from its own tables."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

from nemo_dist.testing.family_cells import LOADERS

_TABLES = {
    "CausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def families(kind: str) -> list[str]:
    """Return the model types that the loader of *kind* takes, sorted."""
    return sorted(_TABLES[LOADERS[kind]])
