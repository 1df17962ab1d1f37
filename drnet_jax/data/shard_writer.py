# SPDX-License-Identifier: Apache-2.0
"""Writes a TFDS data set as ArrayRecord, shard by shard, without TensorFlow.

A shard is there whole or not at all, and the data set cannot be opened before
the last one is. A writer that was killed resumes, when started again, at the
shard it was at, and leaves byte for byte what one never killed would.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tqdm import tqdm

from drnet_jax.errors import UserError

SUMS = 'SHA256SUMS'
_PLAN = 'plan.json'


@dataclasses.dataclass(frozen=True)
class Shard:
  """A shard to be written, of `count` examples.

  `records` opens them, serialised; it may be called again after a failure.
  """

  count: int
  records: Callable[[], Iterator[bytes]]


def write(
  directory: str,
  plan: Mapping,
  splits: Mapping[str, Sequence[Shard]],
  features: tfds.features.FeaturesDict,
  threads: int,
) -> None:
  """Writes what is not there yet, and at the end what makes it a data set.

  Args:
    directory: `<data_dir>/<name>/<version>`.
    plan: says what is to be written, as JSON; a directory begun under another
      plan is refused.
    splits: their shards, by name.
    features: of the examples.
    threads: shards to write at a time.

  Raises:
    UserError: the plan is another, or a file cannot be written.
  """
  try:
    sums = _begin(directory, json.dumps(plan, indent=2))
  except OSError as error:
    raise UserError(f'cannot write to {directory}: {error}') from error
  dataset = os.path.basename(os.path.dirname(os.path.abspath(directory)))
  files = {
    split: {
      f'{dataset}-{split}.array_record-{i:05d}-of-{len(shards):05d}': shard
      for i, shard in enumerate(shards)
    }
    for split, shards in splits.items()
  }
  jobs = {k: v for shards in files.values() for k, v in shards.items()}
  paths = {name: os.path.join(directory, name) for name in jobs}
  left = [k for k in jobs if k not in sums or not os.path.exists(paths[k])]
  total = sum(shard.count for shard in jobs.values())
  with (
    concurrent.futures.ThreadPoolExecutor(threads) as pool,
    tqdm(
      total=total,
      initial=total - sum(jobs[name].count for name in left),
      unit='img',
      unit_scale=True,
      disable=None,
    ) as bar,
  ):
    futures = {
      pool.submit(_write_shard, paths[name], jobs[name], bar): name
      for name in left
    }
    try:
      for future in concurrent.futures.as_completed(futures):
        sums[futures[future]] = future.result()
        lines = (f'{v}  {k}\n' for k, v in sorted(sums.items()))
        _write(os.path.join(directory, SUMS), ''.join(lines))
    except (OSError, RuntimeError) as error:  # ArrayRecord's are RuntimeErrors
      raise UserError(
        f'cannot write to {directory}: {error}. The same command resumes from '
        'here.'
      ) from error
    finally:
      for future in futures:
        future.cancel()
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=features,
    split_infos=[
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.count for shard in shards.values()],
        num_bytes=sum(os.path.getsize(paths[name]) for name in shards),
        filename_template=tfds.core.ShardedFileTemplate(
          data_dir=directory,
          dataset_name=dataset,
          split=split,
          filetype_suffix='array_record',
        ),
      )
      for split, shards in files.items()
    ],
    check_data=False,
  )


def _begin(directory: str, plan: str) -> dict[str, str]:
  """Returns checksums of the shards there, by name; UserError: another plan."""
  os.makedirs(directory, exist_ok=True)
  path = os.path.join(directory, _PLAN)
  if not os.path.exists(path):
    _write(path, plan)
  with open(path) as file:
    if file.read() != plan:
      raise UserError(
        f'{directory} was begun from other images or settings ({path} '
        'differs); remove it, or choose another --data_dir'
      )
  path = os.path.join(directory, SUMS)
  if not os.path.exists(path):
    return {}
  with open(path) as file:
    # As `sha256sum` writes it; a name may have spaces.
    lines = [line.rstrip('\n').partition('  ') for line in file]
  return {name: digest for digest, _, name in lines}


def _write_shard(path: str, shard: Shard, bar: tqdm) -> str:
  """Returns the shard's checksum."""
  writer = array_record_module.ArrayRecordWriter(
    f'{path}.partial', 'group_size:1'
  )
  count = 0
  for record in shard.records():
    writer.write(record)
    count += 1
    bar.update()
  writer.close()
  if count != shard.count:
    raise UserError(
      f'{count} examples found for {os.path.basename(path)}, where there '
      f'should be {shard.count}'
    )
  with open(f'{path}.partial', 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  os.replace(f'{path}.partial', path)
  return digest


def serializer(
  features: tfds.features.FeaturesDict,
) -> Callable[[Mapping], bytes]:
  """Returns a function from examples to records, the same in any process."""
  to_proto = tfds.core.example_serializer.ExampleSerializer(
    features.get_serialized_info()
  ).get_tf_example

  def serialize(example: Mapping) -> bytes:
    record = to_proto(features.encode_example(example))
    # Else the order of the fields would differ from process to process.
    return record.SerializeToString(deterministic=True)

  return serialize


def _write(path: str, text: str) -> None:
  """Writes a file that is there whole or not at all."""
  with open(f'{path}.partial', 'w') as file:
    file.write(text)
  os.replace(f'{path}.partial', path)
