# SPDX-License-Identifier: Apache-2.0
"""Writes colab/drnet_jax.ipynb: what to run, in order, on Colab or here.

    python colab/make_notebook.py

The notebook is made by this script only; a test compares the two and runs the
cells, but for those tagged `imagenet`, which need the data and a TPU or GPU.
"""

import configparser
import json
import pathlib
import textwrap
from typing import Any

HERE = pathlib.Path(__file__).parent
FILE = HERE / 'drnet_jax.ipynb'


def repository() -> str:
  """Where the code is published, from setup.cfg."""
  settings = configparser.ConfigParser()
  settings.read(HERE.parent / 'setup.cfg')
  return settings['metadata']['url']


def cells() -> list[dict[str, Any]]:
  """All cells, in order."""
  return [
    text(
      """
      # drnet_jax: each image at its own size

      A small predictor looks at an image and chooses the size at which one CNN
      classifies it, and the CNN runs at no other. This notebook trains such a
      network on handwritten digits of random sizes, shows what it saves, and
      ends with the commands for ImageNet. A CPU runtime will do until there.
      """
    ),
    code(
      f"""
      # Where the code is, and what to train. configs/smoke.py tries everything
      # in a minute and learns nothing; the quick start takes some minutes.
      REPOSITORY = '{repository()}'
      CONFIG = 'configs/quickstart.py'
      WORKDIR = 'runs/quickstart'
      """,
      'parameters',
    ),
    text('## Install'),
    code(
      """
      import importlib.metadata
      import os

      if not os.path.exists('drnet_jax/main.py'):  # not in a checkout
        !git clone --quiet --depth 1 {REPOSITORY} drnet_jax_code
        %cd drnet_jax_code
      try:
        print('drnet_jax', importlib.metadata.version('drnet_jax'))
      except importlib.metadata.PackageNotFoundError:
        %pip install --quiet -e .[export]
      """
    ),
    text(
      """
      ## Train

      Two stages: the CNN at every size, then CNN and predictor together. If
      the runtime is cut off, run the same cell again to resume.
      """
    ),
    code('!python -m drnet_jax.main --config={CONFIG} --workdir={WORKDIR}'),
    text(
      """
      ## The report

      What is saved, at what accuracy, and is the gain real? The page that
      `main` left at the end of the run says so.
      """
    ),
    code(
      """
      import html

      from IPython.display import HTML, display

      with open(f'{WORKDIR}/report/index.html') as file:
        page = html.escape(file.read())
      size = 'width="100%" height="900"'
      display(HTML(f'<iframe srcdoc="{page}" {size}></iframe>'))
      """
    ),
    text(
      """
      ## Classify pictures of your own

      On Colab this asks for files; elsewhere it takes images of the test split.
      """
    ),
    code(
      """
      import glob

      try:
        from google.colab import files

        paths = list(files.upload())
      except ImportError:
        paths = sorted(glob.glob(f'{WORKDIR}/report/examples/*'))
      """
    ),
    code(
      """
      import matplotlib.pyplot as plt
      import PIL.Image

      from drnet_jax.serve.classifier import Classifier

      classifier = Classifier.load(WORKDIR)


      def show(paths):
        answers = classifier.predict(paths)
        size = (2 * len(paths), 2.6)
        _, axes = plt.subplots(1, len(paths), figsize=size, squeeze=False)
        for path, answer, ax in zip(paths, answers, axes[0], strict=True):
          ax.imshow(PIL.Image.open(path))
          ax.set_title(
            f'{answer.name} ({answer.probability:.0%})\\n{answer.option}, '
            f'{answer.gmacs / answer.full_gmacs:.0%} of the cost',
            fontsize=8,
          )
          ax.axis('off')
        plt.show()


      show(paths[:8])
      """
    ),
    text(
      """
      ## Any budget

      At the end of the run the best policy for every average cost was found on
      the validation split: how far a picture goes, by the predictor, by how
      sure the answers are, or by both. So any budget can be asked for, without
      training again.
      """
    ),
    code(
      """
      calibration = classifier.calibration
      points = calibration.points['GMACs']['best']
      low, high = points[0].gmacs, points[-1].gmacs
      for share in (0.1, 0.5, 0.9):
        promised = classifier.set_budget(gmacs=low + share * (high - low))
        print(
          f'{promised.gmacs:.5f} GMACs an image: {promised.top1:.1%} of the '
          f'images of {calibration.split} are right'
        )
        show(paths[:8])
      """
    ),
    text(
      """
      ## ImageNet

      For a TPU or GPU runtime (*Runtime, Change runtime type*), with the two
      official tars of ILSVRC 2012. What the network costs needs neither:
      """
    ),
    code('!python -m drnet_jax.main --mode=describe --config=configs/in1k.py'),
    code('!python -m drnet_jax cost --config=configs/in1k.py', 'imagenet'),
    text(
      """
      The data, once, into the ArrayRecord shards that training reads (about 150
      GB). Then both stages; the same command resumes after an interruption, so
      keep the workdir where it outlives the runtime. `in1k.py`'s header has the
      commands for every row of the paper's tables.
      """
    ),
    code(
      r"""
      !python launch/prepare_imagenet.py \
          --source=/content/downloads --data_dir=/content/data
      """,
      'imagenet',
    ),
    code(
      """
      from google.colab import drive

      drive.mount('/content/drive')
      """,
      'imagenet',
    ),
    code(
      r"""
      !python -m drnet_jax.main --config=configs/in1k.py \
          --workdir=/content/drive/MyDrive/in1k \
          --config.data.data_dir=/content/data \
          --config.model.base.dtype=bfloat16 \
          --config.finetune.objective.eta=0.2 \
          --config.finetune.objective.target_gmacs=2.5
      """,
      'imagenet',
    ),
    code(
      r"""
      !python -m drnet_jax.main --mode=evaluate \
          --workdir=/content/drive/MyDrive/in1k
      """,
      'imagenet',
    ),
  ]


def text(source: str) -> dict[str, Any]:
  """A cell of Markdown."""
  return _cell('markdown', source)


def code(source: str, *tags: str) -> dict[str, Any]:
  """A cell of code."""
  cell = _cell('code', source) | {'execution_count': None, 'outputs': []}
  cell['metadata'] = {'tags': list(tags)} if tags else {}
  return cell


def _cell(kind: str, source: str) -> dict[str, Any]:
  lines = textwrap.dedent(source).strip().splitlines(keepends=True)
  return {'cell_type': kind, 'metadata': {}, 'source': lines}


def notebook() -> str:
  """The notebook as the text of its file."""
  numbered = [
    {'id': f'cell-{i}'} | cell for i, cell in enumerate(cells(), start=1)
  ]
  content = {
    'cells': numbered,
    'metadata': {
      'kernelspec': {
        'display_name': 'Python 3',
        'language': 'python',
        'name': 'python3',
      },
      'language_info': {'name': 'python'},
    },
    'nbformat': 4,
    'nbformat_minor': 5,
  }
  return json.dumps(content, indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
  FILE.write_text(notebook())
  print(f'Written: {FILE}')
