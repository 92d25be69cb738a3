"""Compiled blocks compute what one process computes, at every length, and are compiled a few times only.

The graphs run as torch traces them ("aot_eager"), as a CPU's compiler takes minutes for kernels of them.
"""

import warnings
from collections import Counter
from functools import partial
from unittest import mock

import attrs
import pytest
import torch
from cases import cases, slow
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint as recomputed

from nemo_dist import ContextConfig, DistributedSetup, FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import Task, checkpoint, differences, merged, reference, train_on_rank
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_fsdp2.compiled import compile_blocks
from nemo_dist_recompute.policy import selective_contexts

FULL, SELECTIVE = ({"activation_checkpointing": mode} for mode in ("full", "selective"))
TP = {"tp_size": 2}
LENGTHS = (16, 12, 20, 8)


@attrs.frozen(kw_only=True)
class Lengths(Task):
    """A task whose batches have another length in every step."""

    steps: int = len(LENGTHS)

    def batches(self, step):
        fields = attrs.asdict(self) | {"length": LENGTHS[step]}
        return Task(**fields).batches(step)


class Compiler:
    """A backend of torch.compile that counts the graphs that it makes, and how often they run."""

    def __init__(self):
        self.counts = Counter()

    def __call__(self, graph, inputs):
        self.counts["graphs"] += 1
        run = aot_eager(graph, inputs)

        def counted(*args):
            self.counts["runs"] += 1
            return run(*args)

        return counted

    def __enter__(self):
        torch._dynamo.reset()
        compile_module = nn.Module.compile
        self._patch = mock.patch.object(nn.Module, "compile", lambda module: compile_module(module, backend=self))
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


def on_rank_train(task, folder, options, config):
    with Compiler() as compiler, warnings.catch_warnings(record=True) as caught, torch._dynamo.config.patch(config):
        warnings.simplefilter("always")
        outcome = train_on_rank(task, folder, options)
    told = [str(one.message) for one in caught if "enable_compile" in str(one.message)]
    return outcome, dict(compiler.counts), told


def compiled(ranks, specimen, place, fields, config=None, **task):
    """Train on two ranks, compare with one process, and return the graphs, their runs, and what was warned of.

    *place* has the sizes of axes, and the ``method`` of ``cp``.
    """
    task = Lengths(specimen=specimen, **task)
    sizes = {name: size for name, size in place.items() if name != "method"}
    options = {
        "strategy": FSDP2Config(mp_policy=FP32, enable_compile=True, **fields),
        "parallelism_sizes": ParallelismSizes(**sizes),
        "plugins": (ContextConfig(method=place["method"]),) if "method" in place else (),
    }
    found = ranks(2).run(on_rank_train, task, checkpoint(specimen), options, config or {})
    wrong = differences(merged([outcome for outcome, _, _ in found]), reference(task))
    assert not wrong, "not what one process computes:\n" + "\n".join(wrong)
    return found[0][1].get("graphs", 0), found[0][1].get("runs", 0), found[0][2]


@cases(
    ("specimen", "place", "fields"),
    [
        ("llama-padded", {}, {}),
        slow("llama-packed", {}, {}),
        slow("llama-padded", {}, FULL),
        slow("llama-padded", {}, SELECTIVE),
        slow("llama", {}, {"offload_policy": "cpu"}),
        slow("llama-padded", TP, {}),
        slow("llama-packed", TP, {}),
        slow("gpt-oss", {}, SELECTIVE),
    ],
)
def test_whole_blocks_are_compiled_once_for_one_length_and_once_for_all(ranks, specimen, place, fields):
    blocks = SPECIMENS[specimen].config().num_hidden_layers
    assert compiled(ranks, specimen, place, fields) == (2, len(LENGTHS) * blocks, [])


@cases(
    ("specimen", "place", "fields", "task"),
    [
        slow("qwen3-moe", {}, {}, {}),
        slow("qwen3-moe", {}, {}, {"accumulate": 2}),
        slow("qwen3-moe", TP, {}, {}),
        slow("mixtral", {}, {}, {}),
        slow("gpt-oss", {}, {}, {}),
        slow("deepseek-v3", {}, SELECTIVE, {}),
        slow("deepseek-v3", {}, FULL, {}),
        slow("llama-padded", {"cp_size": 2, "method": "all_gather"}, {}, {}),
        slow("llama-packed", {"cp_size": 2, "method": "all_gather"}, {}, {}),
        slow("llama-padded", {"cp_size": 2, "method": "ulysses"}, {}, {}),
        slow("llama-padded", {"cp_size": 2, "method": "ring"}, {}, {}),
    ],
)
def test_blocks_are_compiled_around_what_cannot_be(ranks, specimen, place, fields, task):
    graphs, runs, told = compiled(ranks, specimen, place, fields, **task)
    assert 0 < graphs <= 20 and runs and not told


@pytest.mark.slow
def test_the_gradient_of_a_router_loss_is_not_that_of_an_earlier_step(ranks):
    """Even where torch would compile the backward that reads it."""
    compiled(ranks, "qwen3-moe", {}, {}, {"trace_autograd_ops": True})


@cases(
    ("specimen", "place", "fields"),
    [
        slow("qwen3-moe", {}, FULL),
        slow("qwen3-moe", {}, SELECTIVE),
        slow("llama-padded", {"cp_size": 2, "method": "all_gather"}, FULL),
        slow("llama", {"cp_size": 2, "method": "ulysses"}, SELECTIVE),
        slow("llama", {"cp_size": 2, "method": "ring"}, FULL),
        slow("llama", TP, FULL),
        slow("llama", TP, SELECTIVE),
        slow("llama", TP, FULL | {"sequence_parallel": True}),
    ],
)
def test_blocks_of_which_nothing_is_compiled_are_told(ranks, specimen, place, fields):
    graphs, _, told = compiled(ranks, specimen, place, fields)
    # With sequence parallelism, what cuts the tokens before the first block and joins them after the last is compiled.
    assert graphs == (4 if "sequence_parallel" in fields else 0) and len(told) == 1
    assert "enable_compile compiles nothing of 3 " in told[0] and "leave activation_checkpointing or" in told[0]


class Layer(nn.Module):
    """A linear layer that is run twice, or has what cannot be compiled, or both."""

    def __init__(self, recomputes, breaks):
        super().__init__()
        self.linear, self.recomputes, self.breaks = nn.Linear(4, 4), recomputes, breaks

    def run(self, hidden):
        found = self.linear(hidden)
        if self.breaks:
            torch._dynamo.graph_break()
        return found.sin()

    def forward(self, hidden):
        return recomputed(self.run, hidden, use_reentrant=False) if self.recomputes else self.run(hidden)


class Whole(Layer):
    """A layer that can be compiled, of a class of its own, as torch goes by the code."""

    def __init__(self):
        super().__init__(False, False)

    def forward(self, hidden):
        return recomputed(lambda given: self.linear(given).cos(), hidden, use_reentrant=False)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
def test_one_warning_names_the_layers_of_which_nothing_is_compiled(recomputes, breaks):
    model = nn.Sequential(Layer(recomputes, breaks), Layer(recomputes, breaks), Whole())
    nothing = recomputes and breaks
    with Compiler() as compiler, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compile_blocks(model, list(model))
        with torch.no_grad():
            model(torch.ones(2, 4))
        before = len(caught)
        for _ in range(4):
            model(torch.ones(2, 4)).sum().backward()
    told = [str(one.message) for one in caught if "enable_compile" in str(one.message)]
    assert len(told) == nothing and all("compiles nothing of 2 Layer:" in one for one in told)
    assert before == 0 and compiler.counts["graphs"]


def routed(hidden, weight):
    """Return the tokens *hidden* by the scores of their two experts, which are scaled in place as DeepSeek's are."""
    scores, chosen = (hidden @ weight).sigmoid().topk(2)
    scores /= scores.sum(-1, keepdim=True)
    return (hidden.unsqueeze(1) * scores.unsqueeze(-1) * weight.T[chosen]).sum(1)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_router_that_scales_its_choice_in_place_recomputes_selectively(compiles):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((6, 8), (8, 4)))
    wanted = torch.autograd.grad(routed(hidden, weight).sin().sum(), (hidden, weight))

    def layer(*inputs):
        return recomputed(routed, *inputs, use_reentrant=False, context_fn=partial(selective_contexts, True))

    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiles else layer
    found = torch.autograd.grad(run(hidden, weight).sin().sum(), (hidden, weight))
    torch.testing.assert_close(found, wanted)


def on_rank_train_many_blocks(lengths):
    """Return how many graphs twelve layers of two kinds have after steps of *lengths*."""
    config = SPECIMENS["gemma3"].config()
    config.layer_types = [config.layer_types[index % len(config.layer_types)] for index in range(12)]
    config.num_hidden_layers = 12
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32, enable_compile=True))
    with Compiler() as compiler, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model = SPECIMENS["gemma3"].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
        runtime, generator = setup.runtime(model), torch.Generator().manual_seed(0)
        for length in lengths:
            runtime.forward_backward(SPECIMENS["gemma3"].batch(2, length, generator))
    return compiler.counts["graphs"], len(set(config.layer_types))


@pytest.mark.slow
def test_more_blocks_and_lengths_than_torch_would_compile_share_their_graphs(ranks):
    ((graphs, kinds),) = ranks(1).run(on_rank_train_many_blocks, (16, 12, 20, 8, 9, 24, 17, 11, 13, 21))
    assert graphs == 2 * kinds
