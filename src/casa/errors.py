"""The one exception whose message is written for the user: a plain sentence that names the remedy.

The command line prints it without a traceback and exits with status 2. It is a `ValueError`, so that
library callers can treat it as such.
"""


class UserError(ValueError):
    """Something the user can mend: a bad file, an unknown name, a setting that makes no sense."""
