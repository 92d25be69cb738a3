"""Who may import whom, where private names stand, and that the core names no strategy; each rule reads one table."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import nemo_dist.testing

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "safetensors", "numpy"}

# Each package (or module beside them) may import those that stand before it, never those after.
ORDER = (
    *("errors", "hf_model", "torch_private", "planning", "mesh", "plugin", "hooks"),
    "losses",
    *("loading", "checkpoint", "training", "setup", "models", "dry_run", "launcher", "testing", "recipe"),
    *("search", "cli"),
)
# What a plugin may import of the core, besides the public names of nemo_dist itself.
FOR_PLUGINS = {
    *("nemo_dist.errors", "nemo_dist.hf_model", "nemo_dist.torch_private", "nemo_dist.hooks", "nemo_dist.testing"),
    *("nemo_dist.planning", "nemo_dist.mesh", "nemo_dist.plugin"),
    *("nemo_dist.training.loss_weighting", "nemo_dist.training.router_aux_loss", "nemo_dist.training.rehearsal"),
    *("nemo_dist.training.step_loss", "nemo_dist.training.whole_rows", "nemo_dist.training.forward_code"),
    *("nemo_dist.training.gradient_average", "nemo_dist.losses"),
    *("nemo_dist.training.counted_calls", "nemo_dist.training.fixed_draws", "nemo_dist.training.kept_state"),
}
# These plan: importing them, with every plugin, leaves torch unimported.
WITHOUT_TORCH = (
    *("nemo_dist", "nemo_dist.hf_model", "nemo_dist.hooks", "nemo_dist.cli.main"),
    *("nemo_dist.search.space", "nemo_dist.search.enumeration", "nemo_dist.search.hardware"),
)
WITHOUT_TORCH_PACKAGES = ("planning", "plugin", "setup")
# The lazy tables of public names: not part of the graph, as they import nothing by themselves.
LAZY = {"nemo_dist", "nemo_dist.distributed"}

# Private names of torch and transformers, and the one module that each stands in.
PRIVATE = {
    "nemo_dist.torch_private": (
        *("_StridedShard", "_python_dispatch", "_disable_current_modes", "_get_current_dispatch_mode", "_pytree"),
        *("_cdata", "_execution_engine", "_functional_collectives", "_c10d_functional", "_current_graph_task_id", "_C"),
        *("_version", "_dtensor_spec", "_assert_async", "_resolve_process_group", "_subclasses", "_spec", "_BatchNorm"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
        *("_backward_hooks", "_post_accumulate_grad_hooks", "_local_tensor", "_timeout"),
    ),
    "nemo_dist.hf_model": (
        *("_no_split_modules", "_hf_peft_config_loaded", "_is_hf_initialized", "_attn_implementation"),
        *("_get_dtype_plan", "_loss_function", "_can_set_experts_implementation"),
    ),
    "nemo_dist.mesh.mesh_context": ("_flatten", "_flatten_mapping", "_get_root_mesh", "_set_pg_timeout"),
    "nemo_dist.mesh.process_group": ("_device_types", "_get_backend"),
    "nemo_dist.mesh.rank_status": ("_get_default_store",),
    "nemo_dist.loading.hf_weight_loader": (
        *("_load_pretrained_model", "_finalize_model_loading", "_initialize_missing_keys", "_dtensor_from_local_like"),
        "_slice_and_cat",
    ),
    "nemo_dist.loading.deferred_init": ("_no_grad_trunc_normal_", "_schema"),
    "nemo_dist.checkpoint.hf_weight_conversion": (
        *("_weight_conversions", "_original_source_patterns", "_original_target_patterns"),
    ),
    "nemo_dist.checkpoint.hf_export": ("_keys_to_ignore_on_save",),
    "nemo_dist.checkpoint.scheduler_state": ("_schedulers", "_last_lr"),
    "nemo_dist.models.other_loops": ("_is_distributed_loading_by_transformers", "_is_accelerate_prepared"),
    "nemo_dist.training.router_aux_loss": ("_can_record_outputs",),
    "nemo_dist.training.peft_adapters": ("_get_base_model_class",),
    "nemo_dist.dry_run.imagined_world": ("_internal", "_fully_shard", "_fsdp_param"),
    "nemo_dist.testing.fake_cuda": ("_coalescing_manager", "_dynamo"),
    "nemo_dist.testing.worker": ("_Options", "_clear_sharding_prop_cache", "_devices", "_world"),
    "nemo_dist_fsdp2.groups": (
        *(
            "_get_fsdp_state",
            "_sharded_param_data",
            "_fsdp_param_groups",
            "_fsdp_param_group",
            "_lazy_init",
            "_pre_backward",
            "_register_pre_backward_hook",
            "_root_post_backward_final_callback",
        ),
        *("_all_gather_comm", "_reduce_scatter_comm", "_module_fqn", "_module_info", "_unsharded_param"),
    ),
    "nemo_dist_ddp.replicas": ("_pre_forward", "_post_forward", "_check_reducer_finalized"),
    "nemo_dist_moe.experts": ("_expand_parallel_plan", "_is_view"),
    "nemo_dist_recompute.apply": ("_can_checkpoint_with_cache", "_gradient_checkpointing_func"),
    "nemo_dist_pipeline.runtime.torch_stage": (
        *("_PipelineScheduleRuntime", "_load_csv", "_post_metadata_inference_cleanup", "_schedule_visualizer"),
    ),
    "nemo_dist_megatron_fsdp.memory_estimate": ("_get_parameter_groups",),
    "nemo_dist_megatron_fsdp.engine": (
        *("_replace_param_with_raw_if_needed", "_replace_param_with_distributed_if_needed"),
        "_root_pre_backward_hook_issued",
    ),
}
# Names of torch's modules that are private by their underscore, and as good as public by their use.
USUAL = {"_parameters", "_buffers"}


def sources():
    """Every module that ships, by dotted name."""
    files = {*(ROOT / "nemo_dist").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")}
    return {dotted(path): path for path in sorted(files)}


def dotted(path):
    base = ROOT / "plugins" if (ROOT / "plugins") in path.parents else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node, *, types=True, functions=True):
    """Yield the names that *node* imports; without those under TYPE_CHECKING, without those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not types:
            yield from imports(ast.Module(child.orelse, []), types=types, functions=functions)
        elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, types=types, functions=functions)


MODULES = sources()
PLUGINS = sorted({name.partition(".")[0] for name in MODULES} - {"nemo_dist"})


@cache
def trees():
    """The syntax trees of all modules, by name."""
    return {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


@cache
def homes():
    """Where the lazy public names come from: `from nemo_dist import MeshPlan` imports nemo_dist.planning.mesh_plan."""
    return {f"nemo_dist.{target.rpartition('.')[2]}": target for target in imports(trees()["nemo_dist"])}


def module_of(target):
    """The module of ours that an imported name lives in: `a.b` for `a.b.name`; empty for others' names."""
    target = homes().get(target, target)
    while target and target not in MODULES:
        target = target.rpartition(".")[0]
    return target


def at_import(name):
    """What the module *name* imports when it is imported, of ours and of others."""
    found = set(imports(trees()[name], types=False, functions=False))
    return {module_of(target) or target.partition(".")[0] for target in found}


def closure(*names):
    """Everything that importing *names* imports in the end."""
    seen, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += at_import(name) if name in MODULES else ()
    return seen


@cache
def arrows():
    """Every arrow between our modules: also those for types only, and those inside functions."""
    return {name: {module_of(target) for target in imports(tree)} - {"", name} for name, tree in trees().items()}


def package_of(name):
    """The package of *name*: `mesh` for `nemo_dist.mesh.mesh_context`, that of the plugin for another."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "nemo_dist" else first


def within(name, packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


# ---- arrows ----


def test_every_module_of_the_core_is_in_the_order():
    known = {package_of(name) for name in MODULES if name.startswith("nemo_dist.")} - {"distributed"}

    assert known == set(ORDER)


def test_packages_import_only_those_before_them():
    """For every module, imports for types and inside functions included."""
    up = [
        f"{name} -> {other}"
        for name, others in arrows().items()
        for other in others
        if name.startswith("nemo_dist.") and name not in LAZY and other.startswith("nemo_dist.")
        if ORDER.index(package_of(other)) > ORDER.index(package_of(name))
    ]
    assert up == []


def test_no_module_imports_itself_through_others():
    """For every module, imports for types and inside functions included; a package and its modules are one."""
    reached = {name: set(others) - LAZY for name, others in arrows().items() if name not in LAZY}
    for middle in reached:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    circles = {name for name, others in reached.items() if name in others}

    assert circles == set()


def test_the_package_itself_imports_nothing_of_its_own():
    assert at_import("nemo_dist") & set(MODULES) == set()


def test_what_plans_does_not_import_torch():
    planning = [
        name for name in MODULES if package_of(name) in WITHOUT_TORCH_PACKAGES and name.startswith("nemo_dist.")
    ]

    assert closure(*WITHOUT_TORCH, *planning, *PLUGINS) & HEAVY == set()


def test_plugins_import_no_other_plugin_and_only_what_is_for_them():
    foreign = [
        f"{name} -> {target}"
        for name, tree in trees().items()
        for target in imports(tree)
        if package_of(name) in PLUGINS and (where := module_of(target))
        if package_of(where) != package_of(name)
        if not homes().get(target, "").startswith("nemo_dist.") and not within(where, FOR_PLUGINS)
    ]
    assert foreign == []


def test_planning_16384_ranks_with_every_plugin_loaded_leaves_torch_unimported():
    script = """
import json, sys
import nemo_dist
from nemo_dist import DistributedSetup, Registry
registry = Registry()
loaded = {name: registry.load(name).name for name in registry}
setup = DistributedSetup.build(world_size=16384, strategy="fsdp2")
plan = setup.plan
asked = [plan.size("dp"), plan.dp_rank(16383), len(plan.batch_ranks(9)), len(list(plan.groups("tp")))]
heavy = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
print(json.dumps({"loaded": loaded, "asked": asked, "heavy": heavy}))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)

    assert set(said["loaded"]) >= {"ddp", "fsdp2"}
    assert all(name == key for key, name in said["loaded"].items())
    assert said["asked"] == [16384, 16383, 1, 16384]
    assert said["heavy"] == []


# ---- names ----


def named_private(tree, home):
    """Yield the private names that *tree* takes from others' objects: attributes, imports, and of *home* in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "super")
            found = () if own else (node.attr,)
        elif isinstance(node, ast.ImportFrom):
            found = (*str(node.module).split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in home:
            found = (node.value,)
        else:
            continue
        yield from (name for name in found if re.fullmatch(r"_[A-Za-z0-9]\w*", name))


def defined(tree):
    """Yield what *tree* defines itself: functions, classes, variables, attributes and keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_a_private_name_of_torch_or_transformers_stands_in_one_module():
    ours = {name for tree in trees().values() for name in defined(tree)}
    home = {name: module for module, names in PRIVATE.items() for name in names}
    strange = {
        f"{name} in {module}"
        for module, tree in trees().items()
        for name in set(named_private(tree, home)) - USUAL
        if (name in home and home[name] != module) or (name not in home and name not in ours)
    }
    assert strange == set()


def test_the_list_of_private_names_is_not_longer_than_need_be():
    unused = [
        f"{name} in {module}"
        for module, names in PRIVATE.items()
        for name in names
        if name not in MODULES[module].read_text()
    ]
    assert unused == []


def strings(tree):
    """Yield the strings in *tree* that a program reads: all but docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def catalogue():
    """The names of our plugins, of the strategies among them, and their aliases and config classes."""
    from nemo_dist import Registry, Stage

    registry = Registry()
    ours = [name for name in registry if registry.entry(name).dist.name == "nemo-dist"]
    strategies = {name for name in ours if registry.stage(name) == Stage.DATA}
    configs = {registry.load(name).config_type.__name__ for name in ours}
    return set(ours), strategies | {alias.name for alias in registry.aliases}, configs


# Words of a file's format that happen to be names of plugins: keys of a configuration, and the kind of a saved value.
WORDS = {"nemo_dist.setup.config_section": {"pipeline", "moe"}, "nemo_dist.checkpoint.json_state": {"tensor"}}


def test_the_core_names_no_plugin_and_no_strategy():
    """Not as an import and not as a string, but for the one table of public names in the package itself."""
    plugins, strategies, configs = catalogue()
    words = re.compile(rf"\b({'|'.join(sorted(strategies | configs | set(PLUGINS)))})\b")
    found = []
    for name, tree in trees().items():
        if package_of(name) in PLUGINS or name in LAZY or package_of(name) == "testing":
            continue
        found += [f"{name} imports {other}" for other in arrows()[name] if package_of(other) in PLUGINS]
        found += [f"{name} says {text!r}" for text in strings(tree) if words.search(text)]
        exact = plugins - WORDS.get(name, set())
        found += [f"{name} has the name {text!r}" for text in strings(tree) if text in exact]
    assert found == []


def test_a_package_of_the_core_says_what_is_in_it():
    """Its docstring names every one of its modules, so that a reader finds the room."""
    unnamed = [
        name
        for name in MODULES
        if name.count(".") == 2 and name.startswith("nemo_dist.") and not name.endswith("__main__")
        if f"``{name.rpartition('.')[2]}``" not in (ast.get_docstring(trees()[name.rpartition(".")[0]]) or "")
    ]
    assert unnamed == []


@pytest.mark.parametrize("name", nemo_dist.testing.__all__)
def test_the_test_kit_gives_every_public_name(name):
    assert getattr(nemo_dist.testing, name).__name__.endswith(name)
    assert name in dir(nemo_dist.testing)


def test_the_test_kit_says_what_it_does_not_have():
    with pytest.raises(AttributeError, match=r"module 'nemo_dist\.testing' has no attribute 'RankPol'"):
        nemo_dist.testing.RankPol  # noqa: B018
