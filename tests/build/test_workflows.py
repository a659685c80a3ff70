"""Workflows of GitHub Actions: valid YAML that runs what exists, for architectures that exist."""

import re
from pathlib import Path

import pytest
from code_generation import ARCHS
from wheel_check import TORCHES, main, parts

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return yaml.safe_load(request.param.read_text())


def test_every_step_runs_a_make_target_or_an_action_of_a_version(workflow):
    assert workflow["name"] and workflow[True]  # YAML reads the key `on` as true
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        for step in job["steps"]:
            if "run" in step:
                command, target, *_ = step["run"].split()
                assert command == "make" and target in TARGETS
            else:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_the_wheels_are_for_known_architectures(workflow):
    wheels = workflow["jobs"]["wheel"]["strategy"]["matrix"]["include"]
    assert len({wheel["name"] for wheel in wheels}) == len(wheels)
    toolkits = {wheel["image"] for wheel in wheels}
    for toolkit in toolkits - {"cpu"}:  # together they serve everything
        named = ";".join(wheel["archs"] for wheel in wheels if wheel["image"] == toolkit)
        assert {arch.removesuffix("+PTX") for arch in named.split(";")} == set(ARCHS)


def test_the_options_of_the_wheel_check_exist(workflow, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    known = capsys.readouterr().out
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            for option in re.findall(r"--[a-z]+", step.get("run", "")):
                assert option in known
    assert parts(TORCHES[0]) == (2, 10)
