"""A run saved under any topology goes on under any other, and plain transformers loads what any of them exports.

Every topology saves once, and each other one goes on from all of them. `make test` has a cycle, each saved and loaded
once.
"""

from functools import lru_cache

import checkpoint_runs as runs
import pytest
import torch
import transformers
from cases import case_id, cases, slow

from nemo_dist.testing.equivalence import TOLERANCE, Task
from nemo_dist.testing.fake_cuda import WithCudaCalls

# By model: packed queries, keys and values and tied embeddings; experts, whose projections tensor parallelism cuts
# packed. Topologies are in the order of the world size, as a pool of ranks takes seconds to start.
TOPOLOGIES = {
    "phi3-deep-tied": [
        *(("fsdp2", 1), ("ddp", 1)),
        *(("fsdp2", 2), ("ddp", 2), ("tp", 2), ("cp", 2), ("pp", 2), ("pp-v", 2)),
        *(("fsdp2", 4), ("hsdp", 4), ("tp", 4), ("cp", 4), ("pp", 4), ("pp-tp", 4), ("pp-cp", 4)),
        *(("hsdp-tp", 4), ("hsdp-cp", 4)),  # replicas of one shard each, beside another axis
        *(("fsdp2", 8), ("ddp", 8), ("hsdp-tp", 8)),
    ],
    "qwen3-moe-deep": [
        ("fsdp2", 1),
        *(("fsdp2", 2), ("ddp", 2), ("tp", 2), ("cp", 2), ("pp", 2), ("ep", 2)),
        *(("hsdp", 4), ("tp", 4), ("ep", 4), ("ep-tp", 4)),
        *(("ep", 8), ("five", 8)),
    ],
    "llama-tied": [("ddp", 2), ("tp", 2), ("megatron", 2), ("megatron-zero1", 2), ("fsdp2", 4), ("megatron-tp", 4)],
}
CYCLES = {
    "phi3-deep-tied": [
        ("ddp", 2),
        ("tp", 2),
        ("cp", 2),
        ("pp", 2),
        ("pp-v", 2),
        ("pp-tp", 4),
        ("hsdp-tp", 4),
        ("hsdp", 4),
    ],
    "qwen3-moe-deep": [("tp", 2), ("fsdp2", 2), ("ep", 4)],
}
KINDS = ["exp_avg", "exp_avg_sq", "model", "step"]


def cells():
    for specimen, cycle in CYCLES.items():
        for source, target in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            yield pytest.param(
                specimen, [source], target, id=case_id(specimen, f"{spoken(source)} to {spoken(target)}")
            )
    for specimen, topologies in TOPOLOGIES.items():
        for target in topologies:
            marks = [pytest.mark.slow, pytest.mark.timeout(1800)]
            yield pytest.param(
                specimen, topologies, target, marks=marks, id=case_id(specimen, f"all to {spoken(target)}")
            )


def named(topology):
    return "".join(map(str, topology))


def spoken(topology):
    name, world = topology
    return f"{name} on {world}"


@pytest.fixture(scope="module")
def on(rank_pools):
    """Run a function on the ranks of a topology, with a stand-in for CUDA where its package calls it."""

    def run(topology, function, *args):
        name, world = topology
        pool = WithCudaCalls(rank_pools(world)) if name.startswith("megatron") else rank_pools(world)
        return pool.run(function, name, *args, timeout=900.0)  # one call may go on from 17 topologies

    return run


@pytest.fixture(scope="module")
def saved(on, tmp_path_factory):
    """A training saved and exported under a topology: where, everything in it, and its next three losses."""
    where = tmp_path_factory.mktemp("saved")

    @lru_cache
    def save(specimen, topology):
        path = where / f"{specimen}-{named(topology)}"
        answers = on(topology, runs.on_rank_train_save_and_export, runs.folders(specimen), specimen, path)
        found = runs.joined([found for found, _ in answers])
        assert sorted({key.partition("/")[0] for key in found}) == KINDS
        assert ("model/lm_head.weight" in found) != ("tied" in specimen)
        return path, found, answers[0][1]

    return save


@pytest.mark.slow
@pytest.mark.parametrize(("specimen", "sources", "target"), list(cells()))
def test_a_run_resumes_in_another_topology_and_loads_its_export(on, saved, specimen, sources, target):
    of = {source: saved(specimen, source) for source in sources}
    _, _, uninterrupted = saved(specimen, target)
    paths = [path for path, _, _ in of.values()]
    another = sources.index(target) - 1 if target in sources else 0
    answers = on(
        target, runs.on_rank_load_each, runs.folders(specimen), specimen, paths, runs.export_of(paths[another])
    )
    problems = []
    for index, (source, (_, expected, _)) in enumerate(of.items()):
        problems += wrong(f"from {named(source)}", [reports[index] for reports, _ in answers], expected, uninterrupted)
    assert not problems, "\n".join(problems)
    assert runs.joined([exported for _, exported in answers]) == model_of(of[sources[another]][1])


def wrong(what, reports, expected, uninterrupted):
    """Say what differs: bits of the state from *expected*, the next losses from those of a run that never stopped."""
    loaded = runs.joined([found for found, _ in reports])
    for name in sorted(loaded.keys() ^ expected.keys()):
        yield f"{what}: {name} is {'new' if name in loaded else 'missing'}"
    for name in sorted(loaded.keys() & expected.keys()):
        if loaded[name] != expected[name]:
            yield f"{what}: {name} is {loaded[name]}, expected {expected[name]}"
    for _, losses in reports:
        # What was loaded is the source's, whose sums were taken in another order.
        if losses != pytest.approx(uninterrupted, rel=TOLERANCE):
            yield f"{what}: the next losses are {losses}, expected {uninterrupted}"


def model_of(found):
    return {name: text for name, text in found.items() if name.startswith("model/")}


EXPORTS = [
    (specimen, topology) if topology in CYCLES.get(specimen, ()) else slow(specimen, topology)
    for specimen, topologies in TOPOLOGIES.items()
    for topology in topologies
]


@cases(("specimen", "topology"), EXPORTS, lambda specimen, topology: case_id(specimen, spoken(topology)))
def test_plain_transformers_loads_the_trained_model_from_an_export(saved, specimen, topology):
    path, expected, losses = saved(specimen, topology)
    model = transformers.AutoModelForCausalLM.from_pretrained(runs.export_of(path), dtype=torch.float32)
    tied = set(model.all_tied_weights_keys)
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items() if name not in tied}
    assert runs.digests(state) == model_of(expected)
    batch = Task(specimen=specimen).batches(3)[0]
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert loss == pytest.approx(losses[0], rel=TOLERANCE)
