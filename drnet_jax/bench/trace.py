# SPDX-License-Identifier: Apache-2.0
"""Where a device spends its time: kernels and gaps of a profile by JAX."""

import collections
import glob
import os
import tempfile
from collections.abc import Callable

import jax

# Lines of a profile on which work itself is shown, the first kind found: of
# GPUs, of TPUs, of CPUs. Others sum up what these show.
_WORK = ('Stream', 'XLA Ops', 'tf_XLA')
_KERNELS, _GAPS = 10, 5
_TIMES = 3  # that the job is run


def profile(job: Callable[[], None]) -> list[dict]:
  """Profiles a compiled job, a function that returns only once it is done.

  Returns:
    Rows: how busy the device was; its most expensive kernels, all calls of each
    together; the longest gaps between kernels, and what ran before and after.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
      for _ in range(_TIMES):
        job()
    (path,) = glob.glob(os.path.join(folder, '**/*.xplane.pb'), recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
    events = sorted(_events(data))
  return table(events)


def table(events: list[tuple[float, float, str]]) -> list[dict]:
  """The rows of `profile`, from (start, end, name) in order, in ns."""
  if not events:
    raise RuntimeError('the profile shows no work of a device')
  spent, calls, gaps = collections.Counter(), collections.Counter(), []
  last_end, last_name, busy = events[0][0], '', 0.0
  for start, end, name in events:
    spent[name] += end - start
    calls[name] += 1
    if start > last_end:
      gaps.append((start - last_end, last_name, name))
    busy += max(end - max(start, last_end), 0.0)
    if end > last_end:
      last_end, last_name = end, name
  span, total = last_end - events[0][0], sum(spent.values())
  rows = [('device', span, busy / span, len(events))]
  rows += [
    (name, ns, ns / total, calls[name])
    for name, ns in spent.most_common(_KERNELS)
  ]
  rows += [
    (f'gap: {before} .. {after}', ns, ns / span, 1)
    for ns, before, after in sorted(gaps, reverse=True)[:_GAPS]
  ]
  return [
    {'what': what, 'ms': ns / 1e6, 'share': share, 'calls': count}
    for what, ns, share, count in rows
  ]


def _events(data):
  """(start, end, name) of the first device's work; not of what only waits."""
  planes = [p for p in data.planes if p.name.startswith('/device:')]
  planes = [p for p in planes if 'CUSTOM' not in p.name][:1]
  lines = [line for plane in planes or data.planes for line in plane.lines]
  for kind in _WORK:
    chosen = [line for line in lines if line.name.startswith(kind)]
    if chosen:
      break
  for line in chosen:
    for event in line.events:
      start, name = event.start_ns, event.name
      if event.duration_ns and not (name.startswith('end: ') or '::' in name):
        yield start, start + event.duration_ns, name
