"""The committed references: what notebooks 07 and 08 make of the committed logs is what is committed, byte for byte."""

import contextlib
import gzip
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest

from falconlib.errors import FalconError
from falconlib.evaluation.score import FILES, load_samples, save_samples
from falconlib.files import read_json, sha256, write_text
from falconlib.notebook import read_cells
from falconlib.reporting.cards import sampled_cards
from falconlib.reporting.tables import mode_samples, sample_file, training_runs

REPO = Path(__file__).resolve().parents[1]
REFERENCE = REPO / "results" / "reference"


@pytest.fixture(scope="module", params=["quick", "small-cpu"])
def again(request, tmp_path_factory):
    """(run folder, reference folder, what was printed): the code cells of 07 and 08, run here on the committed logs alone."""
    results, said, before = tmp_path_factory.mktemp("results"), io.StringIO(), Path.cwd()
    write_text(results / "runs" / request.param / "figures" / "pass_at_k.png", "of an earlier run")
    for name in ("07_benchmarks", "08_ablations"):
        cells = [cell for cell in read_cells(REPO / "notebooks" / f"{name}.ipynb") if cell["type"] == "code"]
        scope = {"__name__": name}
        with contextlib.redirect_stdout(said), contextlib.chdir(REPO / "notebooks"):
            for cell in cells:
                exec(cell["source"], scope)
                if "parameters" in cell["tags"]:
                    scope |= {"profile": request.param, "results": str(results)}
    assert Path.cwd() == before
    return results / "runs" / request.param, REFERENCE / request.param, said.getvalue()


def test_the_committed_tables_rebuild_from_the_committed_logs_byte_for_byte(again):
    root, reference, _ = again
    names = [f"tables/{name}.csv" for name in ("main", "paired", "contrasts", "outcomes", "errors", "ablations", "hypotheses")]
    drawn = ["solved", "budget", "paired", "learning", "ablations", "ablation_curves"]
    drawn += ["pass_at_k"] if reference.name != "quick" else []  # quick decodes greedily
    for name in names + [f"figures/{name}.csv" for name in drawn]:
        one, two = ((folder / name).read_bytes() for folder in (root, reference))
        one = one.replace(b",committed results\n", b",this run\n")  # the source that ablations.csv names
        assert one == two, name
    csv = [path.relative_to(root) for path in root.rglob("*.csv")]
    assert len(csv) == len(names) + len(drawn), f"not compared: {set(map(str, csv)) - {*names}}"


def test_the_curve_begins_with_the_main_table_and_the_budget_has_every_arm(again):
    root, reference, said = again
    main = pd.read_csv(reference / "tables/main.csv").query("mode == 'zero-shot'")
    budget = pd.read_csv(root / "figures/budget.csv")
    tokens = budget.groupby("arm")["trained_tokens"].first()
    assert tokens["base"] == 0 < tokens.drop("base").min() and set(tokens.index) == set(main["arm"])
    assert "budget unknown, not in the figure: no arm" in said
    if reference.name == "quick":
        assert "there is no pass@k" in said and not list(root.glob("figures/pass_at_k.*"))
        return
    curve, same = pd.read_csv(root / "figures/pass_at_k.csv"), ["benchmark", "arm", "metric", "value", "ci_low", "ci_high"]
    first = curve.loc[curve["k"] == 1, same].merge(main[same], how="inner")
    assert len(first) == len(curve) / 2 == 16 and set(curve["k"]) == {1, 2} and set(curve["n"]) == {164, 500}
    wide = curve.pivot(index=["benchmark", "arm"], columns="k", values="value")
    assert (wide[1] <= wide[2]).all()
    samples = load_samples(sample_file(reference / "train/falcon-s1"))
    solved = {s.task_id for s in samples if s.benchmark == "mbpp" and not s.greedy and s.status == "pass"}
    share = float(curve.query("benchmark == 'mbpp' and arm == 'falcon' and k == 2")["by_seed"].iloc[0].split()[1])
    assert share == pytest.approx(len(solved) / 500, abs=1e-4), "pass@2 of two samples: whether any of them passes"


def test_a_mode_is_compared_with_the_same_seeds_and_problems(again):
    root, reference, _ = again
    main = pd.read_csv(reference / "tables/main.csv").set_index(["arm", "mode"])
    paired, seen = pd.read_csv(root / "tables/paired.csv"), 0
    for arm, folders in training_runs(reference / "train").items():
        found = mode_samples(folders)
        zero = found.pop("zero-shot")
        for mode, runs in found.items():
            assert set(main.loc[(arm, mode), "seeds"]) == {len(runs)} and set(main.loc[(arm, "zero-shot"), "seeds"]) == {
                len(zero)
            }
            some = "" if len(runs) == len(zero) else f" (seed {', '.join(map(str, runs))})"
            rows = paired[paired["comparison"] == f"{arm} {mode} - {arm}{some}"].set_index(["benchmark", "metric"])
            for (benchmark, metric), row in rows.iterrows():
                greedy, shares = metric == "greedy", []
                met = {s.task_id for own in runs.values() for s in own if s.benchmark == benchmark}
                plainly = {seed: load_samples(reference / f"train/{arm}-s{seed}" / FILES["zero-shot"]) for seed in runs}
                if len(plainly[0]) != len(runs[0]):  # the run's own samples are others: those of the whole test sets
                    plainly = {seed: zero[seed] for seed in runs}
                for own in (runs, plainly):
                    drawn = [s for run in own.values() for s in run if s.task_id in met and s.greedy == greedy]
                    shares.append(sum(s.status == "pass" for s in drawn) / len(drawn))
                assert row["n"] == len(met) and row["difference"] == pytest.approx(shares[0] - shares[1]), (arm, mode, metric)
                seen += 1
    assert seen == (28 if reference.name == "small-cpu" else 2)


def spoil_card(root, change, run="grpo-s0", mode="zero-shot"):
    file = root / f"modes/{run}/card.json"
    card = read_json(file)
    change(card[mode])
    write_text(file, json.dumps(card))


def other_weights(root):
    file = root / "train/grpo-s0/manifest.json"
    manifest = read_json(file)
    manifest["outputs"]["train/grpo-s0/adapter/adapter_model.safetensors"] = "0" * 64  # trained again since
    write_text(file, json.dumps(manifest))


def fewer_samples(root):
    file = root / "modes/grpo-s0" / FILES["zero-shot"]
    save_samples(file, load_samples(file)[1:])


SPOILED = {
    "temperature": lambda root: spoil_card(root, lambda card: card["decoding"].update(temperature=0.9)),
    "limits": lambda root: spoil_card(root, lambda card: card["limits"].update(cpu_s=9.0)),
    "problems": lambda root: spoil_card(root, lambda card: card["benchmarks"]["humaneval"].update(tasks=3)),
    "samples": lambda root: spoil_card(root, lambda card: card["decoding"].update(samples=5)),
    "seeds": lambda root: spoil_card(root, lambda card: card.update(seeds=[1])),
    "adapters": lambda root: spoil_card(root, lambda card: card.update(model="a model with rft-s0/adapter (00)")),
    "adapters of the base": lambda root: spoil_card(root, lambda card: card.update(model="m with x-s0/adapter (0)"), "base-s0"),
    "adapters, trained again": other_weights,
    "problems, of fewer": fewer_samples,
    "memories": lambda root: spoil_card(root, lambda card: card.update(memory="0" * 64), "falcon-s0", "+LTM"),
    "model": lambda root: spoil_card(root, lambda card: card.update(model="x" + card["model"])),
    "modes": lambda root: spoil_card(root, lambda card: card.update(mode="best-of-K")),
    "memories, of GRPO": lambda root: spoil_card(root, lambda card: card.update(memory="0" * 64)),
    "extraction": lambda root: spoil_card(root, lambda card: card.update(extraction="")),
    "samples, twice": lambda root: save_samples(path := root / "modes/grpo-s0" / FILES["zero-shot"], 2 * load_samples(path)),
    "other card": lambda root: spoil_card(root, lambda card: card.pop("estimator")),
    "no evaluation card": lambda root: (root / "modes/grpo-s0/card.json").unlink(),
}


@pytest.mark.parametrize("what", list(SPOILED))
def test_samples_that_were_drawn_differently_do_not_stand_in_one_table(tmp_path, what):
    shutil.copytree(REFERENCE / "quick/train", tmp_path / "train")
    for run in ("base-s0", "grpo-s0", "falcon-s0"):  # as `falconlib eval --out` writes them
        own, folder = tmp_path / "train" / run, tmp_path / "modes" / run
        mode = "+LTM" if what == "memories" and run == "falcon-s0" else "zero-shot"
        card = read_json(own / "card.json")[mode]
        weights = read_json(own / "manifest.json")["outputs"].get(f"train/{run}/adapter/adapter_model.safetensors", "")[:16]
        name = re.split(" with ", card["model"])[0]
        card["model"] = name if run == "base-s0" else f"{name} with {run}/adapter ({weights})"
        write_text(folder / "card.json", json.dumps({mode: card}))
        shutil.copyfile(own / FILES[mode], folder / FILES[mode])
    runs = training_runs(tmp_path / "train")
    cards, unknown = sampled_cards(runs)
    assert len(cards) == 6 and not unknown and sample_file(runs["grpo"][0]).parent.parent.name == "modes"
    SPOILED[what](tmp_path)
    with pytest.raises(FalconError, match={"other card": "estimator"}.get(what, what.split(",")[0].split(" of ")[0])):
        sampled_cards(runs)


def test_no_file_of_a_reference_names_a_place_of_the_machine():
    places = ("/tmp/", "/root/", "/home/", str(REPO))
    files = [path for path in REFERENCE.rglob("*") if path.suffix in (".json", ".jsonl", ".csv", ".md")]
    assert len(files) > 100
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not [place for place in places if place in text], path
    for path in REFERENCE.rglob("*.jsonl.gz"):  # programs may well speak of /home
        assert str(REPO).encode() not in gzip.decompress(path.read_bytes()), path


def test_files_are_those_that_the_manifests_speak_of():
    """Nobody changed what a stage wrote or read: samples, metrics, tables, figures, cards."""
    seen = 0
    for path in sorted(REFERENCE.rglob("manifest.json")):
        manifest = read_json(path)
        base = next(folder for folder in path.parents if (folder / manifest["stage"]).is_dir())
        for name, digest in (manifest["outputs"] | manifest["read"]).items():
            for place in [p for p in (base / name, REPO / name) if p.is_file()][:1]:
                assert sha256(place) == digest, f"{place} is not the file of {path}"
                seen += 1
    assert seen > 300


def test_the_card_of_a_published_adapter_evaluates_as_its_study_did():
    from falconlib.cli import parser

    cards = sorted(REFERENCE.glob("*/train/*/adapter/README.md"))
    assert cards
    for card in cards:
        options = parser().parse_args(shlex.split(re.search(r"`falconlib (eval [^`]+)`", card.read_text(encoding="utf-8"))[1]))
        assert options.profile == card.parents[3].name and options.tasks == "humaneval", card


def test_the_sweep_that_08_prints_names_an_adapter_that_is_there(again):
    from falconlib.cli import parser

    root, reference, said = again
    options = parser().parse_args(shlex.split(re.search(r"Per temperature: falconlib (.+)", said)[1]))
    assert REPO / options.adapter == reference / "train/falcon-s0/adapter" and options.adapter.parts[0] == "results"
    assert (options.profile, options.set) == (reference.name, ["eval.temperature=0.2"])
    assert (REPO / options.out).resolve() == (root / "ablations/temperature/0.2").resolve()


def test_hypotheses_are_differences_on_validation_tasks(again):
    root, reference, said = again
    found = pd.read_csv(root / "tables/hypotheses.csv")
    assert list(found) == ["hypothesis", "change", "arm", "rate", "tasks", "samples", "difference", "low", "high"]
    if reference.name == "quick":
        assert found.empty and "Profile quick has tested none." in said
        return
    changes = ["long_term.prompt_share=0", "long_term.prompt_share=0", "train.b_sl=1.0", "inner.alpha=0.3"]
    assert found["change"].tolist() == changes and found["rate"].tolist() == [3e-5, 3e-4, 3e-4, 3e-5]
    assert set(found["tasks"]) == {118} and set(found["samples"]) == {4} and found["hypothesis"].notna().all()
    share = {}
    for change in ("default", changes[0]):  # by hand, from the files alone
        folder = reference / "search/hypotheses" / change / "falcon-lr3e-05"
        rows = [json.loads(line) for line in gzip.decompress((folder / "validation.jsonl.gz").read_bytes()).splitlines()]
        drawn = [row["status"] == "pass" for row in rows if not row["greedy"]]
        share[change] = sum(drawn) / len(drawn)
    assert found["difference"][0] == pytest.approx(share[changes[0]] - share["default"], abs=1e-9) and len(drawn) == 118 * 4
    assert ((found["low"] <= found["difference"]) & (found["difference"] <= found["high"])).all()
    assert f"{((found['low'] <= 0) & (found['high'] >= 0)).sum()} of 4 intervals include 0" in said
