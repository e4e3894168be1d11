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

WITHIN = ("benchmarks", "decoding", "judge")  # what the runs of one mode share; a mode may meet fewer problems than zero-shot
ACROSS = ("limits", "estimator", "interval")  # what all modes share, with these of the decoding:
DECODING = ("max_new_tokens", "temperature", "top_p")
Cards = dict[tuple[str, str], dict[str, Any]]  # (mode, run) -> evaluation card


def sampled_cards(runs: Mapping[str, Sequence[Path]]) -> tuple[Cards, list[str]]:
    """The card of each run's samples in each mode, and "run, mode" of those without one, of which nothing is known.

    runs: as `tables.training_runs` finds them. Raises FalconError for zero-shot samples without a card, for a card that does
    not fit its samples or its run (problems, samples, seed, adapter, memory), and for two that may not stand in one table.
    """
    from falconlib.evaluation.score import FILES, load_samples

    cards: Cards = {}
    unknown: list[str] = []
    for folder in (folder for folders in runs.values() for folder in folders):
        for mode, file in [(mode, file) for mode in FILES if (file := sample_file(folder, mode))]:
            place = file.with_name("card.json")
            card = (read_json(place) if place.is_file() else {}).get(mode)
            if card is None and mode == "zero-shot":
                raise FalconError(f"{file} has no evaluation card", "sample it again, or run its stage again")
            if card is None:
                unknown.append(f"{folder.name}, {mode}")
                continue
            if odd := misfits(folder, mode, card, load_samples(file)):
                raise FalconError(f"{mode} of {folder.name}: {place} speaks of other {', '.join(odd)}", "sample it again")
            cards[mode, folder.name] = card
    for (mode, name), card in cards.items():
        like = next(known for (own, _), known in cards.items() if own == mode)
        whole = next(known for (own, _), known in cards.items() if own == "zero-shot")
        odd = [field for field in WITHIN if card[field] != like[field]] + [
            field for field in ACROSS if card[field] != whole[field]
        ]
        odd += [field for field in DECODING if card["decoding"][field] != whole["decoding"][field]]
        if odd:
            raise FalconError(f"{mode} of {name} was sampled with other {', '.join(odd)} than the rest", "sample it again")
    return cards, unknown


def misfits(folder: Path, mode: str, card: Mapping[str, Any], samples: Sequence[Sample]) -> list[str]:
    """What a card says otherwise than the samples beside it or the training run in `folder`."""
    name, (arm, _, seed) = re.escape(folder.name), folder.name.rpartition("-s")
    made = read_json(folder / "manifest.json")["outputs"]
    weights = made.get(f"train/{folder.name}/adapter/adapter_model.safetensors", "")[:16]
    adapter = rf" with (train/{name}/adapter$|{name}/adapter \({weights}.*\)$)"
    drawn = Counter(s.task_id for s in samples if not s.greedy)
    own = read_json(folder / "card.json") if (folder / "card.json").is_file() else {}
    wrong = {
        "problems": len({s.task_id for s in samples}) != sum(found["tasks"] for found in card["benchmarks"].values()),
        "samples": {*drawn.values()} != {card["decoding"]["samples"]} - {0},
        "seeds": card["seeds"] != [int(seed)],
        "adapters": "/adapter" in card["model"] if arm == "base" else not re.search(adapter, card["model"]),
        "memories": "LTM" in mode and "+LTM" in own and card["memory"] != own["+LTM"]["memory"],
    }
    return [what for what, found in wrong.items() if found]
