"""longrl: reinforcement learning for vision-language models that reason over long videos."""

__version__ = "0.1.0"
