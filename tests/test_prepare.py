# SPDX-License-Identifier: Apache-2.0
"""ImageNet in miniature: tars of the official layout, folders, TFRecord."""

import io
import itertools
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import encoded
from test_sources import DATA

from drnet_jax.data import pixels, sources
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError
from launch import prepare_imagenet

WNIDS = ('n01751748', 'n09193705', 'n02105855')  # of the first three of val
PER_CLASS = 5
SCRIPT = pathlib.Path(prepare_imagenet.__file__)


def jpeg(seed) -> bytes:
  noise = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
  return encoded(noise, 'JPEG')


def add(tar, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def images(per_class=PER_CLASS):
  """(wnid, name, bytes) of both splits."""
  train = [
    (wnid, f'{wnid}_{i}.JPEG', jpeg((j, i)))
    for j, wnid in enumerate(WNIDS)
    for i in range(per_class)
  ]
  val = [
    (wnid, f'ILSVRC2012_val_{j + 1:08d}.JPEG', jpeg((9, j)))
    for j, wnid in enumerate(WNIDS)
  ]
  return {'train': train, 'validation': val}


def make_tars(root, per_class=PER_CLASS):
  """And a class that is not asked for; --classes asks in another order."""
  found = images(per_class)
  with tarfile.open(root / 'ILSVRC2012_img_train.tar', 'w') as outer:
    for wnid in (*WNIDS, 'n01440764'):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as tar:
        for of, name, data in found['train']:
          if of == wnid:
            add(tar, name, data)
      add(outer, f'{wnid}.tar', inner.getvalue())
  with tarfile.open(root / 'ILSVRC2012_img_val.tar', 'w') as tar:
    for _, name, data in reversed(found['validation']):
      add(tar, name, data)
  (root / 'mini.txt').write_text('\n'.join(reversed(WNIDS)))


def make_folders(root):
  for split, short in (('train', 'train'), ('validation', 'val')):
    for wnid, name, data in images()[split]:
      path = root / short / wnid
      path.mkdir(parents=True, exist_ok=True)
      (path / name).write_bytes(data)
  (root / 'mini.txt').write_text('\n'.join(reversed(WNIDS)))


def arguments(root, out, shard_mb=0.005):
  return [
    f'--source={root}',
    f'--data_dir={out}',
    f'--classes={root}/mini.txt',
    f'--shard_mb={shard_mb}',
    '--threads=2',
  ]


def sums(out):
  return (out / 'mini' / '5.1.0' / 'SHA256SUMS').read_text()


@pytest.mark.parametrize('make', [make_tars, make_folders])
def test_every_image_is_there_once_with_its_class(tmp_path, make, capsys):
  make(tmp_path)
  out = tmp_path / 'out'
  prepare_imagenet.main(arguments(tmp_path, out))
  assert 'train: 15 images\n' in capsys.readouterr().out
  for split, expected in images().items():
    source = sources.load('mini', split, data_dir=str(out))
    assert source.class_names == WNIDS[::-1]
    found = {
      (source.class_names[e['label']], e['image'])
      for e in (source.examples[i] for i in range(len(source.examples)))
    }
    assert found == {(wnid, data) for wnid, _, data in expected}
    assert len(source.examples) == len(expected)
  sha = ['sha256sum', '--check', '--quiet', 'SHA256SUMS']
  subprocess.run(sha, cwd=out / 'mini' / '5.1.0', check=True)

  data = Data(
    **DATA
    | {
      'name': 'mini',
      'data_dir': str(out),
      'validation_split': 'validation',
      'test_split': 'validation',
    }
  )
  batch = next(
    data.train_batches(
      data.open('train'), size_px=16, batch_size=6, seed=0, start_step=0
    )
  )
  assert batch['image'].shape == (6, 16, 16, 3)
  (batch,) = data.eval_batches(
    data.open('validation'), size_px=16, batch_size=4
  )
  assert batch['valid'].tolist() == [True] * 3 + [False]


def test_tars_and_folders_give_the_same_bytes(tmp_path):
  for name, make in (('tars', make_tars), ('folders', make_folders)):
    (tmp_path / name).mkdir()
    make(tmp_path / name)
    out = tmp_path / f'{name}_out'
    prepare_imagenet.main(arguments(tmp_path / name, out))
  assert sums(tmp_path / 'tars_out') == sums(tmp_path / 'folders_out')


def test_some_images_of_each_class_as_of_a_folder(tmp_path):
  make_folders(tmp_path)
  out = tmp_path / 'out'
  prepare_imagenet.main([*arguments(tmp_path, out), '--images_per_class=2'])
  ours = sources.load('mini', 'train', data_dir=str(out)).examples
  theirs = sources.load(
    'folder',
    'train',
    data_dir=str(tmp_path),
    classes=str(tmp_path / 'mini.txt'),
    images_per_class=2,
  ).examples
  assert sorted(
    (e['label'], e['image']) for e in map(ours.__getitem__, range(6))
  ) == sorted(
    (e['label'], pathlib.Path(e['image']).read_bytes())
    for e in map(theirs.__getitem__, range(6))
  )
  assert len(ours) == len(theirs) == 6


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
  make_tars(tmp_path, per_class=150)
  out, whole = tmp_path / 'out', tmp_path / 'whole'
  command = arguments(tmp_path, out, shard_mb=0.002)
  process = subprocess.Popen([sys.executable, SCRIPT, *command])
  directory = out / 'mini' / '5.1.0'
  while len(list(directory.glob('*-of-?????'))) < 20:
    assert process.poll() is None
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  kept = {
    path.name: path.stat().st_mtime_ns for path in directory.glob('*-of-?????')
  }
  done = {line.split()[1] for line in sums(out).splitlines()}
  assert not (directory / 'dataset_info.json').exists()
  with pytest.raises(UserError, match='mini'):
    sources.load('mini', 'train', data_dir=str(out))

  prepare_imagenet.main(command)
  assert len(kept) < len(sums(out).splitlines())
  for name in done:  # not written twice
    assert (directory / name).stat().st_mtime_ns == kept[name]
  prepare_imagenet.main(arguments(tmp_path, whole, shard_mb=0.002))
  assert sums(out) == sums(whole)
  assert len(sources.load('mini', 'train', data_dir=str(out)).examples) == 450


def test_another_preparation_is_not_mixed_in(tmp_path):
  make_folders(tmp_path)
  out = tmp_path / 'out'
  prepare_imagenet.main(arguments(tmp_path, out))
  before = sums(out)
  prepare_imagenet.main(arguments(tmp_path, out))  # nothing to do
  with pytest.raises(UserError, match='begun from other images or settings'):
    prepare_imagenet.main(arguments(tmp_path, out, shard_mb=1))
  assert sums(out) == before


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(UserError, match='holds neither ILSVRC2012_img_train.tar'):
    prepare_imagenet.main([f'--source={tmp_path}', f'--data_dir={tmp_path}/o'])
  make_tars(tmp_path)
  with pytest.raises(UserError, match='train has no image of 997 classes'):
    prepare_imagenet.main([f'--source={tmp_path}', f'--data_dir={tmp_path}/o'])
  with open(tmp_path / 'ILSVRC2012_img_train.tar', 'r+b') as file:
    file.truncate(9000)
  with pytest.raises(UserError, match='ILSVRC2012_img_train|tars'):
    prepare_imagenet.main(arguments(tmp_path, tmp_path / 'o'))
  with pytest.raises(UserError, match='from_tfrecord=.* holds no data set'):
    prepare_imagenet.main(
      [f'--from_tfrecord={tmp_path}', f'--data_dir={tmp_path}/o']
    )


def write_tfrecord(path, records):
  """Its framing: length, checksum, data, checksum; readers here skip these."""
  with open(path, 'wb') as file:
    for record in records:
      file.write(struct.pack('<QI', len(record), 0) + record + bytes(4))


def test_tfrecord_is_converted(tmp_path):
  """Files as TFDS leaves them: ours, with the records in the other format."""
  make_folders(tmp_path)
  out, old = tmp_path / 'out', tmp_path / 'old' / 'mini' / '5.1.0'
  prepare_imagenet.main(arguments(tmp_path, out))
  builder = tfds.builder_from_directory(str(out / 'mini' / '5.1.0'))
  old.mkdir(parents=True)
  for split, info in builder.info.splits.items():
    raw = builder.as_data_source(
      split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    records = iter([raw[i] for i in range(len(raw))])
    for part in info.file_instructions:
      name = os.path.basename(part.filename)
      write_tfrecord(
        old / re.sub('array_record', 'tfrecord', name),
        itertools.islice(records, part.take),
      )
  for name in ('features.json', 'label.labels.txt'):
    (old / name).write_bytes((out / 'mini' / '5.1.0' / name).read_bytes())
  info = json.loads((out / 'mini' / '5.1.0' / 'dataset_info.json').read_text())
  (old / 'dataset_info.json').write_text(
    json.dumps(info | {'fileFormat': 'tfrecord'})
  )

  new = tmp_path / 'new'
  prepare_imagenet.main([f'--from_tfrecord={old}', f'--data_dir={new}'])
  assert sums(new) == sums(out)
  source = sources.load('mini', 'train', data_dir=str(new))
  assert pixels.decode(source.examples[3]['image']).shape == (20, 30, 3)

  shard = next(old.glob('*train*'))
  shard.write_bytes(shard.read_bytes()[:-500])
  with pytest.raises(UserError, match='train.tfrecord-0.* is cut off'):
    prepare_imagenet.main([f'--from_tfrecord={old}', f'--data_dir={new}2'])
