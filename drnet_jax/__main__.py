# SPDX-License-Identifier: Apache-2.0
"""python -m drnet_jax VERB ...: all but training, which is drnet_jax.main.

python -m drnet_jax                  lists the verbs
python -m drnet_jax VERB --help      explains one
"""

import importlib
import sys

from drnet_jax.commands import cli

VERBS = {
  'predict': 'classify image files',
  'calibrate': 'find the best policy for every budget, on held-out images',
  'report': 'write the report of a run, or of several, as a page',
  'demo': 'serve a page to try a model with images',
  'compare': 'draw several models on one plot, in multiply-adds and in ms',
  'export': 'write a model as ONNX and StableHLO',
  'convert': 'read or write PyTorch weights',
  'sweep': 'run a set of experiments',
  'benchmark': 'time inference on this machine, path by path',
  'benchmark_stream': 'measure whether a service keeps its deadline here',
  'benchmark_training': 'time training steps on this machine',
  'benchmark_input': 'time the reading and decoding of images',
  'benchmark_accelerator': 'measure all that matters on an accelerator',
  'cost': 'estimate what training a config takes on machines not at hand',
}


def main() -> None:
  verb = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if verb in VERBS:
    # What parses the flags takes the first argument for the program's name.
    sys.argv[:2] = [f'python -m drnet_jax {verb}']
    cli.start(importlib.import_module(f'drnet_jax.commands.{verb}'))
    return
  width = max(map(len, VERBS)) + 2
  lines = [f'  {name:{width}}{what}' for name, what in VERBS.items()]
  usage = '\n'.join(
    [
      'python -m drnet_jax.main --config=... --workdir=...   trains a model',
      'python -m drnet_jax VERB ...   does one of these:',
      '',
      *lines,
      '',
      'Each explains itself: python -m drnet_jax VERB --help',
    ]
  )
  if verb in ('help', '-h', '--help', '-help'):
    print(usage)
    return
  print(f'error: {verb!r} is not a verb\n\n{usage}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  main()
