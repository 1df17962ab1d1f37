# SPDX-License-Identifier: Apache-2.0
"""Imports only point down the list of layers."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'drnet_jax'

# From the top; modules on one line may not import each other, but those of one
# folder may.
LAYERS = [
  ['__main__', 'main'],
  ['commands'],
  ['demo'],
  ['bench'],
  ['serve'],
  ['export'],
  ['run.evaluate'],
  ['report'],
  ['run.train'],
  ['run.stage'],
  ['run.calibrate'],
  ['run.recording'],
  ['run.weights', 'run.describe', 'run.ladder'],
  ['run.workdir'],
  ['run', 'run.checkpoint', 'run.log', 'run.paths', 'run.provenance'],
  ['steps.pretrain', 'steps.routed', 'steps.exits'],
  ['steps.step'],
  ['steps'],
  ['models'],
  ['data'],
  ['choosing'],
  ['routing', 'losses', 'resize', 'flops', 'mesh', 'terminal', 'tables'],
  ['settings', 'processes'],
  ['errors', 'cache', 'memory'],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


MOST_LINES = 500  # of a module: what is longer has a second purpose


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


def layer(module: str) -> str:
  """The listed name that a module falls under."""
  while module and module not in RANK:
    module = module.rpartition('.')[0]
  return module


def imports(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        package, _, inner = alias.name.partition('.')
        if package == 'drnet_jax' and inner:
          yield inner
    elif isinstance(node, ast.ImportFrom) and node.module:
      if node.module == 'drnet_jax':
        yield from (alias.name for alias in node.names)
      elif node.module.startswith('drnet_jax.'):
        inner = node.module.removeprefix('drnet_jax.')
        for alias in node.names:
          file = PACKAGE / inner.replace('.', '/') / f'{alias.name}.py'
          yield f'{inner}.{alias.name}' if file.exists() else inner


FILES = [p for p in sorted(PACKAGE.rglob('*.py')) if module_name(p)]


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_point_down(path):
  here = layer(module_name(path))
  assert here, f'{module_name(path)} has no place in LAYERS'
  for imported in imports(path):
    there = layer(imported)
    same_folder = here == there and (PACKAGE / here).is_dir()
    assert RANK[here] < RANK[there] or same_folder, (
      f'{module_name(path)} imports {imported}, which is not below it'
    )


def test_no_module_is_long():
  lines = {
    module_name(path): path.read_text().count('\n')
    for path in PACKAGE.rglob('*.py')
  }
  assert len(lines) > 100
  assert not {k: n for k, n in lines.items() if n > MOST_LINES}
