"""A preparation: says how far it is, makes the folder, prints its name.

Fails while ``<folder>.fail`` exists.
"""

import json
import sys
from pathlib import Path

folder, progress = Path(sys.argv[1]), Path(sys.argv[2])
progress.write_text(
    json.dumps({"stage": "download", "done": 1, "total": 2, "unit": "bytes", "message": "half"})
)
if folder.with_suffix(".fail").exists():
    message = "no space left on the device; free 1 GiB"
    progress.write_text(json.dumps({"stage": "failed", "done": 1, "total": 2, "message": message}))
    sys.exit(1)
folder.mkdir(parents=True, exist_ok=True)
print("a line before")
print(folder)
