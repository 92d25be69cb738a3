"""AutoPipeline: what a rank has and reads, evaluation, loops of one's own, export, and a rank that dies."""

import gc
import math
import os
import signal
import time
import weakref
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_dist import AutoPipeline, DistributedSetup, FSDP2Config, ParallelismSizes, PipelineConfig, RankError
from nemo_dist.mesh.dtensor import local
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.io_counter import BytesRead
from nemo_dist.testing.pool import RankPool
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import whole
from nemo_dist.testing.tiny_models import SPECIMENS


def build(schedule, pp=2, **options):
    return DistributedSetup.build(
        FSDP2Config(mp_policy=FP32),
        ParallelismSizes(pp_size=pp),
        PipelineConfig(pp_schedule=schedule, **options),
    )


def load(specimen, schedule, pp=2, folder=None, **options):
    setup = build(schedule, pp, **options)
    kind = SPECIMENS[specimen].load
    return setup, kind.from_pretrained(folder or checkpoint(specimen), distributed_setup=setup, dtype=torch.float32)


def batch_of(specimen, rows=4, length=10, seed=3):
    return SPECIMENS[specimen].batch(rows, length, torch.Generator().manual_seed(seed))


# ---- what a rank has ----


def on_rank_describe(folder, schedule):
    _setup, pipeline = load("llama-deep", schedule, folder=folder)
    info = pipeline.info
    assert isinstance(pipeline, AutoPipeline) and list(info.model_parts) == pipeline.parts
    assert all(type(part).__name__ == "FSDPLlamaForCausalLM" for part in pipeline.parts)
    return {
        "stages": [stage.index for stage in info.stages],
        "ends": (info.has_first_stage, info.has_last_stage),
        "modules": [stage.modules for stage in info.stages],
        "names": {name for name, _ in pipeline.named_parameters()},
        "summary": pipeline.debug_summary(),
        "picture": pipeline.picture(2),
    }


def test_the_stages_of_all_ranks_are_the_model(ranks):
    first, last = ranks(2).run(on_rank_describe, checkpoint("llama-deep"), "interleaved_1f1b")
    names = {name for name, _ in SPECIMENS["llama-deep"].make().named_parameters()}

    assert (first["stages"], last["stages"]) == ([0, 2], [1, 3])
    assert (first["ends"], last["ends"]) == ((True, False), (False, True))
    assert first["names"] | last["names"] == names and not first["names"] & last["names"]
    assert first["modules"][0][0] == "model.embed_tokens" and last["modules"][1][-2:] == ("model.norm", "lm_head")


def test_a_v_schedule_puts_both_ends_on_the_first_rank(ranks):
    first, last = ranks(2).run(on_rank_describe, checkpoint("llama-deep"), "zbv")
    assert (first["stages"], first["ends"]) == ([0, 3], (True, True))
    assert (last["stages"], last["ends"]) == ([1, 2], (False, False))


def test_a_summary_and_a_picture_show_the_pipeline(ranks):
    first, _ = ranks(2).run(on_rank_describe, checkpoint("llama-deep"), "1f1b")

    assert "model.embed_tokens, model.layers.0 ... model.layers.4" in first["summary"]
    assert "schedule 1F1B: 11.1% bubble in theory with 8 microbatches" in first["summary"]
    assert first["picture"].splitlines()[0] == "rank 0  F0 F1 .  .  B0 -- .  B1 --"


# ---- loading ----


def on_rank_read(folder, schedule):
    setup = build(schedule)
    with BytesRead() as reading:
        pipeline = SPECIMENS["llama-deep"].load.from_pretrained(folder, distributed_setup=setup)
    held = sum(local(parameter).nbytes for parameter in pipeline.parameters())
    return reading.bytes, held


@pytest.mark.parametrize(("schedule", "world"), [("1f1b", 2), ("interleaved_1f1b", 4)])
def test_a_rank_reads_only_its_shard_of_its_stages(ranks, schedule, world):
    answers = ranks(world).run(on_rank_read, checkpoint("llama-deep"), schedule)
    full = sum(parameter.nbytes for parameter in SPECIMENS["llama-deep"].make().parameters())

    assert [read for read, _ in answers] == [held for _, held in answers]
    assert sum(read for read, _ in answers) == full


def on_rank_load_quietly(folder):
    import transformers.utils.logging as logging

    logging.set_verbosity_warning()
    load("llama-deep", "interleaved_1f1b", folder=folder)


def test_only_unknown_checkpoint_keys_raise_a_warning(ranks, tmp_path, capsys):
    ranks(2).run(on_rank_load_quietly, checkpoint("llama-deep"))
    assert "UNEXPECTED" not in capsys.readouterr().out
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama-deep")).save_pretrained(tmp_path)
    save_file(
        load_file(tmp_path / "model.safetensors") | {"strange": torch.ones(1)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    ranks(2).run(on_rank_load_quietly, tmp_path)
    shown = capsys.readouterr().out
    assert "strange" in shown and "lm_head" not in shown


def on_rank_from_config(specimen, schedule, pp):
    torch.manual_seed(7)
    pipeline = SPECIMENS[specimen].load.from_config(
        SPECIMENS[specimen].config(), distributed_setup=build(schedule, pp), dtype=torch.float32
    )
    return {name: whole(parameter) for name, parameter in pipeline.named_parameters()}, torch.rand(1).item()


@pytest.mark.parametrize(("specimen", "schedule", "pp"), [("llama-deep-tied", "zbv", 2), ("qwen3-deep", "1f1b", 4)])
def test_a_new_model_starts_from_the_weights_of_one_process(ranks, specimen, schedule, pp):
    torch.manual_seed(7)
    single = SPECIMENS[specimen].load.from_config(SPECIMENS[specimen].config(), dtype=torch.float32)
    then = torch.rand(1).item()
    answers = ranks(4).run(on_rank_from_config, specimen, schedule, pp)
    found = {name: tensor for tensors, _ in answers for name, tensor in tensors.items()}

    assert [drawn for _, drawn in answers] == [then] * 4
    assert found.keys() == dict(single.named_parameters()).keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in single.named_parameters())


def on_rank_load_with_new_head(folder):
    torch.manual_seed(5)
    _setup, pipeline = load("llama-sequences", "zbv", folder=folder, pp=2)
    return {name: whole(parameter) for name, parameter in pipeline.named_parameters()}


def test_a_missing_head_is_drawn_as_on_one_process(ranks, tmp_path):
    single = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint("llama-sequences"))
    single.model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    config = SPECIMENS["llama-sequences"].config()
    config.save_pretrained(tmp_path)
    found = {
        name: tensor
        for tensors in ranks(2).run(on_rank_load_with_new_head, tmp_path)
        for name, tensor in tensors.items()
    }

    assert torch.equal(found["score.weight"], expected.score.weight)


SCATTERED = ("layers.0.mlp.up_proj.weight", "layers.3.self_attn.q_proj.weight", "layers.8.input_layernorm.weight")


def on_rank_load_with_holes(folder, schedule, specimen):
    torch.manual_seed(5)
    _setup, pipeline = load(specimen, schedule, folder=folder)
    return {name: whole(parameter) for name, parameter in pipeline.named_parameters()}, torch.rand(1).item()


@pytest.mark.parametrize(
    ("world", "schedule", "specimen"), [(2, "1f1b", "llama-deep-tied"), (4, "zbv", "llama-sequences")]
)
def test_missing_weights_are_drawn_in_the_order_of_the_whole_model(ranks, tmp_path, world, schedule, specimen):
    model = SPECIMENS[specimen].make()
    model.config.save_pretrained(tmp_path)
    lacking = (*(f"model.{name}" for name in SCATTERED), "score.weight", "lm_head.weight")
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in lacking}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(5)
    single = type(model).from_pretrained(tmp_path)
    then = torch.rand(1).item()
    answers = ranks(world).run(on_rank_load_with_holes, tmp_path, schedule, specimen)
    found = {name: tensor for tensors, _ in answers for name, tensor in tensors.items()}

    assert [drawn for _, drawn in answers] == [then] * world
    assert found.keys() == dict(single.named_parameters()).keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in single.named_parameters())


def test_a_tied_model_with_an_untied_checkpoint_is_refused(ranks, tmp_path):
    model = SPECIMENS["llama-deep"].make()
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})

    for message in ranks(2).run(on_rank_refusal, tmp_path):
        assert "the checkpoint holds different tensors for them" in message


def on_rank_refusal(folder):
    with pytest.raises((ValueError, RankError)) as caught:
        load("llama-deep", "1f1b", folder=folder)
    return str(caught.value)


# ---- evaluation and loops of one's own ----


def on_rank_evaluate(folder, specimen, schedule, batch):
    _setup, pipeline = load(specimen, schedule, folder=folder)
    before = pipeline.eval(batch).item()
    loss = pipeline.step(batch).item()
    between = pipeline.eval(batch).item()  # and training goes on from there
    again = pipeline.step(batch).item()
    grads = {name: whole(parameter.grad) for name, parameter in pipeline.named_parameters()}
    logits = pipeline.logits({name: value for name, value in batch.items() if name != "labels"})
    return (before, loss, between, again), grads, logits


@pytest.mark.parametrize(
    ("specimen", "schedule"),
    [("llama-deep-tied", "1f1b"), ("llama-deep-tied", "zbv"), ("llama-sequences", "looped_bfs")],
)
def test_evaluation_gives_loss_and_logits_and_leaves_gradients_alone(ranks, specimen, schedule):
    batch = batch_of(specimen, rows=5)
    model = SPECIMENS[specimen].load.from_pretrained(checkpoint(specimen), dtype=torch.float32)
    output = model(**batch)
    output.loss.backward()
    answers = ranks(2).run(on_rank_evaluate, checkpoint(specimen), specimen, schedule, batch)

    for losses, grads, _ in answers:
        assert losses == pytest.approx([output.loss.item()] * 4, rel=1e-5)
        for name, grad in grads.items():  # two steps without zero_grad add up
            expected = 2 * model.get_parameter(name).grad
            assert (grad - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name
    (logits,) = [logits for _, _, logits in answers if logits is not None]
    torch.testing.assert_close(logits, output.logits.detach(), rtol=1e-4, atol=1e-5)


def on_rank_weigh(folder, batch, weights):
    _setup, pipeline = load("llama-deep", "1f1b", folder=folder)
    return [pipeline.step(batch, weight).item() for weight in weights]


def test_a_step_may_have_any_weight(ranks):
    batch = batch_of("llama-deep")
    loss = SPECIMENS["llama-deep"].load.from_pretrained(checkpoint("llama-deep"), dtype=torch.float32)(**batch).loss

    for losses in ranks(2).run(on_rank_weigh, checkpoint("llama-deep"), batch, (-1.0, 0.5, 0.0, math.nan)):
        assert losses == pytest.approx([-loss.item(), 0.5 * loss.item(), 0.0, math.nan], rel=1e-5, nan_ok=True)


def mean_of_labels(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def on_rank_count_schedules(folder, batch):
    from nemo_dist_pipeline.runtime.torch_stage import ScheduleBuilder

    _setup, pipeline = load("llama-deep", "1f1b", folder=folder, loss_fn=mean_of_labels)
    with patch.object(ScheduleBuilder, "__call__", autospec=True, side_effect=ScheduleBuilder.__call__) as build:
        losses = [pipeline.step(batch).item() for _ in range(3)]
    return losses, build.call_count


def test_steps_with_a_loss_of_the_users_own_share_one_schedule(ranks):
    batch = batch_of("llama-deep")
    model = SPECIMENS["llama-deep"].load.from_pretrained(checkpoint("llama-deep"), dtype=torch.float32)

    for losses, built in ranks(2).run(on_rank_count_schedules, checkpoint("llama-deep"), batch):
        assert built == 1
        assert losses == pytest.approx([model(**batch).loss.item()] * 3, rel=1e-5)


def on_rank_own_loop(folder, batch):
    from nemo_dist_pipeline.runtime.microbatches import Microbatches

    _setup, pipeline = load("llama-deep", "interleaved_1f1b", folder=folder)
    run = Microbatches.of(pipeline.parts[-1], batch, torch.ones(()), 1, 0)
    losses = []
    pipeline.schedule(run).step(target=run.weights, losses=losses, return_outputs=False, **run.arguments)
    return sum(loss.item() for loss in losses)


def test_a_hand_written_loop_can_step_torchs_schedule(ranks):
    batch = batch_of("llama-deep")
    model = SPECIMENS["llama-deep"].load.from_pretrained(checkpoint("llama-deep"), dtype=torch.float32)
    on_first, on_last = ranks(2).run(on_rank_own_loop, checkpoint("llama-deep"), batch)

    assert on_first == 0 and on_last == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def on_rank_train_in_bfloat16(folder, batch, dtype, policy):
    options = {} if policy is None else {"mp_policy": policy}
    setup = DistributedSetup.build(
        FSDP2Config(**options), ParallelismSizes(pp_size=2), pipeline_config=PipelineConfig(dtype=dtype)
    )
    kind = SPECIMENS["llama-deep"].load
    pipeline = kind.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    loss = setup.runtime(pipeline).forward_backward(batch).item()
    (built,) = pipeline._built.values()
    stage = built._stage
    (meta,) = stage._stage_meta.outputs if stage.is_first else stage._stage_meta.inputs
    return loss, str(meta.dtype), {name: one.grad.to_local() for name, one in pipeline.named_parameters()}


@pytest.mark.parametrize("policy", [None, {"param_dtype": "bfloat16", "reduce_dtype": "float32"}])
def test_hidden_states_are_sent_in_the_compute_or_the_chosen_dtype(ranks, policy):
    """Sent in more digits than they have, they give the same loss and gradients to the last bit."""
    batch = batch_of("llama-deep")
    model = SPECIMENS["llama-deep"].load.from_pretrained(checkpoint("llama-deep"), dtype=torch.float32)
    expected = model(**batch).loss.item()
    made = {
        dtype: ranks(2).run(on_rank_train_in_bfloat16, checkpoint("llama-deep"), batch, dtype, policy)
        for dtype in (None, "float32", "float16")
    }
    for dtype, travels in ((None, "torch.bfloat16"), ("float32", "torch.float32"), ("float16", "torch.float16")):
        assert {found for _, found, _ in made[dtype]} == {travels}
        assert [loss for loss, *_ in made[dtype]] == pytest.approx([expected] * 2, rel=2e-2)
    for (loss, _, grads), (as_made, _, same) in zip(made["float32"], made[None], strict=True):
        assert loss == as_made and grads.keys() == same.keys()
        assert all(torch.equal(grads[name], same[name]) and grads[name].dtype is torch.float32 for name in same)


def on_rank_train_on_two_lengths(folder, schedule, options):
    """Return how many schedules are kept after each of three batches, and whether buffers of the first are."""
    setup, pipeline = load("llama-deep", schedule, folder=folder, **options)
    runtime = setup.runtime(pipeline)
    gc.disable()  # what a circle of references holds stays
    kept = []
    with patch.object(torch.random, "fork_rng", wraps=torch.random.fork_rng) as fork:
        for length in (10, 12, 10):
            runtime.forward_backward(batch_of("llama-deep", length=length))
            kept.append(len(pipeline._built))
            if length == 10 and len(kept) == 1:
                (built,) = pipeline._built.values()
                stages = getattr(built, "_stages", None) or [built._stage]
                received = [
                    info.buffer for stage in stages for info in stage.args_recv_info[0] if info.buffer is not None
                ]
                first = [weakref.ref(buffer) for buffer in received]
                del built, stages, received
            elif length == 12:
                alive = [buffer() is not None for buffer in first]
    gc.enable()
    # Without a list of devices, the state of every GPU of the machine is copied.
    assert all(call.args or call.kwargs.get("devices") is not None for call in fork.call_args_list)
    return kept, alive


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
@pytest.mark.parametrize(("options", "kept"), [({}, 1), ({"pp_cached_schedules": 2}, 2)])
def test_receive_buffers_are_kept_for_as_many_shapes_as_asked(ranks, schedule, options, kept):
    answers = ranks(2).run(on_rank_train_on_two_lengths, checkpoint("llama-deep"), schedule, options)
    assert any(alive for _, alive in answers)
    for counts, alive in answers:
        assert counts == [1, kept, kept] and set(alive) <= {kept == 2}


def on_rank_freeze_and_train(folder, batch):
    setup, pipeline = load("llama-deep", "1f1b", folder=folder)
    for name, parameter in pipeline.named_parameters():
        parameter.requires_grad_("layers.8" in name)
    runtime = setup.runtime(pipeline)
    runtime.forward_backward(batch)
    return {name: whole(p.grad) for name, p in pipeline.named_parameters() if p.grad is not None}


def test_a_first_stage_may_have_nothing_to_train(ranks):
    batch = batch_of("llama-deep")
    model = SPECIMENS["llama-deep"].load.from_pretrained(checkpoint("llama-deep"), dtype=torch.float32)
    model(**batch).loss.backward()
    first, last = ranks(2).run(on_rank_freeze_and_train, checkpoint("llama-deep"), batch)

    assert first == {} and last and all("layers.8" in name for name in last)
    for name, grad in last.items():
        assert (grad - model.get_parameter(name).grad).norm() <= 1e-5 * grad.norm()


def on_rank_export(folder, schedule, path, batch):
    setup, pipeline = load("llama-deep-tied", schedule, folder=folder)
    setup.runtime(pipeline).export(path)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_an_export_is_the_whole_model(ranks, schedule, tmp_path):
    batch = batch_of("llama-deep-tied")
    ranks(2).run(on_rank_export, checkpoint("llama-deep-tied"), schedule, tmp_path / "out", batch)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama-deep-tied"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    assert torch.equal(model(**batch).logits, again(**batch).logits)


# ---- a rank that dies ----


def on_rank_die_in_the_middle(folder, batch, how):
    setup, pipeline = load("llama-deep", "1f1b", folder=folder)
    runtime = setup.runtime(pipeline)
    runtime.forward_backward(batch)
    if pipeline.info.has_last_stage:
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 2:
                if how == "raises":
                    raise FloatingPointError("the second microbatch went wrong")
                os.kill(os.getpid(), signal.SIGKILL)

        pipeline.parts[-1].register_forward_pre_hook(fail)
    runtime.forward_backward(batch)


@pytest.mark.parametrize(
    ("how", "says"), [("raises", "the second microbatch went wrong"), ("killed", "was killed by SIGKILL")]
)
def test_a_rank_that_dies_in_a_schedule_ends_all_ranks_and_is_named(how, says):
    started = time.monotonic()
    with (
        RankPool(2, timeout=300, collective_timeout=200) as pool,
        pytest.raises(RankError, match="rank 1 of 2 failed") as caught,
    ):
        pool.run(on_rank_die_in_the_middle, checkpoint("llama-deep"), batch_of("llama-deep"), how)

    assert says in str(caught.value)
    assert time.monotonic() - started < 150  # no rank waits for a collective to end by its timeout
