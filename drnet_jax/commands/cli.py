# SPDX-License-Identifier: Apache-2.0
"""What all command lines share: help, process settings, errors as messages."""

import errno
import gc
import importlib.util
import logging as python_logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from absl import flags, logging

from drnet_jax import cache
from drnet_jax.errors import INTERRUPTED, UserError

if TYPE_CHECKING:
  import ml_collections

_ROOM = (
  'What was there before is intact; run the same command again once there is '
  'room.'
)
_ACCESS = 'Results so far, if any, are printed above.'
_FOLDER = 'Name a folder, or a path that is free.'
_REMEDIES = (
  dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM)
  | dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _ACCESS)
  | dict.fromkeys((errno.EEXIST, errno.EISDIR, errno.ENOTDIR), _FOLDER)
)

_GC_THRESHOLD = 20_000, 20, 50  # by itself, up to Python 3.12, 700, 10, 10
_SHARED = f'{__package__}.flags'  # the module whose flags commands `USES`

# One flag for all commands: absl refuses a name that two modules define.
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of a run: checkpoints, metrics, report.'
)


def workdir() -> str:
  """What --workdir names.

  Raises:
    UserError: it is missing, or not a folder of this machine.
  """
  if not (WORKDIR.value or '').strip(','):
    raise UserError('--workdir is missing: name the directory of a run')
  if '://' in WORKDIR.value:
    raise UserError(
      f'--workdir={WORKDIR.value}: runs live in folders; mount the bucket '
      '(with gcsfuse, s3fs or rclone) and name the folder'
    )
  return WORKDIR.value


def model() -> str | list[str]:
  """What --workdir names: one run, or a ladder of several, with commas."""
  paths = [p for p in workdir().split(',') if p]
  return paths[0] if len(paths) == 1 else paths


def refuse_beside(what: str, *others: flags.FlagHolder) -> None:
  """Raises UserError if flags are given that do not go with `what`."""
  given = [f'--{x.name}' for x in others if x.value != x.default]
  if given:
    raise UserError(f'{" and ".join(given)} cannot be combined with {what}')


def start(module: ModuleType) -> None:
  """Runs the command line of a module of this package.

  Args:
    module: its docstring is the help, `run(arguments)` the command; it may have
      a `parse_flags` of its own, and names the shared flags that it `USES`.
  """
  if any(a in ('-h', '-help', '--help') for a in sys.argv[1:]):
    print(_help(module))
    return
  arguments = getattr(module, 'parse_flags', parse_flags)(sys.argv)
  refuse_others(getattr(module, 'USES', ()))
  set_up()
  run_command(lambda: module.run(arguments[1:]))


def refuse_others(uses: Sequence[str]) -> None:
  """Ends with status 2 where a shared flag is given that is not in `uses`."""
  for flag in _flags_of(_SHARED):
    if flag.present and flag.name not in uses:
      _refuse(f'--{flag.name} is a flag of other commands; see --help')


def _flags_of(name: str) -> Sequence[flags.Flag]:
  return flags.FLAGS.flags_by_module_dict().get(name, ())


def _help(module: ModuleType) -> str:
  uses, shown = getattr(module, 'USES', ()), flags.FlagValues()
  shared = [flag for flag in _flags_of(_SHARED) if flag.name in uses]
  for flag in (*_flags_of(module.__name__), *_flags_of(__name__), *shared):
    shown[flag.name] = flag
  listed = shown.get_help(include_special_flags=False)
  return '\n'.join([module.__doc__.rstrip(), '', 'Flags:', listed])


def _refuse(what: object) -> NoReturn:
  print(f'error: {what}', file=sys.stderr)
  sys.exit(2)


def run_command(command: Callable[[], None]) -> None:
  """Runs a command; a UserError becomes one message and exit status 2."""
  try:
    command()
  except UserError as error:
    _refuse(error)
  except BrokenPipeError:
    # The reader (`| head`) has had enough; nor can what is buffered be written.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(INTERRUPTED)
  except OSError as error:
    if error.errno not in _REMEDIES:
      raise
    # Files are written under another name first, which nobody asked for.
    what = re.sub(r'\.\d+\.partial\b', '', str(error))
    _refuse(f'{what}. {_REMEDIES[error.errno]}')


def parse_flags(arguments: Sequence[str]) -> list[str]:
  """absl's parsing, with a mistake told in one line and exit status 2."""
  try:
    for field in (argument.partition('=')[0] for argument in arguments):
      if field.startswith('--config.') and '-' in field[2:]:
        raise flags.Error(f'{field} is no field: names have underscores')
    return flags.FLAGS(with_config(with_home(arguments)))
  except flags.Error as error:
    what = str(error).strip()
    if 'get_config() missing' in what:  # after a traceback
      what = '--config names a set: add a colon and a row of its ROWS'
    elif 'get_config() takes 0 positional' in what:
      what = '--config names no set: nothing can follow its colon'
    _refuse(f'{what}; see --help')
  except KeyError as error:
    # What follows the colon of --config=<file>:<row> is looked up by the file.
    name = error.args[0]
    if any(argument.endswith(f':{name}') for argument in arguments):
      what = f'row {name!r}; its file lists them in ROWS'
    elif any(f'.{name}' in argument for argument in arguments):
      what = f'field {name!r}'
    else:
      raise
    _refuse(f'--config has no {what}')
  except AttributeError as error:
    # ml_collections wraps a KeyError, whose str() is a quotation.
    cause = error.args[0] if error.args else error
    what = cause.args[0] if isinstance(cause, KeyError) else cause
    _refuse(f'--config has no field {" ".join(str(what).split())}')


def with_home(arguments: Sequence[str]) -> list[str]:
  """Arguments with `~` and `~name` replaced wherever a path may begin.

  Shells do so at the beginning of an argument only, not after `=` or a comma.
  """
  return [
    re.sub('(?<![^=,])~[^/,]*', lambda x: os.path.expanduser(x[0]), argument)
    for argument in arguments
  ]


def with_config(arguments: Sequence[str]) -> list[str]:
  """Arguments with `--config=<name>` as the path of configs/<name>.py.

  So it is found wherever the command runs, also of an installed package. A file
  of the value's name goes first; what follows a colon is a row of a set.

  Raises:
    flags.Error: there is neither.
  """
  found = list(arguments)
  for i, argument in enumerate(found):
    flag, is_whole, value = argument.partition('=')
    place = i if is_whole else i + 1  # --config quickstart
    if i < place < len(found):
      value = found[place]
    name, *row = value.split(':', 1)
    if flag not in ('--config', '-config') or not name or os.path.isfile(name):
      continue
    known = _configs()
    if name not in known:
      raise flags.Error(
        f'--config={name} is neither a file nor one of {", ".join(known)}'
      )
    whole = ':'.join([known[name], *row])
    found[place] = f'{flag}={whole}' if is_whole else whole
  return found


def _configs() -> dict[str, str]:
  """Paths of the configs that are installed, or beside the package, by name."""
  spec = importlib.util.find_spec('configs')
  folders = list(spec.submodule_search_locations or ()) if spec else []
  return {
    module.name: os.path.join(module.module_finder.path, f'{module.name}.py')
    for module in pkgutil.iter_modules(folders)
    if not module.ispkg
  }


def keep_overrides(arguments: Sequence[str]) -> list[str]:
  """`parse_flags`, but --config.<field>=<value> are left over for `run`.

  For commands that use a run whose data may have moved; of one with a --config
  of its own they go there too.
  """
  arguments = with_home(arguments)
  overrides = [a for a in arguments if a.startswith('--config.')]
  if not any(a.split('=')[0] in ('--config', '-config') for a in arguments):
    arguments = [a for a in arguments if a not in overrides]
  return parse_flags(arguments) + overrides


def read_config(
  value: 'ml_collections.ConfigDict | None',
) -> 'ml_collections.ConfigDict':
  """The value of a --config flag, or a UserError if it holds none."""
  if value is None:
    raise UserError('--config is missing, e.g. --config=quickstart')
  try:
    value.keys()  # what stands in for a file that failed to load raises here
  except OSError as error:
    what = ' '.join(str(error).split())
    raise UserError(f'--config cannot be read: {what}') from error
  return value


def set_up() -> None:
  """Process-wide settings: a compilation cache, and quieter libraries."""
  logging.set_verbosity(logging.ERROR)
  # Tracing makes a great many small objects. To look for cycles among them as
  # often as Python does by itself takes a twentieth of a quick start's time.
  gc.set_threshold(*_GC_THRESHOLD)
  # They report every save, restore and missing accelerator.
  for name in ('orbax', 'jax._src.xla_bridge'):
    python_logging.getLogger(name).setLevel(python_logging.ERROR)
  sys.unraisablehook = _report_unraisable
  # It warns of what it tidies up after a process that ends at once: no news.
  os.environ.setdefault('PYTHONWARNINGS', 'ignore:resource_tracker')
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    settings = {
      'jax_compilation_cache_dir': cache.path('compiled'),
      'jax_persistent_cache_min_compile_time_secs': 0.5,
    }
    for option, value in settings.items():
      # The environment is read when JAX is imported: not every command does.
      if 'jax' in sys.modules:
        sys.modules['jax'].config.update(option, value)
      else:
        os.environ[option.upper()] = str(value)


def _report_unraisable(unraisable) -> None:
  """Python's report, but for what Orbax leaves behind when a restore fails."""
  if 'Event loop is closed' not in str(unraisable.exc_value):
    sys.__unraisablehook__(unraisable)
