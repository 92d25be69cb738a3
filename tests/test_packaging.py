"""What is in plugins/ is what ships, and it ships the way a third party's would."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
FOLDERS = sorted(path.parent.name for path in ROOT.glob("plugins/*/__init__.py"))
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


def test_every_plugin_folder_ships():
    assert sorted(PACKAGES) == sorted(["nemo_dist", *(f"plugins/{folder}" for folder in FOLDERS)])


def test_every_plugin_folder_has_one_entry_point():
    declared = PROJECT["project"]["entry-points"]["nemo_dist"]

    assert sorted(value.partition(":")[0] for value in declared.values()) == FOLDERS


@pytest.mark.parametrize("group", sorted(PROJECT["project"]["entry-points"]))
def test_the_entry_points_are_installed_as_declared(group):
    installed = {
        entry.name: entry.value for entry in entry_points(group=group) if entry.dist and entry.dist.name == "nemo-dist"
    }

    assert installed == PROJECT["project"]["entry-points"][group], "run `make test`, which installs what is declared"


def test_every_role_is_filled_by_a_declared_plugin():
    groups = PROJECT["project"]["entry-points"]

    assert set(groups.get("nemo_dist.roles", {}).values()) <= set(groups["nemo_dist"])


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_every_package(package):
    assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "docs", "examples", "plugins"])
def test_only_what_ships_is_a_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_wheel_holds_every_package_at_its_top_level(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr

    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to((ROOT / package).parent).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources <= held
    assert {name.partition("/")[0] for name in held} == {"nemo_dist", *FOLDERS}


def test_constraints_pin_everything_that_make_installs():
    todo = [("nemo-dist", "dev"), ("nemo-dist", "test"), ("nemo-dist", "")]
    needed = set()
    while todo:
        name, extra = todo.pop()
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            key = canonicalize_name(requirement.name)
            if wanted and key not in needed | {"nemo-dist"}:
                needed.add(key)
                todo += [(key, each) for each in ("", *requirement.extras)]

    assert sorted(needed - set(PINS)) == []


def test_constraints_allow_what_the_project_requires():
    extras = PROJECT["project"]["optional-dependencies"].values()
    requirements = map(
        Requirement, [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]
    )
    pinned = {text: PINS.get(canonicalize_name(text.name)) for text in requirements if text.name != "nemo-dist"}

    assert {str(text): pin for text, pin in pinned.items() if pin is None or not text.specifier.contains(pin)} == {}
