"""The calls that a training loop makes, by name, and which orders of them are possible; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Each can be frozen and thawed: one module alone in its group, a whole block, the last module, matrices in a block.
FROZEN: Mapping[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.",),
    "block": ("model.layers.1.",),
    "head": ("lm_head.",),
    "attention": ("model.layers.0.self_attn.", "model.layers.2.self_attn."),
}
# Any time; with a runtime; with an optimizer.
ANY_TIME = (
    *("evaluate", "infer", "forward", "generate", "train", "eval", "thaw"),
    *(f"freeze {name}" for name in FROZEN),
)
WITH_RUNTIME = (
    *("forward_backward", "own_backward", "accumulate", "clip", "export", "optimizer", "runtime", "save", "load"),
    *("halve_gradients", "replace_gradients", "shrink_weights"),
    *(f"drop {name}" for name in FROZEN),
)
WITH_OPTIMIZER = ("update", "zero_grad", "zero_grad_in_place")
CALLS = (*ANY_TIME, *WITH_RUNTIME, *WITH_OPTIMIZER)


def possible(order: Iterable[str]) -> list[str]:
    """Return *order* without the calls that are not possible where they stand, such as a step without an optimizer."""
    kept: list[str] = []
    for call in order:
        ready = call in ANY_TIME or call == "runtime" or "runtime" in kept
        if call in WITH_OPTIMIZER:
            ready = "optimizer" in kept
        elif call == "load":
            saved = [index for index, earlier in enumerate(kept) if earlier == "save"]
            # A checkpoint with an optimizer is loaded with one, and one without is not.
            ready = bool(saved) and ("optimizer" in kept[: saved[-1]]) == ("optimizer" in kept)
        if ready:
            kept.append(call)
    return kept
