"""A checkpoint of format 1, as version 0.1 wrote it: of a tiny Phi-3 under tensor parallelism on two ranks.

``expected.json`` has the digests of its weights and moments, as ``checkpoint_runs.digests`` makes them, and the next
numbers that the first rank drew.
"""

from pathlib import Path

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
CONFIG = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


class Position:
    """Where a rank is in its data."""

    def __init__(self, at):
        self.at = at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]
