"""From a clean environment, the tutorial by its commands alone gives a package that works and passes its tests."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(
    r"<!-- file: (?P<path>\S+) -->\n```python\n(?P<code>.*?)^```|^```console\n(?P<session>.*?)^```", re.M | re.S
)
SLOW = ("pytest", "check", "demo")  # in a command: it trains on ranks


def steps():
    """Yield what the page tells to do, in its order: a file's path and text, or a command and lines that it prints."""
    for block in BLOCK.finditer(PAGE.read_text()):
        if block["path"]:
            yield block["path"], block["code"]
            continue
        for session in block["session"].removeprefix("$ ").split("\n$ "):
            command, *printed = session.strip().splitlines()
            yield shlex.split(command), printed


@pytest.fixture
def clean(tmp_path):
    """Yield the variables of an environment of its own, with nothing in it but what the tests run with.

    pip installs into it, and finds no network.
    """
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "venv" / "lib" / version / "site-packages"
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    script = python.with_name("nemo-dist")
    script.write_text(f'#!/bin/sh\nexec "{python}" -m nemo_dist.cli "$@"\n')
    script.chmod(0o755)
    (tmp_path / "work").mkdir()
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as short:  # sockets in it must have names of at most some 100 characters
        yield {
            **os.environ,
            **offline,
            "PATH": path,
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": short,
            "CI": "1",
        }


def follow(clean, folder, left_out=()):
    """Do what the page says, but for commands with a word of *left_out*; check what it shows."""
    ran = []
    for what, then in steps():
        if isinstance(what, str):
            (folder / what).write_text(then)
            continue
        if set(left_out) & set(what):
            continue
        result = subprocess.run(
            what, cwd=folder, env=clean, capture_output=True, text=True, timeout=400, check=False, encoding="utf-8"
        )
        output = result.stdout + result.stderr
        assert result.returncode == 0, f"{what}: {output[-4000:]}"
        for line in then:
            shown = " ".join(line.split()) in " ".join(output.split())
            assert shown, f"{what} does not print {line!r}: {output[-4000:]}"
        ran.append(what)
    return ran


def test_the_tutorial_gives_a_package_that_is_listed_and_installs(clean, tmp_path):
    ran = follow(clean, tmp_path / "work", left_out=SLOW)
    assert {command[0] for command in ran} == {"nemo-dist", "python"}
    assert list((tmp_path / "work" / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_whole_tutorial_gives_a_conformant_package(clean, tmp_path):
    ran = follow(clean, tmp_path / "work")
    assert {word for command in ran for word in command} >= set(SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--strategy",)], ids=["plugin", "strategy"])
def test_the_tests_of_a_new_package_pass_as_it_is(clean, options, tmp_path):
    work = tmp_path / "work"
    for command in (
        ("nemo-dist", "new-plugin", "brand-new", *options),
        ("python", "-m", "pip", "install", "-q", "-e", "./nemo-dist-brand-new"),
        ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "nemo-dist-brand-new"),
    ):
        result = subprocess.run(command, cwd=work, env=clean, capture_output=True, text=True, timeout=400, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "passed" in result.stdout and "failed" not in result.stdout
