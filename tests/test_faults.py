# SPDX-License-Identifier: Apache-2.0
"""Images and shards that cannot be read, by threads and by processes."""

import glob
import itertools
import shutil

import numpy as np
import pytest
from test_sources import CLASSES, DATA, PER_CLASS, folder  # noqa: F401

from drnet_jax.data import pixels, sources
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError

# Of twelve images three cannot be read, two of them neighbours.
BAD = [5, 6, 11]
SEED = 7


@pytest.fixture
def data(folder):  # noqa: F811
  return Data(**DATA | {'data_dir': folder, 'max_bad_images': 3})


def spoil(data, split='train', which=BAD):
  examples = data.open(split).examples
  for i in which:
    with open(examples.name(i), 'r+b') as file:
      file.truncate(20)


def shown(data, steps, *, start_step=0, **changes):
  """Each step's images, each by the shade that tells which it is."""
  source = data.open('train')
  stream = Data(**{**vars(data), **changes}).train_batches(
    source, size_px=4, batch_size=6, seed=SEED, start_step=start_step
  )
  batches = list(itertools.islice(stream, steps))
  assert batches[0].keys() == {'image', 'label'}
  return [b['image'][:, 0, 0, 0].tolist() for b in batches], source


def shade(i):
  return 50 * (i // PER_CLASS) + i % PER_CLASS


def test_the_next_readable_image_stands_in(data, capsys):
  whole, _ = shown(data, 8)
  spoil(data)
  # 5 and 6 become 7, and the last image the first; all else stays in place.
  stand_in = {shade(5): shade(7), shade(6): shade(7), shade(11): shade(0)}
  expected = [[stand_in.get(x, x) for x in batch] for batch in whole]
  found, source = shown(data, 8)
  assert found == expected and found != whole
  assert source.unreadable == set(BAD)
  said = capsys.readouterr().out
  assert shown(data, 3, start_step=5)[0] == expected[5:]
  for i in BAD:
    assert said.count(f'warning: {source.examples.name(i)}') == 1
  assert '3 of at most 3 unreadable images' in said


def test_an_unreadable_image_is_decoded_once(data, monkeypatch):
  """Not again for the reason, which comes with its batch."""
  spoil(data)
  spoil(data, 'val')
  tried, decode = [], pixels.opened

  def note(source, *arguments):
    tried.append(source)
    return decode(source, *arguments)

  monkeypatch.setattr(pixels, 'opened', note)
  source = data.open('val')
  list(data.eval_batches(source, size_px=4, batch_size=12))
  names = [source.examples.name(i) for i in BAD]
  assert [tried.count(name) for name in names] == [1, 1, 1]
  _, source = shown(data, 2)  # an epoch; 6 and 7 after 5, twice
  names = [source.examples.name(i) for i in BAD]
  assert all(name in tried for name in names)
  assert source.unreadable == set(BAD)


def test_the_reason_is_told(data, capsys):
  spoil(data)
  shown(data, 2)
  said = capsys.readouterr().out.splitlines()
  said = [line for line in said if line.startswith('warning: ')]
  assert len(said) == 3 and all('cannot read' in line for line in said)


def test_one_image_too_many_ends_the_run(data):
  spoil(data)
  with pytest.raises(UserError, match='max_bad_images = 2. Repair'):
    shown(data, 8, max_bad_images=2)
  with pytest.raises(UserError, match=r'png: cannot read .*images = 0'):
    shown(data, 8, max_bad_images=0)


def test_no_image_that_can_be_read_is_said_so(data):
  spoil(data, which=range(12))
  with pytest.raises(UserError, match=r'None of the 12 images can be read'):
    shown(data, 1, max_bad_images=100)


@pytest.mark.slow
def test_worker_processes_do_the_same(data):
  spoil(data)
  expected, _ = shown(data, 8, max_bad_images=3)
  source, found = data.open('train'), []
  stream = Data(**{**vars(data), 'max_bad_images': 2, 'workers': 2})
  with pytest.raises(UserError, match='max_bad_images = 2'):
    for batch in stream.train_batches(
      source, size_px=4, batch_size=6, seed=SEED, start_step=0
    ):
      found.append(batch['image'][:, 0, 0, 0].tolist())
  assert found == expected[: len(found)] and found
  assert source.unreadable == set(BAD)


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_evaluation_leaves_them_out(data, processes):
  spoil(data, 'val')
  batches = []
  for process in range(processes):
    source = data.open('val')
    batches.append(
      list(
        data.eval_batches(
          source,
          size_px=4,
          batch_size=8,
          process=process,
          num_processes=processes,
        )
      )
    )
  assert {len(b) for b in batches} == {2}
  merged = {
    k: np.concatenate(
      [b[k] for step in zip(*batches, strict=True) for b in step]
    )
    for k in batches[0][0]
  }
  assert merged['index'].tolist() == [*range(12), -1, -1, -1, -1]
  good = [i for i in range(12) if i not in BAD]
  assert np.flatnonzero(merged['valid']).tolist() == good
  shades = merged['image'][merged['valid'], 0, 0, 0]
  assert shades.tolist() == [shade(i) for i in good]
  assert merged['label'][good].tolist() == [i // PER_CLASS for i in good]


def test_an_unreadable_first_image_and_batches_of_nothing(data):
  source = data.open('val')
  for name in CLASSES[:1]:
    for i in range(2):
      with open(source.examples.name(i), 'wb') as file:
        file.write(name.encode())
  batches = list(data.eval_batches(source, size_px=4, batch_size=1))
  assert [int(b['valid'].sum()) for b in batches] == [0, 0] + [1] * 10
  with pytest.raises(UserError, match='max_bad_images = 1'):
    strict = Data(**{**vars(data), 'max_bad_images': 1})
    list(strict.eval_batches(data.open('val'), size_px=4, batch_size=1))


@pytest.fixture
def shard(data_dir, tmp_path):
  """A copy of scaled_digits, and the file of its split 'validation'."""
  sources.load('scaled_digits', 'validation', data_dir=data_dir)
  shutil.copytree(f'{data_dir}/scaled_digits', tmp_path / 'scaled_digits')
  (path,) = glob.glob(f'{tmp_path}/scaled_digits/*/*validation.array_record*')
  return path


def load_copy(tmp_path):
  return sources.load('scaled_digits', 'validation', data_dir=str(tmp_path))


def test_a_damaged_record_is_one_unreadable_image(shard, tmp_path):
  with open(shard, 'r+b') as file:
    file.seek(300_000)
    byte = file.read(1)[0]
    file.seek(300_000)
    file.write(bytes([byte ^ 255]))
  source = load_copy(tmp_path)
  bad = []
  for i in range(len(source.examples)):
    try:
      source.examples[i]
    except UserError as error:
      assert 'hash mismatch' in str(error)
      bad.append(i)
  assert len(bad) == 1
  name = source.examples.name(bad[0])
  assert name == f'{shard}, record {bad[0]}'


@pytest.mark.parametrize('share', [0, 0.5, 0.99])
def test_a_truncated_shard_is_named(shard, tmp_path, share):
  with open(shard, 'r+b') as file:
    file.truncate(int(share * file.seek(0, 2)))
  with pytest.raises(UserError, match=r'shard .*-00000-of-00001 cannot be'):
    load_copy(tmp_path)


def test_another_shard_in_its_place_is_named(shard, tmp_path, data_dir):
  sources.load('scaled_digits', 'originals', data_dir=data_dir)
  (other,) = glob.glob(f'{data_dir}/scaled_digits/*/*originals.array_record*')
  shutil.copy(other, shard)
  with pytest.raises(UserError, match='holds 1258 records, not 4000'):
    load_copy(tmp_path)
