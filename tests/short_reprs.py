"""Configs of transformers that print as one word, so that tests read them in a tenth of the time.

transformers writes a config out in full, with the defaults of its class made anew to compare with, for a log line that
nobody sees and wherever a field of a union is no instance of its first type: of Qwen2.5-Omni that is 0.1 s at each
reading, of which tests have thousands. Nothing reads the text; how a config is read, checked and saved stays as it is.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


def _repr(self: PreTrainedConfig) -> str:
    return f"{type(self).__name__}()"


PreTrainedConfig.__repr__ = _repr
