# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Answer over HTTP with a trained model: RUN -> OpenAI's API, and a page. RUN is a run folder or a checkpoint in it.

examples:
  python device_serve.py runs/quickstart
      a page at http://127.0.0.1:8000, POST /v1/completions for programs, GET /metrics for Prometheus;
      POST /v1/chat/completions for a model that brought a chat template (scripts/reshard_checkpoint.py carries it along)
  python device_serve.py runs/quickstart --host 0.0.0.0 --token-file secret --set serve.slots=64 --set mesh.tensor=4
      for other machines, which must send "Authorization: Bearer ..." with the file's content

It compiles first what requests of up to serve.warmup_tokens tokens need: until then GET /health answers 503, and requests wait.
SIGTERM and Ctrl-C: no new requests, up to serve.drain_seconds for those being answered, then the end.
exit status: 0 done, 1 failed, 2 wrong usage or configuration
"""

import argparse
import sys
from pathlib import Path

from mesh_transformer.cli import DONE, FAILED, add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError

EXTRA = ("fastapi", "starlette", "uvicorn", "h11", "jinja2", "prometheus_client")


def main(arguments: list[str]) -> int:
    """Parse, load, serve."""
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

    trained = load_model(options.run, options.set)
    print(f"{trained.where}: step {trained.step}", file=sys.stderr)
    name = options.name or Path(options.run).resolve().name
    lived = serve(trained, name=name, host=options.host, port=options.port, token=token)
    return DONE if lived else FAILED


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", help="a run folder, such as runs/quickstart, or a checkpoint in it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free; default: %(default)s")
    parser.add_argument("--token-file", type=Path, help="a file whose content every request must bring")
    parser.add_argument("--name", help="the model's name in the API; default: RUN's last part")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port {options.port}: a number from 0 to 65535 is wanted")
    return options


if __name__ == "__main__":
    sys.exit(run_command(main))
