"""Which samples may stand in one table: each file held against its evaluation card, and the cards against each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falconlib.errors import FalconError
from falconlib.files import read_json
from falconlib.reporting.tables import sample_file

if TYPE_CHECKING:
    from falconlib.evaluation.score import Sample

WITHIN = ("benchmarks", "decoding")  # what the runs of one mode share; a mode may meet fewer problems than zero-shot
ACROSS = ("limits", "estimator", "interval", "extraction", "stop", "packages")  # what all modes share, with these of decoding:
DECODING = ("max_new_tokens", "temperature", "top_p")
AGAIN = "falconlib eval --out <run>/modes/<arm>-s<seed> with the settings of the rest, or delete what lies there"
Cards = dict[tuple[str, str], dict[str, Any]]  # (mode, run) -> evaluation card


def sampled_cards(runs: Mapping[str, Sequence[Path]]) -> tuple[Cards, list[str]]:
    """The card of each run's samples in each mode, and "run, mode" of those without one, of which nothing is known.

    runs: as `tables.training_runs` finds them. Raises FalconError for zero-shot samples without a card, for a card that does
    not fit its samples or its run (problems, samples, seed, adapter, memory), and for two that may not stand in one table.
    """
    from falconlib.evaluation.score import FILES, load_samples

    cards: Cards = {}
    met: dict[tuple[str, str], set[str]] = {}
    unknown: list[str] = []
    for folder in (folder for folders in runs.values() for folder in folders):
        for mode, file in [(mode, file) for mode in FILES if (file := sample_file(folder, mode))]:
            place = file.with_name("card.json")
            card = (read_json(place) if place.is_file() else {}).get(mode)
            samples = load_samples(file)
            met[mode, folder.name] = {s.task_id for s in samples}
            if card is None and mode == "zero-shot":
                raise FalconError(f"{file} has no evaluation card", AGAIN)
            if odd := [] if card is None else misfits(folder, mode, card, samples):
                raise FalconError(f"{mode} of {folder.name}: {place} speaks of other {', '.join(odd)}", AGAIN)
            if not met[mode, folder.name] <= met.get(("zero-shot", folder.name), set()):
                raise FalconError(f"{mode} of {folder.name} met problems that zero-shot did not: no pairs", AGAIN)
            if card is None:
                unknown.append(f"{folder.name}, {mode}")
            else:
                cards[mode, folder.name] = card
    for (mode, name), card in cards.items():
        like = next(known for (own, _), known in cards.items() if own == mode)
        whole = next(known for (own, _), known in cards.items() if own == "zero-shot")
        odd = [field for field in WITHIN if card.get(field) != like.get(field)]
        odd += [field for field in ACROSS if card.get(field) != whole.get(field)]
        odd += [field for field in DECODING if card["decoding"][field] != whole["decoding"][field]]
        odd += ["model"] * (re.split(" with | [(]", card["model"])[0] != re.split(" with | [(]", whole["model"])[0])
        if odd:
            raise FalconError(f"{mode} of {name} was sampled with other {', '.join(odd)} than the rest", AGAIN)
    return cards, unknown


def misfits(folder: Path, mode: str, card: Mapping[str, Any], samples: Sequence[Sample]) -> list[str]:
    """What a card says otherwise than the samples beside it or the training run in `folder`."""
    name, (arm, _, seed) = re.escape(folder.name), folder.name.rpartition("-s")
    made = read_json(folder / "manifest.json")["outputs"]
    weights = made.get(f"train/{folder.name}/adapter/adapter_model.safetensors", "")[:16]
    adapter = rf" with (train/{name}/adapter$|{name}/adapter \({weights}.*\)$)"
    greedy, drawn = (Counter(s.task_id for s in samples if s.greedy == alone) for alone in (True, False))
    lender = arm if f"train/{folder.name}/memory.sqlite" in made else "falcon"  # an arm without a memory recalls from FALCON's
    file = folder.with_name(f"{lender}-s{seed}") / "card.json"
    lent = read_json(file).get("+LTM", {}).get("memory") if "LTM" in mode and file.is_file() else None
    wrong = {
        "problems": len({s.task_id for s in samples}) != sum(found["tasks"] for found in card["benchmarks"].values()),
        "samples": {*drawn.values()} != {card["decoding"]["samples"]} - {0} or {*greedy.values()} != {1},
        "seeds": card["seeds"] != [int(seed)],
        "adapters": "/adapter" in card["model"] if arm == "base" else not re.search(adapter, card["model"]),
        "memories": ("LTM" in mode) != (card["memory"] is not None) or (lent or card["memory"]) != card["memory"],
        "modes": card["mode"] != mode,
    }
    return [what for what, found in wrong.items() if found]
