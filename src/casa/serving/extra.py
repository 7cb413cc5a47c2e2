"""Whether what the server is built on is installed: the extra `casa-vlm[serve]`."""

from importlib.util import find_spec

from casa.errors import UserError

NEEDED = ("fastapi", "uvicorn", "websockets")


def check_installed() -> None:
    """Raises UserError if the extra is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"the server needs {' and '.join(missing)}: install casa-vlm[serve].")
