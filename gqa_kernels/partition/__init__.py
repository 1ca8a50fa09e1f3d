"""Splits head maps across the ranks of tensor parallelism, provably optimally.

Each rank holds whole query heads and only the KV heads that they read. If two ranks read a KV head,
both hold it. The load of a rank is ``query_cost * query heads + kv_cost * KV heads``. The
assignment minimises the largest load and, second, the number of KV heads held by all ranks, so a
KV head is replicated only if that lowers the maximum.

Query heads that read the same K and V are interchangeable, so only the sizes of the groups matter.
If ``x[g, r]`` is the number of group ``g``'s heads on rank ``r``, this is bin packing with
splittable items and set-up costs. If a simple split meets the bounds on both counts, it is optimal.
Otherwise SciPy's HiGHS solves a mixed-integer program.
"""

from .assignment import assign
from .groups import Groups

__all__ = ["Groups", "assign"]
