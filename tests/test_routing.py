"""The router loss of a step is that of one process on all of its tokens, whatever the strategy."""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from setups import DATA_PARALLEL

from nemo_dist import DistributedSetup, MeshContext, ParallelismSizes
from nemo_dist.losses import CrossEntropy
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.router_aux_loss import RouterLoss


@pytest.mark.parametrize("specimen", ["qwen3-moe", "qwen3-moe-padded"])
@pytest.mark.parametrize("strategy", DATA_PARALLEL)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_strategy_computes_the_router_loss_of_all_tokens(ranks, specimen, strategy, accumulate):
    assert_equivalent(ranks(4), Task(specimen=specimen, accumulate=accumulate), **DATA_PARALLEL[strategy])


def test_a_batch_may_turn_the_router_loss_off(ranks):
    """Then the loss of a step is the mean over labels alone."""
    losses = ranks(2).run(on_rank_losses, checkpoint("qwen3-moe"))

    for on, off, default in losses:
        assert on == default
        assert off == pytest.approx(plain_loss(), rel=1e-6)
        assert on > off


def on_rank_losses(folder):
    setup = DistributedSetup.build(**DATA_PARALLEL["fsdp2"])
    model = SPECIMENS["qwen3-moe"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch = rows_of_rank(Task(specimen="qwen3-moe").batches(0)[0], runtime)
    switches = ({"output_router_logits": True}, {"output_router_logits": False}, {})
    return [runtime.forward_backward({**batch, **switch}).item() for switch in switches]


def on_rank_see_twice(folder):
    setup = DistributedSetup.build(**DATA_PARALLEL["fsdp2"])
    model = SPECIMENS["qwen3-moe"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    first = setup.runtime(model)
    batch = rows_of_rank(Task(specimen="qwen3-moe").batches(0)[0], first)

    def numbers(runtime):
        model.zero_grad()
        return runtime.forward_backward(batch).item(), runtime.clip_grad_norm_(1e9).item()

    before = numbers(first)
    second = setup.runtime(model, loss=CrossEntropy())
    return before, numbers(first), numbers(second)


def test_another_runtime_of_the_model_leaves_the_router_loss_on(ranks):
    for before, after, second in ranks(2).run(on_rank_see_twice, checkpoint("qwen3-moe")):
        assert after == before
        assert second == pytest.approx(before, rel=1e-5)  # the same loss, given as one of the user's own


def plain_loss():
    model = SPECIMENS["qwen3-moe"].load.from_pretrained(checkpoint("qwen3-moe"), dtype=torch.float32)
    return model(**Task(specimen="qwen3-moe").batches(0)[0], output_router_logits=False).loss.item()


def on_rank_lose_by_stages(folder):
    setup = DistributedSetup.build(**DATA_PARALLEL["fsdp2"], parallelism_sizes=ParallelismSizes(pp_size=2))
    model = SPECIMENS["qwen3-moe-deep"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    found = []
    for loss in (None, CrossEntropy()):
        runtime = setup.runtime(model, loss=loss)
        model.zero_grad()
        total = runtime.forward_backward(rows_of_rank(Task(specimen="qwen3-moe-deep").batches(0)[0], runtime))
        found.append((total.item(), runtime.clip_grad_norm_(1e9).item()))
    return found


def test_a_loss_of_ones_own_stands_beside_the_router_loss_of_a_pipeline(ranks):
    for models, own in ranks(2).run(on_rank_lose_by_stages, checkpoint("qwen3-moe-deep")):
        assert own == pytest.approx(models, rel=1e-5)


def test_batches_of_one_step_must_agree_on_the_router_loss():
    loss = RouterLoss.of([SPECIMENS["qwen3-moe"].make()], MeshContext())

    with pytest.raises(ValueError, match="True in some batches of a step and False in others"):
        loss.wanted([{"output_router_logits": True}, {"output_router_logits": False}])


def test_a_router_loss_of_another_form_is_refused():
    config = transformers.DogeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_moe=True,
        num_experts=16,
        output_router_logits=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)

    with pytest.raises(ValueError, match="DogeForCausalLM has a router loss whose form is not known"):
        RouterLoss.of([model], MeshContext())


def test_a_dense_model_has_no_router_loss():
    assert RouterLoss.of([SPECIMENS["llama"].make()], MeshContext()) is None


def test_load_balancing_losses_of_transformers_share_one_formula():
    """The contract with transformers: the one formula that is summed over ranks here is told by its arguments."""
    bodies = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        for node in ast.parse(source).body if "def load_balancing_loss_func" in source else ():
            if isinstance(node, ast.FunctionDef) and node.name == "load_balancing_loss_func":
                arguments = tuple(argument.arg for argument in node.args.args)
                code = ast.unparse([line for line in node.body if not is_docstring(line)])
                bodies.setdefault(arguments, {}).setdefault(code, []).append(path.parent.name)

    same = bodies["gate_logits", "num_experts", "top_k", "attention_mask"]
    families = [found for found in same.values() if found != ["nllb_moe"]]  # an encoder and decoder: refused
    assert len(families) == 1
    assert {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"} <= set(*families)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
