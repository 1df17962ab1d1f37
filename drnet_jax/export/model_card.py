# SPDX-License-Identifier: Apache-2.0
"""The README of an exported model."""

from collections.abc import Mapping, Sequence

from drnet_jax.export.contract import Contract
from drnet_jax.run import workdir


def text(
  trained: workdir.Trained,
  contract: Contract,
  budgets: Sequence[Mapping[str, float]],
  formats: Sequence[str],
  weights: str,
) -> str:
  """The card, as Markdown.

  Args:
    trained: the model.
    contract: its contract.
    budgets: rows of the budget table.
    formats: that were written.
    weights: 'folded' or 'shared'.
  """
  config, model = trained.config, trained.model
  data = f'{config.data.name}/{config.data.train_split}'
  sizes = ', '.join(f'{r} px' for r in contract.resolutions)
  lines = [
    f'# Dynamic-resolution classifier, {len(contract.class_names)} classes',
    '',
    f'A network `{config.model.base.network}` that runs each image at one of '
    f'{sizes}'
    + (
      f'; a predictor `{config.model.predictor.network}` chooses from a view '
      f'of {contract.predictor_px} px.'
      if contract.has_router
      else '. No predictor was trained: every image runs at the largest size.'
    ),
    f'Trained on `{data}` with drnet_jax ({contract.origin}); weights '
    f'{weights}, formats {", ".join(formats)}.',
    '',
    '## Cost',
    '',
    '| part | GMACs per image |',
    '|---|---|',
    *(
      f'| network at {r} px | {gmacs:.4g} |'
      for r, gmacs in zip(contract.resolutions, contract.gmacs, strict=True)
    ),
  ]
  if contract.has_router:
    lines.append(f'| predictor | {contract.predictor_gmacs:.4g} |')
  if budgets:
    lines += [
      '',
      '## Budgets',
      '',
      'A size is chosen by argmax(log p - lambda * GMACs). Average cost '
      '(predictor counted) and top-1 on images held out from training, not on '
      'yours:',
      '',
      '| GMACs | top-1, % | lambda |',
      '|---|---|---|',
      *(
        f'| {b["gmacs"]:.4g} | {100 * b["top1"]:.1f} | {b["lambda"]:.4g} |'
        for b in budgets
      ),
    ]
  resized = (
    'The short side is resized'
    if contract.keep_aspect
    else 'The whole image is squashed'
  )
  if contract.decode == 'full':
    crop = (
      f'every network is given that crop, {contract.image_px} px: it resizes '
      'itself'
    )
  else:
    crop = (
      'every network is given a crop of its own size, cut from the image '
      'shrunk in proportion (the predictor, of '
      f'{contract.predictor_px} px); a JPEG may be decoded at 1/2, 1/4 or 1/8 '
      f'as long as its short side keeps {contract.resize_px} px'
    )
  lines += [
    '',
    '## Input',
    '',
    f'8-bit RGB, EXIF rotation applied, transparency on white. {resized} '
    f'to {contract.resize_px} px (Pillow, bilinear, antialiased) and the '
    f'middle square of {contract.image_px} px cut; {crop}. Networks '
    f'take uint8 [batch, side, side, 3] and normalise themselves (mean '
    f'{_numbers(model.mean)}, deviation {_numbers(model.std)}).',
    '',
    '## Use',
    '',
  ]
  if 'onnx' in formats:
    lines += [
      '    pip install onnxruntime numpy pillow',
      '    python run.py' + ' --gmacs=...' * bool(budgets) + ' photo.jpg',
      '',
    ]
  lines += [
    "    drnet_jax.serve.classifier.Classifier.load('this folder', "
    f"runtime='{formats[0]}')",
    '',
    '## Limits',
    '',
    f'It knows the {len(contract.class_names)} classes in contract.json and '
    'calls everything else one of them. Its probabilities are not calibrated. '
    'Accuracy and the shares of the sizes hold for images like those of '
    f'`{data}`. The licences of the data and of the weights it began with '
    'apply to these weights.',
    '',
  ]
  return '\n'.join(lines)


def _numbers(values: Sequence[float]) -> str:
  return ', '.join(f'{v:g}' for v in values)
