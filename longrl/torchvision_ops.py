"""Mends a torchvision whose compiled operators do not load: `python -m longrl.torchvision_ops`, once per environment.

The torchvision wheels of the package index are CUDA builds. Beside a CPU PyTorch their library does not load, so the
operators `nms` and `qnms` do not exist, and `import torchvision` stops where it registers fake versions of them. Then
`import lightning` stops too, for torchmetrics imports torchvision where it is installed. Resizing, normalising and
transformers' image and video processors are plain Python and need neither operator; declaring the two names is enough
for them. Calling them stays an error.

The declaration goes into torchvision's own `extension.py`, behind the lines that try to load the library. So it holds
in every process of that environment, the ones that loaders and vLLM start included, whatever they import first; it
does nothing once the library loads; and installing torchvision anew removes it. No other environment is touched, and
no command of longrl runs this by itself: `make env` does, and the user whom the error sends here.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

SYMPTOM = "operator torchvision::nms does not exist"
REMEDY = "The installed torchvision does not fit this PyTorch. Mend it once by: python -m longrl.torchvision_ops"

_DECLARATION = """

# Added by `python -m longrl.torchvision_ops`: torchvision's import needs these names, even if nothing calls them.
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def mend() -> Path | None:
    """Has torchvision declare its missing operators, if and only if its import fails for want of them.

    Returns:
        The file that was changed, None if torchvision could be imported as it is.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        spec = find_spec("torchvision")
        assert spec is not None
        assert spec.origin is not None
        file = Path(spec.origin).with_name("extension.py")
        text = file.read_text()
        if SYMPTOM not in str(error) or _DECLARATION in text:
            raise
        # A new file in place of the old one: package managers link one copy into several environments.
        mended = file.with_suffix(".mended")
        mended.write_text(text + _DECLARATION)
        mended.replace(file)
        return file
    return None


if __name__ == "__main__":
    changed = mend()
    sys.stdout.write(f"mended: {changed}\n" if changed else "torchvision imports as it is\n")
