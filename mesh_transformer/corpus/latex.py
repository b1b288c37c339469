# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Fast conversion of LaTeX to text by pylatexenc: a run of plain text is one token instead of one token per character.

The library's parser calls `get_token` for every token. The override in this module handles plain text and environments,
and leaves all other tokens to the library. The library's method is slow on long documents because it copies the rest of
the document at every begin and end of an environment.
"""

import functools
import logging
import re
from typing import Any

from pylatexenc import latex2text, latexwalker

logging.getLogger("pylatexenc").setLevel(logging.ERROR)  # otherwise pylatexenc logs errors in documents to the terminal

_SPACE = re.compile(r"\s*")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([\w* ._-]+)\}")
_MARKUP = "\\%{}$"  # each of these characters begins a new token


def nodes_to_text(source: str) -> str:
    """Return the text of LaTeX source with formulas unchanged; raise pylatexenc's errors for invalid source."""
    nodes, _, _ = _RunWalker(source, latex_context=_context(), tolerant_parsing=True).get_latex_nodes()
    # Each document needs a new writer, because a writer stores the title.
    writer = latex2text.LatexNodes2Text(_text_context(), math_mode="verbatim", strict_latex_spaces=False)
    return writer.nodelist_to_text(nodes)


@functools.cache
def _context() -> Any:
    return latexwalker.get_default_latex_context_db()


@functools.cache
def _text_context() -> Any:
    """Return the default context, but with an empty \\today: the text must not depend on the date of the build."""
    context = latex2text.get_default_latex_context_db()
    macros = [latex2text.MacroTextSpec("today", ""), latex2text.MacroTextSpec("maketitle", _make_title)]
    context.add_context_category("undated", macros=macros, prepend=True)
    return context


def _make_title(node: Any, l2tobj: Any) -> str:
    """Return the title, author and date, one per line, without fields that the document lacks."""
    lines = [getattr(l2tobj, f"_doc_{name}", "") for name in ("title", "author", "date")]
    return "".join(f"{line}\n" for line in lines if line) + "\n"


@functools.cache
def _run_pattern(braces: str) -> re.Pattern[str]:
    """Return the pattern of plain characters, spaces and paragraph breaks, without trailing spaces."""
    specials = {chars for category in _context().d.values() for chars in category["specials"]}
    markup = re.escape(_MARKUP + braces)
    first_chars = re.escape("".join(sorted({chars[0] for chars in specials})))
    no_special = f"(?!{'|'.join(map(re.escape, sorted(specials)))})[{first_chars}]"
    spaces = r"[^\S\n]*+(?:\n(?!\n)[^\S\n]*+)*+"
    return re.compile(rf"(?:{spaces}(?:\n\n|[^\s{markup}{first_chars}]++|{no_special}))++")


class _RunWalker(latexwalker.LatexWalker):
    """The library's parser with faster tokenization."""

    def get_token(
        self,
        pos: int,
        include_brace_chars: Any = None,
        environments: bool = True,
        parsing_state: Any = None,
        **rest: Any,
    ) -> Any:
        """Return the token at `pos`. A run of plain characters is one token, unless the caller expects an argument."""
        if environments and not rest and parsing_state is not None and parsing_state.latex_context is _context():
            braces = "".join(char for pair in include_brace_chars or () for char in pair)
            if run := _run_pattern(braces).match(self.s, pos):
                return latexwalker.LatexToken("char", run.group(), pos, run.end() - pos, "")
            space = _SPACE.match(self.s, pos)
            assert space is not None, "the pattern matches the empty string"
            environment = _ENVIRONMENT.match(self.s, space.end())
            if environment and "\n\n" not in space.group():
                kind = f"{environment[1]}_environment"
                return latexwalker.LatexToken(
                    kind, environment[2], environment.start(), len(environment[0]), space.group()
                )
        rest |= {"include_brace_chars": include_brace_chars, "environments": environments}
        return super().get_token(pos, parsing_state=parsing_state, **rest)
