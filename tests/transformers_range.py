"""Chosen tests on the oldest, the pinned and the newest transformers: `make test-range`.

    python tests/transformers_range.py                      all three; the newest only if it is not the pin
    python tests/transformers_range.py newest               one of them
    python tests/transformers_range.py 5.20.*               any version

Another version than the environment's is overlaid on it: pip says what would have to change, and that alone goes into
.range/<version>, which PYTHONPATH puts first. There is one torch. Exits with the worst status.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
MOVING = ("transformers", "tokenizers", "huggingface-hub")  # pins of these do not hold for another transformers
TESTS = (
    "arguments",
    "generate",
    "cache",
    "loading",
    "remote_code",
    "trainer",
    "released",
    "processor",
    "speculation",
    "vision_commands",
)


def main(asked: list[str]) -> int:
    done: set[str] = set()
    status = 0
    for request in asked or ["oldest", "pin", "newest"]:
        found = changes(requirement(request)) if request != "pin" else {}
        number = found.get("transformers", version("transformers"))
        if number in done:
            print(f"transformers {number} ({request}): done above", flush=True)
            continue
        done.add(number)
        print(f"transformers {number} ({request})", flush=True)
        status = max(status, run_tests(overlay(number, found), number))
    return status


def requirement(request: str) -> str:
    """What pip should look for: pyproject.toml's lower bound with its last patch, the newest, or a version."""
    if request == "oldest":
        request = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] + ".*"
    return "transformers" if request == "newest" else f"transformers=={request}"


def changes(wanted: str) -> dict[str, str]:
    """Name -> version of every package that the environment would have to change for it."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    others = "\n".join(pin for pin in pins if not pin.startswith(MOVING))
    (ROOT / ".range").mkdir(exist_ok=True)
    (ROOT / ".range" / "constraints.txt").write_text(others + "\n")
    command = [*PIP, "--dry-run", "--report", "-", "--upgrade", "-c", str(ROOT / ".range" / "constraints.txt"), wanted]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {found["metadata"]["name"].lower(): found["metadata"]["version"] for found in json.loads(report)["install"]}


def overlay(number: str, found: dict[str, str]) -> Path | None:
    """The folder with those packages, made unless it is there."""
    if not found:
        return None
    folder = ROOT / ".range" / number
    packages = sorted(f"{name}=={number}" for name, number in found.items())
    stamp = folder / "packages.txt"
    if not stamp.is_file() or stamp.read_text().split() != packages:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        subprocess.run([*PIP, "--no-deps", "--target", str(folder), *packages], check=True)
        stamp.write_text("\n".join(packages))
    return folder


def run_tests(folder: Path | None, number: str) -> int:
    """pytest's status on the overlay, whose transformers must be the one that is meant."""
    paths = [str(folder)] if folder else []
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    seen = "import transformers; print(transformers.__version__)"
    output = subprocess.run(
        [sys.executable, "-c", seen], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    if output.stdout.strip() != number:
        print(f"transformers {output.stdout.strip()} was imported, {number} was meant", file=sys.stderr)
        return 1
    tests = [str(next((ROOT / "tests").glob(f"*/test_{name}.py"))) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses=8", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
