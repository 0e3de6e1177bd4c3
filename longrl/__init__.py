"""longrl: reinforcement learning for vision-language models that reason over long videos."""

from longrl.torchvision_ops import retry_on_import

__version__ = "0.1.0"

retry_on_import()
