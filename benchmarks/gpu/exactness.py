"""Do the numbers on the device equal those of a plain loop on the same device, with one NCCL rank?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
import transformers
from record import Place, Record
from torch import Tensor

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification
from nemo_dist.hf_model import inner_model
from nemo_dist.testing.equivalence import MAX_NORM, Outcome, Task, checkpoint, differences, train_with
from nemo_dist.testing.tensors import saved_weights
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_fsdp2 import FSDP2Config
from nemo_dist_megatron_fsdp import MegatronFSDPConfig

EXACT = {"param_dtype": "float32", "reduce_dtype": "float32"}
TOLERANCE = 2e-5  # of a norm: kernels sum in any order
_FSDP2 = FSDP2Config(mp_policy=EXACT)


def plain(task: Task, place: Place, **loading: Any) -> Outcome:
    """Train *task* on the device with plain transformers and torch."""
    loading = {"dtype": torch.float32, **loading}
    model: Any = SPECIMENS[task.specimen].load.from_pretrained(checkpoint(task.specimen, task.seed), **loading)
    model.to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), **task.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(task.steps):
        batch = {name: value.to(place.device) for name, value in joined(task, step).items()}
        loss = model(**batch).loss
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=on_cpu(model.named_parameters()))


def joined(task: Task, step: int) -> dict[str, Tensor]:
    """Return the batches of *step* as one."""
    batches = task.batches(step)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def on_cpu(named: Any) -> dict[str, Tensor]:
    """Return copies on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in named}


def built(place: Place, strategy: Any, **options: Any) -> DistributedSetup:
    """Return the setup of *strategy*, a name or its section."""
    return DistributedSetup.build(strategy=strategy, device_type=place.device_type, **options)


def loaded(place: Place, task: Task, strategy: Any, dtype: Any = torch.float32, **options: Any) -> Any:
    """Return the runtime of the model of *task* under *strategy*."""
    setup = built(place, strategy, **options)
    folder = checkpoint(task.specimen, task.seed)
    return setup.runtime(SPECIMENS[task.specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=dtype))


def compare(record: Record, what: str, found: Outcome, expected: Outcome, tolerance: float = TOLERANCE) -> None:
    """Judge every loss, norm, gradient and parameter, and tell how far the worst parameter is off."""
    wrong = differences(found, expected, tolerance)
    worst = max(_error(found.parameters[name], expected.parameters[name]) for name in found.parameters)
    text = f"worst parameter off by {worst:.1e}, last loss {found.losses[-1]:.6f} and {expected.losses[-1]:.6f}"
    record.judge(what, not wrong, "; ".join([text, *wrong[:4]]))


def _error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def the_loop(place: Place, record: Record) -> None:
    """The README's loop in float32 and bfloat16 under fsdp2 and ddp, its save, load and export."""
    with place.one_rank():
        for specimen in ("llama", "llama-tied", "llama-padded", "gpt2", "gemma3"):
            task = Task(specimen=specimen)
            expected = plain(task, place)
            for strategy in (_FSDP2, "ddp"):
                name = f"{specimen}, {strategy if isinstance(strategy, str) else 'fsdp2'}"
                with record.attempt(name):
                    compare(record, name, train_with(task, loaded(place, task, strategy)), expected)
        task = Task(steps=20, rows=16, length=64, lr=1e-3)
        with record.attempt("bfloat16"):
            full, mixed = plain(task, place), train_with(task, loaded(place, task, "fsdp2"))
            gap = max(abs(a - b) / b for a, b in zip(mixed.losses, full.losses, strict=True))
            record.judge("fsdp2 in bfloat16, losses of 20 steps off float32's by at most 2 %", gap < 0.02, f"{gap:.2%}")
        with record.attempt("save and load"):
            _saves(place, record, _FSDP2)


def _saves(place: Place, record: Record, strategy: Any) -> None:
    task = Task(steps=1)
    runtime, after, again = (loaded(place, task, strategy) for _ in range(3))
    optimizer, its_own = (one.optimizer(torch.optim.AdamW, **task.optimizer) for one in (runtime, after))
    for step in range(2):
        _step(runtime, optimizer, task.batches(step)[0])
    runtime.save(place.folder / "saved", optimizer)
    after.load(place.folder / "saved", its_own)
    runtime.export(place.folder / "exported")
    next_losses = [_step(one, o, task.batches(2)[0]) for one, o in ((runtime, optimizer), (after, its_own))]
    record.judge("next loss after save and load", next_losses[0] == next_losses[1], next_losses)
    exported = saved_weights(place.folder / "exported")
    again.load(place.folder / "saved")
    different = [n for n, p in again.named_parameters() if not torch.equal(_whole(p).cpu(), exported[n])]
    record.judge("exported weights equal the saved ones", not different, different[:3])


def _whole(parameter: Any) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _step(runtime: Any, optimizer: Any, batch: Mapping[str, Tensor]) -> float:
    loss: float = runtime.forward_backward(dict(batch)).item()
    runtime.clip_grad_norm_(MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def megatron_fsdp(place: Place, record: Record) -> None:
    """Megatron-FSDP, every ZeRO level and double buffers, for 20 steps."""
    with calls_of(place), place.one_rank():
        for specimen in ("llama", "qwen3-moe"):
            task = Task(specimen=specimen, steps=20, lr=1e-3)
            expected = plain(task, place)
            for level, double in ((1, False), (2, False), (3, False), (3, True)):
                name = f"{specimen}, ZeRO {level}{', double buffers' if double else ''}"
                with record.attempt(name):
                    strategy = MegatronFSDPConfig(zero_dp_strategy=level, fsdp_double_buffer=double)
                    compare(record, name, train_with(task, loaded(place, task, strategy)), expected, 1e-4)


def calls_of(place: Place) -> Any:
    """Within the context, Megatron-FSDP's calls of ``torch.cuda`` work on the CPU; on CUDA they are what they are."""
    from contextlib import nullcontext

    from nemo_dist.testing.fake_cuda import cuda_calls

    return nullcontext() if place.cuda else cuda_calls()


def offload(place: Place, record: Record) -> None:
    """Shards in the memory of the host."""
    strategy = FSDP2Config(mp_policy=EXACT, offload_policy="cpu")
    with place.one_rank():
        for specimen in ("llama", "gemma3"):
            task = Task(specimen=specimen)
            with record.attempt(f"{specimen}, offload"):
                runtime = loaded(place, task, strategy)
                found = train_with(task, runtime)
                compare(record, f"{specimen}, offload", found, plain(task, place))
                devices = sorted({str(_local(p).device) for _, p in runtime.named_parameters()})
                record.judge("shards are on the CPU", devices == ["cpu"], devices)
        with record.attempt("save and load"):
            _saves(place, record, strategy)


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def missing_head(place: Place, record: Record) -> None:
    """A head that the checkpoint lacks is what the CPU's generator draws, whatever the device's does."""
    folder = checkpoint("llama")
    loader: Any = NeMoAutoModelForSequenceClassification
    torch.manual_seed(3)
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(folder).score.weight
    with place.one_rank():
        for name, strategy in (("ddp", "ddp"), ("fsdp2", _FSDP2)):
            for seed in (1, 2):
                torch.manual_seed(3)
                if place.cuda:
                    torch.cuda.manual_seed(seed)
                model = loader.from_pretrained(folder, distributed_setup=built(place, strategy))
                found = _whole(inner_model(model).score.weight).detach().cpu()
                record.judge(f"{name}, device seed {seed}", torch.equal(found, expected), found[0, :3].tolist())


def new_models(place: Place, record: Record) -> None:
    """A model from a config has the weights that one process draws on the CPU, also with CUDA as default device."""
    config = SPECIMENS["llama"].config()
    torch.manual_seed(0)
    expected = on_cpu(transformers.AutoModelForCausalLM.from_config(config).named_parameters())
    with place.one_rank():
        for default in ("cpu", "cuda" if place.cuda else "meta"):
            name = f"default device {default}"
            with record.attempt(name):
                torch.manual_seed(0)
                with torch.device(default):
                    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=built(place, _FSDP2))
                found = {n: _whole(p).detach().cpu() for n, p in model.named_parameters()}
                different = [n for n in expected if not torch.equal(found[n], expected[n])]
                record.judge(name, not different, f"{len(different)} of {len(expected)} differ")


def asynchronous_save(place: Place, record: Record) -> None:
    """What is overwritten right after an asynchronous save returned is saved as it was."""
    task = Task(steps=1)
    with place.one_rank():
        runtime = loaded(place, task, _FSDP2)
        optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
        for turn in range(5):
            _step(runtime, optimizer, task.batches(turn)[0])
            before = {name: _local(p).detach().clone() for name, p in runtime.named_parameters()}
            handle = runtime.save(place.folder / f"saved-{turn}", optimizer, asynchronous=True)
            with torch.no_grad():
                for _, parameter in runtime.named_parameters():
                    _local(parameter).zero_()
            handle.wait()
            runtime.load(place.folder / f"saved-{turn}", optimizer)
            different = [n for n, p in runtime.named_parameters() if not torch.equal(_local(p).detach(), before[n])]
            record.judge(f"turn {turn}", not different, different[:3])


def dropout_and_resume(place: Place, record: Record) -> None:
    """The losses after a resume draw the same dropout as those without it."""
    task = Task(steps=1)
    with place.one_rank():
        runs = []
        for _ in range(2):
            setup = built(place, _FSDP2)
            model = NeMoAutoModelForCausalLM.from_pretrained(
                checkpoint("llama"), distributed_setup=setup, dtype=torch.float32, attention_dropout=0.2
            )
            runtime = setup.runtime(model.train())
            runs.append((runtime, runtime.optimizer(torch.optim.AdamW, **task.optimizer)))
        _step(*runs[0], task.batches(0)[0])
        runs[0][0].save(place.folder / "saved", runs[0][1])
        first = [_step(*runs[0], task.batches(step)[0]) for step in (1, 2)]
        runs[1][0].load(place.folder / "saved", runs[1][1])
        second = [_step(*runs[1], task.batches(step)[0]) for step in (1, 2)]
        record.judge("losses with dropout", first == second, [first, second])


def recomputation(place: Place, record: Record) -> None:
    """Recomputed forwards draw the same dropout, and hold less."""
    rows, length = (8, 512) if place.cuda else (2, 32)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    with place.one_rank():
        for mode in (False, "selective", True):
            torch.manual_seed(0)
            setup = built(place, _FSDP2, activation_checkpointing=mode)
            model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32).train()
            runtime = setup.runtime(model)
            tokens = torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(1))
            torch.manual_seed(5)
            place.forget_peak()
            loss = runtime.forward_backward({"input_ids": tokens, "labels": tokens}).item()
            gradients = {n: _whole(p.grad).detach().cpu().clone() for n, p in runtime.named_parameters()}
            record.note(f"recompute {mode}: peak", f"{place.peak():.0f} MiB")
            found[str(mode)] = (loss, gradients)
            del runtime, model, setup
    expected, gradients = found["False"]
    for mode in ("selective", "True"):
        worst = max(_error(found[mode][1][name], gradients[name]) for name in gradients)
        record.judge(
            f"recompute {mode}: loss and gradients", found[mode][0] == expected and worst < 1e-5, f"{worst:.1e}"
        )


def experts(place: Place, record: Record) -> None:
    """Experts by grouped matrix products, in float32 and bfloat16."""
    task = Task(specimen="qwen3-moe")
    with place.one_rank():
        with record.attempt("float32"):
            compare(record, "float32", train_with(task, loaded(place, task, _FSDP2)), plain(task, place))
        with record.attempt("bfloat16"):
            found = train_with(task, loaded(place, task, "fsdp2")).losses
            expected = plain(task, place).losses
            gap = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
            record.judge("losses in bfloat16 off by at most 3 %", gap < 0.03, f"{gap:.2%}")
        runtime = loaded(place, task, _FSDP2)
        record.note("experts run by", getattr(runtime.model.config, "_experts_implementation", None))


def compiled(place: Place, record: Record) -> None:
    """Compiled blocks."""
    task, compile_block = Task(), torch.nn.Module.compile
    how = {} if place.cuda else {"backend": "aot_eager"}  # kernels for the CPU take minutes
    patch = mock.patch.object(torch.nn.Module, "compile", lambda block: compile_block(block, **how))
    with place.one_rank(), patch:
        expected = plain(task, place)
        for mode in (False, True):
            with record.attempt(f"compiled, recompute {mode}"):
                strategy = FSDP2Config(mp_policy=EXACT, enable_compile=True)
                found = train_with(task, loaded(place, task, strategy, activation_checkpointing=mode))
                compare(record, f"compiled, recompute {mode}", found, expected, 1e-4)


def bad_token(place: Place, record: Record) -> None:
    """A token id outside of the vocabulary is an error under tensor parallelism too, not a row of zeros."""
    from types import SimpleNamespace

    from nemo_dist_tensor.layers import vocabulary

    peers: Any = SimpleNamespace(bounds=lambda total: (0, total), all_reduce=lambda value: value, rank=0, size=1)
    embedding = torch.nn.Embedding(8, 4).to(place.device)
    vocabulary(embedding, peers)
    record.judge("a good id", embedding(torch.tensor([3], device=place.device)).shape == (1, 4), "")
    try:
        found = embedding(torch.tensor([9], device=place.device))
        place.settle()
        record.judge("a bad id", False, found.tolist())
    except Exception as error:
        record.judge("a bad id", True, f"{type(error).__name__}: {str(error)[:200]}")


def demo(place: Place, record: Record) -> None:
    """The demo under Megatron-FSDP and fsdp2, with its own comparison of the export."""
    for strategy in ("megatron_fsdp", "fsdp2"):
        steps = 60 if place.cuda else 2
        if strategy == "megatron_fsdp" and not place.cuda:
            continue
        command = [sys.executable, "-m", "nemo_dist.cli", "demo", "--strategy", strategy, "--nproc", "1"]
        command += ["--steps", str(steps), "--out", str(place.folder / strategy)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env={**os.environ})
        text = (done.stdout + done.stderr).strip()
        record.judge(strategy, done.returncode == 0, text[-400:] if done.returncode == 0 else text[-1500:])
