# SPDX-License-Identifier: Apache-2.0
"""Is it worth it here? Times inference on this machine, path by path.

    python -m drnet_jax benchmark --workdir=runs/quickstart
    python -m drnet_jax benchmark --network=resnet50 --out=runs/speed

With a workdir: its model, its test images, the sizes that its predictor
chooses. With a network's name: DR-ResNet of random weights (predictor ResNet-10
at 128 px, 1000 classes), synthetic JPEGs, and sizes drawn with `--shares` while
the predictor runs all the same.

Times, all paths in turn so that a machine that changes its speed does so for
all, medians of the rounds:

* every network by itself, per size and batch;
* whole predictions, routed against fixed at the largest size of the same path:
  one at a time, and in bulk. `implied` is the ratio of their multiply-adds,
  predictor counted; `realised` that of their times;
* where the time of a single prediction goes: decode, resize, predictor,
  network, and what the host does between;
* decoding files whole against decoding them no larger than needed
  (`decode='scaled'`), and how many answers that changes.

Leaves `speed.csv`, `worth.csv`, `parts.csv`, `decoding.csv` and the figure
`latency` (the paper's Figure 3 where the workdir was evaluated). Training steps
are timed by `drnet_jax benchmark_training`.

A network with exits is timed by `benchmark_exits`, with the same command.
"""

from collections.abc import Sequence

from drnet_jax.bench import inference


def run(arguments: Sequence[str]) -> None:
  inference.run()
