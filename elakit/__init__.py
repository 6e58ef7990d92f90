"""elakit: see, measure and fix concept bleeding in text-to-image diffusion models."""

import lazy_loader

__version__ = "0.1.0"

# The public names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is
# needed, so that `import elakit` and `elakit --help` load neither torch nor diffusers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
