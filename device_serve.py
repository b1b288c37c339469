# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Serve a trained model over HTTP with OpenAI's API and a web page. RUN is a model as in device_sample.py --help.

examples:
  python device_serve.py runs/quickstart
      a web page at http://127.0.0.1:8000, POST /v1/completions, GET /metrics for Prometheus, and
      POST /v1/chat/completions for a model with a chat template (scripts/reshard_checkpoint.py copies the template)
  python device_serve.py runs/quickstart --host 0.0.0.0 --token-file secret --set serve.slots=64 --set mesh.tensor=4
      reachable from other machines, which must send "Authorization: Bearer TOKEN" with the token in the file

--set 'serve.speculative="prompt-lookup"' or "draft-model" enables speculative decoding; see device_sample.py --help.
The server first compiles the programs for requests of up to serve.warmup_tokens tokens. Until then GET /health returns 503
and requests wait. On SIGTERM or Ctrl-C it accepts no new requests, and exits once running requests have finished, after at
most serve.drain_seconds.
exit status: 0 done, 1 failed, 2 invalid usage or configuration
"""

import argparse
import sys
from pathlib import Path

from mesh_transformer.cli import DONE, FAILED, add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError

EXTRA = ("fastapi", "starlette", "uvicorn", "h11", "jinja2", "prometheus_client")


def main(arguments: list[str]) -> int:
    """Load the model and serve it."""
    options = parse(arguments)
    try:
        from mesh_transformer.serve.server import check_host, read_token, serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in EXTRA:
            raise ConfigError(f"serving needs {error.name}: pip install 'mesh-transformer[serve]'") from None
        raise
    token = read_token(options.token_file) if options.token_file else None
    check_host(options.host, token)
    from mesh_transformer.sample.loading import load_model

    loaded = load_model(options.run, options.set)
    print(f"{loaded.where}: step {loaded.step}", file=sys.stderr)
    for line in loaded.defaults.describe():
        print(line, file=sys.stderr)
    name = options.name or Path(options.run).resolve().name
    succeeded = serve(loaded, name=name, host=options.host, port=options.port, token=token)
    return DONE if succeeded else FAILED


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "run",
        metavar="RUN",
        help="run folder, checkpoint, Hugging Face folder or name (org/model), or .gguf file",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on, 0: any free port; default: %(default)s"
    )
    parser.add_argument("--token-file", type=Path, help="file with the bearer token that clients must send")
    parser.add_argument("--name", help="name of the model in the API; default: last component of RUN")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port {options.port}: must be from 0 to 65535")
    return options


if __name__ == "__main__":
    sys.exit(run_command(main))
