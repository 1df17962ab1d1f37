# SPDX-License-Identifier: Apache-2.0
"""The notebook is what its script writes, and its cells run."""

import os
import pathlib
import shlex
import sys

import pytest

from colab import make_notebook

ROOT = pathlib.Path(__file__).parents[1]
# The smallest run that has every part.
SMALL = (
  '--config.pretrain.epochs=1 --config.finetune.epochs=1 '
  '--config.data.data_dir='
)


def source(cell):
  return ''.join(cell['source'])


def tags(cell):
  return cell['metadata'].get('tags', [])


def test_the_notebook_is_what_the_script_writes():
  assert make_notebook.FILE.read_text() == make_notebook.notebook(), (
    'run python colab/make_notebook.py'
  )


def test_its_code_comes_from_where_setup_says():
  assert make_notebook.repository().startswith('https://')
  (parameters,) = [c for c in make_notebook.cells() if 'parameters' in tags(c)]
  assert make_notebook.repository() in source(parameters)


def test_imagenet_cells_are_commands():
  found = [c for c in make_notebook.cells() if 'imagenet' in tags(c)]
  # Drive is there before anything is kept on it.
  first = next(i for i, c in enumerate(found) if '/drive' in source(c))
  assert 'drive.mount(' in source(found.pop(first))
  assert len(found) == 4
  for cell in found:
    command = shlex.split(source(cell))
    assert command[0] == '!python'
    if command[1] != '-m':
      assert (ROOT / command[1]).exists()


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_cells_run(data_dir, tmp_path, monkeypatch):
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  pytest.importorskip('ipykernel')
  notebook = nbformat.read(make_notebook.FILE, as_version=4)
  nbformat.validate(notebook)
  workdir = tmp_path / 'run'
  notebook.cells = [c for c in notebook.cells if 'imagenet' not in tags(c)]
  for cell in notebook.cells:
    if 'parameters' in tags(cell):
      # {CONFIG} is put into a command line, so flags may follow it.
      cell.source += (
        f'\nCONFIG = "configs/smoke.py {SMALL}{data_dir}"'
        f'\nWORKDIR = "{workdir}"'
      )
  # As in a terminal: one device, and the python of this environment.
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setenv('MPLBACKEND', '')
  binaries = os.path.dirname(sys.executable)
  monkeypatch.setenv('PATH', binaries + os.pathsep + os.environ['PATH'])
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(ROOT)}}
  )
  client.execute()
  printed, pictures, pages = '', 0, 0
  for cell in notebook.cells:
    for output in cell.get('outputs', []):
      printed += output.get('text', '')
      pictures += 'image/png' in output.get('data', {})
      pages += '<iframe srcdoc=' in output.get('data', {}).get('text/html', '')
  assert 'error:' not in printed and 'Traceback' not in printed
  for expected in ('best policy', 'best fixed', '30,464,363'):
    assert expected in printed, expected
  assert pages == 1  # the report
  # The answers, then those at three budgets.
  assert pictures == 1 + 3
  assert printed.count('GMACs an image: ') == 3
  assert (workdir / 'calibration.json').exists()
