# SPDX-License-Identifier: Apache-2.0
"""Turns ``:math:`…` `` and blocks in the language ``math`` into MathML when the documentation is built.

Browsers render MathML themselves, so the pages need no script and no network.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
BLOCK = re.compile(r'<pre[^>]*><code class="language-math">(.*?)</code></pre>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    content = BLOCK.sub(lambda m: convert(html.unescape(m[1].strip()), display="block"), content)
    return INLINE.sub(lambda m: convert(html.unescape(m[1])), content)
