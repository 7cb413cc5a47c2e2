"""What is mended in pages of the site when they have been made."""

import re
from typing import Any

SHORT = re.compile(r"<code>([^<\s]{1,36})</code>")
# griffe reads "hits, misses: ..." of a docstring's attributes as one name and its type
JOINED = re.compile(r"<b><code><span[^>]*>(\w+),</span></code></b>\s*\(<code><span[^>]*>([\w, ]+)</span></code>\)")


def on_page_content(html: str, **_: Any) -> str:
    """Short code in a text stays in one piece, by site.css: a browser would break `--option` behind its hyphens."""
    return SHORT.sub(r'<code class="whole">\1</code>', JOINED.sub(r"<b><code>\1, \2</code></b>", html))
