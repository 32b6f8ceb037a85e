"""Values of a state dict, of any tensor type, as ``TensorValue`` and ``ObjectValue``.

One module per family of types; ``describe`` chooses. Does not belong here: walking the state dict
(``state.flatten``) and comparing ranks (``planning``).
"""

from dcp_engine.state.adapters.describe import describe, describe_leaves
from dcp_engine.state.adapters.group import GroupRanks
from dcp_engine.state.adapters.wrapper import FLATTEN_KEY

__all__ = ["FLATTEN_KEY", "GroupRanks", "describe", "describe_leaves"]
