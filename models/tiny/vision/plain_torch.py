"""Lets transformers be imported beside a CPU build of torch; import this module before transformers.

The torchvision and torchaudio wheels of PyPI are built for CUDA. Beside a CPU torch their import fails
and takes transformers with it, though nothing here needs them; so here they count as not installed.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch

if torch.version.cuda is None:
    for _name in ("torchvision", "torchaudio", "torchcodec"):
        if _name not in sys.modules:
            # None makes the import system say "not found"; the annotation of sys.modules does not know of it.
            cast(dict[str, Any], sys.modules)[_name] = None
