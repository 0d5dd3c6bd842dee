"""Loads ultralytics so that it works here and keeps to itself.

It would write its settings into the home folder, look for updates on the network, install packages it misses,
and call a torchvision operator that may not exist.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def load(path: Path, device: str, *, settings: Path | None = None) -> Any:
    """An ``ultralytics.YOLO`` on a device, ready to predict.

    Args:
        path: a ``.pt`` file, or a folder with one. Such a file is a pickle and runs code when loaded: only
            files whose checksum is known may get here.
        device: torch's name of it, "cpu" or "cuda:0".
        settings: folder that ultralytics may write to; by default one of this user's under the temporary
        folder.

    Raises:
        OSError: no weights.
        ValueError: the model does not detect boxes.
    """
    weights = find_weights(path)
    folder = settings or Path(tempfile.gettempdir()) / f"hearth-ultralytics-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Read by ultralytics and matplotlib when they are imported, so not before this.
    os.environ |= {
        "YOLO_CONFIG_DIR": str(folder),
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_VERBOSE": "false",
        "MPLCONFIGDIR": str(folder),
    }
    from ultralytics import YOLO

    from kernels.nms import install

    install()
    model: Any = YOLO(str(weights))
    if model.task != "detect":
        raise ValueError(f"{weights} is a model for '{model.task}', not for detection")
    return model.to(device)


def find_weights(path: Path) -> Path:
    """The ``.pt`` file that ``path`` is or holds.

    Raises:
        OSError: there is none, or more than one.
    """
    if path.is_file():
        return path
    files = sorted(path.glob("*.pt"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"{path} must hold one .pt file with YOLO weights; it has {found}")
    return files[0]
