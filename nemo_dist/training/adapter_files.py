"""Write adapters as PEFT does, with the weights of the model that are saved beside them gathered from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from nemo_dist.checkpoint.chunks import assemble, survey
from nemo_dist.checkpoint.safetensors_writer import DTYPE_OF
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.checkpoint.state_dict import model_state

_OF = "/"  # between the name of an adapter and that of a tensor in its file


@attrs.frozen(eq=False)
class AdapterFiles:
    """``save_pretrained`` of the PEFT models that are the parts of *sharded*.

    ``staged``: the parts are stages of a pipeline. ``original`` is what PEFT does, for the first part of this rank.
    """

    sharded: ShardedModel
    staged: bool
    original: Callable[..., None]

    def __call__(
        self,
        save_directory: Any,
        *,
        is_main_process: bool | None = None,
        save_embedding_layers: bool | str = False,
        **others: Any,
    ) -> None:
        """Write the adapters of all parts as PEFT does, from the first rank or the main one; all ranks must call this.

        ``others`` are PEFT's keywords. Raises ValueError where the embedding layers are asked for, which are shards.
        """
        if save_embedding_layers not in (False, "auto"):
            raise ValueError("save_embedding_layers=True asks for weights of the model, which runtime.export writes")
        ranks = self.sharded.ranks
        writes = ranks.first if is_main_process is None else is_main_process
        names, whole = self._gathered(writes)
        with ranks.agreed("saving the adapters"):
            if writes:
                own = {name: whole[label] for label, name in names.items()}
                self.original(save_directory, state_dict=own, save_embedding_layers=False, **others)
                if self.staged:  # PEFT has written one stage alone
                    _write(Path(save_directory), whole)

    def _gathered(self, writes: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Return the names in the model of what PEFT saves of the first part, and, if this rank writes, all values.

        Both by the adapter and the name in its file.
        """
        ranks, names = self.sharded.ranks, list[dict[str, str]]()

        def collected() -> Mapping[str, Tensor]:
            state = model_state(self.sharded)
            names.extend(_saved(part, state) for part in self.sharded.parts)
            return {label: state[name] for found in names for label, name in found.items()}

        state, entries = survey(ranks, "collecting the adapters", collected)
        writing = ranks.collect("saving the adapters", lambda: writes)
        dtypes = {label: DTYPE_OF[entry.dtype] for label, entry in entries.items()}
        wanted = [sorted(entries) if one else [] for one in writing]
        return names[0], assemble(ranks, wanted, state, entries, dtypes)


def _saved(part: Any, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names in *state*, that of the model, of what PEFT saves of *part*."""
    from peft.utils import get_peft_model_state_dict

    own = {name: state[name] for name in part.state_dict() if name in state}
    name_of = {id(value): name for name, value in own.items()}
    return {
        f"{adapter}{_OF}{label}": name_of[id(value)]
        for adapter in part.peft_config
        for label, value in get_peft_model_state_dict(
            part, state_dict=own, adapter_name=adapter, save_embedding_layers=False
        ).items()
    }


def _write(folder: Path, whole: Mapping[str, Tensor]) -> None:
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    files: dict[str, dict[str, Tensor]] = {}
    for label, value in whole.items():
        adapter, _, name = label.partition(_OF)
        files.setdefault(adapter, {})[name] = value
    for adapter, contents in files.items():
        path = folder if adapter == "default" else folder / adapter
        if path.exists():  # else it was not selected
            save_file(contents, path / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def keeps_weights_of_the_model(config: Any) -> bool:
    """Whether PEFT saves weights of the model, of which ranks have shards, with the adapters of *config*."""
    return bool(getattr(config, "modules_to_save", None)) or getattr(config, "bias", "none") != "none"
