# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""LaTeX by pylatexenc, with plain text taken a run at a time where the library takes a token for every character.

The nodes are the library's own: its parser asks `get_token` for every token, and what this one does not know better it
leaves to the library. That takes longer the longer a document is, for at every begin and end of an environment it copies
all that follows.
"""

import functools
import logging
import re
from typing import Any

from pylatexenc import latex2text, latexwalker

logging.getLogger("pylatexenc").setLevel(logging.ERROR)  # of damage in documents it would warn on the terminal

_SPACE = re.compile(r"\s*")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([\w* ._-]+)\}")
_MARKUP = "\\%{}$"  # begins a token of its own in whatever context


def nodes_to_text(source: str) -> str:
    """Text of LaTeX source, formulas as they are written; pylatexenc's errors for what it cannot read."""
    nodes, _, _ = _RunWalker(source, latex_context=_context(), tolerant_parsing=True).get_latex_nodes()
    writer = latex2text.LatexNodes2Text(_text_context(), math_mode="verbatim", strict_latex_spaces=False)
    return writer.nodelist_to_text(nodes)  # a new one each time, for it remembers the title


@functools.cache
def _context() -> Any:
    return latexwalker.get_default_latex_context_db()


@functools.cache
def _text_context() -> Any:
    """The library's own, but that no text has the date of the day on which it is read."""
    context = latex2text.get_default_latex_context_db()
    macros = [latex2text.MacroTextSpec("today", ""), latex2text.MacroTextSpec("maketitle", _make_title)]
    context.add_context_category("undated", macros=macros, prepend=True)
    return context


def _make_title(node: Any, l2tobj: Any) -> str:
    """Of title, author and date what was given, a line each."""
    found = [getattr(l2tobj, f"_doc_{name}", "") for name in ("title", "author", "date")]
    return "".join(f"{line}\n" for line in found if line) + "\n"


@functools.cache
def _run_pattern(braces: str) -> re.Pattern[str]:
    """Characters, spaces and ends of paragraphs that are nothing but themselves, without the spaces behind them."""
    specials = {chars for category in _context().d.values() for chars in category["specials"]}
    own = re.escape(_MARKUP + braces)
    begins = re.escape("".join(sorted({chars[0] for chars in specials})))
    no_special = f"(?!{'|'.join(map(re.escape, sorted(specials)))})[{begins}]"
    spaces = r"[^\S\n]*+(?:\n(?!\n)[^\S\n]*+)*+"
    return re.compile(rf"(?:{spaces}(?:\n\n|[^\s{own}{begins}]++|{no_special}))++")


class _RunWalker(latexwalker.LatexWalker):
    """The library's parser with quicker tokens."""

    def get_token(
        self,
        pos: int,
        include_brace_chars: Any = None,
        environments: bool = True,
        parsing_state: Any = None,
        **rest: Any,
    ) -> Any:
        """The token from `pos` on. A run of plain characters is one, unless the caller is after an argument."""
        if environments and not rest and parsing_state is not None and parsing_state.latex_context is _context():
            braces = "".join(char for pair in include_brace_chars or () for char in pair)
            if run := _run_pattern(braces).match(self.s, pos):
                return latexwalker.LatexToken("char", run.group(), pos, run.end() - pos, "")
            space = _SPACE.match(self.s, pos)
            assert space is not None, "it may be empty"
            found = _ENVIRONMENT.match(self.s, space.end())
            if found and "\n\n" not in space.group():
                kind = f"{found[1]}_environment"
                return latexwalker.LatexToken(kind, found[2], found.start(), len(found[0]), space.group())
        rest |= {"include_brace_chars": include_brace_chars, "environments": environments}
        return super().get_token(pos, parsing_state=parsing_state, **rest)
