# SPDX-License-Identifier: Apache-2.0
"""The accelerator suite, in small, and what it promises when cut off."""

import dataclasses

import numpy as np
import pytest
from conftest import encoded, pack, rows_of

from configs import accelerator as accelerator_config
from drnet_jax.bench import accelerator, accelerator_parts, trace
from drnet_jax.errors import UserError


@pytest.fixture
def suite(tmp_path):
  """Of a packed file of noise: 48 images of 4 classes, a third of them val."""
  noise = np.random.default_rng(0).integers(0, 256, (48, 40, 40, 3), np.uint8)
  path = pack(
    tmp_path / 'packed.npz',
    [encoded(image, 'JPEG') for image in noise],
    label=np.arange(48) % 4,
    split=np.arange(48) % 3 // 2,
    class_name=np.array([b'a', b'b', b'c', b'd']),
  )
  config = accelerator_config.get_config()
  config.data.data_dir = path
  return accelerator_parts.Suite(
    out=str(tmp_path / 'out'),
    seconds=800,
    small=True,
    config=config,
  )


def written(suite):
  return rows_of(suite.out, accelerator.FILE)


def statuses(suite):
  return {
    row['part']: row['value']
    for row in written(suite)
    if (row['what'], row['measure']) == ('part', 'status')
  }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_in_small(suite):
  text = accelerator.run(suite)
  assert statuses(suite) == dict.fromkeys(accelerator.PARTS, 'finished')
  rows = written(suite)
  wrong = [r for r in rows if r['measure'] == 'right' and r['value'] != 'True']
  assert not wrong
  found = {(r['part'], r['what'], r['measure']): r['value'] for r in rows}
  steps = 'c steps', 'routed, chosen, 16 images'
  realised, implied, ratio = (
    float(found[*steps, k])
    for k in ('realised', 'implied', 'realised_of_implied')
  )
  assert ratio == pytest.approx(realised / implied) and implied > 1
  routed = [
    float(value)
    for (part, what, measure), value in found.items()
    if part == 'g training'
    and what.startswith('from scratch: router')
    and measure == 'gmacs'
  ]
  assert routed and min(routed) > 0
  assert '9 of 9' in text and '| routed, bulk |' in text
  with open(f'{suite.out}/index.html') as file:
    assert 'fixed 32, 16 images' in file.read()


def test_a_training_is_as_long_as_the_speed_allows(suite):
  suite.config.data.held_out = 8
  steps = suite.found['c steps'] = []
  with pytest.raises(RuntimeError, match='no fixed step'):
    accelerator_parts._set_epochs(suite, suite.config, 100.0)
  lengths = []
  for speed in (10.0, 20.0):
    steps[:] = [
      {
        'what': 'fixed, 64 images',
        'mmacs_per_image': 4089.0,
        'images_per_second': speed,
      }
    ]
    accelerator_parts._set_epochs(suite, suite.config, 1000.0)
    stages = suite.config.pretrain, suite.config.finetune
    lengths.append([stage.epochs for stage in stages])
  slow, fast = np.array(lengths)
  np.testing.assert_allclose(fast, 2 * slow)
  assert (slow > 1).all() and stages[0].schedule.warmup_epochs == 0.5


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_rest(
  suite, monkeypatch
):
  def broken(suite, left_s):
    """Breaks."""
    yield {'what': 'before', 'value': 1.0}
    raise RuntimeError('out of\nmemory')

  def slow(suite, left_s):
    """Takes too long."""
    yield {'what': 'first', 'value': 2.0}
    # What was measured is there already.
    assert [r['what'] for r in written(suite)][-1] == 'first'
    while True:
      pass

  def last(suite, left_s):
    """Has no time."""
    yield {'what': 'never', 'value': 3.0}

  parts = {'a': (9, broken), 'b': (1, slow), 'c': (9, last)}
  monkeypatch.setattr(accelerator, 'PARTS', parts)
  suite = dataclasses.replace(suite, seconds=2.5, small=False)
  text = accelerator.run(suite)
  found = statuses(suite)
  assert found['a'] == 'RuntimeError: out of memory'
  assert found['b'] == 'TimeoutError: stopped after 1 s'
  assert [r['what'] for r in written(suite) if r['measure'] == 'value'] == [
    'before',
    'first',
    'never',
  ]
  assert '1 of 3' in text


def test_a_part_run_again_leaves_what_the_others_found(suite, monkeypatch):
  def found(value):
    def part(suite, left_s):
      """Finds."""
      for what in ('x', 'y', 'y'):  # rows may share a name
        yield {'what': what, 'value': value, 'right': True, 'why': 'a, b'}

    return part

  monkeypatch.setattr(
    accelerator, 'PARTS', {'a': (9, found(1.5)), 'b': (9, found(2.5))}
  )
  accelerator.run(suite)
  first = written(suite)
  monkeypatch.setattr(
    accelerator, 'PARTS', {'a': (9, found(3.5)), 'b': (9, found(4.5))}
  )
  text = accelerator.run(dataclasses.replace(suite, parts='b', found={}))
  second = written(suite)
  assert second[:11] == first[:11] and len(second) == len(first) == 22
  assert [r['value'] for r in second if r['measure'] == 'value'] == [
    *['1.5'] * 3,
    *['4.5'] * 3,
  ]
  assert '2 of 2' in text and '| y | 1.5 | True | a, b |' in text


def test_another_device_does_not_add_to_what_one_found(suite):
  accelerator.run(dataclasses.replace(suite, parts='a'))
  path = f'{suite.out}/{accelerator.FILE}'
  with open(path) as file:
    text = file.read().replace(',device,value,', ',device,value,an H100 and ')
  with open(path, 'w') as file:
    file.write(text)
  with pytest.raises(UserError, match='of an H100 and .*, and this is .*cpu'):
    accelerator.run(dataclasses.replace(suite, parts='e', found={}))
  with open(path) as file:
    assert file.read() == text


def test_gaps_and_kernels_of_a_profile():
  events = [(0, 4, 'a'), (2, 6, 'b'), (10, 11, 'a'), (13, 20, 'b')]
  device, first, second, *gaps = trace.table(events)
  # busy 0-6, 10-11, 13-20 of 20 ns
  assert device['share'] == pytest.approx(14 / 20) and device['calls'] == 4
  assert (first['what'], first['share'], first['calls']) == ('b', 11 / 16, 2)
  assert second['ms'] == pytest.approx(5e-6)
  assert [g['what'] for g in gaps] == ['gap: b .. a', 'gap: a .. b']
  assert gaps[0]['share'] == pytest.approx(4 / 20)
