"""Loops of a user's own, whose calls fail, skip or change something, train as one process does or are refused."""

import re
from contextlib import nullcontext, suppress

import pytest
import torch
from cases import cases, slow
from failing import Fail
from setups import DATA_PARALLEL

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS

FSDP2 = FSDP2Config(mp_policy=FP32)
TOPOLOGIES = {
    "fsdp2": DATA_PARALLEL["fsdp2"],
    "ddp": DATA_PARALLEL["ddp"],
    "tp": {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(tp_size=2)},
    "kept": {"strategy": FSDP2Config(mp_policy=FP32, reshard_after_forward=False)},
    "recompute": {"strategy": FSDP2, "activation_checkpointing": "full"},
    "every backward": {"strategy": FSDP2Config(mp_policy=FP32, defer_fsdp_grad_sync=False)},
    "ddp, static": {"strategy": DDPConfig(static_graph=True)},
    "ddp, views": {"strategy": DDPConfig(gradient_as_bucket_view=True)},
}
FEW = ("fsdp2", "ddp")


class Training:
    """A model with what a loop calls, on one process (``options`` is None) or on a rank."""

    def __init__(self, folder, options):
        setup = None if options is None else DistributedSetup.build(**options)
        given = {} if setup is None else {"distributed_setup": setup}
        self.model = SPECIMENS["llama"].load.from_pretrained(folder, dtype=torch.float32, **given)
        self.runtime = None if setup is None else setup.runtime(self.model)

    def loss(self, seed):
        return self.outputs(seed).loss

    def outputs(self, seed, **asked):
        return self.model(**self.rows(seed), **asked)

    def rows(self, seed):
        """Return this rank's rows of a batch, every token of which has a label."""
        tokens = torch.randint(1, 64, (4, 8), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": tokens, "labels": tokens}
        return batch if self.runtime is None else rows_of_rank(batch, self.runtime)

    def no_sync(self):
        return nullcontext() if self.runtime is None else self.runtime.no_sync()

    def step(self, seed):
        if self.runtime is None:
            self.loss(seed).backward()
        else:
            self.runtime.forward_backward(self.rows(seed))

    def optimizer(self, parameters=None):
        if self.runtime is None:
            return torch.optim.SGD(parameters or self.model.parameters(), lr=0.1)
        return self.runtime.optimizer(torch.optim.SGD, parameters, lr=0.1)

    def gradients(self):
        named = self.model.named_parameters() if self.runtime is None else self.runtime.named_parameters()
        return {name: whole(one.grad).clone() for name, one in named if one.grad is not None}


def failing_loss(training, seed):
    """Return the loss of a graph in the middle of which, in a block, the backward fails."""
    inside = training.model.model.layers[1].mlp
    hook = inside.register_forward_hook(lambda _, args, output: Fail.apply(output))
    loss = training.loss(seed)
    hook.remove()
    return loss


def fail(loss):
    with suppress(ValueError):
        loss.backward()


def stop(*_):
    raise ValueError("a forward that fails")


def accumulate_steps(training):
    """Steps of the runtime, of which the last alone averages gradients, and a backward of one's own."""
    with training.no_sync():
        training.step(0)
    training.loss(1).backward()
    training.step(2)


def drop_by_optimizer(training):
    optimizer = training.optimizer()
    with training.no_sync():
        training.loss(0).backward()
    optimizer.zero_grad()
    training.loss(1).backward()


def drop_by_model(training):
    training.loss(2).backward()
    with training.no_sync():
        training.loss(0).backward()
    training.loss(3)  # which leaves parameters gathered
    training.model.zero_grad()
    training.loss(1).backward()


def drop_those_of_a_module(training):
    with training.no_sync():
        training.loss(0).backward()
    training.model.model.norm.zero_grad()
    training.model.model.layers[0].zero_grad()
    training.loss(1).backward()


def drop_some(training):
    """Two optimizers, of which one drops its gradients."""
    named = dict(training.model.named_parameters())
    blocks = [one for name, one in named.items() if "layers" in name]
    optimizer = training.optimizer(blocks)
    with training.no_sync():
        training.loss(0).backward()
    optimizer.zero_grad()
    training.loss(1).backward()


def go_on_after_a_failed_backward(training):
    optimizer = training.optimizer()
    fail(failing_loss(training, 0))
    optimizer.zero_grad()
    training.loss(1).backward()
    optimizer.step()
    optimizer.zero_grad()
    with training.no_sync():
        training.loss(2).backward()
    training.loss(3).backward()


def go_on_after_a_failed_forward(training):
    optimizer = training.optimizer()
    training.loss(0).backward()
    hook = training.model.model.layers[1].mlp.register_forward_hook(stop)
    with suppress(ValueError):
        training.loss(1)
    hook.remove()
    optimizer.step()
    optimizer.zero_grad()
    training.loss(2).backward()


def fail_without_synchronising(training):
    optimizer = training.optimizer()
    with training.no_sync():
        fail(failing_loss(training, 0))
    optimizer.zero_grad()
    with training.no_sync():
        training.loss(2).backward()
    training.loss(1).backward()


def go_on_with_a_second_graph(training):
    first, second = failing_loss(training, 0), training.loss(1)
    fail(first)
    training.model.zero_grad()
    second.backward()


def run_a_part_after_a_failed_backward(training):
    fail(failing_loss(training, 0))
    training.model.zero_grad()
    training.model.model(input_ids=training.rows(1)["input_ids"]).last_hidden_state.pow(2).mean().backward()


def start_at_an_activation(training):
    found = []
    hook = training.model.model.layers[1].register_forward_hook(lambda _, args, output: found.append(output))
    training.loss(0)
    hook.remove()
    (output,) = found
    (output[0] if isinstance(output, tuple) else output).pow(2).mean().backward()
    training.loss(1).backward()


def call_the_head(training):
    hidden = training.outputs(0, output_hidden_states=True).hidden_states[-1]
    training.model.lm_head(hidden).pow(2).mean().backward()
    training.loss(1).backward()


def reach_some_parameters(training):
    training.loss(0).backward(inputs=[training.model.lm_head.weight])


def assign_weights(training):
    training.loss(0)
    training.model.load_state_dict(
        {name: one.clone() for name, one in training.model.state_dict().items()}, assign=True
    )
    training.loss(1).backward()


def recompute_inside(training):
    """A backward inside of the backward."""
    training.model.train()
    training.model.enable_input_require_grads()
    training.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    training.loss(0).backward()


LOOPS = (
    *(
        accumulate_steps,
        drop_by_optimizer,
        drop_by_model,
        drop_those_of_a_module,
        drop_some,
        go_on_after_a_failed_backward,
        go_on_after_a_failed_forward,
        fail_without_synchronising,
    ),
    *(go_on_with_a_second_graph, run_a_part_after_a_failed_backward, start_at_an_activation),
    call_the_head,
)
# The others free what they need, or keep their own parameters.
OF_DDP = (reach_some_parameters, assign_weights, recompute_inside)
CELLS = [
    (name, loop)
    for name in TOPOLOGIES
    for loop in (*LOOPS, *(OF_DDP if name == "ddp" else ()))
    if (name, loop) != ("ddp, views", start_at_an_activation)  # refused
    if (name, loop) != ("tp", call_the_head)  # which gives no hidden states
]


def named(topology, loop):
    return f"{topology}, {loop.__name__}"


def on_rank_run(folder, options, loop):
    training = Training(folder, options)
    loop(training)
    return training.gradients()


@cases(
    ("topology", "loop"),
    [(name, loop) if name in FEW else slow(name, loop) for name, loop in CELLS],
    named,
)
def test_gradients_are_those_of_one_process(ranks, topology, loop):
    expected = on_rank_run(checkpoint("llama"), None, loop)
    for found in ranks(2).run(on_rank_run, checkpoint("llama"), TOPOLOGIES[topology], loop):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name} is off")


def clip_what_waits(training):
    with training.no_sync():
        training.loss(0).backward()
        training.runtime.clip_grad_norm_(1.0)


def step_what_waits(training):
    optimizer = training.optimizer()
    with training.no_sync():
        training.loss(0).backward()
    optimizer.step()


def step_what_was_frozen(training):
    optimizer = training.optimizer()
    with training.no_sync():
        training.loss(0).backward()
    training.model.lm_head.requires_grad_(False)
    training.loss(1).backward()
    optimizer.step()


def step_before_the_backward(training):
    optimizer = training.optimizer()
    training.loss(0).backward()
    loss = training.loss(1)
    optimizer.step()
    loss.backward()


def edit_what_is_gathered(training):
    training.loss(0)
    with torch.no_grad():
        training.model.lm_head.weight.mul_(0.5)
    training.loss(1)


def edit_data_of_what_is_gathered(training):
    training.loss(0)
    for parameter in training.model.parameters():
        parameter.data.mul_(0.5)
    with torch.no_grad():
        training.loss(1)


def step_what_was_gathered(training):
    training.loss(0)
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training.loss(1).backward()
    optimizer.step()


def assign_data(training):
    training.loss(0).backward()
    for parameter in training.model.parameters():
        parameter.data = parameter.data * 0.5
    with torch.no_grad():
        training.loss(1)


def hook_a_gradient(training):
    training.model.lm_head.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    training.loss(0).backward()


def hook_an_accumulated_gradient(training):
    training.loss(0).backward()
    training.model.lm_head.weight.register_post_accumulate_grad_hook(lambda one: one.grad.clamp_(-0.01, 0.01))
    training.loss(1).backward()


def differentiate(training):
    trained = list(training.model.parameters())
    for parameter, gradient in zip(trained, torch.autograd.grad(training.loss(0), trained), strict=True):
        parameter.grad = gradient


def clip_what_no_backward_made(training):
    differentiate(training)
    training.runtime.clip_grad_norm_(1.0)


def step_what_no_backward_made(training):
    optimizer = training.optimizer()
    differentiate(training)
    optimizer.step()


def step_what_waits_by_another(training):
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    with training.runtime.no_sync():
        training.loss(0).backward()
    optimizer.step()


WAITS = r"of model\.embed_tokens\.weight, .* and 27 others: they are of a backward under runtime\.no_sync\(\)"
DIFFER = r"replicas that must be equal on all ranks differ:\n- the gradient of model\.embed_tokens\.weight"
REFUSED = {
    ("ddp", hook_a_gradient): r"lm_head\.weight has a hook of its gradient, which ddp would call with that of one rank",
    ("ddp", hook_an_accumulated_gradient): r"lm_head\.weight has a hook of its gradient.*in \.grad after the backward",
    ("ddp", clip_what_no_backward_made): DIFFER,
    ("ddp", step_what_no_backward_made): DIFFER,
    ("fsdp2", clip_what_waits): rf"clip_grad_norm_\(\) found gradients of one rank's rows alone, {WAITS}",
    ("ddp", clip_what_waits): rf"clip_grad_norm_\(\) found gradients of one rank's rows alone, {WAITS}",
    ("fsdp2", step_what_waits): rf"optimizer\.step\(\) found gradients of one rank's rows alone, {WAITS}",
    ("ddp", step_what_waits): rf"optimizer\.step\(\) found gradients of one rank's rows alone, {WAITS}",
    (
        "fsdp2",
        step_what_waits_by_another,
    ): rf"optimizer\.step\(\) found gradients of one rank's rows alone, {WAITS}",
    (
        "ddp",
        step_what_waits_by_another,
    ): rf"optimizer\.step\(\) found gradients of one rank's rows alone, {WAITS}",
    ("ddp", step_what_was_frozen): r"optimizer\.step\(\) found gradients .* of lm_head\.weight: they are of",
    ("fsdp2", step_before_the_backward): r"weights of .* were changed between a forward and its backward.*once more",
    ("fsdp2", edit_what_is_gathered): r"lm_head\.weight was changed while gathered, after a forward without a backward",
    ("fsdp2", edit_data_of_what_is_gathered): r"lm_head\.weight was changed while gathered.*runtime\.named_parameters",
    ("ddp, views", recompute_inside): r"a backward runs inside of another, .* or set use_reentrant=False",
    (
        "fsdp2",
        step_what_was_gathered,
    ): r"made of parameters that a forward had left gathered.*optimizer\(\)",
    ("fsdp2", assign_data): r"the data of model\.embed_tokens\.weight, .* was assigned.*p\.data\.copy_\(value\)",
}


def on_rank_refuse(folder, options, loop):
    with pytest.raises(RuntimeError) as refused:
        loop(Training(folder, options))
    return str(refused.value)


@cases(("topology", "loop"), REFUSED, named)
def test_what_would_be_lost_is_refused(ranks, topology, loop):
    for words in ranks(2).run(on_rank_refuse, checkpoint("llama"), TOPOLOGIES[topology], loop):
        assert re.search(REFUSED[topology, loop], words, flags=re.DOTALL), words


def on_rank_refuse_views(folder):
    training = Training(folder, TOPOLOGIES["ddp, views"])
    for loop in (reach_some_parameters, start_at_an_activation):
        with pytest.raises(RuntimeError, match=r"gradient_as_bucket_view=True keeps in its buckets"):
            loop(training)


def test_gradients_in_buckets_that_no_backward_averaged_are_refused(ranks):
    ranks(2).run(on_rank_refuse_views, checkpoint("llama"))


def on_rank_write_data(folder):
    """Write through ``data`` in ways that reach the shards."""
    training = Training(folder, TOPOLOGIES["fsdp2"])
    for parameter in training.model.parameters():
        parameter.data.mul_(0.5)
        parameter.data += parameter.data
    return training.loss(0).item(), training.model.float() is training.model and training.loss(0).item()


def test_writes_to_data_of_shards_count(ranks):
    training = Training(checkpoint("llama"), None)
    rows = training.rows(0)
    parts = [training.model(**{name: value.chunk(2)[rank] for name, value in rows.items()}).loss for rank in (0, 1)]
    for found, part in zip(ranks(2).run(on_rank_write_data, checkpoint("llama")), parts, strict=True):
        assert found == pytest.approx((part.item(), part.item()), rel=1e-6)
