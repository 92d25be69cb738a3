"""Make the parts of a model tensor-parallel in place: match the plan, check it, shard parameters, replace forwards."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn
from torch.distributed.tensor import Placement
from transformers.pytorch_utils import Conv1D

from nemo_dist.errors import TopologyError
from nemo_dist.hf_model import inner_model
from nemo_dist.mesh.store_consensus import consensus
from nemo_dist.planning.mesh_plan import Role
from nemo_dist_tensor import layers, parameter_sharding
from nemo_dist_tensor.attention_heads import AttentionHeads
from nemo_dist_tensor.block_structure import Blocks
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.install import Installer
from nemo_dist_tensor.random_choices import random_problems
from nemo_dist_tensor.structure import completed
from nemo_dist_tensor.styles import COLUMN, EMBEDDING, GATHERED, ROW
from nemo_dist_tensor.tp_plan import Rules, generic, match, problems
from nemo_dist_tensor.vocab_parallel_loss import VocabularyParallelLoss, can_stay_cut

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist_tensor.config import TensorConfig

_SHARDED_OUTPUTS = ("output_hidden_states", "output_attentions")  # no rank has these whole


def apply_tensor_parallelism(parts: list[nn.Module], mesh: MeshContext, config: TensorConfig) -> None:
    """Shard the *parts*, transformers models on meta, in place; raise TopologyError with every reason not to."""
    peers = Peers.along(mesh["tp"])
    stage, experts = mesh.size(Role.LAYERS) > 1, mesh.ep_size > 1
    models = [inner_model(part) for part in parts]
    matched = [match(part, config.tp_plan or {}, stage=stage, skip_experts=experts) for part in models]
    found = _unused(matched, mesh)
    if not found:
        size, experts_too = peers.size, not experts
        both = [
            completed(part, rules, size, experts_too, config.sequence_parallel)
            for part, rules in zip(models, matched, strict=True)
        ]
        matched, found = [rules for rules, _ in both], [line for _, lines in both for line in lines]
    if not stage:  # a stage of a pipeline need not have a block
        found += [problem for part, rules in zip(models, matched, strict=True) for problem in problems(part, rules)]
    if found:
        raise TopologyError(found)
    for part, rules in zip(models, matched, strict=True):
        Parallelizer(part, rules, peers, config.sequence_parallel).run()


def _unused(matched: list[Rules], mesh: MeshContext) -> list[str]:
    """Say which of the user's rules match nothing in any part; the ranks of all pipeline stages take part."""
    hints = {rule: hint for rules in matched for rule, hint in rules.unused.items()}
    unused = sorted(rule for rule in hints if all(rule in rules.unused for rules in matched))
    if mesh.size(Role.LAYERS) > 1:
        unused = consensus("the tensor-parallel plan", unused, lambda lists: sorted(set.intersection(*map(set, lists))))
    return [
        f"tp_plan has a rule for {rule!r}, which names no module or parameter of the model{hints.get(rule, '')}"
        for rule in unused
    ]


@attrs.frozen(eq=False)
class Parallelizer:
    """Make one model tensor-parallel by its rules, over the ranks *peers*."""

    model: Any
    rules: Rules
    peers: Peers
    sequence: bool

    def run(self) -> None:
        """Change the model in place; raise TopologyError with every reason before anything is changed."""
        problems = self.problems()
        if problems:
            raise TopologyError(problems)
        blocks, installer, placements = self._blocks, self._installer, self.placements()
        regions = blocks.install(self.peers, self.sequence)
        parameter_sharding.shard(self.model, placements, self.peers)
        state = self._keep_logits_cut()
        installer.install(regions, state)
        self.model.register_forward_pre_hook(self._refuse_sharded_outputs, with_kwargs=True)

    @property
    def _blocks(self) -> Blocks:
        return Blocks.of(self.model, self.rules)

    @property
    def _installer(self) -> Installer:
        return Installer(self.model, self.model.config, self.rules, self.peers)

    def placements(self) -> dict[str, Placement | None]:
        """Return how every parameter that a rule names is sharded; None leaves it whole."""
        return self._installer.placements()

    def problems(self) -> list[str]:
        """Say why the rules do not fit the model on this number of ranks, one sentence each; nothing is changed."""
        placements = self.placements()
        return [
            *self._misfits(),
            *self._packed(placements),
            *parameter_sharding.tie_problems(self.model, placements),
            *random_problems(self.model),
            *(self._blocks.problems() if self.sequence else ()),
        ]

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _misfits(self) -> list[str]:
        """Say which modules do not fit their rule, and which numbers of heads do not divide over the ranks."""
        found = []
        for name, style in self.rules.modules.items():
            module = self._module(name)
            kind = nn.Linear if style in COLUMN | ROW else nn.Embedding if style in EMBEDDING else nn.Module
            if not isinstance(module, (kind, Conv1D) if kind is nn.Linear else kind):
                found.append(
                    f"{generic(name)} is a {type(module).__name__}, which the style {style!r} does not fit; "
                    f"it fits nn.{kind.__name__}"
                )
            elif kind is not nn.Module and "weight" not in module._parameters:
                own = ", ".join(parameter for parameter, _ in module.named_parameters())
                found.append(
                    f"{generic(name)} computes its weight from others ({own}), as weight_norm and pruning do, and "
                    f"the style {style!r} cuts only a weight of its own; leave that out, or use tp_size=1, and fsdp2"
                )
            elif isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
                found.append(f"{generic(name)} uses max_norm, scale_grad_by_freq or sparse, so it cannot be cut")
            elif style == "colwise":
                heads = AttentionHeads.of(self._module(name.rpartition(".")[0]), self.peers.size)
                found += [f"{type(self.model).__name__}: {heads.problem}"] if heads and heads.problem else []
        return list(dict.fromkeys(found))  # one for all layers

    def _packed(self, placements: Mapping[str, Placement | None]) -> list[str]:
        """Say which packed parameters cannot be sharded."""
        problems = [
            parameter_sharding.packed_problem(name, self.model.get_parameter(name), placement, self.peers.size)
            for name, placement in placements.items()
            if placement is not None
        ]
        return [problem for problem in problems if problem]

    def _keep_logits_cut(self) -> layers.LMHead | None:
        """Keep the logits sharded along the vocabulary whenever the model is called with labels and computes the loss.

        Returns None where the logits are always gathered: the plan does not gather them, or the loss is another one.
        """
        head = self.model.get_output_embeddings()
        name = next((name for name, module in self.model.named_modules() if module is head), None)
        forward = inspect.unwrap(type(self.model).forward)
        calls_loss = "loss_function" in forward.__code__.co_names
        if self.rules.modules.get(name or "") not in GATHERED or not calls_loss:
            return None
        if not self.rules.logits_stay_cut or not can_stay_cut(self.model.loss_function):
            return None
        self.model.loss_function = VocabularyParallelLoss(self.peers, self.model.loss_function)
        state, signature = layers.LMHead(), inspect.signature(self.model.forward)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state.stays_cut = signature.bind_partial(*args, **kwargs).arguments.get("labels") is not None

        def after(*_: Any) -> None:
            state.stays_cut = False

        self.model.register_forward_pre_hook(before, with_kwargs=True)
        self.model.register_forward_hook(after, always_call=True)
        return state

    def _refuse_sharded_outputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError when the caller asks for outputs of which every rank has only a part."""
        for option in _SHARDED_OUTPUTS:
            asked = kwargs.get(option)
            if asked or (asked is None and getattr(self.model.config, option, False)):
                raise ValueError(
                    f"{option} is not available with tp_size={self.peers.size}: no rank has more than its own heads or "
                    f"tokens; leave it out"
                )
