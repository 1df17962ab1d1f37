# SPDX-License-Identifier: Apache-2.0
"""Errors that command lines show without a traceback, and exit statuses."""

import signal
import zipfile
import zlib

# Exit statuses of a run that has saved its state: stopped by SIGTERM, to
# be started again, or by a person.
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 128 + signal.SIGINT

# What reading a damaged .npz or .pth raises. RuntimeError: zipfile's, of a
# changed version or flag; TypeError: numpy's, of a damaged header or an .npy.
DAMAGED_ZIP = (
  ValueError,
  EOFError,
  RuntimeError,
  TypeError,
  zipfile.BadZipFile,
  zlib.error,
)


class UserError(Exception):
  """Something only the user can mend; the text names the thing and the remedy.

  Command lines print it after `error:` and exit with status 2. Anything else
  that escapes is a bug of ours and keeps its traceback.
  """


class NotFinite(UserError):
  """A network returns NaN or infinity."""


class NotHeldOut(UserError):
  """Policies would be set, or weights tested, on images that were seen."""
