# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Raw sources -> filtered, deduplicated, mixed, tokenised and documented corpus, from one file.

`recipe` is that file. `sources` finds the files of a component and makes documents of them (`markup` makes text of HTML,
LaTeX, manual pages, reStructuredText and mail): a new kind of source is a row there. `steps` judges and mends one
document at a time: a new step is a row there and a record in `recipe`. `duplicates` finds documents and lines that
are there already. `mixture` repeats, shuffles and tokenises. `build` is the order of all that; `stages` runs each
in parts, on this machine or a cluster (`clusters`), and never takes a lost part for a whole. `datasheet` says what came out.
"""

import importlib.util

if importlib.util.find_spec("datatrove") is None:
    raise ImportError("building corpora needs more libraries: pip install 'mesh-transformer[corpus]'")
