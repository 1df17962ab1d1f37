# SPDX-License-Identifier: Apache-2.0
"""What an image can be run at, and what that costs.

An option is a size of a network, an exit of one, or the same of one of several
networks. Options stand in ascending order of cost within their network.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

FEW = 4  # up to so many options, cascades try all sets
MOST_TRIED = 3  # options that a cascade tries, where there are more than FEW


@dataclasses.dataclass(frozen=True)
class Options:
  """Names of what can be chosen among, and which go on with which.

  Attributes:
    names: [R], for people: '112 px', 'exit 3', 'small: 112 px'.
    chain: [R], options of the same number, from 0, are exits of one network: a
      later one goes on with what an earlier one computed. -1 stands alone.
  """

  names: tuple[str, ...]
  chain: tuple[int, ...]

  @classmethod
  def of(cls, names: Sequence[str]) -> 'Options':
    """Of one network: exits if they are named so, else sizes."""
    names = tuple(str(name) for name in names)
    chain = (0 if name.startswith('exit ') else -1 for name in names)
    return cls(names, tuple(chain))

  @classmethod
  def join(cls, several: 'dict[str, Options]') -> 'Options':
    """Of several networks, by their names."""
    names, chain = [], []
    for prefix, one in several.items():
      names += [f'{prefix}: {name}' for name in one.names]
      first = max(chain, default=-1) + 1
      chain += [c + first if c >= 0 else c for c in one.chain]
    return cls(tuple(names), tuple(chain))

  def __len__(self) -> int:
    return len(self.names)

  @property
  def noun(self) -> str:
    """What one is called: a 'size', an 'exit', or an 'option' of a mixture."""
    if all(name.endswith(' px') and ':' not in name for name in self.names):
      return 'size'
    return 'exit' if set(self.chain) == {0} else 'option'

  def keeps_exits_together(self, path: Sequence[int]) -> bool:
    """Whether no other option comes between two exits of one network.

    Features are handed from an exit to the next, and kept nowhere else.
    """
    groups = itertools.groupby(self.chain[j] for j in path)
    networks = [chain for chain, _ in groups if chain >= 0]
    return len(set(networks)) == len(networks)

  @property
  def columns(self) -> tuple[tuple[int, ...], ...]:
    """Each option alone, then the sets of options whose mean may answer.

    Those are all runs of neighbours and, but for more than FEW exits, which are
    tried one after another, all sets that a cascade may try.
    """
    count, sets = len(self), []
    longest = count
    if count > FEW:
      longest = 1 if self.noun == 'exit' else MOST_TRIED
    for length in range(1, longest + 1):
      sets += itertools.combinations(range(count), length)
    sets += [
      tuple(range(i, j)) for i in range(count) for j in range(i + 2, count + 1)
    ]
    return tuple(dict.fromkeys(sets))


@dataclasses.dataclass(frozen=True)
class Costs:
  """What an image costs.

  Attributes:
    unit: 'GMACs' or 'ms'.
    options: [R], of running each with nothing run before it.
    predictor: of the predictor.
    source: how it was found.
  """

  unit: str
  options: tuple[float, ...]
  predictor: float
  source: str

  @property
  def full(self) -> float:
    """Of the most expensive option."""
    return max(self.options)

  def of_path(self, options: Options, path: Sequence[int]) -> np.ndarray:
    """What has been paid along a path of these options, float64 [P, P].

    At [s, i] the sum over path[s] to path[i] (0 for i < s); an exit costs what
    it adds to the exit of the same network before it.
    """
    count = len(path)
    paid = np.zeros((count, count))
    for start in range(count):
      spent, total = {}, 0.0  # in each network, and in all
      for i, j in enumerate(path[start:], start):
        chain, cost = options.chain[j], self.options[j]
        total += cost - spent.get(chain, 0.0)
        if chain >= 0:
          spent[chain] = cost
        paid[start, i] = total
    return paid
