# SPDX-License-Identifier: Apache-2.0
"""The README of an exported model."""

from collections.abc import Iterable, Mapping, Sequence

from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.policy import Policy, describe
from drnet_jax.data import transforms
from drnet_jax.export.contract import Contract
from drnet_jax.run import workdir


def about(trained: workdir.Trained, contract: Contract) -> str:
  """A sentence or two on one network."""
  config = trained.config
  sizes = ', '.join(contract.options.names)
  chooses = (
    f'; a predictor `{config.model.predictor.network}` looks at '
    f'{trained.model.predictor_px} px and says where to begin'
    if contract.routes
    else ''
  )
  mean, std = (
    ', '.join(f'{v:g}' for v in values)
    for values in (trained.model.mean, trained.model.std)
  )
  begun = config.get('init_from', '') and f'the weights of `{config.init_from}`'
  made = (
    f'trained on `{config.data.name}/{config.data.train_split}` with drnet_jax '
    f'({contract.origin})' + (f', beginning with {begun}' if begun else '')
  )
  if contract.origin.startswith(f'stage {workdir.INITIAL},'):
    made = f'with {begun or "weights"} that were not trained further'
  return (
    f'A network `{config.model.base.network}` at {sizes}{chooses}, {made}; it '
    f'normalises pixels itself (mean {mean}, deviation {std}).'
  )


def int8_section(rows: Sequence[Mapping[str, str]]) -> str:
  """What int8 changes, as Markdown; of each row every field is shown."""
  columns = [*rows[0]]
  table = [columns, ['---'] * len(columns), *(row.values() for row in rows)]
  return '\n'.join(
    [
      '',
      '## int8',
      '',
      'Top-1 on images held out from training, other ones than those that set '
      'the ranges, measured in OpenVINO where this was exported; the predictor '
      'by the sizes that it chooses. A processor without VNNI may round '
      'otherwise.',
      '',
      *map(_row, table),
      '',
    ]
  )


def text(
  contract: Contract,
  calibration: Calibration | None,
  usual: Policy,
  networks: Sequence[str],
  formats: Sequence[str],
  weights: str,
) -> str:
  """The card, as Markdown; `networks` is what `about` says of each.

  See `package.write` on the rest.
  """
  lines = [
    f'# Adaptive-resolution classifier, {len(contract.class_names)} classes',
    '',
    *networks,
    '',
    f'Weights {weights}, formats {", ".join(formats)}.',
    '',
    '## Cost',
    '',
    '| part | GMACs per image |',
    '|---|---|',
    *(
      _row([name, f'{gmacs:.4g}'])
      for name, gmacs in zip(
        contract.options.names, contract.gmacs, strict=True
      )
    ),
  ]
  if contract.routes:
    lines.append(_row(['predictor', f'{contract.predictor_gmacs:.4g}']))
  lines += [
    '',
    '## Policies',
    '',
    f'Unless another is asked for: {describe(usual, contract.options)}.',
  ]
  if calibration:
    lines += [
      '',
      'The best policy for each average cost (everything counted), and its '
      f'top-1 on {calibration.images:,} images of `{calibration.split}`, held '
      'out from training, not on yours:',
      '',
      '| GMACs | top-1, % | policy |',
      '|---|---|---|',
      *(
        _row(
          [
            f'{p.gmacs:.4g}',
            f'{100 * p.top1:.1f}',
            describe(p.policy, contract.options),
          ]
        )
        for p in calibration.points['GMACs']['best']
      ),
    ]
  view = contract.views[-1]
  resized = (
    'The short side is resized'
    if view.keep_aspect
    else 'The whole image is squashed'
  )
  lines += [
    '',
    '## Input',
    '',
    f'8-bit RGB, EXIF rotation applied, transparency on white. {resized} '
    '(Pillow, bilinear, antialiased) and the middle square cut, as `views` in '
    'contract.json says for each network; '
    + (
      'it resizes the crop to its own size itself.'
      if contract.decode == 'full'
      else 'a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as its short side '
      f'keeps {transforms.DECODE_MARGIN * contract.decode_px} px.'
    ),
    'Networks take uint8 [batch, side, side, 3].',
    '',
    '## Use',
    '',
  ]
  if 'onnx' in formats:
    lines += [
      '    pip install onnxruntime numpy pillow',
      '    python run.py'
      + ' --policy=best --gmacs=...' * bool(calibration)
      + ' photo.jpg',
      '',
    ]
  lines += [
    "    drnet_jax.serve.classifier.Classifier.load('this folder')",
    '',
    '## Limits',
    '',
    f'It knows the {len(contract.class_names)} classes in contract.json and '
    'calls everything else one of them. Its probabilities are not calibrated. '
    'Accuracy and costs hold for images like those it was calibrated on. The '
    'licences of the data and of the weights it began with apply to these '
    'weights.',
    '',
  ]
  return '\n'.join(lines)


def _row(cells: Iterable[str]) -> str:
  """Of a table in Markdown, whatever networks and classes are called."""
  escaped = (cell.replace('|', r'\|') for cell in cells)
  return f'| {" | ".join(escaped)} |'
