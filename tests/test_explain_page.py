"""The page of `nemo-dist explain --html`: what is in it agrees with the plan, the plugins and the real shards."""

import json
import math
import re
from functools import cache
from importlib.resources import files
from itertools import combinations

import attrs
import pytest
import transformers
from typer.testing import CliRunner

from nemo_dist import DistributedSetup, ParallelismSizes, Stage, hookimpl
from nemo_dist.cli.main import app
from nemo_dist.models.meta_model import meta_model
from nemo_dist.plugin.memory_estimate import RankShare
from nemo_dist.setup.explain_page import page_data
from nemo_dist.setup.rank_memory import divide
from nemo_dist_pipeline import SCHEDULES
from nemo_dist_pipeline.runtime.torch_stage import torch_order

LARGEST = 400_000  # bytes of a page
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
EXPERTS = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
}


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """Return a function that makes a model on the meta device, each once: "llama" (8 B parameters) or "experts"."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        kinds = {"llama": (transformers.LlamaConfig, LLAMA), "experts": (transformers.Qwen3MoeConfig, EXPERTS)}
        kind, sizes = kinds[name]
        kind(**sizes).save_pretrained(folder)
        return meta_model(folder)

    return make


def setup_of(world_size, schedule=None, batch=None, strategy="fsdp2", **sizes):
    pipeline = {"pp_schedule": schedule, "pp_batch_size": batch} if schedule else None
    return DistributedSetup.build(
        strategy=strategy,
        world_size=world_size,
        parallelism_sizes=ParallelismSizes(**{f"{axis}_size": size for axis, size in sizes.items()}),
        pipeline_config=pipeline,
        activation_checkpointing=True,
    )


def data_of(setup, model=None, rows=1, length=128, per_node=8):
    return page_data(setup, model, rows, length, per_node)


def embedded(page):
    """Return the data in the HTML of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# ---- the page ----


def test_the_command_writes_one_page_with_the_data_of_the_setup(tmp_path):
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["explain", "-n", "16", "--dp-replicate", "2", "--html", str(out)])
    assert result.exit_code == 0 and result.stdout == f"wrote {out}\n"
    page = out.read_text()
    expected = data_of(setup_of(16, dp_replicate=2))
    assert embedded(page)["views"] == expected["views"] and "<title>16 ranks: dp_replicate 2" in page


def test_the_command_counts_bytes_for_a_model_in_text_and_on_the_page(tmp_path, model_of, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # lines are whole where nothing says how wide a terminal is
    model_of("llama").config.save_pretrained(tmp_path)
    asked = ["explain", "-n", "8", "--model", str(tmp_path), "--rows", "2", "--length", "256"]
    text = CliRunner().invoke(app, asked).stdout
    setup = DistributedSetup.build(world_size=8)
    assert text.strip() == setup.explain(model_of("llama"), rows=2, length=256)
    CliRunner().invoke(app, [*asked, "--html", str(tmp_path / "page.html"), "--per-node", "4"])
    data = embedded((tmp_path / "page.html").read_text())
    assert (data["model"]["rows"], data["model"]["length"], data["ranks_per_node"]) == (2, 256, 4)
    sent = [one.sent for found in setup.calls.traffic(**asked_of(setup, model_of("llama"), 2, 256)) for one in found]
    assert [one["sent"] for one in data["collectives"]] == sent and sent[0] > 0


def asked_of(setup, model, rows, length):
    from nemo_dist.setup.explain import facts_of

    return {"plan": setup.plan, "facts": facts_of(setup, model, rows, length), "model": model}


def test_a_page_names_nothing_outside_of_itself():
    page = setup_of(64, tp=4).explain_page()
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert re.findall(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page) == []
    assert "default-src 'none'" in page


def test_text_of_a_plugin_cannot_end_the_script_that_holds_it():
    @attrs.frozen
    class Config:
        plugin = "loud"

    @attrs.frozen(eq=False)
    class Loud:
        name, config_type, stage = "loud", Config, Stage.COMPILE
        axes, composes_with = frozenset(), frozenset()
        config: Config = attrs.field(factory=Config)

        @hookimpl
        def explain(self):
            return "loud: </script><!--<script>alert(1)</script>&amp; {{SCRIPT}} {{DATA}}"

    page = DistributedSetup.build(world_size=2, plugins=(Loud(),)).explain_page()
    assert Loud().explain() in embedded(page)["plugins"]
    assert page.count("</script>") == 2 and "<!--" not in page


@pytest.mark.parametrize("count", [8, 64, 1024, 16384, 262144])
def test_the_size_of_a_page_does_not_grow_with_the_ranks(count):
    assert len(setup_of(count, tp=8, dp_replicate=count // 8).explain_page().encode()) < 100_000


@pytest.mark.parametrize(("pp", "batch"), [(32, 2048), pytest.param(64, 4096, marks=pytest.mark.slow)])
def test_the_size_of_a_page_is_bounded_for_very_long_schedules(pp, batch):
    page = setup_of(pp * 8, schedule="interleaved_1f1b", batch=batch, pp=pp).explain_page()
    data = embedded(page)
    assert len(page.encode()) < LARGEST
    assert data["schedule"]["microbatches"] == batch and len(data["schedule"]["lanes"]) <= 64
    assert any(f"of the {batch} microbatches" in note for note in data["schedule"]["notes"])


# ---- the schedule ----


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_timeline_has_torchs_actions_in_torchs_order(name):
    schedule = SCHEDULES[name]
    drawn = data_of(setup_of(8, schedule=name, batch=8, pp=4))["schedule"]
    kinds = list(drawn["kinds"])
    shown = [
        [f"{stage}{kinds[kind]}{index}" for kind, stage, index, _, _ in zip(*[iter(lane["tasks"])] * 5, strict=True)]
        for lane in drawn["lanes"]
    ]
    assert shown == [list(map(str, line)) for line in torch_order(schedule, 4, schedule.per_rank, 8)]
    assert drawn["idle"] == pytest.approx(schedule.bubble(4, schedule.per_rank, 8))
    busy = sum(sum(lane["tasks"][4::5]) - sum(lane["tasks"][3::5]) for lane in drawn["lanes"])
    assert 1 - busy / (4 * drawn["length"]) == pytest.approx(drawn["idle"])


def test_a_batch_that_the_schedule_does_not_take_is_said(model_of):
    drawn = data_of(setup_of(8, pp=4), model_of("llama"), rows=2)["schedule"]
    assert drawn["microbatches"] == 16
    assert "needs at least as many microbatches as its 4 stages (got 2); drawn with 16" in drawn["notes"][0]


@pytest.mark.parametrize(
    ("name", "held"),
    [("1f1b", [4, 3, 2, 1]), ("gpipe", [16, 16, 16, 16])],
)
def test_a_stage_holds_as_many_microbatches_as_its_schedule_lets_wait(name, held, model_of):
    """By hand: 1F1B runs ahead by a forward for each stage after it, GPipe by all microbatches."""
    model, setup = model_of("llama"), setup_of(4, schedule=name, batch=16, pp=4)
    whole = RankShare.whole(model, 16, 128)
    shares = divide(whole, setup.calls, setup.strategy, **asked_of(setup, model, 16, 128))
    bars = data_of(setup, model, rows=16)["memory"]["bars"]
    assert [share.stages[0].alive for share in shares] == held
    for bar, share in zip(bars, shares, strict=True):
        inputs = len(share.stages[0].blocks) * share.stages[0].alive  # of a row of 128 tokens in bfloat16
        assert bar["held"]["block inputs"] == inputs * 128 * 4096 * 2


# ---- memory ----


def test_stages_hold_each_parameter_of_the_model_once(model_of):
    model = model_of("llama")
    for schedule, stages in (("1f1b", 1), ("interleaved_1f1b", 2)):
        bars = data_of(setup_of(64, schedule=schedule, batch=16, pp=4, tp=4), model)["memory"]["bars"]
        whole = sum(p.nbytes for p in model.parameters())  # over tp 4 and 4 shards; norms are not cut by tp
        assert sum(bar["held"]["parameters"] for bar in bars) == pytest.approx(whole / 16, rel=1e-4)
        assert [len(bar["stages"]) for bar in bars] == [stages] * 4
    assert bars[0]["modules"].startswith("embed_tokens, layers 0") and bars[3]["modules"].endswith("norm, lm_head")


@pytest.mark.slow
def test_bytes_of_a_rank_are_the_models_over_the_ranks_that_share_them(model_of):
    model = model_of("llama")
    count = sum(p.numel() for p in model.parameters())
    (bar,) = data_of(setup_of(64, tp=4, cp=2), model, rows=3, length=1024)["memory"]["bars"]
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    one = ((count - norms) // 4 + norms) // 16 * 2  # bfloat16, over 16 shards, and tp 4 but for the norms
    assert bar["held"]["parameters"] == bar["held"]["gradients"] == one
    assert bar["held"]["optimizer state"] == 2 * one + 4 * len(list(model.parameters()))
    assert bar["held"]["block inputs"] == 32 * 3 * 1024 // 2 * 4096 * 2
    assert bar["held"]["logits"] == 3 * 1024 // 2 * 128256 // 4 * 2


def test_a_strategy_without_shards_holds_everything_whole(model_of):
    model = model_of("experts")
    count = sum(p.numel() for p in model.parameters())
    (bar,) = data_of(setup_of(8, strategy="ddp"), model)["memory"]["bars"]
    steps = 4 * len(list(model.parameters()))
    assert bar["held"]["parameters"] == count * 4 and bar["held"]["optimizer state"] == count * 8 + steps


def test_experts_are_divided_over_the_ranks_that_share_them(model_of):
    """Of 16 ranks in two replicas, ep 4: an expert is on 1 of 4 ranks, in 2 shards, and twice in all."""
    model = model_of("experts")
    experts = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3)
    rest = sum(p.numel() for p in model.parameters()) - experts
    (bar,) = data_of(setup_of(16, ep=4, dp_replicate=2), model)["memory"]["bars"]
    assert experts > rest > 0
    assert bar["held"]["parameters"] == pytest.approx(4 * (experts / 8 + rest / 8), rel=1e-6)


def test_a_strategy_that_does_not_say_what_it_holds_is_named(model_of):
    @attrs.frozen
    class Config:
        plugin = "secretive"

    @attrs.frozen(eq=False)
    class Secretive:
        name, config_type, stage = "secretive", Config, Stage.DATA
        axes, composes_with = frozenset({"dp_shard"}), frozenset({"activation_checkpointing"})
        config: Config = attrs.field(factory=Config)

    data = data_of(DistributedSetup.build(strategy=Secretive(), world_size=4), model_of("experts"))
    assert data["memory"] == {
        "bars": [],
        "notes": ["No memory is shown: strategy 'secretive' has no memory hook, so what it holds is not known"],
    }


# ---- colours ----

# Machado, Oliveira and Fernandes 2009: linear RGB as seen without red, green and blue cones.
SIGHTS = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(colour, sight):
    """Return the CIE Lab coordinates of a colour like "#0072b2", as seen by *sight*."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    seen = [min(1, max(0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in SIGHTS[sight]]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [
        sum(a * b for a, b in zip(row, seen, strict=True)) / w
        for row, w in zip(to_xyz, (0.9505, 1, 1.089), strict=True)
    ]
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_colours_differ_for_every_kind_of_sight(sight):
    """A difference of 2 is seen side by side; of colours in one picture no two are nearer than 15."""
    style = files("nemo_dist.setup").joinpath("page", "page.css").read_text()
    colours = re.findall(r"--c\d: (#[0-9a-f]{6})", style)
    assert len(colours) == 8
    distances = {math.dist(lab(one, sight), lab(other, sight)): (one, other) for one, other in combinations(colours, 2)}
    assert min(distances) > 15, distances[min(distances)]


# ---- the terminal ----


@pytest.mark.parametrize("command", ["plan", "explain", "plugins"])
def test_no_word_is_broken_in_a_terminal_of_60_columns(command, monkeypatch):
    asked = [command] if command == "plugins" else [command, "-n", "64", "--tp", "4", "--pp", "4", "--cp", "2"]
    monkeypatch.setenv("COLUMNS", "400")
    whole = CliRunner().invoke(app, asked).stdout
    monkeypatch.setenv("COLUMNS", "60")
    narrow = CliRunner().invoke(app, asked).stdout

    assert max(map(len, narrow.splitlines())) <= 60
    assert "…" not in narrow
    assert words(whole) <= words(narrow)


def words(text):
    """Return the words of *text*, without the lines that tables are drawn with."""
    return {word.rstrip(":") for word in re.findall(r"[^\s\u2500-\u257f]+", text)}
