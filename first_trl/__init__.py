"""Trustworthy distillation on the Hugging Face stack (FIRST, arXiv 2408.12168)."""

import lazy_loader

from .utils.versions import __version__


# The names stand in `__init__.pyi`, once, for Python and for editors. Each is imported on first use: `import first_trl`
# and the calibration core stay light, and someone who only wants an ECE never loads torch.
__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]
