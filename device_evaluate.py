# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure a trained model: RUN -> numbers that can be compared. RUN is a run folder, a checkpoint in it,
or a model folder of Hugging Face.

examples:
  python device_evaluate.py runs/quickstart
      bits per byte of the text that the run held out of its training, a segment of the context's length at a time
  python device_evaluate.py runs/gpt2 --data pile=test.jsonl.zst --set 'evaluate.group_key="meta.pile_set_name"'
      by component (with --set evaluate.sample_fraction=0.1 as the Pile's paper measures GPT-2 and GPT-3), beside its table 2
  python device_evaluate.py runs/gpt2 --task wikitext2 --data wikitext2=wiki.test.tokens --set evaluate.stride=512
      perplexity per word of the original and per token, in windows that overlap
  python device_evaluate.py runs/gpt2 --task hellaswag --data hellaswag=hellaswag_val.jsonl --task local --json
      tasks of lm-evaluation-harness from local files, and our own of held-out text (pip install 'mesh-transformer[evaluate]')
  python device_evaluate.py runs/gpt2 --task rte --data rte=val.jsonl --shots 32 --examples rte=train.jsonl
      with 32 examples before every question, drawn as the harness draws them

tasks: text (the default), wikitext2; lambada, hellaswag, piqa, winogrande, arc_easy, arc_challenge, sciq; superglue (boolq, cb,
copa, rte, wic, wsc, multirc, record), each with --data TASK=FILE of its records; local (local_choice, local_cloze),
local_line; and any definition of the harness by its file, its own (gsm8k/gsm8k.yaml) or yours, with --data gsm8k=FILE.
Results go into the run folder: evaluation_<step>.json in the harness's form, and its page report.html.
exit status: 0 done, 1 failed, 2 wrong usage or configuration
"""

import json
import sys

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.evaluate.options import parse


def main(arguments: list[str]) -> int:
    """Parse, load, measure, print, keep."""
    options = parse(make_parser(__doc__ or ""), arguments)
    # JAX and what needs it come after the options: --help and errors in them answer at once.
    from mesh_transformer.evaluate.checkpoint_eval import evaluate_checkpoint

    evaluation = evaluate_checkpoint(options.run, options.set, quiet=options.json)
    if options.json:
        print(json.dumps(evaluation, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
