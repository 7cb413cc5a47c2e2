"""A release: one version, and a wheel and an sdist from which the program runs in an environment that has no more."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import casa
from casa.models.loading import shipped
from casa.testing import PATIENCE

ROOT = Path(__file__).parents[2]
# casa-tiny's weights are 15.5 MB of it, casa-smol's at most 30
MOST_BYTES = 18_000_000 + 30_000_000 * ("casa-smol" in shipped())


def test_the_version_has_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "casa.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == casa.__version__
    changes = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes[0] == casa.__version__


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_forms_are_yaml_and_name_what_is_there(path):
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert extra in extras
    for file in re.findall(r"(?<![\w/])(?:\.ci|docs|src|tests)/[\w./-]*\w", text):
        assert (ROOT / file).exists(), file


def test_the_image_copies_what_is_there_and_names_extras():
    (path,) = (path for path in ROOT.rglob("*Containerfile*") if ".venv" not in path.parts)
    text = path.read_text(encoding="utf-8")
    for names in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for name in names.split():
            assert (ROOT / name).exists(), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    chosen = re.findall(r"EXTRAS=([\w,]+)", text)
    assert len(chosen) == 2
    assert {extra for group in chosen for extra in group.split(",")} <= set(extras)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, built from a copy of the source with the setuptools that is here: nothing is fetched."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def closure(requirements, extras):
    """All packages that these need on this machine, with those of the extras."""
    found, waiting = {}, [(Requirement(text), extras) for text in requirements]
    while waiting:
        wanted, chosen = waiting.pop()
        asked = not wanted.marker or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *chosen))
        if asked and wanted.name != "casa-vlm" and wanted.name not in found:
            found[wanted.name] = package = distribution(wanted.name)
            waiting += [(Requirement(text), wanted.extras) for text in package.requires or ()]
    return found.values()


def environment(wheel, folder, extras=(), sdist=None):
    """An environment with the wheel and what it requires, lent by links, for torch is large; and nothing else.

    sdist: installed in the wheel's place, by the setuptools that is here.
    """
    venv.create(folder, with_pip=True)
    (there,) = folder.glob("lib/python*/site-packages")
    # venv's own setuptools may be too old to build
    for old in (*there.glob("setuptools*"), *there.glob("_distutils_hack")):
        shutil.rmtree(old)
    with zipfile.ZipFile(wheel) as held:
        told = message_from_bytes(held.read(f"casa_vlm-{casa.__version__}.dist-info/METADATA"))
    for package in closure([*told.get_all("Requires-Dist"), *(["setuptools"] if sdist else [])], extras):
        for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (there / name).exists():
                (there / name).symlink_to(package.locate_file(name))
    wanted = f"{sdist or wheel}[{','.join(extras)}]" if extras else str(sdist or wheel)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--no-index", "--no-build-isolation", wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder


def in_it(folder, *words, where):
    """Runs the program there, without the checkout in sight."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [folder / "bin" / "casa", *words]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_what_is_in_them(built):
    wheel, sdist = built
    assert wheel.name == f"casa_vlm-{casa.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    there = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "casa").rglob("*") if path.is_file()}
    assert {name for name in there if "__pycache__" not in name} <= names
    assert "casa/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "projects", "docs"))]
    assert wheel.stat().st_size < MOST_BYTES
    with tarfile.open(sdist) as held:
        inside = {name.partition("/")[2] for name in held.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/casa/assets/casa-tiny/model.safetensors"} <= inside
    assert sdist.stat().st_size < 2 * MOST_BYTES


@pytest.mark.slow
def test_the_core_answers_and_says_what_is_missing(built, tmp_path):
    empty = environment(built[0], tmp_path / "empty")
    page = ROOT / "docs" / "images" / "page.png"
    done = in_it(empty, "ask", "casa-tiny", str(page), "Read line 1.", where=tmp_path)
    assert (done.returncode, done.stdout) == (0, "797\n"), done.stderr
    assert in_it(empty, "--version", where=tmp_path).stdout == f"casa {casa.__version__}\n"
    for words, extra in (
        (("demo", "--out", "demo"), "casa-vlm["),
        (("caption", "casa-tiny", "film.mp4"), "casa-vlm[video]"),
        (("serve", "casa-tiny"), "casa-vlm[serve]"),
        (("eval", "casa-tiny", "--tasks", "pages"), "casa-vlm[tasks]"),
        (("train", "mine.yaml", "--out", "run"), "casa-vlm[train]"),
    ):
        shutil.copy(ROOT / "src" / "casa" / "assets" / "demo" / "clip.mp4", tmp_path / "film.mp4")
        (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {checkpoint: casa-tiny}\n")
        done = in_it(empty, *words, where=tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        assert extra in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_sdist_can_be_installed(built, tmp_path):
    folder = environment(built[0], tmp_path / "env", sdist=built[1])
    done = in_it(folder, "ask", "casa-tiny", str(ROOT / "docs" / "images" / "page.png"), "Read line 1.", where=tmp_path)
    assert (done.returncode, done.stdout) == (0, "797\n"), done.stderr


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(built, tmp_path, noise_film):
    folder = environment(built[0], tmp_path / "env", ("plots", "video"))
    done = in_it(folder, "demo", "--video", str(noise_film(2)), "--out", "demo", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"captions.srt", "memory.png"} <= {path.name for path in (tmp_path / "demo").iterdir()}
