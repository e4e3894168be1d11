"""The two memories.

Long-term (`LongTermMemory`): digests of the training tasks' episodes in SQLite, recalled by similarity and learnt utility.
Short-term (`ShortTermMemory`): ring buffers of the latest episodes per task. Embedders: `get_embedder`, `embed.PolicyStates`.
Upkeep of files: `verify`, `export`, `import_export`.
Switching a memory off means not making one: nothing else reaches for it.
"""

from falconlib.memory.embed import HashedTfidf, get_embedder
from falconlib.memory.long_term import LongTermMemory
from falconlib.memory.short_term import ShortTermMemory
from falconlib.memory.upkeep import export, import_export, verify

__all__ = ["HashedTfidf", "LongTermMemory", "ShortTermMemory", "export", "get_embedder", "import_export", "verify"]
