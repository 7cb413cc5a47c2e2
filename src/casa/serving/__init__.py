"""The HTTP and WebSocket server and its live page: the extra `casa-vlm[serve]`.

`create_app` is in `app.py`, and `server.py` runs it; both need the extra, which is why neither is imported here.
"""

from casa.serving.limits import Limits

__all__ = ["Limits"]
