"""FFmpeg's libraries as PyAV's wheel brings them, under the names by which torchcodec looks for them.

    export LD_LIBRARY_PATH="$(python -m longrl.datamodules.media.ffmpeg_links ~/.cache/longrl/ffmpeg)"

The loader of Linux takes a link for the library that it leads to: one FFmpeg serves both. Other systems, and a PyAV
that was built against the system's FFmpeg, need none.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

LIBRARY = re.compile(r"(?P<name>lib[a-zA-Z0-9-]+?)-[0-9a-f]{8}\.so\.(?P<major>\d+)[\d.]*")
"""`libavcodec-5e6b81c2.so.62.28.102`, which other libraries know as `libavcodec.so.62`."""
OF_FFMPEG = ("libav", "libsw")


def link_ffmpeg(folder: Path) -> Path:
    """Fills a folder with links to the libraries in PyAV's wheel, and gives its absolute path.

    Raises:
        ImportError: PyAV brought none.
    """
    spec = find_spec("av")
    assert spec is not None, "longrl needs PyAV"
    assert spec.origin is not None, "it is a package"
    libraries = sorted(Path(spec.origin).resolve().parents[1].glob("av.libs/*.so*"))
    if not libraries:
        raise ImportError("PyAV has no libraries of its own here; install FFmpeg's shared libraries")
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        parts = LIBRARY.fullmatch(library.name)
        names = [library.name]  # by which they know each other
        if parts and library.name.startswith(OF_FFMPEG):
            names.append(f"{parts['name']}.so.{parts['major']}")
        for name in names:
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return folder.resolve()


if __name__ == "__main__":
    sys.stdout.write(f"{link_ffmpeg(Path(sys.argv[1]))}\n")
