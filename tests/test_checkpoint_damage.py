"""What is not whole, not of this model, or not to be trusted is refused by name, before anything has changed."""

import os
import pickle
import shutil
import zlib
from types import SimpleNamespace
from unittest import mock

import checkpoint_runs as runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_dist import CheckpointError
from nemo_dist.checkpoint.json_state import from_json
from nemo_dist.checkpoint.load import Reader
from nemo_dist.checkpoint.manifest import Manifest


@pytest.fixture(scope="module")
def original(rank_pools, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "c"
    rank_pools(2).run(runs.on_rank_train_and_save, "fsdp2", runs.folders("llama"), path)
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path, dirs_exist_ok=True)


def locally(runtime, optimizer):
    """Return copies of what this rank holds; no communication, as another rank may have failed."""
    tensors = {name: parameter.to_local().detach().clone() for name, parameter in runtime.named_parameters()}
    return tensors | {"moments": torch.tensor(len(optimizer.state)), "generator": torch.get_rng_state()}


def on_rank_try_to_load(folders, path, specimen="llama", optimizer_type=torch.optim.AdamW, **options):
    """Report the error of a load, and whether nothing of the run has changed."""
    runs.FOLDERS.update(folders)
    runtime, _ = runs.start("fsdp2", specimen, 1)
    optimizer = runtime.optimizer(optimizer_type, lr=1e-3)
    before = locally(runtime, optimizer)
    try:
        runtime.load(path, optimizer, **options)
        error = "none"
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    after = locally(runtime, optimizer)
    return error, all(torch.equal(after[name], tensor) for name, tensor in before.items())


def refusals(ranks, path, **options):
    answers = ranks(2).run(on_rank_try_to_load, runs.folders("llama", "qwen3"), path, **options)
    assert all(same for _, same in answers), "a refused checkpoint has changed the run"
    assert all("Error: " in error for error, _ in answers), answers
    return "\n".join(error for error, _ in answers)


def cut(path):
    name = path / "rank-00001.safetensors"
    os.truncate(name, name.stat().st_size - 1)


def flip(path):
    name = path / "rank-00001.safetensors"
    content = bytearray(name.read_bytes())
    content[-100] ^= 4
    name.write_bytes(content)


def flip_in_the_header(path):
    name = path / "rank-00000.safetensors"
    content = bytearray(name.read_bytes())
    content[40] ^= 1
    name.write_bytes(content)


def remove_shard(path):
    (path / "rank-00001.safetensors").unlink()


def remove_manifest(path):
    (path / "manifest.json").unlink()


def cut_manifest(path):
    os.truncate(path / "manifest.json", 1000)


def flip_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"lr":0.01', '"lr":0.91', 1))


def newer(path):
    runs.rewrite(path, format=lambda old: old + 1)


def climbing(path):
    def climb(files):
        return [{**files[0], "name": "../rank-00000.safetensors"}, *files[1:]]

    runs.rewrite(path, files=climb)


def without_a_moment(path):
    name = "optimizer.exp_avg/model.norm.weight"
    runs.rewrite(path, tensors=lambda tensors: {other: value for other, value in tensors.items() if other != name})


def absolute(path):
    runs.rewrite(path, files=lambda files: [{**files[0], "name": "/etc/passwd"}, *files[1:]])


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def pickle_with_right_sums(path):
    content = pickle.dumps(Payload(path / "ran"))
    (path / "rank-00001.safetensors").write_bytes(content)
    entry = {"name": "rank-00001.safetensors", "bytes": len(content), "crc32": zlib.crc32(content), "dp_rank": 1}
    runs.rewrite(path, files=lambda files: [files[0], entry])


def pickle_alone(path):
    (path / "rank-00001.safetensors").write_bytes(pickle.dumps(Payload(path / "ran")))


def torch_file(path):
    torch.save({"weight": Payload(path / "ran")}, path / "rank-00001.safetensors")
    content = (path / "rank-00001.safetensors").read_bytes()
    entry = {"name": "rank-00001.safetensors", "bytes": len(content), "crc32": zlib.crc32(content), "dp_rank": 1}
    runs.rewrite(path, files=lambda files: [files[0], entry])


def other_shapes_than_announced(path):
    save_file({"x": torch.ones(2)}, path / "rank-00001.safetensors")
    content = (path / "rank-00001.safetensors").read_bytes()
    entry = {"name": "rank-00001.safetensors", "bytes": len(content), "crc32": zlib.crc32(content), "dp_rank": 1}
    runs.rewrite(path, files=lambda files: [files[0], entry])


NORM = "model/model.norm.weight"


def listed(path, pieces):
    """List the chunks of a norm one by one, as of a layout without order."""
    runs.rewrite(path, tensors=lambda tensors: {**tensors, NORM: [[32], "float32", pieces]})


def holes(path):
    listed(path, [[1, [16], [16]]])


def twice(path):
    listed(path, [[0, [0], [16]], [1, [0], [16]]])


def outside(path):
    listed(path, [[0, [32], [32]]])


def of_another_layout(path):
    def other(layouts):
        return [{**layout, "placements": [[*layout["placements"][0], 2]]} for layout in layouts]

    runs.rewrite(path, layouts=other)


def of_more_ranks(path):
    runs.rewrite(path, layouts=lambda layouts: [{**layout, "ranks": [0, 4]} for layout in layouts])


def without_the_state_of_a_rank(path):
    name = path / "rank-00001.safetensors"
    save_file({key: value for key, value in load_file(name).items() if key != "rank"}, name)
    content = name.read_bytes()
    entry = {"bytes": len(content), "crc32": zlib.crc32(content)}
    runs.rewrite(path, files=lambda files: [files[0], {**files[1], **entry}])


def moment_of_nobody(path):
    """Everything fits together, but a moment belongs to no parameter: told before weights are changed, not after."""
    old, new, entries = "optimizer.exp_avg/model.norm.weight", "optimizer.exp_avg/nobody", []
    for file in sorted(path.glob("rank-*.safetensors")):
        save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)
        content = file.read_bytes()
        entries.append({"name": file.name, "bytes": len(content), "crc32": zlib.crc32(content)})
    runs.rewrite(
        path,
        files=lambda old: [{**before, **entry} for before, entry in zip(old, entries, strict=True)],
        tensors=lambda tensors: {name.replace(old, new): value for name, value in tensors.items()},
    )


def nonsense(path):
    runs.rewrite(path, tensors=lambda tensors: ["a", "list"])


def deep(path):
    (path / "manifest.json").write_text("[" * 100_000)


def list_at_the_top(path):
    (path / "manifest.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (cut, ["rank-00001.safetensors has", "it was cut or replaced"]),
        (flip, ["rank-00001.safetensors is damaged: its checksum is"]),
        (flip_in_the_header, ["rank-00000.safetensors is damaged"]),
        (remove_shard, ["rank-00001.safetensors is missing; the checkpoint is not complete"]),
        (remove_manifest, ["manifest.json is missing"]),
        (cut_manifest, ["manifest.json is damaged"]),
        (flip_manifest, ["manifest.json is damaged: its checksum"]),
        (newer, ["has checkpoint format 3, and this version reads up to 2; update nemo_dist"]),
        (climbing, ["names the file '../rank-00000.safetensors'"]),
        (without_a_moment, ["has optimizer.exp_avg/model.norm.weight[", "manifest.json does not name"]),
        (absolute, ["names the file '/etc/passwd'"]),
        (pickle_alone, ["it was cut or replaced"]),
        (holes, ["model.norm.weight do not make the whole tensor"]),
        (twice, ["model.norm.weight do not make the whole tensor"]),
        (outside, ["a piece of model/model.norm.weight lies outside"]),
        (of_another_layout, ["rank-00000.safetensors is no safetensors file, or lacks a tensor"]),
        (of_more_ranks, ["lies outside the tensor or the files"]),
        (without_the_state_of_a_rank, ["rank-00001.safetensors is malformed"]),
        (moment_of_nobody, ["optimizer.exp_avg/nobody has shape (32,), but no parameter of that name"]),
        (nonsense, ["manifest.json is malformed"]),
        (deep, ["manifest.json is damaged"]),
        (list_at_the_top, ["it must be a JSON object (got list)"]),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_changes_nothing(ranks, copy, damage, messages):
    damage(copy)
    found = refusals(ranks, copy)
    for message in messages:
        assert message in found
    assert not (copy / "ran").exists()


@pytest.mark.parametrize("damage", [pickle_with_right_sums, torch_file, other_shapes_than_announced])
def test_a_file_that_is_not_safetensors_is_refused_and_not_executed(ranks, copy, damage):
    damage(copy)
    found = refusals(ranks, copy)
    assert "rank-00001.safetensors" in found
    assert not (copy / "ran").exists()


def test_a_checkpoint_of_another_class_is_refused(ranks, original):
    assert "is of a LlamaForCausalLM, but the model is a Qwen3ForCausalLM" in refusals(
        ranks, original, specimen="qwen3"
    )


def test_another_optimizer_is_refused(ranks, original):
    found = refusals(ranks, original, optimizer_type=torch.optim.SGD)
    assert "was saved with the optimizer AdamW, and the optimizer to load is SGD" in found


def on_rank_save_variant(path, **changes):
    """Save a new model of the class of the specimen, with a changed config."""
    config = runs.SPECIMENS["llama"].config()
    config.update(changes)
    setup = runs.DistributedSetup.build(**runs.SETUPS["fsdp2"])
    model = runs.SPECIMENS["llama"].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    runtime.save(path, runtime.optimizer(torch.optim.AdamW))


def test_a_model_of_another_size_is_refused_with_the_names_and_shapes(ranks, tmp_path):
    ranks(2).run(on_rank_save_variant, tmp_path / "c", vocab_size=100)
    found = refusals(ranks, tmp_path / "c")
    assert "lm_head.weight is torch.float32 (100, 32) in the checkpoint, torch.float32 (96, 32) in the model" in found


def test_missing_and_unknown_parameters_are_named(ranks, tmp_path):
    ranks(2).run(on_rank_save_variant, tmp_path / "small", num_hidden_layers=2)
    assert "model.layers.2.mlp.up_proj.weight is not in the checkpoint" in refusals(ranks, tmp_path / "small")
    ranks(2).run(on_rank_save_variant, tmp_path / "large", num_hidden_layers=4)
    assert "model.layers.3.mlp.up_proj.weight is not in the model" in refusals(ranks, tmp_path / "large")


def test_schedulers_and_data_that_were_not_saved_cannot_be_loaded(ranks, original):
    assert "has 0 schedulers, but 1 are to be loaded" in refusals(ranks, original, schedulers=["any"])
    assert "has no state of data" in refusals(ranks, original, data="any")


def test_a_path_without_a_checkpoint_is_refused(ranks, tmp_path):
    assert f"there is no checkpoint at {tmp_path / 'none'}" in refusals(ranks, tmp_path / "none")


def test_a_manifest_cannot_name_an_arbitrary_attribute_of_torch(copy):
    runs.rewrite(copy, tensors=lambda tensors: tensors | {"model/x": [[1], "load", [[0, [0], [1]]]]})
    with pytest.raises(CheckpointError, match="malformed"):
        Manifest.read(copy)


@pytest.mark.parametrize(
    "value",
    [
        {"nemo_dist": "function", "value": ""},
        {"nemo_dist": "tensor", "dtype": "load", "shape": [1], "value": ""},
        {"nemo_dist": "ndarray", "dtype": "|O", "shape": [1], "value": "AAAAAAAAAAA="},
        {"nemo_dist": "dict", "value": [[1, 2, 3]]},
        {"nemo_dist": ["unhashable"], "value": ""},
    ],
)
def test_forged_values_are_refused(value):
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json(value)


def test_a_read_that_a_signal_interrupts_is_named(copy):
    """A handler's exception becomes a ValueError inside of torch."""
    interrupted = SimpleNamespace(get_tensor=mock.Mock(side_effect=ValueError("of torch's")))
    reader = Reader(Manifest.read(copy))
    name, stored = next((n, t) for n, t in reader.manifest.tensors.items() if n.startswith("model/"))
    reader._files.update(dict.fromkeys(range(len(reader.manifest.files)), interrupted))
    with pytest.raises(CheckpointError, match=f"reading {name} from .* was interrupted"):
        reader.fill("", {name: torch.empty(stored.shape)})
