"""Measurements in a process of their own, for what one process has only once: its peak of memory."""

import json
import subprocess
import sys
from typing import Any

from casa.errors import UserError


def measured_apart(module: str, given: Any, what: str) -> Any:
    """What `child()` of a module prints as its last line, as JSON, in a new process that was told `given`.

    module: by its import name. given: anything that JSON can hold; `told` is how the child gets it. what: the name of
    the measurement, for the error. Raises UserError if the process fails, of memory perhaps.
    """
    command = [sys.executable, "-c", f"from {module} import child; child()", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{what} in a process of its own failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def told() -> Any:
    """In the child: what `measured_apart` was given."""
    return json.loads(sys.argv[1])
