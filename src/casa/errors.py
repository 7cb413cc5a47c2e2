"""The one exception whose message is written for the user: a plain sentence that names the remedy.

The command line prints it without a traceback and exits with status 2. It is a `ValueError`, so that
library callers can treat it as such.
"""


class UserError(ValueError):
    """Something the user can mend: a bad file, an unknown name, a setting that makes no sense.

    Args:
        sentence: What is wrong and what to do, in the library's own names: "fps is 0; give a number above 0.",
            "the file is there; go on with resume=True."
        field: The parameter, or the parameters, that stand in the sentence as words. The command line writes
            them as its options: "--fps is 0", "go on with --resume", and `cue='said'` as "--cue said".
    """

    def __init__(self, sentence: str = "", *, field: str | tuple[str, ...] = ()) -> None:
        super().__init__(sentence)
        self.fields = (field,) if isinstance(field, str) else field
