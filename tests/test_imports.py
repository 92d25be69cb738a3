"""Who may import whom: the core never names a plugin, plugins never know each other, planning never loads torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_dist.testing

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "safetensors", "numpy"}
# Each package may import those that stand before it, never those after.
ORDER = (
    "errors",
    "planning",
    "mesh",
    "plugin",
    "loading",
    "checkpoint",
    "training",
    "setup",
    "models",
    "launcher",
    "cli",
)
# What plans: no torch in it, nor in what it imports.
PLANNING = (
    "nemo_dist",
    "nemo_dist.cli.main",
    "nemo_dist.errors",
    "nemo_dist.setup.setup",
    "nemo_dist.plugin.hook_caller",
)
# What a plugin may import: `from nemo_dist import ...`, and these for what is too special to be a name there.
PUBLIC = {"nemo_dist.errors", "nemo_dist.planning", "nemo_dist.mesh", "nemo_dist.plugin", "nemo_dist.training"}


def sources():
    """Every module that ships, by dotted name."""
    files = {*(ROOT / "nemo_dist").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")}
    return {dotted(path): path for path in sorted(files)}


def dotted(path):
    base = ROOT / "plugins" if (ROOT / "plugins") in path.parents else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node, *, types=True, functions=True):
    """Yield the modules that *node* imports; without those under TYPE_CHECKING, without those inside functions."""
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
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
PLUGINS = sorted({name.partition(".")[0] for name in MODULES} - {"nemo_dist"})
# Where the lazy public names come from: `from nemo_dist import MeshPlan` imports nemo_dist.planning.mesh_plan.
HOMES = {f"nemo_dist.{target.rpartition('.')[2]}": target for target in imports(TREES["nemo_dist"])}


def module_of(target):
    """The module of ours that an imported name lives in: `a.b` for `a.b.name`."""
    target = HOMES.get(target, target)
    while target and target not in MODULES:
        target = target.rpartition(".")[0]
    return target


def at_import(name):
    """What the module *name* imports when it is imported, of ours and of others."""
    found = set(imports(TREES[name], types=False, functions=False))
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


def package_of(name):
    """The package of the core that the module *name* is in: `mesh` for `nemo_dist.mesh.mesh_context`."""
    return name.split(".")[1] if name.startswith("nemo_dist.") else ""


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package):
    later = ORDER[ORDER.index(package) + 1 :]
    mine = [name for name in MODULES if package_of(name) == package]

    assert mine
    assert [(name, other) for name in mine for other in at_import(name) if package_of(other) in later] == []


def test_the_package_itself_imports_nothing_of_its_own():
    assert at_import("nemo_dist") & set(MODULES) == set()


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_itself_in_the_end(name):
    assert name not in closure(*at_import(name))


def test_planning_modules_do_not_import_torch():
    assert closure(*PLANNING, *PLUGINS) & HEAVY == set()


def public(target):
    """Whether *target* is a public name of the core; one of the lazy table that lives in a plugin is not."""
    return HOMES.get(target, "").startswith("nemo_dist.")


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_imports_no_other_plugin_and_only_public_modules_of_the_core(plugin):
    mine = [name for name in MODULES if name.partition(".")[0] == plugin]
    targets = {target for name in mine for target in imports(TREES[name]) if not public(target)}
    used = {module_of(target) for target in targets} - {""}

    foreign = {name for name in used if name.partition(".")[0] != plugin}
    assert [name for name in foreign if not any(f"{name}.".startswith(f"{public}.") for public in PUBLIC)] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.partition(".")[0] == "nemo_dist"])
def test_the_core_names_no_plugin(name):
    """Not as an import and not as a string, but for the one table of public names in the package itself."""
    targets = (HOMES.get(target, target) for target in imports(TREES[name]))
    imported = {target for target in targets if target.partition(".")[0] in PLUGINS}
    strings = {
        node.value
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and any(map(node.value.count, PLUGINS))
    }
    if name == "nemo_dist":
        assert strings == {target.partition(".")[0] for target in imported} == set(PLUGINS) & strings
    else:
        assert imported | strings == set()


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
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)

    assert set(said["loaded"]) >= {"ddp", "fsdp2"}
    assert all(name == key for key, name in said["loaded"].items())
    assert said["asked"] == [16384, 16383, 1, 16384]
    assert said["heavy"] == []


@pytest.mark.parametrize("name", nemo_dist.testing.__all__)
def test_the_test_kit_gives_every_public_name(name):
    assert getattr(nemo_dist.testing, name).__name__.endswith(name)
    assert name in dir(nemo_dist.testing)


def test_the_test_kit_says_what_it_does_not_have():
    with pytest.raises(AttributeError, match=r"module 'nemo_dist\.testing' has no attribute 'RankPol'"):
        nemo_dist.testing.RankPol  # noqa: B018
