"""What users do to the parameters of a sharded model, and to their gradients, is exact or refused in words."""

import ast
from pathlib import Path

import pytest
import torch
from own_models import SIZES, OwnConfig, OwnModel

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.errors import TopologyError
from nemo_dist.testing.equivalence import TOLERANCE, tensor_differences, whole_state
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist_fsdp2 import resharding
from nemo_dist_fsdp2.groups import strangers

ROOT = Path(__file__).parents[1]
TOKENS = (torch.arange(48).view(4, 12) * 5) % 90 + 3
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def loaded(change="", strategy=None, sizes=None, **more):
    setup = DistributedSetup.build(strategy or FSDP2Config(mp_policy=FP32), ParallelismSizes(**(sizes or {})))
    torch.manual_seed(0)
    config = OwnConfig(**SIZES, change=change)
    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32, **more)
    return model, setup.runtime(model)


def one_process(change="", **more):
    torch.manual_seed(0)
    return OwnModel._from_config(OwnConfig(**SIZES, change=change), **more)


def step(runtime):
    return runtime.forward_backward(rows_of_rank(BATCH, runtime))


def gradients_of(runtime):
    return whole_state(runtime, {name: one.grad for name, one in runtime.named_parameters() if one.grad is not None})


def same_gradients(found, model):
    expected = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return tensor_differences("gradients", found, expected, TOLERANCE)


def on_rank_hook():
    model, runtime = loaded()
    handle = model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(RuntimeError) as caught:
        step(runtime)
    handle.remove()
    for name, parameter in runtime.named_parameters():
        if "embed" in name:
            parameter.register_post_accumulate_grad_hook(halve)
    step(runtime)
    return str(caught.value), gradients_of(runtime)


def halve(parameter):
    parameter.grad.mul_(0.5)


def test_a_hook_of_a_gradient_is_refused_and_the_way_out_works(ranks):
    model = one_process()
    model.model.embed_tokens.weight.register_post_accumulate_grad_hook(halve)
    model(**BATCH).loss.backward()

    for message, found in ranks(2).run(on_rank_hook):
        assert message.startswith("model.embed_tokens.weight has a hook of register_hook, which fsdp2 never calls")
        assert "use register_post_accumulate_grad_hook" in message
        assert same_gradients(found, model) == []


def on_rank_tie(early):
    model, runtime = loaded()
    if not early:
        step(runtime)
        runtime.optimizer(torch.optim.SGD).zero_grad()
    model.lm_head.weight = model.model.embed_tokens.weight
    if early:
        step(runtime)
        return gradients_of(runtime)
    with pytest.raises(RuntimeError) as caught:
        step(runtime)
    return str(caught.value)


def test_a_tie_before_the_first_step_holds(ranks):
    model = one_process()
    model.lm_head.weight = model.model.embed_tokens.weight
    model(**BATCH).loss.backward()

    assert all(same_gradients(found, model) == [] for found in ranks(2).run(on_rank_tie, True))


def test_a_tie_after_the_first_step_is_refused(ranks):
    for message in ranks(2).run(on_rank_tie, False):
        assert message.startswith("lm_head.weight was replaced, or tied to another parameter, after the first forward")


def on_rank_cast():
    model, runtime = loaded(strategy=FSDP2Config())
    step(runtime)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError) as caught:
        step(runtime)
    return str(caught.value)


def test_a_cast_after_the_first_step_is_refused(ranks):
    for message in ranks(2).run(on_rank_cast):
        assert message.startswith("model.embed_tokens.weight and 38 other parameters were cast after the first forward")
        assert message.endswith("load the model with dtype=")


def on_rank_generate():
    """Return how often forwards without gradients look at every parameter, and what one says of a replaced one."""
    model, runtime = loaded()
    step(runtime)
    looked = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        model(TOKENS)
        patch.setattr(resharding, "strangers", lambda groups: looked.append(groups) or strangers(groups))
        for _ in range(3):
            model(TOKENS)
        count = len(looked)
        model.lm_head.weight = model.model.embed_tokens.weight
        with pytest.raises(RuntimeError) as caught:
            model(TOKENS)
    return count, str(caught.value)


def test_forwards_without_gradients_look_only_for_parameters_that_were_replaced(ranks):
    for count, message in ranks(2).run(on_rank_generate):
        assert count == 0
        assert message.startswith("lm_head.weight was replaced")


def on_rank_compile():
    model, runtime = loaded()
    with pytest.raises(RuntimeError) as caught:
        torch.compile(model, backend="eager")(**rows_of_rank(BATCH, runtime))
    return str(caught.value)


def test_a_model_that_is_compiled_whole_is_refused(ranks):
    assert all("FSDP2Config(enable_compile=True)" in message for message in ranks(2).run(on_rank_compile))


def penalised(model, embeddings, labels, scale):
    """Add the gradients of a penalty on the gradient of the embeddings."""
    given = embeddings.clone().requires_grad_()
    logits = model(inputs_embeds=given).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (slope,) = torch.autograd.grad(loss, given, create_graph=True)
    (scale * slope.pow(2).sum()).backward()


def embeddings():
    return torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(5))


def on_rank_penalise(strategy, sizes):
    model, runtime = loaded(strategy=strategy, sizes=sizes, attn_implementation="eager")
    mine = rows_of_rank({"embeddings": embeddings(), "labels": TOKENS}, runtime)
    try:
        penalised(model, mine["embeddings"], mine["labels"], runtime.dp_size)
    except RuntimeError as error:
        return str(error)
    return gradients_of(runtime)


@pytest.mark.parametrize("sizes", [{}, {"tp_size": 2}], ids=["fsdp2", "tp"])
@pytest.mark.parametrize("reshard", [None, False])
def test_second_derivatives_of_a_sharded_model_are_refused(ranks, sizes, reshard):
    strategy = FSDP2Config(mp_policy=FP32, reshard_after_forward=reshard)
    for message in ranks(2).run(on_rank_penalise, strategy, sizes):
        assert "create_graph=True" in message
        assert "use 'ddp'" in message


def functions():
    """Yield every class of ours that gives autograd a backward, as its tree, with the name of its file."""
    for path in (one for folder in ("nemo_dist", "plugins", "examples") for one in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases):
                yield path.name, node


def test_a_backward_of_ours_says_that_it_is_differentiated_once():
    """Else a second derivative through it is left out, or taken of memory that is used again, in silence."""
    found = {
        f"{file}: {node.name}": [ast.unparse(one) for one in method.decorator_list]
        for file, node in functions()
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "backward"
    }
    assert len(found) > 10
    assert [name for name, decorators in found.items() if "once_differentiable" not in decorators] == []


def test_second_derivatives_of_a_replicated_model_are_exact(ranks):
    model = one_process(attn_implementation="eager")
    penalised(model, embeddings(), TOKENS, 1.0)

    assert all(same_gradients(found, model) == [] for found in ranks(2).run(on_rank_penalise, DDPConfig(), {}))


def on_rank_inside():
    """Run the model inside of the model, and the head by itself, before any forward of the whole."""
    model, runtime = loaded()
    mine = rows_of_rank(BATCH, runtime)
    logits = model.lm_head(model.model(input_ids=mine["input_ids"]).last_hidden_state)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine["labels"][:, 1:].flatten()).backward()
    return gradients_of(runtime)


def test_a_module_inside_may_run_before_the_whole(ranks):
    model = one_process()
    model(**BATCH).loss.backward()

    assert all(same_gradients(found, model) == [] for found in ranks(2).run(on_rank_inside))


def on_rank_gradients(change):
    _, runtime = loaded(change)
    step(runtime)
    return gradients_of(runtime)


@pytest.mark.parametrize("change", ["sharing", "transposed"])
def test_a_module_in_two_blocks_and_a_transposed_weight_are_sharded_exactly(ranks, change):
    model = one_process(change)
    model(**BATCH).loss.backward()

    assert all(same_gradients(found, model) == [] for found in ranks(2).run(on_rank_gradients, change))


def on_rank_refusal():
    with pytest.raises(TopologyError) as caught:
        loaded("empty")
    return str(caught.value)


def test_a_parameter_without_elements_is_refused(ranks):
    message = "model.layers.0.mlp.none has no elements, (0, 8), and fsdp2 cannot shard it; use 'ddp'"
    assert all(message in found for found in ranks(2).run(on_rank_refusal))


def on_rank_renormed():
    _, runtime = loaded("renormed")
    with pytest.raises(RuntimeError) as caught:
        step(runtime)
    return str(caught.value)


def test_a_weight_that_own_code_changes_in_its_forward_is_refused(ranks):
    """It is changed where it is gathered, and the backward, and the next step, gather it as it was."""
    assert all(
        "changes mlp.up_proj.weight in its forward, which is lost" in said for said in ranks(2).run(on_rank_renormed)
    )
