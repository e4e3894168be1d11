"""Run folders, tables, figures and the report: provenance, atomic writes, exact columns, the same bytes twice."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import readme_tree

from falconlib import files
from falconlib.errors import FalconError
from falconlib.evaluation.score import Sample, save_samples
from falconlib.files import JsonLines, canonical, read_json, sha256, write_json, write_text
from falconlib.reporting import figures, report, run, start, tables
from falconlib.reporting.pairs import planned_contrasts

REPO = Path(__file__).resolve().parents[1]


def begin(tmp_path, notebook="04_long_term_memory", **changes):
    return start(notebook, {"profile": "smoke", "results": str(tmp_path), "overrides": {}, **changes})


# -- parameters


@pytest.mark.parametrize(
    ("notebook", "changes", "message"),
    [
        ("04_long_term_memory", {"profile": "smok"}, "unknown profile 'smok'"),
        ("04_long_term_memory", {"profile": 3}, "profile = 3 of 04_long_term_memory: a text is expected"),
        ("04_long_term_memory", {"overrides": "{}"}, "overrides = '{}' of 04_long_term_memory: a group of settings is expected"),
        ("04_long_term_memory", {"overrides": {"train.stepz": 1}}, "unknown parameter 'train.stepz'"),
        (
            "04_long_term_memory",
            {"overrides": {"train.steps": "1e2"}},
            'parameter train.steps = "1e2": a whole number is expected',
        ),
        ("04_long_term_memory", {"arm": "grpo"}, "unknown parameter of 04_long_term_memory 'arm'"),
        ("06_train", {"arm": "gpro", "seed": 0}, "unknown arm 'gpro'"),
        ("06_train", {"arm": "grpo", "seed": "0"}, "seed = '0' of 06_train: a whole number is expected"),
        ("06_train", {"arm": "grpo", "seed": True}, "seed = True of 06_train: a whole number is expected"),
        ("06_train", {"arm": "grpo"}, "parameter seed of 06_train is missing"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_written(tmp_path, notebook, changes, message):
    with pytest.raises(FalconError, match=re.escape(message)):
        begin(tmp_path, notebook, **changes)
    assert not list(tmp_path.iterdir())


def test_the_results_folder_moves_with_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path / "elsewhere"))
    assert begin("").folder == tmp_path / "elsewhere/runs/smoke/04_long_term_memory"
    monkeypatch.delenv("FALCON_RESULTS")
    assert run.results_root() == run.REPO / "results"


def test_the_grid_sets_arm_and_seed(tmp_path):
    stage = begin(tmp_path, "06_train", arm="rltf", seed=3, overrides={"train.steps": 7})
    assert stage.folder == tmp_path / "runs/smoke/train/rltf-s3"
    assert (stage.profile.train.arm, stage.profile.train.seed, stage.profile.train.steps) == ("rltf", 3, 7)


# -- run.json and manifest.json


def test_run_json_is_a_birth_certificate(tmp_path):
    stage = begin(tmp_path)
    before = read_json(stage.folder / "run.json")
    assert before["complete"] is False and before["wall_s"] is None and before["model"] is None and before["sandbox"] is None
    stage.note(model="abc", sandbox={"seccomp": "on"}, configs_tried=2)
    stage.finish()
    after = read_json(stage.folder / "run.json")
    assert after["complete"] and after["wall_s"] >= 0 and after["model"] == "abc" and after["configs_tried"] == 2
    assert after["config"]["train"]["group"] == 4 and after["packages"]["torch"] and set(after["git"]) == {"commit", "dirty"}
    assert after["device"].startswith(("cpu: ", "cuda: ")) and after["dtype"] == "float32" and after["seed"] == 0
    assert str(run.REPO) not in json.dumps(after)


def test_the_manifest_comes_last_and_lists_every_hash(tmp_path):
    stage = begin(tmp_path)
    table = stage.save_table(pd.DataFrame({"a": [1, 2]}), "tables/retrieval")
    (stage.folder / "more").mkdir()
    (stage.folder / "more/x.bin").write_bytes(b"x")
    assert not (stage.folder / "manifest.json").exists()
    stage.finish([stage.folder / "more"])
    outputs = read_json(stage.folder / "manifest.json")["outputs"]
    assert outputs == {
        "tables/retrieval.csv": sha256(table),
        "04_long_term_memory/more/x.bin": sha256(stage.folder / "more/x.bin"),
    }
    begin(tmp_path)
    assert not (stage.folder / "manifest.json").exists(), "a new run begins by taking the old proof away"


@pytest.mark.parametrize("output", ["tables/none.csv", "../outside.txt"])
def test_a_missing_output_leaves_no_manifest(tmp_path, output):
    stage = begin(tmp_path)
    (stage.root.parent / "outside.txt").write_text("x")
    with pytest.raises(FalconError, match="is no file below"):
        stage.finish([output])
    assert not (stage.folder / "manifest.json").exists()


def test_find_takes_complete_stages_then_the_reference(tmp_path, monkeypatch):
    reference = tmp_path / "reference"
    write_text(reference / "sft-s0/samples.txt", "old")
    monkeypatch.setattr(run, "reference_roots", lambda profile: [reference])
    reader = begin(tmp_path, "07_benchmarks")
    with pytest.raises(FalconError, match=r"tables/x\.csv is not there"):
        reader.find("tables/x.csv")
    assert reader.find("sft-s0/samples.txt") == reference / "sft-s0/samples.txt" and reader.from_reference == [
        "sft-s0/samples.txt"
    ]
    assert read_json(reader.folder / "run.json")["from_reference"] == ["sft-s0/samples.txt"]
    writer = begin(tmp_path, "06_train", arm="sft", seed=0)
    write_text(writer.folder / "samples.txt", "new")
    write_text(reference / "train/sft-s0/samples.txt", "old")
    assert reader.find("train/sft-s0/samples.txt").read_text() == "old", "half-made results are not read"
    writer.finish([writer.folder / "samples.txt"])
    assert reader.find("train/sft-s0/samples.txt").read_text() == "new"
    assert reader.inputs["train/sft-s0/samples.txt"] == sha256(writer.folder / "samples.txt")


# -- files


def test_whole_files_or_nothing(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a" / "b.txt", "one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FalconError, match=r"cannot write .*b\.txt: No space left on device\n  remedy: free some disk space"):
        write_text(path, "two")
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["b.txt"]


FULL = """
import resource, signal, sys
from pathlib import Path
from falconlib.errors import FalconError
from falconlib.files import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = JsonLines(Path(sys.argv[1]))
log.append({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))  # the second row fits only in part
try:
    log.append({"step": 2})
except FalconError as error:
    print(error)
"""


def test_a_row_that_does_not_fit_leaves_no_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write ") and "remedy: free some disk space" in done.stdout
    assert path.read_text() == '{"step":1}\n'
    with pytest.raises(FalconError, match="No space left on device" if Path("/dev/full").exists() else "cannot write"):
        JsonLines(Path("/dev/full")).append({"step": 1})


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(FalconError, match="cannot write"):
        begin(tmp_path)


def test_json_has_one_spelling_and_no_nan():
    import numpy as np

    assert canonical({"b": np.float64(0.5), "a": None}) == '{"a":null,"b":0.5}'
    with pytest.raises(FalconError, match="numbers must be finite"):
        canonical({"loss": float("nan")})


def test_json_lines_survive_a_kill_and_go_back_to_a_checkpoint(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    assert log.rows() == []
    for step in range(4):
        log.append({"step": step, "reward": 0.1 * step})
    with open(log.path, "ab") as handle:
        handle.write(b'{"step": 4, "rew')
    assert [row["step"] for row in log.rows()] == [0, 1, 2, 3]
    log.truncate(1)
    log.append({"step": 2, "reward": 0.2})
    assert log.path.read_text() == '{"reward":0.0,"step":0}\n{"reward":0.1,"step":1}\n{"reward":0.2,"step":2}\n'
    log.path.write_text("{\n")
    with pytest.raises(FalconError, match="holds a broken line"):
        log.rows()


def test_broken_json_is_named(tmp_path):
    path = write_text(tmp_path / "run.json", "[1")
    with pytest.raises(FalconError, match=r"run\.json cannot be read"):
        read_json(path)
    write_json(path, [1])
    with pytest.raises(FalconError, match="holds \\[1\\], not an object"):
        read_json(path)


# -- tables


def sample(task, index, status, greedy=False, benchmark="humaneval"):
    return Sample(f"{benchmark}/{task}", benchmark, index, "", "", greedy, 3, status, float(status == "pass"))


@pytest.fixture
def train(tmp_path) -> Path:
    """Two arms, falcon with two seeds and two modes; one unfinished run that must not count."""
    for arm, seed, passes in [("base", 0, 1), ("falcon", 0, 2), ("falcon", 1, 3), ("grpo", 0, 4)]:
        folder = tmp_path / "train" / f"{arm}-s{seed}"
        save_samples(folder / "samples.jsonl.gz", [sample(i, 0, "pass" if i < passes else "fail", True) for i in range(4)])
        facts = {"wall_s": 10.0 + seed, "device": "cpu: x", "configs_tried": 2 if arm == "falcon" else None}
        write_json(folder / "run.json", facts)
        if arm == "falcon":
            save_samples(folder / "samples-ltm.jsonl.gz", [sample(i, 0, "pass", True) for i in range(4)])
            write_json(folder / "budget.json", {"completions": 8 + 2 * seed, "programs": 5, "trained_tokens": 100})
            JsonLines(folder / "metrics.jsonl").append({"step": 1, "reward": 0.5, "errors": {"NameError": 1}})
        if arm != "grpo":
            write_json(folder / "manifest.json", {})
    return tmp_path / "train"


def test_the_main_table_has_exactly_its_columns(train):
    frame = tables.main_table(train, draws=200)
    names = "benchmark mode arm metric value ci_low ci_high seeds n completions trained_tokens wall_s configs_tried device"
    names += " executed by_seed"
    assert " ".join(frame.columns) == names
    assert frame[["arm", "mode", "value", "seeds", "n"]].values.tolist() == [
        ["base", "zero-shot", 0.25, 1, 4],
        ["falcon", "zero-shot", 0.625, 2, 4],
        ["falcon", "+LTM", 1.0, 2, 4],
    ]
    falcon = frame.iloc[1]
    assert (falcon.completions, falcon.trained_tokens, falcon.wall_s, falcon.configs_tried) == (9.0, 100.0, 10.5, 2.0)
    assert (falcon.executed, falcon.by_seed) == (5.0, "0.5000 0.7500")
    assert pd.isna(frame.iloc[0].completions), "unknown is not zero"
    assert (frame.ci_low <= frame.value).all() and (frame.value <= frame.ci_high).all() and frame.ci_high.max() <= 1


def test_the_main_table_is_the_same_twice_and_prints(train, tmp_path):
    one, two = (tables.write_csv(tables.main_table(train, draws=200), tmp_path / name) for name in ("a.csv", "b.csv"))
    assert one.read_bytes() == two.read_bytes()
    assert re.search(r"falcon zero-shot humaneval greedy +62\.5 \[", tables.as_text(one))
    readme = report.readme_table(one)
    assert "| arm | mode | seeds | humaneval greedy (n = 4) |" in readme and "| base | zero-shot | 1 | 25.0 [" in readme
    for other in (b"a,b\n1,2\n", b"", b"\x89PNG\r\n\x1a\n\xff\x00"):
        one.write_bytes(other)
        with pytest.raises(FalconError, match="is no main table"):
            tables.as_text(one)


def test_the_same_samples_are_counted_in_other_ways(train):
    """MBPP on its hidden asserts, problems near the training tasks left out, modes sampled later, the search: beside train/."""
    mbpp = [replace(sample(i, 0, "pass" if i == 0 else "fail", True, "mbpp"), hidden=i < 2) for i in range(4)]
    unknown = replace(sample(4, 0, "infra_error", True, "mbpp"), hidden=None)
    save_samples(train.parent / "modes/falcon-s0/samples-stm-adapt.jsonl.gz", [*mbpp, unknown])
    write_text(train.parent / "01_tasks/leakage.csv", "set,task,nearest,cosine\nh,humaneval/0,b/1,0.95\nh,humaneval/1,b/1,0.9\n")
    for lr in (1e-4, 3e-4, 3e-4):
        JsonLines(train.parent / "search/search.jsonl").append({"arm": "falcon", "lr": lr})
    frame = tables.main_table(train, draws=200)
    rows = frame.set_index(["benchmark", "mode", "arm"])
    assert rows.loc[("mbpp", "+STM adapt", "falcon"), ["value", "seeds", "n"]].tolist() == [0.25, 1, 4]
    assert rows.loc[("humaneval", "+LTM", "falcon"), "seeds"] == 2 and "seeds" in tables.summary(frame), "readers see which"
    modes = tables.mode_samples(tables.training_runs(train)["falcon"])
    assert {mode: list(own) for mode, own in modes.items()} == {"zero-shot": [0, 1], "+LTM": [0, 1], "+STM adapt": [0]}
    assert rows.loc[("mbpp" + tables.HIDDEN, "+STM adapt", "falcon"), ["value", "n"]].tolist() == [0.5, 4]
    assert rows.loc[("humaneval" + tables.FAR, "zero-shot", "base"), ["value", "n"]].tolist() == [0.0, 3], "only above 0.9"
    assert "mbpp" + tables.FAR not in set(frame["benchmark"]), "nothing of it was left out"
    assert set(frame[frame["arm"] == "falcon"]["configs_tried"]) == {2}
    assert set(tables.plain(frame)["benchmark"]) == {"humaneval", "mbpp"} == set(frame["benchmark"][: len(tables.plain(frame))])
    assert "hidden" not in tables.markdown(tables.summary(frame))


def test_a_table_of_an_earlier_version_is_still_read(train, tmp_path):
    old = tables.write_csv(tables.main_table(train, draws=100)[tables.NEEDED], tmp_path / "old.csv")
    assert len(tables.read_main(old)) == 3 and tables.NEEDED[-1] == "device"


def test_metrics_of_all_runs_in_one_table(train):
    frame = tables.metrics_table(train)
    assert frame.to_dict("records") == [{"arm": "falcon", "seed": s, "step": 1, "reward": 0.5} for s in (0, 1)]
    with pytest.raises(FalconError, match="holds no complete training run"):
        tables.training_runs(train / "none")


def test_markdown_leaves_the_unknown_empty():
    frame = pd.DataFrame({"a": ["x|y", "z"], "b": [0.12345, None]})
    assert tables.markdown(frame.astype({"a": "string"}).replace("z", pd.NA)).endswith("|  |  |\n")
    assert tables.markdown(frame) == "| a | b |\n| --- | --- |\n| x\\|y | 0.123 |\n| z |  |\n"


# -- figures


def drawings():
    curves = pd.DataFrame(
        [{"arm": a, "seed": s, "step": t, "reward": t * 0.1 + s} for a in ("grpo", "falcon") for s in (0, 1) for t in (1, 2)]
    )
    modes = [("zero-shot", 3), ("+LTM", 1)]
    rates = pd.DataFrame([["he", m, a, "greedy", 0.5, 0.2, 0.8, 4, s] for m, s in modes for a in ("base", "falcon")])
    rates.columns = ["benchmark", "mode", "arm", "metric", "value", "ci_low", "ci_high", "n", "seeds"]
    budget = rates[rates["mode"] == "zero-shot"].assign(trained_tokens=[0.0, 35000.0])
    pairs = pd.DataFrame({"comparison": ["minus LTM"], "difference": [0.1], "ci_low": [-0.1], "ci_high": [0.3]})
    return {
        "curves": (figures.learning_curves, curves),
        "rates": (figures.pass_rates, rates),
        "budget": (lambda frame: figures.rates_against(frame, "trained_tokens", "tokens"), budget),
        "pairs": (figures.paired_differences, pairs),
    }


@pytest.mark.parametrize("name", list(drawings()))
def test_figures_give_the_same_bytes_and_legible_text(tmp_path, name):
    draw, frame = drawings()[name]
    for folder in ("a", "b"):
        figures.save(draw(frame), tmp_path / folder / name, frame)
    for ending in ("svg", "png", "csv"):
        assert (tmp_path / "a" / f"{name}.{ending}").read_bytes() == (tmp_path / "b" / f"{name}.{ending}").read_bytes()
    assert "dc:date" not in (tmp_path / "a" / f"{name}.svg").read_text()
    figure = draw(frame)
    figure.canvas.draw()
    texts = [t for t in figure.findobj(lambda o: hasattr(o, "get_fontsize")) if t.get_text()]
    assert texts and min(t.get_fontsize() for t in texts) >= 9


def test_series_differ_by_marker_as_well_as_by_colour():
    styles = figures.look(["a", "b", "c", "d", "e", "f", "g", "h"])
    assert (
        len(set(styles.values()))
        == len({colour for colour, _ in styles.values()})
        == len({mark for _, mark in styles.values()})
        == 8
    )


def test_equal_curves_can_be_told_apart():
    frame = drawings()["curves"][1]
    same = pd.concat([frame[frame["arm"] == "grpo"].assign(arm=arm) for arm in ("grpo", "rltf", "rft", "falcon")])
    figure = figures.learning_curves(same)
    lines = figure.axes[0].get_lines()
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == len({line.get_linewidth() for line in lines}) == 4
    assert len({line.get_xdata()[0] for line in lines}) == 4 and max(abs(line.get_xdata()[0] - 1) for line in lines) < 0.1
    assert figure.axes[0].get_legend() is None and len(figure.legends) == 1, "the legend covers no curve"
    figures.plt.close(figure)


def test_a_line_says_its_mode_and_that_it_has_fewer_seeds_or_problems():
    rates = drawings()["rates"][1]
    rates.loc[3, "n"] = 2
    figure = figures.pass_rates(rates)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "base",
        "falcon",
        "base +LTM, 1 of 3 seeds",
        "falcon +LTM, 1 of 3 seeds, n = 2",
    ]
    figure.canvas.draw()
    assert {"20%", "40%"} <= {t.get_text() for t in figure.axes[0].get_xticklabels()}
    figures.plt.close(figure)


def test_a_budget_that_is_unknown_has_no_place_and_zero_has_one():
    frame = drawings()["budget"][1]
    figure = figures.rates_against(
        pd.concat([frame, frame.tail(1).assign(arm="grpo", trained_tokens=None)]), "trained_tokens", "x"
    )
    points = {bars.get_label(): bars[0].get_xdata().tolist() for bars in figure.axes[0].containers}
    assert points == {"base": [0.0], "falcon": [35000.0], "grpo": []}
    ends = [path.vertices[:, 1].tolist() for path in figure.axes[0].containers[0][2][0].get_paths()]
    assert ends == [[0.2, 0.8]] and figure.axes[0].containers[0][0].get_linestyle() == "None", "one point is no curve"
    figures.plt.close(figure)
    curve = pd.concat([frame.assign(k=k, value=0.2 * k) for k in (1, 2, 4)])
    figure = figures.rates_against(curve, "k", "k", apart=0.1)
    places = [[round(x, 9) for x in bars[0].get_xdata()] for bars in figure.axes[0].containers]
    assert places == [[0.95, 1.95, 3.95], [1.05, 2.05, 4.05]] and figure.axes[0].containers[0][0].get_linestyle() == "-"
    figures.plt.close(figure)


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_many_panels_stay_as_wide_as_a_page(groups):
    row = {
        "mode": "zero-shot",
        "arm": "base",
        "metric": "greedy",
        "value": 0.5,
        "ci_low": 0.2,
        "ci_high": 0.8,
        "n": 4,
        "seeds": 1,
    }
    figure = figures.pass_rates(pd.DataFrame([{"benchmark": f"b{i}", **row} for i in range(groups)]))
    assert len(figure.axes) == groups and figure.get_figwidth() <= 14 and all(axis.get_title() for axis in figure.axes)
    figures.plt.close(figure)


# -- report


def test_the_report_is_one_page_that_fetches_nothing(tmp_path):
    stage = begin(tmp_path)
    draw, frame = drawings()["pairs"]
    stage.save_figure(draw(frame), "figures/pairs", frame)
    stage.finish()
    sections = [
        report.Section("Results", tables.markdown(frame), (report.Figure("figures/pairs", "A dot right of zero", "Paired."),))
    ]
    text, page = report.write_report(stage.root, "A <title>", sections)
    assert "![A dot right of zero](figures/pairs.png)" in text.read_text() and "## How this was made" in text.read_text()
    html = page.read_text()
    assert 'src="data:image/png;base64,' in html and "<title>A &lt;title&gt;</title>" in html and "<table>" in html
    assert 'alt="A dot right of zero"' in html and not re.search(r'(src|href)="(?!data:)', html)
    assert "04_long_term_memory" in html
    with pytest.raises(FalconError, match=r"figure figures/none\.png is not in"):
        report.write_report(stage.root, "t", [report.Section("x", "y", (report.Figure("figures/none", "a", "b"),))])


def test_the_report_names_the_commits_of_training_and_of_the_tables(tmp_path):
    stage = begin(tmp_path)
    stage.finish()
    tables_of = {"command": "falconlib run --only 07", "git": {"commit": "b" * 40, "dirty": True}}
    write_json(stage.folder / "run.json", read_json(stage.folder / "run.json") | tables_of)
    facts = read_json(stage.folder / "run.json") | {"command": "falconlib run", "git": {"commit": "a" * 40, "dirty": False}}
    write_json(stage.root / "train/grpo-s0/run.json", facts)
    text = report.provenance(stage.root).text
    assert f"* Training: `falconlib run` at commit {'a' * 12}\n" in text
    assert f"* Tables and figures: `falconlib run --only 07` at commit {'b' * 12} with uncommitted changes\n" in text
    for folder, git in ((stage.folder, facts["git"]), (stage.root / "train/grpo-s0", {"commit": None, "dirty": None})):
        write_json(folder / "run.json", facts | {"git": git})
    assert "at commit unknown\n" in report.provenance(stage.root).text
    write_json(stage.root / "train/grpo-s0/run.json", facts)
    assert f"* Tables and figures and training: `falconlib run` at commit {'a' * 12}\n" in report.provenance(stage.root).text
    assert "modes/" not in report.provenance(stage.root).text
    write_text(stage.root / "modes/grpo-s0/samples.jsonl.gz", "later")
    assert "\n* 1 file of samples in `modes/`" in report.provenance(stage.root).text


def paired(comparison, difference, low, high, p, metric="pass@1", benchmark="humaneval", **more):
    row = {"comparison": comparison, "benchmark": benchmark, "metric": metric, "difference": difference}
    return row | {"ci_low": low, "ci_high": high, "p_holm": p, "n": 48, **more}


def test_what_is_said_in_short_follows_from_the_intervals():
    """Nothing, something of other arms, and a planned contrast: three conclusions, with the differences named."""
    none = pd.DataFrame([paired("falcon - base", 0.02, -0.1, 0.2, 1.0), paired("falcon - base", 0.3, 0.2, 0.4, None, "greedy")])
    contrast = pd.DataFrame([paired("falcon - grpo", 0.02, -0.1, 0.2, 1.0, detectable=d) for d in (0.112, 0.092)])
    contrast = pd.concat([contrast, pd.DataFrame([paired("falcon - rft", None, None, None, None, detectable=None)])])
    lines = report.in_short("quick", none, contrast)
    assert lines[0] == "0 of 2 paired comparisons are significant after Holm's adjustment."
    assert lines[1].startswith("Of the 3 contrasts of FALCON planned beforehand 2 were run, and 0 are significant")
    assert "a true difference of 9.2 to 11.2 percentage points (pass@1); a smaller one is neither" in lines[2]
    assert lines[-1].startswith("**Profile `quick` shows no difference") and "does not rank the arms.**" in lines[-1]
    sure = pd.DataFrame([paired("rft - base", 0.05, 0.01, 0.09, 0.04, benchmark="mbpp")])
    lines = report.in_short("small-cpu", sure, contrast)
    assert (
        lines[0].endswith(": rft - base, mbpp pass@1, +5.0 [+1.0, +9.0] percentage points.") and "none of FALCON's" in lines[-1]
    )
    kept = pd.DataFrame([paired("falcon - grpo", -0.05, -0.09, -0.01, 0.04, detectable=0.1)])
    lines = report.in_short("small-cpu", sure, kept)
    assert "falcon - grpo, humaneval pass@1, -5.0 [-9.0, -1.0]" in lines[1] and "beyond chance in 1 planned contrast" in lines[-1]
    assert len(report.in_short("x", none, contrast.head(0))) == 2, "without FALCON nothing was planned"


def test_tables_for_readers_have_one_unit_and_whole_counts():
    frame = pd.DataFrame([paired("a - b", -0.0625, -0.1, 0.0, 1.0), paired("c - b", -0.0625, -0.1, 0.0, None)])
    frame = pd.concat([frame, pd.DataFrame([paired("d - b", None, None, None, None)]).assign(n=None)], ignore_index=True)
    shown = tables.readable(frame.assign(detectable=0.25, first_seeds="0.1"))
    names = ["comparison", "benchmark", "metric", "difference, points", "p (Holm)", "detectable, points", "n"]
    assert list(shown.columns) == names and shown["difference, points"].tolist() == ["-6.2 [-10.0, +0.0]"] * 2 + [""]
    assert tables.markdown(shown).splitlines()[2].endswith("| 1.000 | 25.0 | 48 |"), "no 48.000"
    folded = tables.differences_table(frame.dropna(subset="difference").astype({"n": int}))
    assert folded.values.tolist() == [["a - b, c - b", "-6.2 [-10.0, +0.0]"]] and list(folded) == [
        "comparison",
        "humaneval pass@1 (n = 48)",
    ]
    sizes = {"a - b": (164, 500), "c - b": (164, 500), "a +LTM - a (seed 0)": (48, 48)}
    rows = [(name, *x) for name, met in sizes.items() for x in zip(("humaneval", "mbpp"), met, strict=True)]
    fewer = [paired(name, 0.0, -0.1, 0.1, None, benchmark=benchmark) | {"n": n} for name, benchmark, n in rows]
    folded = tables.differences_table(pd.DataFrame(fewer))
    assert list(folded) == ["comparison", "problems", "humaneval pass@1", "mbpp pass@1"]
    assert (
        folded["problems"].tolist() == ["humaneval 164, mbpp 500", "humaneval 48, mbpp 48"]
        and folded["comparison"][0] == "a - b, c - b"
    )
    assert tables.span((0.0625, 0.011, 0.283)) == "6.2 [1.1, 28.3]"
    assert tables.span((-1e-9, -0.1, 0.1), "+") == "+0.0 [-10.0, +10.0]" and tables.span((None, None, None)) == ""
    assert tables.markdown(pd.DataFrame({"n": [16.0, None]})).endswith("| 16 |\n|  |\n")
    assert (tables.count(1, "seed"), tables.count(3, "seed")) == ("1 seed", "3 seeds")


def test_the_readme_shows_the_largest_study_first(train, tmp_path):
    """Two committed runs: the one with more seeds leads and has the picture; each has table, differences and conclusion."""
    for name, seeds in (("quick", 1), ("small-cpu", 3)):
        folder = tmp_path / "results" / "reference" / name / "tables"
        main = tables.main_table(train, draws=100)
        tables.write_csv(main.assign(seeds=seeds), folder / "main.csv")
        tables.write_csv(pd.DataFrame([paired("falcon - base", 0.1, -0.1, 0.3, 1.0)]), folder / "paired.csv")
        tables.write_csv(planned_contrasts({}), folder / "contrasts.csv")
    text = readme_tree.results(tmp_path / "results" / "reference")
    heads = re.findall(r"### Profile `(.+)`: (.+)", text)
    assert heads == [
        (n, f"2 arms, {s}, 4 problems of each benchmark") for n, s in (("small-cpu", "3 seeds"), ("quick", "1 seed"))
    ]
    assert re.findall(r"!\[[^]]+\]\((\S+)\)", text) == ["results/reference/small-cpu/figures/solved.png"]
    assert text.count("| falcon - base | +10.0 [-10.0, +30.0] |") == 2 == text.count("does not rank the arms")


def test_a_sentence_of_the_tree_is_not_cut_at_et_al(tmp_path):
    long = "; and this clause goes on and on until the line is full, so that it must be cut somewhere"
    path = write_text(tmp_path / "x.py", f'"""X (Le et al. 2022, arXiv 2207.01780): a baseline{long}. More."""\n')
    assert readme_tree.sentence(path) == "X (Le et al. 2022, arXiv 2207.01780): a baseline"
    assert (
        readme_tree.sentence(write_text(path, '"""One: M(x) of Li et al. (2024). Two."""\n')) == "One: M(x) of Li et al. (2024)"
    )
    shown = [line[34:] for line in readme_tree.tree().splitlines()]
    assert not [s for s in shown if s.endswith(("et al", "e.g")) or s.count("(") != s.count(")")]


def test_publishing_takes_complete_runs_only(train, tmp_path, monkeypatch):
    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path / "results"))
    root = tmp_path / "results/runs/smoke"
    os.renames(train, root / "train")
    with pytest.raises(FalconError, match=r"stage grpo-s0 .* is not complete"):
        report.publish("smoke", tmp_path / "reference")
    write_json(root / "train/grpo-s0/manifest.json", {})
    main = tables.main_table(root / "train", draws=100)
    grpo = main[main["arm"] == "grpo"]  # solves all; a mode in which it solves none, and a rival that solves nearly all
    main = pd.concat([main, grpo.assign(mode="+LTM", value=0.0), grpo.assign(arm="ppocoder", value=0.9)])
    tables.write_csv(main, root / "tables/main.csv")
    write_text(root / "train/grpo-s0/checkpoints/step-1/x", "big")
    for arm in ("grpo", "falcon", "rft"):  # grpo is the best baseline, zero-shot
        write_text(root / f"train/{arm}-s0/adapter/adapter_model.safetensors", "3 MB")
        write_text(root / f"train/{arm}-s0/memory.sqlite", "3 MB")
    old = ["search/search.jsonl", "search/hypotheses/a/search.jsonl", "ablations/train/falcon-ai-s0/card.json", "gone.txt"]
    old += [f"modes/{run}/card.json" for run in ("falcon-s0", "grpo-s0")]
    for kept in old:
        write_text(tmp_path / "reference/smoke" / kept, "{}")
    write_text(root / "search/search.jsonl", "new")
    write_text(root / "modes/falcon-s1/card.json", "new")
    write_text(root / "ablations/temperature/0.2/card.json", "{}")
    target = report.publish("smoke", tmp_path / "reference")
    assert (target / "tables/main.csv").is_file() and not (target / "train/grpo-s0/checkpoints").exists()
    assert (target / "train/falcon-s0/adapter/adapter_model.safetensors").is_file() and not (target / "gone.txt").exists()
    assert (target / "train/falcon-s0/memory.sqlite").is_file() and not list((target / "train/rft-s0").glob("[am][de]*"))
    assert (target / "train/grpo-s0/adapter/adapter_model.safetensors").is_file()
    assert (target / "search/hypotheses/a/search.jsonl").is_file(), "logs of runs of their own stay"
    assert (target / "search/search.jsonl").read_text() == "new"
    assert {p.name for p in (target / "modes").iterdir()} == {"falcon-s1"}, "the tables rest on the run's own modes"
    assert {p.name for p in (target / "ablations").iterdir()} == {"train", "temperature"}
