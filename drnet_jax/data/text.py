# SPDX-License-Identifier: Apache-2.0
"""Text that people wrote, in whatever encoding their editor has."""

import codecs


def decoded(data: bytes) -> str:
  """UTF-8, UTF-16, or else Windows' Latin; a mark at the beginning is left out.

  Every sequence of bytes is some text.
  """
  if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    encodings = ['utf-16']
  elif b'\0' in data:  # without a mark; the upper byte of Latin letters is 0
    encodings = ['utf-16-be' if data.index(b'\0') % 2 == 0 else 'utf-16-le']
  else:
    encodings = ['utf-8-sig', 'cp1252']
  for encoding in encodings:
    try:
      return data.decode(encoding)
    except UnicodeDecodeError:
      pass
  return data.decode('latin-1')


def lines(path: str) -> tuple[str, ...]:
  """The lines of a file without space around them, less those with nothing.

  Raises:
    OSError: it cannot be read.
  """
  with open(path, 'rb') as file:
    found = decoded(file.read()).replace('\r', '\n').split('\n')
  return tuple(line.strip() for line in found if line.strip())
