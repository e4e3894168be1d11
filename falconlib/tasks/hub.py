"""Fetches a data set from the Hugging Face hub into data/downloads, as the JSON lines that the loaders read.

The only module here that uses the network, and only when called. Parquet files alone are read, never loading scripts.
"""

from __future__ import annotations

import json
from pathlib import Path

from falconlib.errors import FalconError, did_you_mean
from falconlib.files import write_text
from falconlib.tasks.files import DATA

# name: hub id, configuration, revision, {split: file}; APPS has its parquet files on the conversion branch
SOURCES = {
    "mbpp": ("google-research-datasets/mbpp", "full", None, {"prompt+test+validation+train": "mbpp/mbpp.jsonl"}),
    "apps": ("codeparrot/apps", "all", "refs/convert/parquet", {"train": "apps/train.jsonl", "test": "apps/test.jsonl"}),
    "codal": ("coseal/codal-bench", None, None, {"test": "codal/test.jsonl"}),
}


def download(name: str) -> Path:
    """Writes the files of one set and returns the last; each appears whole or not at all.

    Raises FalconError for an unknown name and when the hub cannot be read.
    """
    if name not in SOURCES:
        raise did_you_mean("data set on the hub", name, SOURCES)
    import datasets

    source, config, revision, files = SOURCES[name]
    for split, relative in files.items():
        path = DATA / "downloads" / relative
        try:
            rows = datasets.load_dataset(source, config, revision=revision, split=split)
        except (OSError, ValueError) as error:  # the hub's own errors derive from these
            remedy = f"check the network, or place {relative} in data/"
            raise FalconError(f"{source} ({split}) cannot be fetched: {error}", remedy) from error
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
