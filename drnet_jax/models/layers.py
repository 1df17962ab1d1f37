# SPDX-License-Identifier: Apache-2.0
"""Convolution and batch norm as all our networks use them.

Axes, here and everywhere: `B` batch, `H W` pixels, `C` channels, `R` candidate
sizes, `K` classes. Nothing in a network knows of candidate sizes: which set of
norms it runs with is decided by the variables it is given.

Padding is a value of each network. 'symmetric' is PyTorch's: (k - 1) // 2 on
both sides. 'same' is TensorFlow's SAME: with a stride of 2 on an even side one
more pixel at the end than at the beginning. Both give the same shapes, and
weights trained with one are several points worse with the other.

The dtype of a network is that of its computation ('float32', 'bfloat16' or
'float16'); parameters, statistics and logits stay float32.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from drnet_jax.errors import UserError

if not __debug__:
  # What Flax takes off its interceptors within an assertion would stay on.
  raise UserError(
    'python -O leaves out assertions, and Flax does work in one: run without '
    '-O, and without PYTHONOPTIMIZE'
  )

# What fields of networks are annotated with, see `settings.check`.
Padding = Literal['symmetric', 'same']
DType = Literal['float32', 'bfloat16', 'float16']
HEAD = 'head'  # name of every classifier

_MANY_PIXELS = 400  # of an image, from which `_dense` is worth its compilation

# He initialisation over the outputs, as torchvision's networks.
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def conv(
  features: int,
  kernel: int,
  stride: int = 1,
  *,
  padding: str,
  dtype: Any,
  name: str,
  groups: int = 1,
  convolve: Callable | None = None,
) -> nn.Conv:
  """A square convolution without bias; see the module on `padding`.

  `convolve`, with the arguments of `lax.conv_general_dilated`, computes it;
  None for our own choice.
  """
  if not convolve and groups in (1, features):
    convolve = _dense if groups == 1 else _depthwise
  return nn.Conv(
    features,
    (kernel, kernel),
    strides=(stride, stride),
    padding=_padding(padding, kernel),
    feature_group_count=groups,
    conv_general_dilated=convolve,
    use_bias=False,
    kernel_init=_KERNEL_INIT,
    dtype=dtype,
    name=name,
  )


def norm(
  train: bool,
  *,
  dtype: Any,
  name: str,
  scale_init=nn.initializers.ones,
  epsilon: float = 1e-5,
) -> nn.BatchNorm:
  """Batch norm with PyTorch's constants; its statistics are float32."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=epsilon,
    dtype=dtype,
    scale_init=scale_init,
    name=name,
  )


def conv_norm(
  x: jax.Array,
  features: int,
  kernel: int,
  stride: int = 1,
  *,
  train: bool,
  padding: str,
  dtype: Any,
  name: str,
  groups: int = 1,
  convolve: Callable | None = None,
  activation: Callable[[jax.Array], jax.Array] | None = None,
  epsilon: float = 1e-5,
) -> jax.Array:
  """Convolution `<name>_conv`, norm `<name>_norm`, activation; see `conv`."""
  x = conv(
    features,
    kernel,
    stride,
    padding=padding,
    dtype=dtype,
    name=f'{name}_conv',
    groups=groups,
    convolve=convolve,
  )(x)
  x = norm(train, dtype=dtype, name=f'{name}_norm', epsilon=epsilon)(x)
  return activation(x) if activation else x


def max_pool(
  x: jax.Array, window: int, stride: int, *, padding: str
) -> jax.Array:
  """Maximum over square windows."""
  return nn.max_pool(
    x,
    window_shape=(window, window),
    strides=(stride, stride),
    padding=_padding(padding, window),
  )


def pool_and_classify(
  x: jax.Array, num_classes: int, dropout: float = 0.0, train: bool = False
) -> jax.Array:
  """Mean over the pixels, dropout, then a dense layer `HEAD`.

  In float32 whatever the dtype, from the sum on: ties of bfloat16 logits would
  make an argmax depend on the backend.

  Args:
    x: [B, H, W, C].
    num_classes: K.
    dropout: chance that a channel is dropped in training.
    train: whether this is training.

  Returns:
    float32 [B, K].
  """
  x = x.mean((1, 2), dtype=jnp.float32)
  if dropout:
    x = nn.Dropout(dropout)(x, deterministic=not train)
  return nn.Dense(num_classes, name=HEAD)(x)


def round_channels(channels: float) -> int:
  """To a multiple of 8, at most a tenth below (MobileNetV2's rule)."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
  """Within, convolutions are traced as briefly as can be, their shapes right.

  Fresh filters are zeros, and none is computed in another way on CPUs. To trace
  how filters are drawn takes as long as all the rest of an `init`.
  """

  def brief(call, args, kwargs, context):
    module = context.module
    if isinstance(module, nn.Conv):
      object.__setattr__(module, 'kernel_init', nn.initializers.zeros)
      if module.conv_general_dilated in (narrow_conv, _dense, _depthwise):
        object.__setattr__(module, 'conv_general_dilated', None)
    return call(*args, **kwargs)

  with nn.intercept_methods(brief):
    yield


def _traced_once(convolve: Callable) -> Callable:
  """A convolution that is traced and differentiated once for all of a shape.

  In a network they come again and again.
  """

  @functools.partial(jax.jit, static_argnums=2)
  def jitted(x, kernel, how):
    strides, padding, options = how
    return convolve(x, kernel, strides, padding, **dict(options))

  @functools.wraps(convolve)
  def call(x, kernel, strides, padding, **options):
    if not isinstance(padding, str):
      padding = tuple(map(tuple, padding))
    how = tuple(strides), padding, tuple(options.items())
    return jitted(x, kernel, how)

  return call


@_traced_once
def narrow_conv(x, kernel, strides, padding, **options):
  """`lax.conv_general_dilated` of stride 1, for few output channels.

  XLA's convolutions for CPUs are slow then: one matrix product to the channels
  of all rows of the kernel at once, and the sum of its shifts, take half the
  time (below 16 channels; see results/ranet_speed.md).
  """

  def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)

  def add_rows(x, kernel):
    side, _, channels, features = kernel.shape
    x = _padded(x, kernel, strides, padding)
    height, width = x.shape[1] - side + 1, x.shape[2] - side + 1
    x = jnp.concatenate([x[:, :, j : j + width] for j in range(side)], -1)
    kernel = kernel.transpose(1, 2, 0, 3)
    rows = x @ kernel.reshape(side * channels, side * features)
    return sum(
      rows[:, i : i + height, :, i * features : (i + 1) * features]
      for i in range(side)
    )

  return lax.platform_dependent(x, kernel, cpu=add_rows, default=convolve)


@_traced_once
def _dense(x, kernel, strides, padding, **options):
  """`lax.conv_general_dilated` of filters over all channels.

  On CPUs there are two exceptions: the gradient of the filters, which for many
  pixels takes XLA 2 to 10 times as long as the rest, and 1x1, which is a matrix
  product.
  """

  def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)

  def multiply(x, kernel):
    return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]

  def product(view, gradient):
    channels, features = view.shape[-1], gradient.shape[-1]
    return view.reshape(-1, channels).T @ gradient.reshape(-1, features)

  of_cpu = quick = multiply if kernel.shape[:2] == (1, 1) else convolve

  def spread(gradient, x, kernel):
    (of_x,) = jax.linear_transpose(lambda x: quick(x, kernel), x)(gradient)
    return of_x

  if x.shape[1] * x.shape[2] >= _MANY_PIXELS:
    of_cpu = _with_gradients(quick, spread, product, strides, padding)
  elif quick is convolve:
    return convolve(x, kernel)
  return lax.platform_dependent(x, kernel, cpu=of_cpu, default=convolve)


@_traced_once
def _depthwise(x, kernel, strides, padding, **options):
  """`lax.conv_general_dilated` of a filter for each channel.

  XLA has no quick depthwise convolution for CPUs: as a sum of shifted products
  it is 15 to 50 times as fast there, its gradient about 20 times.
  """

  def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)

  def shift_and_add(x, kernel):
    weights = kernel.reshape(-1, kernel.shape[-1])
    views = _views(x, kernel, strides, 'VALID')
    return sum(view * w for view, w in zip(views, weights, strict=True))

  def product(view, gradient):
    ones = jnp.ones(math.prod(view.shape[:-1]))
    return ones @ (view * gradient).reshape(ones.size, -1)

  def of_cpu(x, kernel):
    # Once, for the convolution and for the gradient of the filters.
    x = _padded(x, kernel, strides, padding)
    spread = functools.partial(_spread, strides)
    return _with_gradients(shift_and_add, spread, product, strides, 'VALID')(
      x, kernel
    )

  return lax.platform_dependent(x, kernel, cpu=of_cpu, default=convolve)


def _spread(strides, gradient, images, kernel):
  """The gradient of the images of a depthwise convolution without padding.

  Sums of shifts of the padded gradient, one sum for all pixels that meet the
  same weights. XLA would transpose `shift_and_add` into a sum of padded
  products, and compute what precedes it (a norm's gradient) for each of them.

  Args:
    strides: of the convolution, in height and in width.
    gradient: [B, h, w, C], of the convolution.
    images: [B, H, W, C].
    kernel: [side, side, 1, C].

  Returns:
    [B, H, W, C].
  """
  sides, size = kernel.shape[:2], images.shape[1:3]
  reach = [-(-k // s) for k, s in zip(sides, strides, strict=True)]
  spans = [-(-n // s) for n, s in zip(size, strides, strict=True)]
  pads = [
    (r - 1, span - n)
    for r, span, n in zip(reach, spans, gradient.shape[1:3], strict=True)
  ]
  gradient = jnp.pad(gradient, ((0, 0), *pads, (0, 0)))

  def shifted(*of_weight):
    top, left = (
      r - 1 - k // s for r, k, s in zip(reach, of_weight, strides, strict=True)
    )
    return gradient[:, top : top + spans[0], left : left + spans[1]]

  def pixels(row, column):
    weights = itertools.product(
      range(row, sides[0], strides[0]), range(column, sides[1], strides[1])
    )
    return sum(
      (shifted(i, j) * kernel[i, j, 0] for i, j in weights),
      jnp.zeros((len(gradient), *spans, kernel.shape[-1]), gradient.dtype),
    )

  rows = [
    jnp.stack([pixels(row, column) for column in range(strides[1])], 3)
    for row in range(strides[0])
  ]
  whole = [n * s for n, s in zip(spans, strides, strict=True)]
  spread = jnp.stack(rows, 2).reshape(len(gradient), *whole, -1)
  return spread[:, : size[0], : size[1]]


def _with_gradients(convolve, spread, product, strides, padding):
  """A convolution of quick gradients on CPUs.

  That of the filters is matrix products, of a few images at a time, so that
  what the products take stays in the cache.

  Args:
    convolve: from images and filters to the convolution.
    spread: from the gradient of the convolution, images and filters to the
      gradient of the images.
    product: from what one weight of each filter is multiplied with, and the
      gradient of the convolution, to the gradient of these weights.
    strides, padding: of the convolution.
  """

  def backward(saved, gradient):
    x, kernel = saved
    some = math.gcd(len(x), 4)

    def add(total, part):
      x, gradient = part
      views = _views(x, kernel, strides, padding)
      products = [product(view, gradient) for view in views]
      return total + jnp.stack(products).reshape(kernel.shape), None

    parts = [a.reshape(-1, some, *a.shape[1:]) for a in (x, gradient)]
    of_kernel, _ = lax.scan(add, jnp.zeros_like(kernel, jnp.float32), parts)
    return spread(gradient, x, kernel), of_kernel.astype(kernel.dtype)

  function = jax.custom_vjp(convolve)
  function.defvjp(lambda *saved: (convolve(*saved), saved), backward)
  return function


def _views(x, kernel, strides, padding):
  """Of [B, H, W, C], what each weight of a filter is multiplied with."""
  sides = kernel.shape[:2]
  x = _padded(x, kernel, strides, padding)
  spans = [
    (size - side) // stride * stride + 1
    for size, side, stride in zip(x.shape[1:3], sides, strides, strict=True)
  ]
  for i, j in itertools.product(*map(range, sides)):
    rows = slice(i, i + spans[0], strides[0])
    yield x[:, rows, j : j + spans[1] : strides[1]]


def _padded(x, kernel, strides, padding):
  """Images [B, H, W, C] as a convolution pads them."""
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      x.shape[1:3], kernel.shape[:2], tuple(strides), padding
    )
  return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _padding(padding: str, kernel: int):
  """As Linen takes it."""
  if padding == 'same':
    return 'SAME'
  if padding != 'symmetric':
    raise ValueError(f"padding {padding!r} is not 'symmetric' or 'same'")
  pad = (kernel - 1) // 2
  return (pad, pad), (pad, pad)
