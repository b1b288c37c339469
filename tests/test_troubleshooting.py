# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every message that docs/troubleshooting.md quotes occurs in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
EXTERNAL = {"RESOURCE_EXHAUSTED"}  # messages of JAX and of the operating system


def quoted_messages() -> list[str]:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.fixture(scope="module")
def strings() -> str:
    """All strings of the package, with \0 for each value in an f-string."""
    found = []
    for path in (ROOT / "mesh_transformer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("message", quoted_messages())
def test_message_is_in_the_code(message, strings):
    assert message in EXTERNAL or message in strings


def test_the_page_quotes_messages():
    assert len(quoted_messages()) >= 15
