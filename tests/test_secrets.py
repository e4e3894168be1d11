"""No key, token or password lies in a file of the repository, executed notebooks and results included."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
KINDS = {
    "private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "AWS": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "Hugging Face": rb"\bhf_[A-Za-z0-9]{30,}",
    "OpenAI and alike": rb"\bsk-[A-Za-z0-9_-]{20,}",
    "Google": rb"\bAIza[0-9A-Za-z_-]{35}",
    "Slack": rb"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "assigned": rb"(?i)(?:api_?key|secret|passw(?:or)?d|token)[\"']?\s*[:=]\s*[\"'](?=[^\"']*[0-9])[A-Za-z0-9+/_-]{20,}[\"']",
}


def found(data: bytes) -> list[str]:
    """The kinds of secrets that some bytes hold."""
    return [kind for kind, pattern in KINDS.items() if re.search(pattern, data)]


def test_no_file_holds_a_secret():
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("no git checkout: what would be committed is not known")
    listed = ["git", "-C", str(REPO), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [REPO / name for name in names if name and (REPO / name).is_file()]
    assert len(files) > 100
    texts = {path: path.read_bytes() for path in files if path.suffix not in (".png", ".svg", ".gz", ".sqlite", ".safetensors")}
    problems = {path.relative_to(REPO).as_posix(): kinds for path, text in texts.items() if (kinds := found(text))}
    assert not problems


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("private key", ("-----BEGIN RSA ", "PRIVATE KEY-----")),
        ("AWS", ("AKIA", "ABCDEFGHIJ234567")),
        ("GitHub", ("ghp_", "a1" * 18)),
        ("Hugging Face", ("hf_", "Ab1" * 11)),
        ("OpenAI and alike", ("sk-", "proj-" + "a1B2" * 6)),
        ("Google", ("AIza", "a1B2c" * 7)),
        ("Slack", ("xoxb-", "123456789012-abc")),
        ("assigned", ("api_key = ", '"' + "a1B2" * 6 + '"')),
    ],
)
def test_the_scan_sees_each_kind(kind, parts):
    assert found("".join(parts).encode()) == [kind] and found(parts[0].encode()) == []
