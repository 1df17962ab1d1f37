# SPDX-License-Identifier: Apache-2.0
"""Writes a TFDS data set as ArrayRecord, shard by shard, without TensorFlow.

A shard is there whole or not at all, and the data set cannot be opened before
the last one is: a writer that is killed and started again takes up at the shard
it was at, and leaves byte for byte what one never killed would.
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


class ShardWriter:
  """Writes the shards of one data set.

  Args:
    directory: `<data_dir>/<name>/<version>`.
    plan: says what is to be written, as JSON; a directory begun under another
      plan is refused.

  Raises:
    UserError: that, or the directory cannot be written.
  """

  def __init__(self, directory: str, plan: Mapping):
    self._directory = directory
    self._name = os.path.basename(os.path.dirname(os.path.abspath(directory)))
    path = os.path.join(directory, _PLAN)
    plan = json.dumps(plan, indent=2)
    try:
      os.makedirs(directory, exist_ok=True)
      if not os.path.exists(path):
        _write(path, plan)
      with open(path) as file:
        if file.read() != plan:
          raise UserError(
            f'{directory} was begun from other images or settings ({path} '
            'differs); remove it, or choose another --data_dir'
          )
      self._sums = self._read_sums()
    except OSError as error:
      raise UserError(f'cannot write to {directory}: {error}') from error

  def write(
    self,
    splits: Mapping[str, Sequence[Shard]],
    features: tfds.features.FeaturesDict,
    threads: int,
  ) -> None:
    """Writes what is not there yet, and at the end what makes it a data set.

    Args:
      splits: their shards, by name.
      features: of the examples.
      threads: shards to write at a time.

    Raises:
      UserError: a file cannot be written.
    """
    jobs = [
      (f'{self._prefix(split)}-{i:05d}-of-{len(shards):05d}', shard)
      for split, shards in splits.items()
      for i, shard in enumerate(shards)
    ]
    left = [job for job in jobs if not self._is_done(job[0])]
    total = sum(shard.count for _, shard in jobs)
    with (
      concurrent.futures.ThreadPoolExecutor(threads) as pool,
      tqdm(
        total=total,
        initial=total - sum(shard.count for _, shard in left),
        unit='img',
        unit_scale=True,
        disable=None,
      ) as bar,
    ):
      futures = [pool.submit(self._write_shard, *job, bar) for job in left]
      try:
        for future in concurrent.futures.as_completed(futures):
          self._sums |= future.result()
          lines = (f'{v}  {k}\n' for k, v in sorted(self._sums.items()))
          _write(os.path.join(self._directory, SUMS), ''.join(lines))
      # ArrayRecord's are RuntimeErrors.
      except (OSError, RuntimeError) as error:
        raise UserError(
          f'cannot write to {self._directory}: {error}. The same command goes '
          'on from here.'
        ) from error
      finally:
        for future in futures:
          future.cancel()
    tfds.folder_dataset.write_metadata(
      data_dir=self._directory,
      features=features,
      split_infos=[self._split_info(*item) for item in splits.items()],
      check_data=False,
    )

  def _prefix(self, split: str) -> str:
    return f'{self._name}-{split}.array_record'

  def _split_info(self, split: str, shards: Sequence[Shard]):
    files = [f for f in self._sums if f.startswith(self._prefix(split))]
    sizes = [os.path.getsize(os.path.join(self._directory, f)) for f in files]
    return tfds.core.SplitInfo(
      name=split,
      shard_lengths=[shard.count for shard in shards],
      num_bytes=sum(sizes),
      filename_template=tfds.core.ShardedFileTemplate(
        data_dir=self._directory,
        dataset_name=self._name,
        split=split,
        filetype_suffix='array_record',
      ),
    )

  def _is_done(self, name: str) -> bool:
    path = os.path.join(self._directory, name)
    return name in self._sums and os.path.exists(path)

  def _read_sums(self) -> dict[str, str]:
    path = os.path.join(self._directory, SUMS)
    if not os.path.exists(path):
      return {}
    with open(path) as file:
      # As `sha256sum` writes it; a name may have spaces.
      return {
        name.rstrip('\n'): digest
        for digest, _, name in (line.partition('  ') for line in file)
      }

  def _write_shard(self, name: str, shard: Shard, bar: tqdm) -> dict[str, str]:
    """Returns the shard's checksum, by name."""
    path = os.path.join(self._directory, name)
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
        f'{count} examples found for {name}, where there should be '
        f'{shard.count}'
      )
    with open(f'{path}.partial', 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    os.replace(f'{path}.partial', path)
    return {name: digest}


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
