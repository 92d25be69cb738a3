"""No composition makes ranks wait for each other for ever by the rules of NCCL, which gloo does not have."""

from collections import Counter
from itertools import cycle

import torch
import torch.distributed as dist
from cases import case_id, cases, slow
from test_dense_matrix import MODES, factorisations
from test_moe_matrix import TOPOLOGIES, WHOLE
from test_pipeline_matrix import MESHES

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, MegatronFSDPConfig, ParallelismSizes, PipelineConfig
from nemo_dist.mesh.store_consensus import report
from nemo_dist.testing.comm_playback import Meeting, Message, Post, Wait, problems, problems_either_way
from nemo_dist.testing.comm_recorder import assert_no_deadlock, recording
from nemo_dist.testing.equivalence import Task
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_pipeline import SCHEDULES

# ---- the rules ----


def gathers(group, *members):
    return Meeting(group=group, members=members, what="allgather", size=8)


def test_ranks_that_use_two_groups_in_one_order_pass():
    line = [gathers("a", 0, 1), gathers("b", 0, 1), gathers("a", 0, 1)]
    assert problems_either_way([line, line]) == []


def test_ranks_that_use_two_groups_in_different_orders_are_stuck():
    lines = [[gathers("a", 0, 1), gathers("b", 0, 1)], [gathers("b", 0, 1), gathers("a", 0, 1)]]
    assert (
        "rank 0 waits at event 0, allgather of 8 bytes over a [0, 1]; rank 1" in problems(lines, bound_device=True)[0]
    )


def test_a_collective_that_a_member_leaves_out_is_found():
    (found,) = problems([[gathers("a", 0, 1)], []])
    assert "rank 0 waits at event 0, the first use of a communicator, allgather of 8 bytes over a" in found


def test_ranks_that_do_different_things_in_one_group_are_found():
    other = Meeting(group="a", members=(0, 1), what="allreduce", size=8)
    (found,) = problems([[gathers("a", 0, 1)], [other]])
    assert found.startswith(
        "the ranks of a group do not do the same: rank 0 allgather of 8 bytes over a [0, 1], rank 1"
    )


def swap(batched, group="pp", ranks=(0, 1, 2)):
    """Let the first and the last of *ranks* swap a tensor."""
    first, last = ranks[0], ranks[-1]
    there, back = Message(source=first, target=last, size=4), Message(source=last, target=first, size=4)
    if batched:
        post = Post(number=0, group=group, members=ranks, batched=True, messages=(there, back))
        return {first: [post, Wait(0)], last: [post, Wait(0)]}
    lines = {}
    for rank, messages in ((first, (there, back)), (last, (there, back))):
        posts = [
            Post(number=number, group=group, members=ranks, batched=False, messages=(message,))
            for number, message in enumerate(messages)
        ]
        lines[rank] = [event for post in posts for event in (post, Wait(post.number))]
    return lines


def test_a_batch_of_some_ranks_may_not_be_the_first_use_of_a_group():
    meeting = Meeting(group=None, members=(0, 1, 2), what="the meeting 'load'")
    used = gathers("pp", 0, 1, 2)
    lines = swap(batched=True)
    first = [[*lines.get(rank, []), meeting, used] for rank in range(3)]
    later = [[used, *lines.get(rank, []), meeting] for rank in range(3)]

    assert "rank 0 waits at event 0, the first use of a communicator, a batch of 0->2" in problems(first)[0]
    assert problems(first, bound_device=True) == [] and problems_either_way(later) == []


def test_messages_that_are_no_batch_need_only_their_two_ranks():
    lines = swap(batched=False)
    meeting = Meeting(group=None, members=(0, 1, 2), what="the meeting 'load'")
    assert problems_either_way([[*lines.get(rank, []), meeting] for rank in range(3)]) == []


def test_two_sends_that_cross_need_a_buffer():
    def line(rank, other):
        out, back = Message(source=rank, target=other, size=4), Message(source=other, target=rank, size=4)
        posts = [
            Post(number=number, group="pp", members=(0, 1), batched=False, messages=(message,))
            for number, message in enumerate((out, back))
        ]
        return [*posts, Wait(1), Wait(0)]

    assert "deadlock" in problems([line(0, 1), line(1, 0)])[0]
    assert problems([line(0, 1), line(1, 0)], buffered=1) == []


def test_messages_of_different_sizes_and_messages_that_nobody_takes_are_found():
    sent = Post(number=0, group="pp", members=(0, 1), batched=False, messages=(Message(source=0, target=1, size=4),))
    taken = Post(number=0, group="pp", members=(0, 1), batched=False, messages=(Message(source=0, target=1, size=8),))

    (found,) = problems([[sent], [taken]])
    assert found == "rank 0 sends 4 bytes over ranks 0 and 1 of pp, and rank 1 receives 8"
    assert problems([[sent], []], bound_device=True) == ["rank 0 ends while 0->1 (4 bytes) over pp is under way"]


# ---- the record ----


def on_rank_record_a_step(specimen, options):
    """Return what the second step of a training communicates, and how many blocks the model has."""
    setup = DistributedSetup.build(FSDP2Config(mp_policy=FP32), **options)
    config = SPECIMENS[specimen].config()
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch = SPECIMENS[specimen].batch(4, 12, torch.Generator().manual_seed(0))
    runtime.forward_backward(batch)
    with recording() as events:
        runtime.forward_backward(batch)
    return events, config.num_hidden_layers


def test_a_record_has_the_collectives_of_forward_and_backward(ranks):
    for events, blocks in ranks(2).run(on_rank_record_a_step, "llama", {}):
        done = Counter(event.what for event in events)
        units = blocks + 2  # the embedding, each block, the head with the last norm
        assert done["reduce_scatter_base"] == units <= done["allgather_base"]
        assert all(event.members == (0, 1) for event in events)


def test_a_record_has_the_collectives_of_tensor_parallelism(ranks):
    options = {"parallelism_sizes": ParallelismSizes(tp_size=2)}
    for events, blocks in ranks(2).run(on_rank_record_a_step, "llama", options):
        # After attention and after the MLP of each block, and in the backward before each.
        assert Counter(event.what for event in events)["all_reduce"] >= 4 * blocks


def test_a_record_has_every_message_of_a_pipeline(ranks):
    options = {"parallelism_sizes": ParallelismSizes(pp_size=2)}
    (first, _), (last, _) = ranks(2).run(on_rank_record_a_step, "llama-deep-tied", options)
    width, vocabulary = 32, 96
    hidden, tied = 12 * width * 4, vocabulary * width * 4

    there, back = [(0, 1, hidden)] * 4 + [(0, 1, tied)], [(1, 0, hidden)] * 4 + [(1, 0, tied)]
    for events in (first, last):
        posts = [event for event in events if isinstance(event, Post)]
        messages = [(one.source, one.target, one.size) for post in posts for one in post.messages]
        assert sorted(messages) == sorted(there + back)
        assert {event.number for event in events if isinstance(event, Wait)} == {post.number for post in posts}


def on_rank_cross():
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    order = groups if dist.get_rank() == 0 else groups[::-1]
    with recording() as events:
        for work in [dist.all_reduce(torch.ones(1), group=group, async_op=True) for group in order]:
            work.wait()
        dist.new_group([0, 1])
        report("the end", None)
    return events


def test_what_passes_on_gloo_and_waits_for_ever_on_nccl_is_found(ranks):
    records = ranks(2).run(on_rank_cross)
    assert [event.what for event in records[0]] == [
        *("allreduce", "allreduce", "making the group of [0, 1]", "the meeting 'the end'")
    ]
    found = problems_either_way(records)
    assert len(found) == 2 and all("deadlock: rank 0 waits at event 0" in problem for problem in found)


# ---- every composition ----

SHARDED = FSDP2Config(mp_policy=FP32)
DEFAULT = (
    "llama-tied, 2 ranks, fsdp2",
    "llama-deep-tied, 2 ranks, pp 2, Interleaved1F1B",
    "llama-deep-tied, 4 ranks, pp 4, 1F1B",
    "qwen3-moe, 4 ranks, ep 2, tp 2",
)


def dense():
    """Strategies, and all dense axes on up to 4 ranks, three of them on 8, in every mode of recomputation."""
    modes = cycle(MODES)
    for strategy in (SHARDED, DDPConfig(), *(MegatronFSDPConfig(zero_dp_strategy=level) for level in (1, 2, 3))):
        yield 2, "llama-tied", {}, {"strategy": strategy}
    yield 4, "llama-tied", {"tp_size": 2}, {"strategy": MegatronFSDPConfig()}
    for world in (2, 4, 8):
        for replicate, shard, cp, tp in factorisations(world):
            if world == 8 and max(replicate, shard, cp, tp) > 2:
                continue
            for sequence in (False, True)[: 1 + (tp > 1)]:
                sizes = {"dp_replicate_size": replicate, "cp_size": cp, "tp_size": tp}
                strategy = FSDP2Config(mp_policy=FP32, sequence_parallel=sequence)
                yield world, "llama-tied", sizes, {"strategy": strategy, "activation_checkpointing": next(modes)}


def experts():
    """What the matrix of experts has."""
    for world, sizes, recompute in TOPOLOGIES.values():
        specimen = "qwen3-moe-deep" if "pp_size" in sizes else "qwen3-moe"
        yield world, specimen, sizes, {"activation_checkpointing": recompute}
    for world, sizes, options in WHOLE.values():
        yield world, "qwen3-moe-deep" if "pp_size" in sizes else "qwen3-moe", sizes, options


def pipelines():
    """Every schedule on 2, 3 and 4 pipeline ranks, and one beside every other axis that the matrix of pipelines has."""
    for schedule in SCHEDULES:
        for pp in (2, 3, 4):
            yield pp, "llama-deep-tied", {"pp_size": pp}, {"pipeline_config": PipelineConfig(pp_schedule=schedule)}
    schedules = cycle(SCHEDULES)
    for world, sizes in MESHES.values():
        options = {"pipeline_config": PipelineConfig(pp_schedule=next(schedules))}
        yield world, "llama-deep-tied", {"pp_size": 2, **sizes}, options


def name_of(world, specimen, sizes, options):
    strategy, pipeline = options.get("strategy"), options.get("pipeline_config")
    zero = getattr(strategy, "zero_dp_strategy", None)
    return case_id(
        specimen,
        world,
        sizes,
        pipeline and pipeline.pp_schedule,
        not sizes and getattr(strategy, "plugin", strategy),
        zero and f"zero {zero}",
        getattr(strategy, "sequence_parallel", False) and "sequence",
        options.get("activation_checkpointing"),
    )


FOUND = {name_of(*row): row for row in (*dense(), *experts(), *pipelines())}
COMPOSITIONS = [row if name in DEFAULT else slow(*row) for name, row in FOUND.items()]


def test_the_default_run_has_compositions_that_exist():
    assert set(DEFAULT) <= FOUND.keys()


@cases(("world", "specimen", "sizes", "options"), COMPOSITIONS, name_of)
def test_no_rank_of_a_composition_waits_for_ever(ranks, world, specimen, sizes, options):
    options = {"strategy": SHARDED, "parallelism_sizes": ParallelismSizes(**sizes), **options}
    megatron = isinstance(options["strategy"], MegatronFSDPConfig)
    pool = WithCudaCalls(ranks(world)) if megatron else ranks(world)
    rows = 24 if sizes.get("pp_size") == 3 else 16  # microbatches that every schedule takes
    assert_no_deadlock(pool, Task(specimen=specimen, rows=rows), **options)
