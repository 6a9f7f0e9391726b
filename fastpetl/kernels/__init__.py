"""Triton kernels. Sources live in the repository's top-level `kernels/`; an installed wheel carries them in here."""

from pathlib import Path as _Path

# The folder is taken only where setup.py stands beside it: in site-packages, `kernels` is Hugging Face's package.
_root = _Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file() and (_root / "kernels" / "adapter.py").is_file():
    __path__.insert(0, str(_root / "kernels"))
del _Path, _root
