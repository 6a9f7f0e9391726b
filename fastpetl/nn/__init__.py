"""Drop-in modules: adapters and fused blocks. Model families' blocks are imported from their own files, never from
here.
"""

from fastpetl.nn.adapter import BottleneckAdapter

__all__ = ["BottleneckAdapter"]
