# SPDX-License-Identifier: Apache-2.0
"""Serves a page on which to try a trained model with images.

    pip install 'drnet_jax[demo]'
    python -m drnet_jax demo --workdir=runs/quickstart [--port=7860]

Drop images, or pick one of the test split: the page shows where the image ended
(a size, or an exit), the picture as the network read it, the likeliest classes,
multiply-adds and measured milliseconds against the full network, and what every
other option says. A slider sets the average budget and with it the policy.
`--workdir` may name a ladder. `--runtime` and `--precision` as of `predict`.

Nothing leaves this machine, and no other machine sees the page unless `--host`
lets it.
"""

from collections.abc import Sequence

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands.flags import PRECISION, RUNTIME
from drnet_jax.errors import UserError

USES = ('runtime', 'precision')
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
_PORT = flags.DEFINE_integer('port', 7860, 'Port to listen on.', 1, 65535)


def run(arguments: Sequence[str]) -> None:
  from drnet_jax import terminal
  from drnet_jax.demo import page
  from drnet_jax.demo.comparer import Comparer
  from drnet_jax.run import paths
  from drnet_jax.serve.classifier import Classifier

  path = cli.model()
  page.import_gradio()  # before the long work
  classifier = Classifier.load(
    path, runtime=RUNTIME.value, precision=PRECISION.value, batch=1
  )
  terminal.say(f'Runs in {classifier.runtime}')
  comparer = Comparer(classifier)
  first = path if isinstance(path, str) else path[0]
  blocks = page.build(comparer, paths.root(first))
  terminal.say(f'http://{_HOST.value}:{_PORT.value} (Ctrl-C stops it)')
  try:
    page.serve(blocks, _HOST.value, _PORT.value)
  except OSError as error:
    raise UserError(
      f'cannot listen on {_HOST.value}:{_PORT.value}: the port is in use, or '
      'the address is not one of this machine. Try another --port or --host'
    ) from error
