# SPDX-License-Identifier: Apache-2.0
"""README and docs: links lead somewhere, commands are right, examples run."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import parse_commands
import pytest
from conftest import QUICK, pictures
from PIL import Image
from records import calibration_of

from colab import make_notebook
from configs import quickstart
from drnet_jax import mesh as mesh_lib
from drnet_jax import models
from drnet_jax.run import workdir
from drnet_jax.run.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]

# Pages whose commands take minutes.
LONG = ('export', 'extending')

# What is run, and with which flags besides, so that it lasts seconds; all else
# needs data, devices or time that a test does not have, and is parsed.
RUN = {
  'drnet_jax predict --workdir=runs/quickstart': '',
  'drnet_jax predict --workdir=exported': '',
  'drnet_jax calibrate --workdir=runs/quickstart': '',
  'drnet_jax export --workdir=runs/quickstart': '--check_images=20',
  'drnet_jax.main --mode=describe': '',
  'drnet_jax.main --config=configs/mine.py': (
    '--config.data.epoch_images=64 --config.log_every_steps=1 '
    '--config.pretrain.epochs=1 --config.finetune.epochs=1 '
    '--config.pretrain.batch_size=32 --config.finetune.batch_size=32 '
    '--config.finetune.objective.bucket_growth=8 '
  ),
  'exported/run.py': '',
  'make_digits.py': '',
  'drnet_jax.main --config=configs/photos.py --workdir=runs/digits': (
    '--config.data.images_per_class=8 --config.pretrain.epochs=1 '
    '--config.pretrain.batch_size=16 --config.data.held_out=16 '
    '--config.data.least_epoch_images=0 '
    # Muon's step takes long to compile.
    '--config.pretrain.optimizer.name=adamw --config.pretrain.schedule.lr=3e-3'
  ),
  'drnet_jax predict --workdir=runs/digits': '',
}


def ids(path):
  return path.stem


def blocks(path, language):
  """Blocks of code of a page."""
  return re.findall(rf'```{language}\n(.*?)```', path.read_text(), re.S)


def commands(path):
  """Lines of the bash blocks, whole and without comments."""
  found = []
  for block in blocks(path, 'bash'):
    for line in block.replace('\\\n', ' ').splitlines():
      if words := shlex.split(line, comments=True):
        found.append(words)
  return found


def mentioned(path):
  """Commands of this package within the text, as in tables."""
  text = path.read_text().replace('--config=...', '--config=configs/smoke.py')
  spans = re.findall(
    r'`((?:python -m )?drnet_jax(?:\.main| [a-z_]+) --[^`]*)`', text
  )
  return [shlex.split(span.removeprefix('python -m ')) for span in spans]


def of_package(words):
  """The module and its arguments, if that is what a command runs."""
  if words[1] == '-m' and words[2].startswith('drnet_jax'):
    return words[2:]
  return None


@pytest.mark.parametrize('path', PAGES, ids=ids)
def test_links_lead_somewhere(path):
  for target in re.findall(r'\]\(([^)]+)\)', path.read_text()):
    if '://' in target:
      continue
    file, _, anchor = target.partition('#')
    linked = (path.parent / file) if file else path
    assert linked.exists(), f'{path.name} links to {target}'
    if anchor:
      titles = re.findall(r'^#+ (.+)$', linked.read_text(), re.M)
      slugs = [
        re.sub(r'[^\w\- ]', '', t.lower()).replace(' ', '-') for t in titles
      ]
      assert anchor in slugs, f'{path.name} links to {target}'


@pytest.mark.parametrize('path', PAGES, ids=ids)
def test_files_that_are_named_exist(path):
  named = re.findall(
    r'`((?:configs|docs|launch|tests|results|colab)/[\w./]+\.\w+)`',
    path.read_text(),
  )
  written = {name for page in PAGES for name, _ in files_of(page)}
  for name in named:
    assert (ROOT / name).exists() or name in written, name


def files_of(path):
  """Python blocks that are files: their name, in the docstring, and text."""
  for block in blocks(path, 'python'):
    if found := re.match(r'"""([\w/]+\.py)"""', block):
      yield found[1], block


@pytest.fixture(scope='module')
def place(data_dir, tmp_path_factory):
  """A folder as a reader has it who has trained the quick start.

  The weights are fresh: nothing here depends on what they have learnt.
  """
  folder = tmp_path_factory.mktemp('place')
  shutil.copytree(ROOT / 'configs', folder / 'configs')
  os.symlink(ROOT / 'launch', folder / 'launch')
  for path in PAGES:
    for name, text in files_of(path):
      (folder / name).parent.mkdir(exist_ok=True)
      (folder / name).write_text(text)
  config = quickstart.get_config()
  config.data.update(
    data_dir=data_dir,
    validation_split='validation[:200]',
    test_split='test[:200]',
  )
  run = folder / 'runs' / 'quickstart'
  names = tuple('0123456789')
  workdir.begin(str(run), config, names)
  model = models.create(config.model, num_classes=10)
  params, batch_stats = jax.jit(model.init)(jax.random.key(0))
  with Checkpoints(str(run), 'finetune', keep=1) as checkpoints:
    checkpoints.save_weights(1, params, batch_stats)
  trained = workdir.load(str(run), mesh_lib.create(1))
  calibration_of(trained, pictures(100, side=64)).write(str(run))
  images = [Image.fromarray(x) for x in pictures(12, side=80)]
  (run / 'report' / 'examples').mkdir(parents=True)
  for image, name in zip(
    images, ('photo.jpg', 'my_own_picture.png'), strict=False
  ):
    image.save(folder / name)
  for i, image in enumerate(images):
    image.save(run / 'report' / 'examples' / f'{i}.png')
    split, kind = ('train', 'val')[i % 2], ('cat', 'dog')[i % 3 % 2]
    at = folder / 'photos' / split / kind
    at.mkdir(parents=True, exist_ok=True)
    image.save(at / f'{i}.jpg')
  return folder


def shell(place, command, *, timeout=280):
  """Runs a command there with the python of these tests."""
  environment = os.environ | {
    'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH'],
    'PYTHONPATH': f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}',
    'XLA_FLAGS': ' '.join(QUICK),  # on one device, as its reader has
  }
  return subprocess.run(
    ['bash', '-c', command],
    cwd=place,
    env=environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


@pytest.mark.slow
def test_flags_and_configs_of_all_commands(place):
  found = []
  for path in PAGES:
    found += [c for words in commands(path) if (c := of_package(words))]
    found += mentioned(path)
  for cell in make_notebook.cells():
    if 'imagenet' in cell['metadata'].get('tags', []):
      words = shlex.split(''.join(cell['source']).replace('\\\n', ' '))
      if c := of_package(words):
        found.append(c)
  wrong = [
    ['drnet_jax', 'predict', '--no_such_flag=1'],
    ['drnet_jax.main', '--config=configs/none.py'],
    ['drnet_jax.main', '--config=configs/smoke.py', '--config.seed=x'],
  ]
  said = parse_commands.mistakes(found + wrong, cwd=place)
  assert len(said) == len(found + wrong) and all(said[len(found) :])
  mistakes = {
    shlex.join(words): mistake
    for words, mistake in zip(found, said, strict=False)
    if mistake
  }
  assert not mistakes


@pytest.mark.slow
def test_other_commands(place):
  for path in PAGES:
    for words in commands(path):
      line = shlex.join(words)
      if of_package(words):
        continue
      if words[0] == 'make':
        done = shell(ROOT, f'make -n {words[1]}')
        assert not done.returncode, done.stderr
      elif words[:2] == ['pip', 'install']:
        (extra,) = re.findall(r'drnet_jax\[(\w+)\]', words[2])
        assert f'\n{extra} =\n' in (ROOT / 'setup.cfg').read_text()
      elif words[1].startswith('launch/'):
        # Its source is not there: one error, but none about flags.
        done = shell(place, line)
        assert done.stderr.startswith('error: '), f'{line}: {done.stderr}'
      else:
        assert any(known in line for known in RUN), line


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  'path',
  [
    pytest.param(path, marks=[pytest.mark.soak] * (path.stem in LONG))
    for path in PAGES
  ],
  ids=ids,
)
def test_commands_and_examples_run(path, place, monkeypatch):
  for words in commands(path):
    line = shlex.join(words)
    for known, more in RUN.items():
      if known in line:
        done = shell(place, f'{line} {more}'.replace('.venv/bin/', ''))
        assert not done.returncode, f'{line}: {done.stderr}'
  monkeypatch.chdir(place)
  written = [text for _, text in files_of(path)]
  for block in blocks(path, 'python'):
    if block not in written:
      data = pathlib.Path('photo.jpg').read_bytes()
      exec(block, {'paths': ['photo.jpg'] * 3, 'data': data})


def test_what_is_run_is_still_there():
  lines = [shlex.join(words) for path in PAGES for words in commands(path)]
  for known in RUN:
    assert any(known in line for line in lines), known
