# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversion of HTML, LaTeX, roff (manual pages), reStructuredText, Info and e-mail to plain text."""

import email
import email.policy
import re
from collections.abc import Callable
from email.message import EmailMessage

from mesh_transformer.data.errors import DataError, DocumentError


def install_hint(module: str) -> DataError:
    """Return the error for a missing optional library."""
    return DataError(f"this recipe requires {module}, which is not installed: pip install 'mesh-transformer[corpus]'")


def html_to_text(page: str) -> str:
    """Return the main content of a page without menus and scripts, by resiliparse."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise install_hint("resiliparse") from None
    return extract_plain_text(page, main_content=True, alt_texts=False, links=False, form_fields=False)


def latex_to_text(source: str) -> str:
    """Return the text of a LaTeX document with formulas unchanged; raise DocumentError if pylatexenc cannot parse it."""
    try:
        from pylatexenc.latexwalker import LatexWalkerError

        from mesh_transformer.corpus.latex import nodes_to_text
    except ImportError:
        raise install_hint("pylatexenc") from None
    _, _, body = source.partition("\\begin{document}")
    body = (body or source).partition("\\end{document}")[0]
    try:
        text = nodes_to_text(body)
    except (LatexWalkerError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]  # pylatexenc does not document its errors
        raise DocumentError(
            "broken LaTeX", f"pylatexenc cannot parse the LaTeX ({reason}); correct or exclude it"
        ) from None
    return _squeeze(text)


# Text of roff escapes; the escapes for fonts, sizes and colors are removed.
_ROFF_NAMES = {
    "(em": "\u2014", "(en": "\u2013", "(hy": "-", "(aq": "'", "(dq": '"', "(lq": "\u201c", "(rq": "\u201d",
    "(oq": "\u2018", "(cq": "\u2019", "(bu": "\u2022", "(co": "\u00a9", "(rg": "\u00ae", "(tm": "\u2122",
    "(ti": "~", "(ha": "^", "(ga": "`", "(rs": "\\", "(->": "\u2192", "(<-": "\u2190", "(>=": "\u2265",
    "(<=": "\u2264", "(!=": "\u2260", "(+-": "\u00b1", "(mu": "\u00d7", "(de": "\u00b0", "(Fo": "\u00ab",
    "(Fc": "\u00bb", "(ss": "\u00df", "*(Aq": "'", "*(lq": "\u201c", "*(rq": "\u201d",
}  # fmt: skip
_ROFF_SINGLE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": "\t", "'": "'", "`": "`"}
_ROFF_ESCAPE = re.compile(
    r"\\(?:f(?:\(..|\[[^]]*\]|.)|s[-+]?(?:\d+|\([^)]{2}|\[[^]]*\]|'[^']*')|m(?:\[[^]]*\])|[hvwlLCoNZ]'[^']*'"
    r"|\*?\(..|\*?\[[^]]*\]|\*.|n(?:\(..|\[[^]]*\]|.)|.)"
)
_ROFF_FONTS = {"B", "I", "R", "SM", "SB", "BR", "RB", "BI", "IB", "IR", "RI"}
_ROFF_HEADINGS = {"SH", "SS", "Sh", "Ss"}
_ROFF_BREAKS = {"PP", "P", "LP", "TP", "IP", "HP", "TQ", "RS", "RE", "sp", "br", "Pp", "It", "Bl", "El", "UE"}
# Macro of mdoc -> format of its arguments.
_MDOC = {
    "Ar": "{}", "Nm": "{}", "Cm": "{}", "Pa": "{}", "Ql": "{}", "Xr": "{}", "Em": "{}", "Sy": "{}", "Li": "{}", "Va": "{}",
    "Fn": "{}", "Ev": "{}", "Dv": "{}", "Er": "{}", "Ic": "{}", "Vt": "{}", "Ft": "{}", "Fa": "{}", "Dl": "{}", "D1": "{}",
    "Fl": "-{}", "Op": "[{}]", "Dq": "\u201c{}\u201d", "Sq": "\u2018{}\u2019", "Nd": "\u2014 {}", "Pq": "({})",
    "Bq": "[{}]", "Aq": "<{}>", "In": "#include <{}>", "Dt": "",
}  # fmt: skip


def man_to_text(source: str) -> str:
    """Return the text of a manual page in the macros man or mdoc: headings, paragraphs and terms, without fonts."""
    lines: list[str] = []
    keep_lines, skip_until = False, ""
    for line in source.split("\n"):
        if skip_until:
            skip_until = "" if line.startswith(skip_until) else skip_until
            continue
        if not line.startswith((".", "'")):
            lines.append(_unescape_roff(line))
            if keep_lines:
                lines.append("")
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        if macro in ("de", "ig", "if", "ie", "el") and (macro in ("de", "ig") or line.rstrip().endswith("\\{\\")):
            skip_until = ".." if macro in ("de", "ig") else ".\\}"
        elif macro in ("nf", "EX", "fi", "EE"):
            keep_lines = macro in ("nf", "EX")
            lines.append("\n")
        elif macro in _ROFF_HEADINGS:
            lines += ["\n", _join_arguments(rest, " "), "\n"]
        elif macro in _ROFF_FONTS:
            lines.append(_join_arguments(rest, " " if len(macro) == 1 or macro in ("SM", "SB") else ""))
            lines += [""] * keep_lines
        elif macro in _MDOC:
            words = _MDOC[macro].format(_join_arguments(" ".join(w for w in rest.split() if w not in _MDOC), " "))
            lines.append(words)
        elif macro in _ROFF_BREAKS:
            lines.append("\n")
            if macro in ("IP", "It") and rest:
                lines += [_join_arguments(rest.split('" ')[0] if rest.startswith('"') else rest.split()[0], " "), "\n"]
    return _fill(lines)


def _join_arguments(rest: str, between: str) -> str:
    words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)
    return _unescape_roff(between.join(quoted or plain for quoted, plain in words))


def _unescape_roff(text: str) -> str:
    if "\\" not in text:
        return text
    text = re.sub(r'\\(?:"|#).*', "", text)
    return _ROFF_ESCAPE.sub(_expand_roff, text)


def _expand_roff(match: re.Match[str]) -> str:
    body = match.group()[1:]
    if body.startswith("["):
        body = f"({body[1:-1]}"
    elif body.startswith("*["):
        body = f"*({body[2:-1]}"
    return _ROFF_NAMES.get(body, _ROFF_SINGLE.get(body, ""))


def _fill(lines: list[str]) -> str:
    """Join lines to paragraphs; an entry "\n" ends a paragraph and an empty entry ends a line."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line == "\n":
            paragraphs.append([])
        elif line == "":
            paragraphs[-1].append("\n")
        else:
            paragraphs[-1].append(line)
    texts = [re.sub(r"(?<! ) *\n *", "\n", " ".join(parts)).strip() for parts in paragraphs]
    return "\n\n".join(text for text in texts if text)


_RST_ROLE = re.compile(r":[\w:.+-]{1,80}:`(?:~|!)?([^`<]*?)\s*(?:<[^`>]*>)?`")
_RST_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
# Directives whose body is retained.
_RST_SHOWN = re.compile(
    r"^\s*\.\. (?:(?:c|py|cpp|js|std):)?(?:note|warning|tip|seealso|versionadded|versionchanged|deprecated|function|class|method|"
    r"module|data|attribute|exception|decorator|option|describe|code|code-block|sourcecode|rubric|admonition|important|"
    r"caution|danger|hint|glossary|type|macro|member|var|struct|enum|classmethod|staticmethod|opcode|cmdoption|envvar)::\s*"
)


def rst_to_text(source: str) -> str:
    """Return the text of reStructuredText without comments, indexes and toctrees; roles and links become their words."""
    lines: list[str] = []
    skipped: int | None = None  # indentation of the directive whose body is skipped
    for line in source.split("\n"):
        indentation = len(line) - len(line.lstrip())
        if skipped is not None:
            if not line.strip() or indentation > skipped:
                continue
            skipped = None
        shown = _RST_SHOWN.match(line)
        if shown:
            line = line[:indentation] + line[shown.end() :]
        elif line.lstrip().startswith(".. ") or line.strip() == "..":
            skipped = indentation
            continue
        elif re.match(r"^\s+:[\w-]+:(\s|$)", line):  # an option of a directive
            continue
        line = _RST_LINK.sub(r"\1", _RST_ROLE.sub(r"\1", line)).replace("``", "")
        lines.append(re.sub(r"(?<![:\w]):$", ":", line.replace("::", ":") if line.endswith("::") else line))
    return _squeeze("\n".join(lines))


INFO_MARK = re.compile(rb"\0\x08\[[^\0]*\0\x08\]")  # marker of an index or image
_INFO_MENU = re.compile(r"^\* .*?::?.*\n(?:[ \t]{8,}\S.*\n)*", re.MULTILINE)


def info_to_text(source: str) -> str:
    """Return the text of the nodes of an Info file without headers, menus and tag tables."""
    nodes = [node.lstrip("\n\f").partition("\n") for node in source.split("\x1f")]
    texts = [body for head, _, body in nodes if head.startswith("File: ")]
    return _squeeze("\n".join(_INFO_MENU.sub("", text.replace("* Menu:\n", "")) for text in texts) if texts else source)


def mail_to_text(data: bytes) -> str:
    """Return subject and body (plain text if it has any, else HTML) of a mail message; raise DocumentError without text."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    try:
        body = message.get_body(preferencelist=("plain", "html"))
        content = body.get_content() if body is not None else ""
        subject = str(message.get("subject", "") or "")
    except (LookupError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise DocumentError(
            "broken mail", f"the mail message cannot be parsed: {' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(content, str) or not content.strip():
        raise DocumentError("no text", "the mail message has no text")
    if body is not None and body.get_content_type() == "text/html":
        content = html_to_text(content)
    return f"{subject}\n\n{content}".strip() + "\n"


def _squeeze(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?<![ \t])[ \t]+\n", "\n", text)).strip()


# Kind of a component -> function from a file's source to its text.
TO_TEXT: dict[str, Callable[[str], str]] = {
    "html": html_to_text,
    "latex": latex_to_text,
    "man": man_to_text,
    "rst": rst_to_text,
    "info": info_to_text,
}
