# SPDX-License-Identifier: Apache-2.0
"""Times streams; the command `benchmark_stream` tells what and how."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from drnet_jax.bench.subjects import Predictions, Subject
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.policy import Policy
from drnet_jax.serve.answers import Prediction
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.streaming import Stream

FULL = 'the full option'


def benchmark(
  classifier: Classifier,
  subject: Subject,
  *,
  loads: Sequence[float],
  deadline_ms: float,
  rounds: int,
) -> list[dict]:
  """Streams of the subject's images by each of its policies and in full.

  Args:
    classifier: of the subject's model.
    subject: whose images arrive, in order.
    loads: rates of arrival, as shares of what the full option does in bulk.
    deadline_ms: of a stream.
    rounds: of each load, in which all policies take turns.

  Returns:
    A row per load and policy. Shares are of all images of all rounds;
    `ms_p50`, `ms_p99`: medians of the rounds'. `top1` where labels are known.
  """
  option = classifier.contract.gmacs.index(classifier.contract.costs.full)
  policies = {FULL: policy_lib.fixed(option)} | dict(subject.policies)
  at_most = _rate_in_bulk(classifier, policies[FULL], subject.files, rounds)
  rows = []
  for load in tqdm(loads, 'loads', leave=False, disable=None):
    found = {name: [] for name in policies}
    for seed in range(rounds):
      gaps = np.random.default_rng(seed).exponential(size=len(subject.files))
      for name, policy in policies.items():
        classifier.policy = policy
        waits = gaps / (load * at_most)
        streamed = _stream(classifier, subject.files, waits, deadline_ms)
        found[name].append(streamed)
    rows += [
      {'policy': name, 'load': load, 'images_per_second': load * at_most}
      | _told(some, subject)
      for name, some in found.items()
    ]
  return rows


def _rate_in_bulk(
  classifier: Classifier, policy: Policy, files: Sequence, rounds: int
) -> float:
  """Images a second, the files decoded on the way: the median of rounds."""
  job, seconds = Predictions(classifier, policy, files), []
  job()
  for _ in range(rounds):
    start = time.perf_counter()
    job()
    seconds.append(time.perf_counter() - start)
  return len(files) / float(np.median(seconds))


def _stream(
  classifier: Classifier,
  files: Sequence,
  waits: np.ndarray,
  deadline_ms: float,
) -> tuple[Stream, list[Prediction]]:
  """A stream of files that arrive so many seconds after one another."""
  with classifier.stream(deadline_ms=deadline_ms) as stream:
    futures, due = [], time.perf_counter()
    for file, wait in zip(files, waits, strict=True):
      due += wait
      time.sleep(max(due - time.perf_counter(), 0))
      futures.append(stream.submit(file))
    return stream, [future.result() for future in futures]


def _told(
  found: Sequence[tuple[Stream, list[Prediction]]], subject: Subject
) -> Mapping[str, float]:
  """Columns of streams of the same images."""
  answered = sum(stream.answered for stream, _ in found)
  ms = np.median([stream.latency_ms((50, 99)) for stream, _ in found], axis=0)
  labels = [x.label for _, answers in found for x in answers]
  right = subject.labels and np.equal(labels, subject.labels * len(found))
  return {
    'late': sum(stream.late for stream, _ in found) / answered,
    'hurried': sum(stream.hurried for stream, _ in found) / answered,
    'ms_p50': float(ms[0]),
    'ms_p99': float(ms[1]),
    'top1': float(right.mean()) if subject.labels else '',
  }
