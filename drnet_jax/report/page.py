# SPDX-License-Identifier: Apache-2.0
"""A report as a page: one html file that needs no other, and the same as md."""

import itertools
import os
import re
import types
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe

from drnet_jax import tables
from drnet_jax.report.wording import Answer

FILE = 'index.html'
_NONE: Mapping[str, Any] = types.MappingProxyType({})


class Table(NamedTuple):
  """Cells as text; the first column names the rows.

  Attributes:
    groups: header above the header: titles, and how many columns each spans.
    strong: indices of the rows that matter most.
    note: below.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  groups: Sequence[tuple[str, int]] = ()
  strong: Sequence[int] = ()
  note: str = ''

  @classmethod
  def of(cls, rows: Sequence[Mapping[str, str]], note: str = '') -> 'Table':
    """Of rows with the same keys, which make the header."""
    return cls(list(rows[0]), [list(row.values()) for row in rows], note=note)

  @classmethod
  def grouped(
    cls, groups: Mapping[str, Sequence[Mapping[str, str]]], strong=(), note=''
  ) -> 'Table':
    """Of several such tables side by side, by their titles."""
    parts = [cls.of(rows) for rows in groups.values()]
    return cls(
      header=[name for part in parts for name in part.header],
      rows=[
        list(itertools.chain(*row))
        for row in zip(*(part.rows for part in parts), strict=True)
      ],
      groups=[(title, len(rows[0])) for title, rows in groups.items()],
      strong=strong,
      note=note,
    )


class Picture(NamedTuple):
  """An image and what is said of it.

  Attributes:
    address: a `data:` address.
    path: of a file with the same image.
    label: under it.
    truth: the class it shows.
    right: whether the label is right.
  """

  address: str
  path: str
  label: str
  truth: str
  right: bool


class Section(NamedTuple):
  """A part of the page.

  Attributes:
    text: paragraphs, in which backticks mark commands.
    figures: SVG by file name, without ending.
    galleries: rows of pictures, by title.
    folded: whether a click opens it.
  """

  title: str
  text: Sequence[str] = ()
  figures: Mapping[str, str] = _NONE
  table: Table | None = None
  galleries: Mapping[str, Sequence[Picture]] = _NONE
  folded: bool = False


class Page(NamedTuple):
  """All of a report.

  Attributes:
    subtitle: what the numbers are of.
    answers: what a reader wants to know first.
    figures: beside the answers, as of a `Section`.
    csv: rows by the name of their file, without ending; where there are none,
      the file of other weights goes.
  """

  title: str
  subtitle: str
  answers: Sequence[Answer]
  sections: Sequence[Section]
  figures: Mapping[str, str] = _NONE
  csv: Mapping[str, Sequence[tables.Row] | None] = _NONE


def write(page: Page, directory: str) -> Page:
  """Writes `index.html`, `report.md`, csv files and the figures as svg."""
  files = {
    f'{name}.svg': svg
    for part in (page, *page.sections)
    for name, svg in part.figures.items()
  }
  files |= {'report.md': markdown(page, directory), FILE: html(page)}
  os.makedirs(directory, exist_ok=True)
  for name, text in files.items():
    with open(os.path.join(directory, name), 'w', encoding='utf-8') as file:
      file.write(text)
  for name, rows in page.csv.items():
    path = os.path.join(directory, f'{name}.csv')
    if rows:
      tables.write_csv(path, rows)
    elif os.path.exists(path):
      os.remove(path)
  return page


def html(page: Page) -> str:
  """The page as one file: style, figures and pictures are inside."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('drnet_jax.report', ''),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters['code'] = _code
  return environment.get_template('page.html').render(page=page)


def _code(text: str) -> markupsafe.Markup:
  """Text in which backticks mark commands, as html."""
  escaped = str(markupsafe.escape(text))
  return markupsafe.Markup(re.sub('`([^`]*)`', r'<code>\1</code>', escaped))


def markdown(page: Page, directory: str) -> str:
  """The same for a file in a folder; its figures are files beside it."""

  def shown(picture: Picture) -> str:
    path = urllib.parse.quote(os.path.relpath(picture.path, directory))
    return f'![{_linked(picture.truth)}]({path} "{_linked(picture.label)}")'

  parts = [f'# {page.title}', page.subtitle]
  parts += [f'**{a.question} {a.short}.** {a.text}' for a in page.answers]
  parts += [f'![{name}]({name}.svg)' for name in page.figures]
  for section in page.sections:
    parts += [f'## {section.title}', *section.text]
    parts += [f'![{name}]({name}.svg)' for name in section.figures]
    if section.table:
      parts += [markdown_table(section.table), section.table.note]
    for title, pictures in section.galleries.items():
      parts += [f'{title}:', ' '.join(map(shown, pictures))]
  return '\n\n'.join(part for part in parts if part) + '\n'


def markdown_table(table: Table) -> str:
  """A table as Markdown, which has no groups: their titles go to the cells.

  The first column of a group has its whole title, the others what stands before
  the colon: 'ours: imagenette, resnet18: top-1, %', then 'ours: top-5, %'.
  """
  header, names = [], iter(table.header)
  for title, span in table.groups or [('', len(table.header))]:
    for name in itertools.islice(names, span):
      header.append(f'{title}: {name}' if title and name else title or name)
      title = title.partition(':')[0]
  rows = [
    [f'**{cell}**' if i in table.strong and cell else cell for cell in row]
    for i, row in enumerate(table.rows)
  ]
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(map(_cell, line))} |' for line in lines)


def _cell(text: str) -> str:
  """A name may hold what Markdown would read as its own."""
  return text.replace('<', '&lt;').replace('|', r'\|').replace('\n', ' ')


def _linked(text: str) -> str:
  """A name that stands where a bracket or a quotation mark would end it."""
  return _cell(re.sub(r'([\\\[\]"])', r'\\\1', text))
