# SPDX-License-Identifier: Apache-2.0
"""Every number in the README's and the docs' tables is one of results/.

Each of their tables is either made again here, cell by cell, from the csv
with its raw values, or named as one without measurements. A new table fails the
test until it is one or the other.
"""

import collections
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows_of

from drnet_jax import flops, models
from drnet_jax.choosing import halves
from drnet_jax.report.paper_tables import TABLES

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'results'
_PHOTOS_GMACS = 0.152816  # MobileNetV2 of ten classes at 160 px
# docs/SCALE.md has estimates of the cost model instead.
PAGES = '\n'.join(
  path.read_text()
  for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
  if path.name != 'SCALE.md'
)
PROSE = ' '.join(PAGES.split())

# First cells of the header of tables that hold no measurement.
WITHOUT_NUMBERS = [
  'field',
  '`config.data.name`',
  'where',
  'in the workdir',
  'runtime',
  'command',
  "the authors' code",
  'the paper',
  'page',
  'section',
  'set',
  'program',
  'what is wrong',
  'may change',
  'what people call it',
  'rival',
  '`--config.init_from=`',
  'field of `config`',
]


def raw(name):
  return rows_of(RESULTS, f'{name}.csv')


def tables(text):
  """Every table: lists of cells, header first, without its rule."""
  found = []
  for block in re.findall(r'(?:^\|.*\n)+', text, re.MULTILINE):
    rows = [
      [cell.strip().replace('**', '') for cell in line.strip('|').split('|')]
      for line in block.strip().splitlines()
    ]
    found.append([rows[0], *rows[2:]])
  return found


def bare(value, digits=2):
  """'.90', '1.04', '1'."""
  return '1' if value == 1 else f'{value:.{digits}f}'.removeprefix('0')


def median_range(values, digits=1, form=''):
  """'91.8 [91.4, 92.3]'."""
  middle, low, high = (
    f'{x + 0.0:{form}.{digits}f}'
    for x in (np.median(values), min(values), max(values))
  )
  return f'{middle} [{low}, {high}]'


def column(rows, name):
  return np.array([100 * float(row[name]) for row in rows])


def quickstart_rows(policy):
  """Of each of the three seeds."""
  return [r for r in raw('quickstart') if r['policy'] == policy]


def quickstart():
  names = {
    'fixed 32 px': 'fixed 32 px',
    'fixed 40 px': 'fixed 40 px',
    'fixed 64 px': 'fixed 64 px',
    'best policy': 'best policy',
    'router as trained': 'router as trained',
    'cascade': 'cascade, at no higher cost than the best policy',
    'router': 'router, the same',
    'best fixed': "best fixed at the best policy's cost",
    'random': "random at the best policy's cost",
    'oracle': 'oracle (smallest size that is right)',
  }
  full = column(quickstart_rows('fixed 64 px'), 'gmacs')
  found = []
  for policy, name in names.items():
    if rows := quickstart_rows(policy):
      cost = 100 * column(rows, 'gmacs') / full[: len(rows)]
      cells = [median_range(x) for x in (column(rows, 'top1'), cost)]
      found.append([name, *cells])
  return found


def imagenet_sizes():
  found = []
  for name, network, digits in (
    ('MobileNetV2', 'mobilenet_v2', 3),
    ('ResNet-50', 'resnet50', 2),
  ):
    rows = [r for r in raw('imagenet_sizes') if r['network'] == network]
    found.append(
      [name]
      + [
        f'{100 * float(r["top1"]):.1f} ({bare(float(r["gmacs"]), digits)})'
        for r in rows
      ]
    )
  return found


def training_step():
  names = [
    'fixed 64 px',
    'routed, `chosen`',
    'routed, `all` (a quarter explored)',
  ]
  return [
    [name, f'{float(r["images_per_second"]):.0f}']
    + [
      bare(float(r[k])) for k in ('implied', 'realised', 'realised_of_implied')
    ]
    for name, r in zip(names, raw('training_step'), strict=True)
  ]


def inference():
  """Policies in onnxruntime against the full size in it."""
  networks = {
    'ResNet-50, routed': ('inference_worth', 'routed'),
    'ResNet-50, a third goes on': (
      'inference_worth',
      'cascade, a third goes on',
    ),
    'MobileNetV2 on photographs, best policy': ('photos_worth', 'best'),
  }
  modes = {
    'single': 'one at a time',
    'bulk': 'bulk',
    'bulk, files': 'bulk, JPEG files',
  }
  return [
    [f'{name}, {modes[r["mode"]]}']
    + [f'{float(r[k]):.1f}' for k in ('fixed_ms', 'policy_ms')]
    + [
      bare(float(r[k])) for k in ('implied', 'realised', 'realised_of_implied')
    ]
    for name, (file, policy) in networks.items()
    for r in raw(file)
    if (r['path'], r['policy']) == ('onnx', policy)
  ]


def inference_half():
  """Policies in OpenVINO, in each precision, against the full size in it."""
  precisions = {
    'openvino': 'float32',
    'openvino in bf16': 'bfloat16',
    'openvino in int8': 'int8',
  }
  policies = {
    'routed': 'routed',
    'cascade, a third goes on': 'a third goes on',
    'best': 'best policy',
  }
  modes = {
    'single': 'one at a time',
    'bulk': 'bulk',
    'bulk, files': 'bulk, JPEG files',
  }
  return [
    [
      f'{network}, {said}, {policies[r["policy"]]}, {modes[r["mode"]]}',
      *(f'{float(r[k]):.1f}' for k in ('fixed_ms', 'policy_ms')),
      *(
        bare(float(r[k]))
        for k in ('implied', 'realised', 'realised_of_implied')
      ),
    ]
    for network in ('ResNet-50', 'MobileNetV2')
    for path, said in precisions.items()
    for r in raw('inference_half_worth')
    if (r['network'], r['path']) == (network, path)
  ]


def half_accuracy():
  """What bfloat16 changes, of each network and size."""
  return [
    [
      f'{r["network"]}, {r["option"]}',
      *(f'{100 * float(r[k]):.1f}' for k in ('float32', 'bfloat16')),
      f'{100 * (float(r["bfloat16"]) - float(r["float32"])):+.1f}',
      f'{r["changed"]} of {int(r["images"]):,}',
    ]
    for r in raw('inference_half_accuracy')
  ]


def int8():
  """What int8 loses, of each network and option."""
  return [
    [
      f'{r["network"]}, {r["name"]}',
      *(f'{100 * float(r[k]):.1f}' for k in ('float32', 'int8')),
      f'{100 * (float(r["float32"]) - float(r["int8"])):+.1f}',
      f'{r["changed"]} of {int(r["images"]):,}',
    ]
    for r in raw('inference_int8')
  ]


def quickstart_time():
  """Seconds of whole quick starts: median and range."""
  found = []
  for version in ('0.4', '0.5'):
    runs = [r for r in raw('quickstart_time') if r['version'] == version]
    cpu = [float(r['user_s']) + float(r['sys_s']) for r in runs]
    real = [float(r['real_s']) for r in runs]
    row = [median_range(x, digits=0) for x in (cpu, real)]
    found.append([f'version {version}', str(len(runs)), *row])
  return found


def memory():
  """Resident megabytes of a ResNet-50 of one size and of five."""
  found = {
    (r['precision'], r['mode'], r['weights'], r['sizes']): r['resident_mb']
    for r in raw('inference_memory')
  }
  rows = []
  for precision, name in (('f32', 'float32'), ('bf16', 'bfloat16')):
    for mode, said in (('single', 'one at a time'), ('bulk', 'bulk')):
      of = [
        found[precision, mode, *which]
        for which in (('folded', '1'), ('folded', '5'), ('shared', '5'))
      ]
      times = [f'{int(x) / int(of[0]):.2f}' for x in of[1:]]
      row = [of[0], of[1], times[0], of[2], times[1]]
      rows.append([f'{name}, {said}', *(f'{x}' for x in row)])
  return rows


def stream():
  """Images that arrive at random, by the share of what can be done in bulk."""
  return [
    [
      {'the full option': '160 px', 'best': 'cascade'}[r['policy']],
      r['load'],
      f'{float(r["images_per_second"]):.0f}',
      f'{100 * float(r["late"]):.1f}',
      f'{100 * float(r["hurried"]):.1f}',
      f'{float(r["ms_p50"]):.0f}',
      f'{float(r["ms_p99"]):.0f}',
      f'{100 * float(r["top1"]):.1f}',
    ]
    for r in raw('inference_stream')
  ]


def accelerator():
  """What the suite found on an H100 in minutes."""
  measures = collections.defaultdict(dict)
  for r in raw('accelerator'):
    measures[r['what']][r['measure']] = r['value']
  rows = [('matrix product, TFLOP/s', ',.0f'), ('copy, GB/s', ',.0f')]
  rows += [('routed step against dense, float32', '.1e')]
  rows += [
    (what, '.2f' if what.startswith('bfloat16') else '.0f')
    for what, measured in measures.items()
    if 'bound' in measured and not what.startswith('routed')
  ]
  return [
    [
      what,
      format(float(measures[what]['value']), form),
      measures[what].get('bound', '').removesuffix('.0'),
    ]
    for what, form in rows
  ]


def compiling():
  """Seconds that an H100's programs took to compile."""
  return [list(r.values()) for r in raw('accelerator_compiling')]


def ladder_speed():
  """Policies of the ladder in onnxruntime against the ResNet-50."""
  return [
    [
      f'{100 * float(r["top1"]):.1f}',
      bare(float(r['gmacs'])),
      f'{float(r["ms_per_image"]):.1f}',
      *(f'{float(r[k]):.1f}' for k in ('implied', 'realised')),
      bare(float(r['realised']) / float(r['implied'])),
    ]
    for r in raw('ladder_speed')
  ]


def gains(row, *names):
  """'+3.3 [+2.7, +3.8]', in points."""
  found = []
  for name in names:
    value, low, high = (
      f'{100 * float(row[f"{name}{end}"]) + 0.0:+.1f}'
      for end in ('', '_low', '_high')
    )
    found.append(f'{value} [{low}, {high}]')
  return found


def photos():
  """Networks of one size, then some budgets of the shared one."""
  rows = [
    [
      f'a network for {r["row"].removesuffix(" alone")} alone',
      f'{100 * float(r["gmacs"]) / _PHOTOS_GMACS:.0f}',
      f'{100 * float(r["top1"]):.1f}',
      '',
      '',
    ]
    for r in raw('photos_runs')
    if r['row'].endswith('px alone')
  ]
  some = [r for r in raw('photos_budgets') if r['row'] == 'ensemble teaches']
  for r in [some[i] for i in (0, 5, 8, 12, 15, 19)]:
    rows.append(
      [
        r['policy'].partition(', on while')[0],
        f'{100 * float(r["share_of_full"]):.0f}',
        f'{100 * float(r["top1"]):.1f}',
        *gains(r, 'over_best_fixed', 'over_networks'),
      ]
    )
  return rows


def photos_training():
  """Top-1 at each size, by what the sizes learn from."""
  names = {
    'ensemble teaches': 'labels and the ensemble of all sizes',
    'labels alone': 'labels alone',
    'alone': 'a network for each size, labels alone',
  }
  found = {name: [] for name in names}
  for r in raw('photos_sizes'):
    key = 'alone' if r['row'].endswith('px alone') else r['row']
    found[key].append(f'{100 * float(r["top1"]):.1f}')
  return [[names[key], *top1] for key, top1 in found.items()]


def photos_seeds():
  """Of three seeds: networks of one size, fixed sizes, then some budgets."""
  rows = raw('photos_seeds')
  names = [f'a network for {px} px alone' for px in (64, 112, 160)]
  names += [f'fixed {px} px' for px in (64, 112, 160)]
  found = {name: [r for r in rows if r['policy'] == name] for name in names}
  for share in (0.24, 0.30, 0.36, 0.42, 0.53, 0.62):
    within = [r for r in rows if float(r['budget_share'] or 1) < share + 0.005]
    # The last of each seed: a budget that buys nothing more has no row.
    found[f'best within {100 * share:.0f} %'] = [
      [r for r in within if r['seed'] == seed][-1] for seed in '012'
    ]
  found['without a budget'] = [
    r for r in rows if r['policy'] == 'without a budget'
  ]
  return [
    [name, *(spread(some, column) for column in _PHOTOS_COLUMNS)]
    for name, some in found.items()
  ]


_PHOTOS_COLUMNS = {
  'share_of_full': 0,
  'top1': 1,
  'over_best_fixed': 1,
  'over_networks': 1,
}


def spread(rows, name):
  """'92.1 [90.3, 92.2]' of the rows that have such a value, '' of none."""
  values = column([row for row in rows if row[name]], name)
  form = '+' if name.startswith('over') else ''
  if not len(values):
    return ''
  if np.ptp(values) < 1e-9:
    return f'{values[0]:{form}.{_PHOTOS_COLUMNS[name]}f}'
  return median_range(values, _PHOTOS_COLUMNS[name], form)


def photos_resnet50():
  return photos_of('photos_resnet50', (0, 1, 2, 8, 11, 15, 17, 19, 20, 21))


def photos_large():
  return photos_of('photos_large', (0, 1, 2, 6, 8, 10, 12, 14, 16, 17))


def photos_of(name, chosen):
  """Fixed sizes, then some budgets."""
  rows = raw(name)
  return [
    [
      r['policy'].partition(', on while')[0],
      f'{100 * float(r["share_of_full"]):.0f}',
      f'{100 * float(r["top1"]):.1f}',
      f'{100 * (float(r["top1"]) - float(r["best_fixed"])):+.1f}'
      if r['best_fixed']
      else '',
    ]
    for r in (rows[i] for i in chosen)
  ]


def photos_halves():
  """Some budgets, policies set on one half of the test images, of each seed."""
  typed = [
    {k: v if k == 'family' else float(v) for k, v in r.items()}
    for r in raw('photos_halves')
  ]
  by_seed = [
    {
      r['budget']: r
      for r in halves.summary([r for r in typed if r['seed'] == seed])
      if r['family'] == 'best'
    }
    for seed in range(3)
  ]
  budgets = sorted(by_seed[0])
  return [
    [
      'none' if np.isinf(budget) else f'{100 * budget / _PHOTOS_GMACS:.0f}',
      median_range([100 * r['gmacs'] / _PHOTOS_GMACS for r in rows], 0),
      median_range([100 * r['top1'] for r in rows]),
      median_range([100 * r['gain'] for r in rows], form='+'),
      median_range([100 * (r['top1'] - r['largest']) for r in rows], form='+'),
      median_range([100 * r['kept'] for r in rows], 0),
    ]
    for budget in [budgets[i] for i in (5, 7, 9, 10, 11, -1)]
    for rows in [[found[budget] for found in by_seed]]
  ]


def photos_crop():
  """Mean top-1 of the seeds at each size, by how much is cut off."""
  found = {}
  for r in raw('photos_crop'):
    who = 'one for all sizes' if r['row'] == 'ensemble teaches' else 'one alone'
    key = f'{r["network"]}, {who}', f'{r["size_px"]} of {r["image_px"]} px'
    ratio = round(int(r['resize_px']) / int(r['image_px']), 1)
    of_ratio = found.setdefault(key, {}).setdefault(ratio, [])
    of_ratio.append(100 * float(r['top1']))
  return [
    [*key, *(f'{np.mean(x[r]):.1f}' if r in x else '' for r in _RATIOS)]
    for key, x in found.items()
  ]


_RATIOS = (1.0, 1.1, 1.2, 1.3, 1.4)


def within(rows, share):
  """Top-1 of the most expensive of some policies within a share of the cost."""
  some = [r for r in rows if float(r['share_of_full']) < share + 0.005]
  return f'{100 * float(some[-1]["top1"]):.1f}'


def photos_teachers():
  """Fixed sizes, then the best policy within each share of the cost."""
  found = {}
  for r in raw('photos_teachers'):
    found.setdefault(r['learns_from'], []).append(r)
  return [
    [
      name,
      *(f'{100 * float(r["top1"]):.1f}' for r in rows[:3]),
      *(within(rows[3:], share) for share in (0.30, 0.42, 0.53, 0.62)),
    ]
    for name, rows in found.items()
  ]


def photos_stopwatch():
  """Policies found by multiply-adds and by milliseconds, timed in OpenVINO."""
  found = []
  for r in raw('photos_stopwatch'):
    if 'openvino' in r['path'] and 'files' not in r['mode']:
      precision = 'bfloat16' if 'bf16' in r['path'] else 'float32'
      mode = 'one at a time' if r['mode'] == 'single' else 'bulk'
      times = (float(r[k]) for k in ('fixed_ms', 'policy_ms'))
      found.append(
        [
          r['found_by'],
          f'{precision}, {mode}',
          *(f'{ms:.1f}' for ms in times),
          *(f'{float(r[k]):.2f}' for k in ('implied', 'realised')),
          bare(float(r['realised_of_implied'])),
        ]
      )
  return found


def photos_router():
  """Top-1 (and cost) of each family at some budgets, by where it begins."""
  found = {}
  for r in raw('photos_router'):
    top1 = 100 * float(r['test_top1'])
    cost = 100 * float(r['test_gmacs']) / _PHOTOS_GMACS
    key = r['row'], round(100 * float(r['budget_gmacs']) / _PHOTOS_GMACS)
    cell = f'{top1:.1f} ({cost:.0f})'
    of_budget = found.setdefault(key, {})
    of_budget[r['family']] = cell
    if r['family'] == 'router':
      of_budget['fixed'] = f'{100 * float(r["best_fixed"]):.1f}'
  order = ('fixed', 'router', 'cascade', 'routed_cascade')
  return [
    [row, str(budget), *(cells[name] for name in order)]
    for (row, budget), cells in found.items()
    if budget in (30, 42, 53, 73)
  ]


def photos_rates():
  """Top-1 at each size, by folder and learning rate."""
  found = {}
  for r in raw('photos_rates'):
    top1 = f'{100 * float(r["top1"]):.1f}'
    key = r['folder'], r['classifier'], r['lr']
    found.setdefault(key, []).append(top1)
  return [[*key, *top1] for key, top1 in found.items()]


def by_budget():
  """Rows of each family, by budget."""
  found = {}
  for r in raw('budget'):
    found.setdefault(float(r['budget_gmacs']), {})[r['family']] = r
  return found


def budget():
  """Every third budget; best fixed is at the cost of the best policy."""
  found = []
  for gmacs, rows in list(by_budget().items())[::3]:
    best = rows['best']
    found.append(
      [f'{1e3 * gmacs:.2f}', f'{1e3 * float(best["test_gmacs"]):.2f}']
      + [
        f'{100 * float(rows[k]["test_top1"]):.1f}' if k in rows else ''
        for k in ('best', 'router', 'cascade', 'routed_cascade')
      ]
      + [f'{100 * float(best["best_fixed"]):.1f}']
    )
  return found


def test_the_best_policy_against_the_best_family():
  """At how many budgets it is level on test images, as the README says."""
  behind = []
  for rows in by_budget().values():
    top1 = {family: float(r['test_top1']) for family, r in rows.items()}
    behind.append(max(top1.values()) - top1['best'])
  assert (
    f'At {sum(x <= 0.003 for x in behind)} of the {len(behind)} budgets'
    in PROSE
  )
  assert max(behind) == 0


def ladder():
  """All photographs at one option, then the best policies of some budgets."""
  names = {
    'mobilenet_v2: 192 px': 'MobileNetV2 at 192 px',
    'resnet50: 224 px': 'ResNet-50 at 224 px',
  }
  rows = [
    [
      names[r['option']],
      f'{100 * float(r["top1"]):.1f}',
      bare(float(r['gmacs'])),
      '',
    ]
    for r in raw('ladder_fixed')
    if r['option'] in names
  ]
  best = best_of_halves('ladder')
  for r in [best[i] for i in (4, 5, 7, 8, 9)]:
    rows.append(
      [
        f'both, budget {bare(r["budget"])} GMACs',
        f'{100 * r["top1"]:.1f}',
        bare(r['gmacs']),
        gain_of_halves(r),
      ]
    )
  return rows


def best_of_halves(name):
  """The best policies for each budget, means over all halves."""
  typed = [
    {k: v if k == 'family' else float(v) for k, v in r.items()}
    for r in raw(name)
  ]
  return [r for r in halves.summary(typed) if r['family'] == 'best']


def gain_of_halves(row):
  gain, low, high = (
    f'{100 * row[k]:+.1f}' for k in ('gain', 'gain_least', 'gain_most')
  )
  return f'{gain} [{low}, {high}]'


def networks():
  """Resnets share a row of the table, and so do efficientnets."""
  rows = raw('networks')

  def line(name, some, digits):
    return [
      name,
      ', '.join(f'{int(r["parameters"]) / 1e6:.1f}' for r in some),
      ', '.join(f'{int(r["macs_224"]) / 1e9:.{digits}f}' for r in some),
    ]

  def named(prefix):
    return [r for r in rows if r['network'].startswith(prefix)]

  def listed(some):
    return ' '.join(f'`{r["network"]}`' for r in some)

  deep = [r for r in named('resnet') if r['network'].endswith('d')]
  plain = [r for r in named('resnet') if r not in deep]
  small = named('mobilenetv4')
  return [
    line(listed(plain), plain, 2),
    line(f"{listed(deep)} (timm's)", deep, 2),
    line(f"{listed(small)} (timm's)", small, 3),
    line('`mobilenet_v2` (any `width`)', named('mobilenet_v2'), 3),
    line(
      "`efficientnet_lite0` to `efficientnet_lite4` (timm's)",
      named('efficientnet_lite'),
      3,
    ),
    line('`efficientnet_b0` to `efficientnet_b4`', named('efficientnet_b'), 3),
  ]


def imagenette(names=None):
  """Rows of the sweep, or those of some names."""
  alone = {}
  for policy in raw('imagenette_policies'):
    if policy['policy'].startswith('fixed'):
      top1 = f'{100 * float(policy["top1"]):.1f}'
      alone.setdefault(policy['row'], []).append(top1)

  def gain(row, over):
    if not row[f'over_{over}']:
      return ''
    value, low, high = (
      f'{round(100 * float(row[f"over_{over}{end}"]), 1) + 0.0:+.1f}'
      for end in ('', '_low', '_high')
    )
    return f'{value} [{low}, {high}]'

  full = max(float(row['full_gmacs']) for row in raw('imagenette'))
  return [
    [
      row['row'],
      f'{100 * float(row["top1"]):.1f}',
      f'{100 * float(row["gmacs"]) / full:.0f}',
      # A network of one size is that alone.
      '' if len(alone[row['row']]) == 1 else ', '.join(alone[row['row']]),
      *(gain(row, over) for over in ('fixed', 'best_fixed', 'random')),
    ]
    for row in raw('imagenette')
    if row['row'] in (names or alone)
  ]


def imagenette_in_short():
  """The rows that the README has."""
  return imagenette(
    (
      'fixed 96',
      'fixed 128',
      'no FLOPs loss',
      'no FLOPs loss fresh',
      'random',
      'alpha .61 eta .2 shared norms',
      'alpha .49 eta .1',
      'alpha .49 eta .2',
      'alpha .49 eta .5',
      'all gradients alpha .4 eta 1',
      'all gradients fresh alpha .4 eta 1',
      'all gradients distilled alpha .4 eta 1',
    )
  )


# By the header of the table.
SOURCES = {
  ('row', 'top-1, %', 'cost, % of 128 px'): imagenette_in_short,
  ('', 'top-1, %', 'cost, % of 64 px'): quickstart,
  ('top-1, % (GMACs)', '96 px'): imagenet_sizes,
  ('training step', 'images/s'): training_step,
  ('against the full size', 'full, ms'): inference,
  ('median of three seeds', '% of 160 px'): photos_seeds,
  ('budget, MMACs', 'cost'): budget,
  ('photographs', 'top-1, %', 'GMACs'): ladder,
  ('`config.model.base.network`', 'parameters, M'): networks,
}
# Too long for a page.
IN_RESULTS = {
  ('row of the set', 'top-1, %'): imagenette,
  ('learns from', '64 px'): photos_training,
  ('network', 'size', 'all of it'): photos_crop,
  ('found by', 'in OpenVINO'): photos_stopwatch,
  ('on all images, learns from', '64 px'): photos_teachers,
  ('folder', 'new classifier'): photos_rates,
  ('row of the set of routers',): photos_router,
  ('policy of one network', '% of 160 px'): photos,
  ('budget, % of 160 px', '% of 160 px'): photos_halves,
  ('a ResNet-50', '% of 160 px'): photos_resnet50,
  ('MobileNetV2 at 96 to 224 px', '% of 224 px'): photos_large,
  ('top-1, %', 'GMACs', 'ms'): ladder_speed,
  ('in OpenVINO, against the full size',): inference_half,
  ('network and part', 'float32, %'): int8,
  ('weights and size', 'float32, %'): half_accuracy,
  ('on an H100', 'found'): accelerator,
  ('program', 'images', 'searched for'): compiling,
  ('in a stream, float32',): stream,
  ('resident, MB', 'one size'): memory,
  ('quick start', 'runs'): quickstart_time,
}


@pytest.mark.parametrize('header', SOURCES, ids=lambda h: h[-1])
def test_a_table_is_that_of_its_csv(header):
  (table,) = [t for t in tables(PAGES) if tuple(t[0][: len(header)]) == header]
  assert table[1:] == SOURCES[header]()


def test_tables_in_results_are_the_same():
  pages = RESULTS.glob('*.md')
  found = set()
  for table in (t for path in pages for t in tables(path.read_text())):
    for header, made in (SOURCES | IN_RESULTS).items():
      if tuple(table[0][: len(header)]) == header:
        assert table[1:] == made()
        found.add(header)
  assert found >= {*IN_RESULTS, ('', 'top-1, %', 'cost, % of 64 px')}


def test_every_table_has_a_source():
  for table in tables(PAGES):
    known = table[0][0] in WITHOUT_NUMBERS or any(
      tuple(table[0][: len(h)]) == h for h in SOURCES
    )
    assert known, (
      f'there is a table {table[0]}: put its raw values into results/ and '
      'say in SOURCES how they become its cells'
    )


def test_the_prose_on_the_quick_start_is_that_of_its_csv():
  quick = ' '.join((RESULTS / 'quickstart.md').read_text().split())

  def gain(rival):
    return median_range(column(quickstart_rows(rival), 'gain'), form='+')

  papers, ours = (
    [r for r in raw('quickstart_old') if r['gradient'] == gradient]
    for gradient in ('chosen', 'all, expected')
  )
  for said in (
    f'**{gain("best fixed")} points over the best fixed size**',
    f'and {gain("random")} over random',
    median_range(column(papers, 'routed')).replace(' ', ' % ', 1)
    + f' at {np.median(column(papers, "cost")):.1f} %',
    median_range(column(ours, 'routed')).replace(' ', ' % ', 1)
    + f' at {np.median(column(ours, "cost")):.1f} %',
  ):
    assert said in f'{PROSE} {quick}', said


def test_the_quick_start_wins_plainly():
  """In each of three seeds."""
  tops = [
    column(quickstart_rows(f'fixed {x} px'), 'top1') for x in (32, 40, 64)
  ]
  assert np.diff(tops, axis=0).min() > 2, 'accuracy rises with the size'
  best, full = (quickstart_rows(x) for x in ('best policy', 'fixed 64 px'))
  assert len(best) == 3
  assert max(column(best, 'gmacs') / column(full, 'gmacs')) < 0.55
  assert (column(best, 'top1') > column(full, 'top1') - 0.3).all()
  for px in (32, 40, 64):
    assert (column(best, f'share of {px} px') > 10).all()
  for rival in ('best fixed', 'random', 'router'):
    assert (column(quickstart_rows(rival), 'gain_low') > 0).all()


# Over the cascade alone the interval reaches zero in one seed. What passes
# fails here: then it belongs above.
@pytest.mark.xfail(strict=True)
def test_the_quick_start_is_not_surely_above_the_cascade():
  assert (column(quickstart_rows('cascade'), 'gain_low') > 0).all()


@pytest.mark.xfail(strict=True)
def test_the_quick_start_is_no_longer_well_above_its_full_size():
  """As with 44 px in the middle, in the median, at a higher cost."""
  best, full = (quickstart_rows(x) for x in ('best policy', 'fixed 64 px'))
  assert np.median(column(best, 'top1') - column(full, 'top1')) > 0.4


def test_the_quick_start_takes_half_of_the_time():
  """Of the processor, in the median of runs in turn, with installing: 15 s."""
  old, new = (
    [
      float(r['user_s']) + float(r['sys_s'])
      for r in raw('quickstart_time')
      if r['version'] == version
    ]
    for version in ('0.4', '0.5')
  )
  assert len(old) == len(new) == 3
  assert np.median(new) + 15 < 0.5 * (np.median(old) + 15)


def test_the_prose_on_photographs_is_that_of_its_csv():
  cells = {row[0]: row[1:] for row in photos_seeds()}
  _, top1, gain, over_networks = cells['best within 30 %']
  gain, over_networks = (
    x.partition(' ')[0].lstrip('+') for x in (gain, over_networks)
  )
  for said in (
    f'and {over_networks} more than networks trained for one size',
    f'has {top1.partition(" ")[0]} %, {gain} points more than its',
    f'network has {gain} points more than its best fixed size',
  ):
    assert said in PROSE, said
  rows = raw('photos_seeds')
  for row in rows:
    for rival in ('over_best_fixed', 'over_networks'):
      if row[rival] and float(row['share_of_full']) > 0.175:
        assert float(row[f'{rival}_low']) > 0
  kept = [r for r in rows if r['policy'] == 'without a budget']
  assert len(kept) == 3
  assert all(float(r['over_full']) > -0.0031 for r in kept)
  # Three points and a half at 30 % of the cost, one at 53.
  medians = {
    name: float(cells[name][2].partition(' ')[0])
    for name in ('best within 30 %', 'best within 53 %')
  }
  assert medians['best within 30 %'] >= 3.5
  assert medians['best within 53 %'] >= 1.0
  # The accuracy of 160 px but for .3 points for 60 % of its cost, in each seed.
  for seed in '012':
    mine = [r for r in rows if r['seed'] == seed]
    (full,) = (r for r in mine if r['policy'] == 'fixed 160 px')
    kept = float(full['top1']) - 0.003
    found = [r for r in mine if float(r['top1']) > kept]
    assert min(float(r['share_of_full']) for r in found) < 0.6


def test_a_policy_of_photographs_saves_time_without_bfloat16():
  page = ' '.join((RESULTS / 'photos.md').read_text().split())
  # Of a saving of a quarter and one of nearly a half.
  for name, least in (('avx2', 0.85), ('below', 0.8)):
    (bulk,) = (
      r
      for r in raw(f'photos_stopwatch_{name}')
      if (r['path'], r['mode']) == ('openvino', 'bulk')
    )
    share = float(bulk['realised_of_implied'])
    assert share >= least
    said = f'{float(bulk["realised"]):.2f} times as fast where '
    said += f'{float(bulk["implied"]):.2f} is implied (**{bare(share)}**)'
    assert said in page


def test_the_prose_on_input_is_that_of_its_csv():
  default = next(
    r
    for r in raw('input_decoders')
    if (r['decoder'], r['enlarger']) == ('turbo', 'OpenCV')
  )
  folder, records = (
    bare(
      float(r['batches_images_per_core_second'])
      / float(r['bare_loop_images_per_core_second'])
    )
    for r in raw('input_pipeline')
  )
  assert f'{float(default["times_pillow"]):.1f} times as fast' in PROSE
  assert f'reaches {folder} (folder) and {records} (ArrayRecord)' in PROSE


def test_the_prose_on_decoding_is_that_of_its_csv():
  _, middle, large = raw('decoding_time')
  for said in (
    f'{large["pixels"]} pixels {float(large["ms_quarter"]):.1f} instead of '
    f'{float(large["ms_whole"]):.1f} ms',
    f'{middle["pixels"]} {float(middle["ms_half"]):.1f} instead of '
    f'{float(middle["ms_whole"]):.1f}',
  ):
    assert said in PROSE
  whole, wide, narrow = raw('decoding_accuracy')[:3]
  for said in (
    f'a ResNet-50 gets {100 * float(whole["top1"]):.1f} % right',
    f'{100 * float(wide["top1"]):.1f} % with the margin '
    f'({100 * float(wide["same_label"]):.0f} % of the labels the same)',
    f'{100 * float(narrow["top1"]):.1f} % without',
  ):
    assert said in PROSE


def test_the_papers_figures_are_the_papers():
  rows = TABLES[3].rows
  drnet, fixed = rows['no FLOPs loss'], rows['fixed 224']
  assert (
    f'{drnet.top1} % at {drnet.gmacs} GMACs for its ResNet-50, against '
    f'{fixed.top1} % at {fixed.gmacs}.'
  ) in PROSE


@pytest.mark.parametrize(
  'config, rows',
  [
    (
      'in1k',
      [
        (alpha, TABLES[3].rows[key], ('gmacs', 'top1', 'top5'))
        for alpha, key in (
          ('none', 'no FLOPs loss'),
          ('3.5', 'alpha 3.5'),
          ('3.0', 'alpha 3.0'),
          ('2.5', 'alpha 2.5'),
          ('2.0', 'alpha 2.0'),
        )
      ],
    ),
    (
      'in100',
      [
        ('0 - private', TABLES[1].rows['no FLOPs loss'], ('gmacs', 'top1')),
        ('fixed 224 px', TABLES[1].rows['fixed 224'], ('gmacs', 'top1')),
        (
          '0.2 2.5 shared',
          TABLES[1].rows['alpha 2.5 eta 0.2 shared norms'],
          ('gmacs', 'top1'),
        ),
      ]
      + [
        (
          f'{float(eta):g} {alpha} private',
          TABLES[2].rows[f'alpha {alpha} eta {eta}'],
          ('gmacs', 'top1'),
        )
        for alpha, eta in (
          *((alpha, '0.2') for alpha in ('2.0', '2.5', '3.0', '3.5')),
          *(('3.0', eta) for eta in ('0.1', '0.5', '1.0')),
        )
      ],
    ),
  ],
)
def test_the_papers_figures_in_a_config_are_the_papers(config, rows):
  lines = [
    ' '.join(line.split())
    for line in (ROOT / 'configs' / f'{config}.py').read_text().splitlines()
  ]
  for name, row, fields in rows:
    said = ' '.join([name, *(getattr(row, field) for field in fields)])
    assert any(line.startswith(said) for line in lines), said


def test_results_say_how_they_were_made():
  texts = {path.name: path.read_text() for path in RESULTS.glob('*.md')}
  for name, text in texts.items():
    assert 'commit' in text.lower(), name
    assert re.search(r'[Dd]evice|cores', text), name
    assert 'python' in text, f'{name} holds no command'
  for path in (*RESULTS.glob('*.csv'), *RESULTS.glob('*.svg')):
    assert any(f']({path.name})' in text for text in texts.values()), (
      f'no file in results/ says how {path.name} was made'
    )
  for name in re.findall(r'\]\((?:\.\./)?results/([^)#]*)', PAGES):
    assert (RESULTS / name).exists(), name


def test_parameters_and_costs_are_those_of_the_code():
  network = models.NETWORKS['resnet18'](num_classes=1000)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(
    lambda x: network.init(jax.random.key(0), x, train=False), image
  )
  macs = flops.count_macs(
    lambda v, x: network.apply(v, x, train=False), variables, image
  )
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  (row,) = [r for r in raw('networks') if r['network'] == 'resnet18']
  assert (row['parameters'], row['macs_224']) == (str(count), str(macs))
