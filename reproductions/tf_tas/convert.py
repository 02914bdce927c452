"""The authors' checkpoints -> ours.

None were published. Their code saves retrained subnets in the supernet's shape, under the names
that we use as well: what belongs to the subnet is cut out. PiT networks need no conversion.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reproductions.autoformer.convert import take_subnet
from reproductions.autoformer.space import get_space
from reproductions.tf_tas.model import FOUND

State = dict[str, Tensor]


def to_t(state: Mapping[str, Tensor]) -> State:
    """TF-TAS-T out of a checkpoint of supernet T."""
    return take_subnet(state, get_space("t"), FOUND["t"])


def to_s(state: Mapping[str, Tensor]) -> State:
    """TF-TAS-S out of a checkpoint of supernet S."""
    return take_subnet(state, get_space("s"), FOUND["s"])


def to_b(state: Mapping[str, Tensor]) -> State:
    """TF-TAS-B out of a checkpoint of supernet B."""
    return take_subnet(state, get_space("b"), FOUND["b"])
