"""PyAV, imported only when a video is opened: it is the extra `casa-vlm[video]`."""

from types import ModuleType

from casa.errors import UserError


def import_av() -> ModuleType:
    """The `av` module.

    Raises:
        UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("Reading and writing video needs PyAV: install casa-vlm[video].") from error
    return av
