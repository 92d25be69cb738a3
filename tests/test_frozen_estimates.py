"""Where some parameters are frozen, or adapters are trained, the figures count what is trained: sent and held."""

import peft
import pytest
import torch
from cases import case_id, cases, slow
from sent_bytes import LENGTH, ROWS, Reduced

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, initialize_distributed
from nemo_dist.hf_model import without_adapters
from nemo_dist.mesh.dtensor import local
from nemo_dist.plugin.comm_estimate import readable
from nemo_dist.plugin.memory_estimate import RankShare
from nemo_dist.setup.explain import facts_of, traffic
from nemo_dist.setup.explain_page import page_data
from nemo_dist.setup.rank_memory import divide
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FROZEN = {
    "head": lambda name: "lm_head" not in name,
    "last block": lambda name: "layers.2." not in name,
    "no embedding": lambda name: "embed_tokens" in name,
    "norms": lambda name: "norm" not in name,
    "embedding": lambda name: "embed_tokens" not in name,
}


def prepared(model, trained, add_adapters):
    """Freeze what is not *trained* of *model*, or add the adapters that are."""
    if trained in FROZEN:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not FROZEN[trained](name))
        return model
    options = {"modules_to_save": ["lm_head"]} if trained == "lora and head" else {}
    return add_adapters(model, peft.LoraConfig(**LORA, **options))


def setup_of(options, world=None):
    return DistributedSetup.build(**{"strategy": FSDP2Config(mp_policy=FP32), **options}, world_size=world)


def on_rank_measure(specimen, options, trained):
    """Return the bytes that a step of this rank sends, by kind, and those that it holds after it."""
    initialize_distributed("gloo")
    setup = setup_of(options)
    config = SPECIMENS[specimen].config()
    config.output_router_logits = False
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    for part in getattr(model, "parts", [model]) if trained in FROZEN else ():
        prepared(part, trained, None)
    model = model if trained in FROZEN else prepared(model, trained, setup.add_adapters)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
    batch = SPECIMENS[specimen].batch(ROWS, LENGTH, torch.Generator().manual_seed(0))
    with Reduced() as counter:
        runtime.forward_backward(batch)
    parameters = [parameter for part in runtime.parts for parameter in part.parameters()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimizer.step()
    state = [value for found in optimizer.state.values() for value in found.values() if isinstance(value, torch.Tensor)]
    held = {"parameters": parameters, "gradients": gradients, "optimizer state": state}
    bytes_held = {kind: sum(local(one).nbytes for one in tensors) for kind, tensors in held.items()}
    return counter.sent | {"all-reduce": counter.sent["all-reduce"] + counter.bytes}, bytes_held


def said(specimen, options, world, trained):
    """Return the same as the plugins say it: what is sent, and what each pipeline rank holds."""
    setup = setup_of(options, world)
    config = SPECIMENS[specimen].config()
    with torch.device("meta"):
        whole = SPECIMENS[specimen].load.from_config(config, dtype=torch.float32)
        whole = prepared(whole, trained, peft.get_peft_model)
    with without_adapters(whole) as (plain, added):
        facts = facts_of(setup, plain, ROWS, LENGTH, added)
        sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-to-all", "all-reduce"), 0)
        for entry in traffic(setup, facts, plain):
            if entry.collective in sent:
                sent[entry.collective] += entry.sent
        shares = divide(
            RankShare.whole(plain, ROWS, LENGTH, added), setup.calls, setup.strategy, setup.plan, facts, plain
        )
    return sent, [share.states for share in shares]


OPTIONS = {
    "fsdp2": {},
    "ddp": {"strategy": "ddp"},
    "tp": {"parallelism_sizes": ParallelismSizes(tp_size=2)},
    "sequence": {
        "strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=True),
        "parallelism_sizes": ParallelismSizes(tp_size=2),
    },
    "pp": {"parallelism_sizes": ParallelismSizes(pp_size=2)},
    "cp": {"parallelism_sizes": ParallelismSizes(cp_size=2)},
    "ep": {"parallelism_sizes": ParallelismSizes(ep_size=2)},
    "replicas": {"parallelism_sizes": ParallelismSizes(dp_replicate_size=2)},
    "recomputed": {"activation_checkpointing": True},
}
OPTIONS["sequence recomputed"] = OPTIONS["sequence"] | OPTIONS["recomputed"]
OPTIONS["cp recomputed"] = OPTIONS["cp"] | OPTIONS["recomputed"]
OPTIONS["ep recomputed"] = OPTIONS["ep"] | OPTIONS["recomputed"]
ADAPTERS = ("lora", "lora and head")
# Beside gradients, ranks reduce which parameters got one, numbers of labels, and losses: a few hundred bytes.
FEW = 1200
CASES = [
    *((2, "llama", name, trained) for trained in (*FROZEN, *ADAPTERS) for name in ("fsdp2", "ddp", "pp")),
    *((2, "llama", name, trained) for trained in FROZEN for name in ("tp", "sequence")),
    *((2, "llama-tied", name, trained) for trained in ("no embedding", "embedding") for name in ("fsdp2", "pp")),
    *((2, "qwen3", name, "last block") for name in ("cp", "cp recomputed")),
    *((4, "qwen3-moe", name, trained) for trained in ("last block", "head") for name in ("ep", "ep recomputed")),
    (4, "llama", "replicas", "head"),
    *((2, "llama", name, "last block") for name in ("recomputed", "sequence recomputed")),
]


@cases(
    ("world", "specimen", "options", "trained"),
    [CASES[0], *(slow(*row) for row in CASES[1:])],
    lambda world, specimen, options, trained: case_id(world, specimen, options, trained),
)
def test_a_step_sends_and_holds_what_is_trained(on_ranks, world, specimen, options, trained):
    sent, states = said(specimen, OPTIONS[options], world, trained)
    found = on_ranks(world, on_rank_measure, specimen, OPTIONS[options], trained)
    for rank, (_, held) in enumerate(found):
        assert held == states[rank % len(states)]
    if options == "pp":
        return  # its lines are means over stages
    for kind, count in sent.items():
        mean = sum(real[kind] for real, _ in found) / world  # experts get uneven numbers of tokens
        few = FEW if kind == "all-reduce" else 0
        assert count == pytest.approx(mean, rel=0.01, abs=few), (kind, found, sent)


def text_of(options, trained, world=2):
    with torch.device("meta"):
        whole = SPECIMENS["llama"].load.from_config(SPECIMENS["llama"].config(), dtype=torch.float32)
        whole = prepared(whole, trained, peft.get_peft_model)
    before = [type(module).__name__ for module in whole.modules()]
    text = setup_of(options, world).explain(whole, ROWS, LENGTH)
    assert [type(module).__name__ for module in whole.modules()] == before
    return text


def test_explain_counts_trained_parameters_only():
    head = text_of({}, "head")  # 96 x 32 numbers, half of which are sent
    assert f"reduce-scatter of gradients, by block, once: {readable(96 * 32 * 4 // 2)}" in head
    assert f"holds whole gradients until the last one is done, up to {readable(96 * 32 * 4)} on a rank" in head
    assert f"all-reduce of gradients, by bucket, once: {readable(96 * 32 * 4)}" in text_of(OPTIONS["ddp"], "head")


def test_explain_has_a_line_for_adapters_and_none_for_gradients_that_wait():
    text = text_of({}, "lora")  # of q and v in 3 blocks, to 32 and 16 features
    added = 3 * 4 * ((32 + 32) + (32 + 16)) * 4
    assert f"dp           all-reduce of gradients of adapters, once: {readable(added)}" in text
    assert "reduce-scatter of gradients, by block, once: 0 B" in text and "holds whole gradients" not in text


def test_the_page_holds_gradients_and_optimizer_state_of_what_is_trained():
    """The same model is asked about twice: what is known of it is kept, but not what is frozen."""
    with torch.device("meta"):
        whole = SPECIMENS["llama"].load.from_config(SPECIMENS["llama"].config(), dtype=torch.float32)
    setup = setup_of({}, 2)
    (full,) = page_data(setup, whole, ROWS, LENGTH, 8)["memory"]["bars"]
    (head,) = page_data(setup, prepared(whole, "head", None), ROWS, LENGTH, 8)["memory"]["bars"]
    assert full["held"]["gradients"] == full["held"]["parameters"] == head["held"]["parameters"]
    own = 96 * 32 * 4 // 2
    assert head["held"]["gradients"] == own and head["held"]["optimizer state"] == 2 * own + 4
