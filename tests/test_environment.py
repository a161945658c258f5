"""What is installed: the versions that were tested together lie within the ranges that qlab asks
for."""

import re
import tomllib
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
INSTALL = '-c constraints.txt -e ".[test]"'


def asked():
    """The requirements of the project and of all its extras on this platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = map(Requirement, sum(extras.values(), project["dependencies"]))
    here = default_environment()
    foreign = [r for r in requirements if r.name != "qlab"]  # an extra may name another one
    return [r for r in foreign if r.marker is None or r.marker.evaluate(here)]


def pinned_versions():
    """Name -> the version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(r.specifier).startswith("==") for r in pins)
    return {
        r.name.lower().replace("_", "-"): Version(str(r.specifier).removeprefix("==")) for r in pins
    }


def test_every_requirement_has_a_tested_version_within_its_range():
    versions = pinned_versions()
    assert not [
        str(r) for r in asked() if r.name not in versions or versions[r.name] not in r.specifier
    ]


def test_the_readme_names_the_whole_range_of_torch():
    named = re.search(r"PyTorch 2\.(\d+) to 2\.(\d+)", (ROOT / "README.md").read_text())
    assert named
    first, last = int(named[1]), int(named[2])
    (torch,) = [r.specifier for r in asked() if r.name == "torch"]
    allowed = [minor for minor in range(last + 10) if Version(f"2.{minor}.0") in torch]
    assert allowed == list(range(first, last + 1))


def test_a_cpu_build_of_the_tested_torch_is_one_of_its_versions():
    assert (
        Version(f"{pinned_versions()['torch']}+cpu")
        in Requirement(f"torch=={pinned_versions()['torch']}").specifier
    )


def test_the_documents_and_the_check_install_the_same():
    for file in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        text = (ROOT / file).read_text()
        commands = re.findall(r"pip install .*\[test\]\"", text)
        assert commands and all(command.endswith(INSTALL) for command in commands), file
