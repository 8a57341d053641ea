"""Factors whose rows are spread over processes: placements for ``fully_shard``, and the step that gathers none.

The mathematics is in docs/design.md, 3.6. ``optim.attach`` and ``optim.StellaAdamW`` take sharded parameters (DTensor)
as they take whole ones; nothing here has to be called for that.
"""

from .base import shard_base
from .placement import shard_placement

__all__ = ["shard_base", "shard_placement"]
