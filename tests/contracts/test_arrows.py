"""The README's import arrows: which room may import which, read from the source and tried in fresh interpreters."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import casa
from casa.testing import PATIENCE

SOURCE = Path(casa.__file__).parent
README = Path(__file__).parents[2] / "README.md"
# small things of one file, which all rooms from the models on may use, and what these use themselves
SMALL = {
    "errors": set(),
    "threads": set(),
    "memory": set(),
    "settings": {"errors"},
    "atomic": {"errors"},
    "figures": {"errors", "atomic"},
    "provenance": {"errors"},
    "cluster": {"errors"},
}
# rooms from the bottom up: each imports what is below its own level, and of that level itself alone
LEVELS = (
    ("windows",),
    ("attention",),
    ("layers",),
    ("models",),
    ("streaming", "training", "evaluation", "analysis"),
    ("pipeline", "captioning", "serving", "benchmarks", "demo"),
    ("cli",),
)
TORCH_ONLY = {"errors", *LEVELS[0], *LEVELS[1], *LEVELS[2]}
# beside the models, of which they know none: what they import, and which rooms may import them
BESIDE = {"vision": set(), "media": {"atomic"}, "data": {"media", "windows", "settings", "atomic", "figures"}}
USERS = {
    "vision": {*LEVELS[3], *LEVELS[4], *LEVELS[5], *LEVELS[6]},
    "media": {*LEVELS[5], *LEVELS[6]},
    "data": {"training", "evaluation", *LEVELS[5], *LEVELS[6]},
}
# (room, what it imports against the list) -> why it may
EXCEPTIONS = {
    ("models", "media.pictures"): "every picture comes in through one door, which is no video",
    ("streaming", "media.pictures"): "the same door",
    ("training", "analysis"): "a run's plan says what it will cost",
    ("analysis", "streaming"): "the cost of a frame is that of a session",
    ("demo", "pipeline"): "the demo loads and asks as a user does",
    ("benchmarks", "captioning"): "the memory of captioning is measured",
    ("provenance", "models.loading"): "a shipped model's name is resolved to its files",
}
ONE_MEANING = {"reference", "sdpa", "flex", "varlen"}  # implementations of attention, which know nothing of each other


def allowed() -> dict[str, set[str]]:
    """What each room may import of casa, besides itself and exceptions; a room that is not here is an error."""
    found = dict(SMALL) | {room: {"errors"} | others for room, others in BESIDE.items()}
    below: set[str] = set()
    for rooms in LEVELS:
        for room in rooms:
            small = {"errors"} if room in TORCH_ONLY else set(SMALL)
            found[room] = below | small | {other for other, users in USERS.items() if room in users}
        below |= set(rooms)
    public = {"errors", "windows", "attention", "models", "streaming", "pipeline", "vision"}
    return found | {"__init__": public, "__main__": {"cli"}, "testing": {"errors", "models"}, "assets": set()}


ALLOWED = allowed()


def imports(tree: ast.AST, package: list[str]) -> set[str]:
    """Dotted names of all modules a file imports, at any depth; `package` is where it lies."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from casa import media` names a room, `from casa.media import pictures` a file
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def violations(root: Path) -> list[str]:
    """Sentences about every forbidden import below `root`, the folder of the package."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        room, file = parts[0], parts[-1]
        if room not in ALLOWED:
            found.append(f"{'/'.join(parts)}: the room {room} is not in the list of arrows")
            continue
        for name in sorted(imports(ast.parse(path.read_text()), ["casa", *parts[:-1]])):
            found += [f"{'/'.join(parts)} imports {name}: {why}" for why in _why_not(room, file, name)]
    return found


def _why_not(room: str, file: str, name: str) -> list[str]:
    top, *rest = name.split(".")
    if top == "projects":
        return ["casa imports no project"]
    if top != "casa":
        stdlib = top in sys.stdlib_module_names
        return ["torch only"] if room in TORCH_ONLY and not stdlib and top != "torch" else []
    if not rest:
        return []
    target = rest[0]
    # the package's own lazy names
    homes = {exported: module for module, names in casa.EXPORTS.items() for exported in names}
    target = homes.get(target, f"casa.{target}").split(".")[1]
    if target == "testing" and room != "testing":
        return ["only tests use casa.testing"]
    if target == room:
        other = rest[1] if len(rest) > 1 else ""
        apart = room == "attention" and file in ONE_MEANING and other in ONE_MEANING and other != file
        return ["one implementation of attention uses another"] if apart else []
    if target in ALLOWED[room] or {(room, target), (room, ".".join(rest[:2]))} & EXCEPTIONS.keys():
        return []
    return [] if target.startswith("__") else ["against the arrows"]


def test_every_import_follows_the_arrows():
    assert violations(SOURCE) == []


def test_the_readme_has_the_same_list():
    text = " ".join(README.read_text(encoding="utf-8").split())
    found = re.search(r"Arrows run upwards only: (.*?); (.*?) stand beside the models and know none", text)
    assert found is not None
    levels = [tuple(part.strip() for part in level.split(",")) for level in found[1].split("←")]
    assert levels == [*LEVELS]
    assert re.split(r", | and ", found[2]) == [*BESIDE]
    told = re.search(r"Exceptions: (.*?)\.(?: |$)", text)
    assert told is not None
    assert set(re.findall(r"`(\w+) → ([\w.]+)`", told[1])) == EXCEPTIONS.keys()


@pytest.mark.slow
def test_every_exception_is_in_use(monkeypatch):
    for exception in [*EXCEPTIONS]:
        monkeypatch.delitem(EXCEPTIONS, exception)
        assert violations(SOURCE), exception
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("file", "line", "why"),
    [
        ("windows.py", "import transformers", "torch only"),
        ("layers/x.py", "from transformers import PreTrainedModel", "torch only"),
        ("layers/x.py", "from casa.models.configuration_casa import CasaConfig", "against the arrows"),
        ("layers/x.py", "from casa import CasaConfig", "against the arrows"),
        ("attention/x.py", "def f():\n    from casa.vision import encode", "against the arrows"),
        ("attention/x.py", "import PIL.Image", "torch only"),
        ("attention/sdpa.py", "from casa.attention import reference", "uses another"),
        ("attention/flex.py", "from .sdpa import attention", "uses another"),
        ("windows.py", "from casa.attention import casa_attention", "against the arrows"),
        ("models/x.py", "from casa import training", "against the arrows"),
        ("models/x.py", "from casa.media.video import frames", "against the arrows"),
        ("models/x.py", "from ..streaming import session", "against the arrows"),
        ("models/x.py", "from casa import StreamingSession", "against the arrows"),
        ("media/x.py", "from casa.models import CasaProcessor", "against the arrows"),
        ("streaming/x.py", "from casa.media.video import frames", "against the arrows"),
        ("training/x.py", "import casa.evaluation.pages", "against the arrows"),
        ("training/x.py", "from casa.benchmarks.train import METHODS", "against the arrows"),
        ("training/x.py", "from casa.media import VideoWriter", "against the arrows"),
        ("streaming/x.py", "from casa.evaluation import page", "against the arrows"),
        ("serving/x.py", "from casa.captioning import caption", "against the arrows"),
        ("layers/x.py", "from casa.settings import build", "against the arrows"),
        ("evaluation/x.py", "from casa.cli import main", "against the arrows"),
        ("models/x.py", "from casa.testing import tiny_casa", "only tests"),
        ("novel/x.py", "import torch", "not in the list"),
        ("models/x.py", "from projects.casa_smol import pages", "no project"),
    ],
)
def test_the_check_can_fail(tmp_path, file, line, why):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    assert [why in sentence for sentence in violations(tmp_path)] == [True]


def test_what_is_allowed_passes(tmp_path):
    (tmp_path / "streaming").mkdir()
    (tmp_path / "streaming" / "x.py").write_text("import av\nfrom casa.media.pictures import check_picture\n")
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "sdpa.py").write_text("import torch\nfrom casa.windows import WindowLayout\n")
    assert violations(tmp_path) == []


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
LOADED = "import sys; print(sorted({n.split('.')[0] for n in sys.modules} & {'transformers', 'PIL', 'av'}))"


@pytest.mark.slow
def test_the_torch_rooms_load_torch_alone():
    rooms = "import casa, casa.windows, casa.attention.sdpa, casa.attention.reference, casa.layers"
    result = python(f"{rooms}\n{LOADED}\nimport PIL\n{LOADED}")
    assert result.stdout.split() == ["[]", "['PIL']"], result.stderr


@needs_ray
@pytest.mark.slow
def test_one_machine_imports_nothing_of_ray():
    rooms = "import casa.cli.main, casa.captioning, casa.serving.app, casa.serving.server, casa.serving.ingress, sys"
    result = python(f"{rooms}\nprint('ray' in sys.modules)\nimport ray\nprint('ray' in sys.modules)")
    assert result.stdout.split() == ["False", "True"], result.stderr


QUIET = """
import importlib, os, pkgutil, random, socket, sys
import torch

def opened(*args, **kwargs):
    raise ConnectionError("a socket was opened")

def state():
    threads = torch.get_num_threads(), torch.get_num_interop_threads()
    seeds = torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate()
    modes = torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    return threads, seeds, modes, dict(os.environ)

def changed(before):
    return [name for name, a, b in zip(("threads", "seeds", "modes", "environment"), before, state()) if a != b]

# what transformers, Ray and rich do at import is not casa's doing
import ray.serve
import rich.console
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, GenerationMixin, Trainer
socket.socket = opened
before = state()
import casa
for found in pkgutil.walk_packages(casa.__path__, "casa."):
    importlib.import_module(found.name)
casa.adapt
print(len([name for name in sys.modules if name.partition(".")[0] == "casa"]))
print(changed(before))
# and these are seen
torch.set_num_threads(torch.get_num_threads() + 1)
torch.manual_seed(12345)
torch.set_default_dtype(torch.float64)
os.environ["CASA_TRIED"] = "1"
print(changed(before))
try:
    socket.socket()
except ConnectionError as error:
    print(error)
"""


@needs_ray
@pytest.mark.slow
def test_importing_changes_no_threads_seeds_or_environment_and_opens_no_socket():
    result = python(QUIET)
    every = str(len(list(SOURCE.rglob("*.py"))))
    seen = str(["threads", "seeds", "modes", "environment"])
    assert result.stdout.splitlines() == [every, "[]", seen, "a socket was opened"], result.stderr
