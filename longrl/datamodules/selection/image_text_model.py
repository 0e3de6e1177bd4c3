"""Similarity of pictures and a text by a CLIP or SigLIP of a local folder: on the CPU, loaded once per process.

Nothing is downloaded, no pickle is read, and code in a folder is never run. Letters: C candidates, F pictures of a
batch, D width of the embeddings.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longrl.datamodules.media.video import content_digest
from longrl.datamodules.selection.candidates import KEPT, Candidates
from longrl.io.atomic import PARTIAL_SUFFIX, atomic_write
from longrl.io.weight_folder import WEIGHTS, local_weight_folder

logger = logging.getLogger(__name__)

OPTION = "data.selection.init_args.folder"
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
FILES = ("*.json", "*.txt", "*.model", WEIGHTS)
"""Of a folder that decide its embeddings."""
DIGITS = 4
"""Of a similarity that count: processors round differently behind them, and ranks must choose alike."""
DEFAULT_SIDE = 224
EMBEDDING_RULES = 1
"""Raised when the same pictures get other embeddings than before."""


def check_folder(folder: str) -> None:
    """Raises ValueError for a folder without a model of pictures and texts; its weights are not read."""
    path = local_weight_folder(folder, OPTION, "a CLIP or SigLIP")
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(path, **LOCAL), trust_remote_code=False)
    except Exception as error:  # whatever foreign values lead to in the config's class
        said = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise ValueError(f"{OPTION}={folder!r} holds no model that transformers knows ({said})") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(
            f"{OPTION}={folder!r} must hold a model of pictures and texts, and a {type(model).__name__} is none; take "
            "a CLIP or SigLIP"
        )


def model_digest(folder: str) -> str:
    """Sha256 of a folder's weights, config and processor, each file read once per process."""
    path = Path(folder).expanduser()
    files = sorted({file for pattern in FILES for file in path.glob(pattern)})
    said = [(file.name, content_digest(file)) for file in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def similarities(
    video: Candidates, question: str, folder: str, batch_size: int, cache_dir: str | None
) -> NDArray[np.float64]:
    """[C] cosine similarity of each candidate and a question, rounded to `DIGITS`."""
    named = f"{EMBEDDING_RULES} {model_digest(folder)} {video.key} {batch_size}"
    name = hashlib.sha256(named.encode()).hexdigest()

    def embed() -> NDArray[np.float32]:
        return load_model(folder).embed_pictures(video, batch_size)

    def read_or_embed() -> NDArray[np.float32]:
        if cache_dir is None:
            return embed()
        file = Path(cache_dir).expanduser() / f"{name}.npy"
        stored = _stored(file, len(video))
        if stored is not None:
            return stored
        embedded = embed()
        _keep_first(file, embedded)
        stored = _stored(file, len(video))
        return embedded if stored is None else stored

    pictures = KEPT.get(name, read_or_embed)
    text = load_model(folder).embed_text(question)
    return np.round(pictures.astype(np.float64) @ text.astype(np.float64), DIGITS)


def _keep_first(file: Path, embedded: NDArray[np.float32]) -> None:
    """Writes embeddings where there are none: of several writers the first wins, for all must choose by the same."""
    content = io.BytesIO()
    np.save(content, embedded, allow_pickle=False)
    own = atomic_write(file.with_name(f".{file.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"), content.getvalue())
    try:
        os.link(own, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last one wins
        own.replace(file)
    finally:
        own.unlink(missing_ok=True)


def _stored(file: Path, count: int) -> NDArray[np.float32] | None:
    """Embeddings on disk; None where they are not there, or damaged, and removed then."""
    try:
        stored = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s cannot be read (%s); its pictures are embedded anew", file, error)
        file.unlink(missing_ok=True)
        return None
    if stored.ndim != 2 or len(stored) != count or stored.dtype != np.float32:
        logger.warning("%s is not of %d pictures; they are embedded anew", file, count)
        file.unlink(missing_ok=True)
        return None
    return stored


@functools.lru_cache(maxsize=2)
def load_model(folder: str) -> ImageTextModel:
    """The model of a folder, once per process."""
    return ImageTextModel(folder)


class ImageTextModel:
    """Embeds pictures and texts.

    Args:
        folder: see `check_folder`.

    Raises:
        ValueError: weights of the model are missing.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoProcessor

        path = Path(folder).expanduser()
        model, loading = AutoModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **LOCAL
        )
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ValueError(
                f"{OPTION}={folder!r} lacks {len(missing)} weights, {missing[0]} among them; fetch it again"
            )
        self.model = model.eval().requires_grad_(False)
        self.processor = AutoProcessor.from_pretrained(path, **LOCAL)
        self.max_tokens = model.config.text_config.max_position_embeddings
        size = self.processor.image_processor.size
        sides = [size[name] for name in ("shortest_edge", "height", "width") if size.get(name)]
        self.side = min(sides, default=DEFAULT_SIDE)
        """Pixels of a picture's shorter side that it makes use of."""

    @torch.no_grad()
    def embed_pictures(self, video: Candidates, batch_size: int) -> NDArray[np.float32]:
        """[C, D] of length 1, of all candidates."""
        embedded = []
        options: dict[str, Any] = {"input_data_format": "channels_last", "return_tensors": "pt"}
        for pictures in video.pictures(self.side):
            for start in range(0, len(pictures), batch_size):
                batch = list(pictures[start : start + batch_size])
                inputs = self.processor.image_processor(images=batch, **options)
                embedded.append(_unit(self.model.get_image_features(**inputs).pooler_output))
        return torch.cat(embedded).numpy()

    @torch.no_grad()
    def embed_text(self, text: str) -> NDArray[np.float32]:
        """[D] of length 1; a longer text is cut at what the model reads."""
        # SigLIP was trained on padded texts alone; CLIP masks what is padded.
        options = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True}
        tokens = self.processor.tokenizer([text], return_tensors="pt", **options)
        return _unit(self.model.get_text_features(**tokens).pooler_output)[0].numpy()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
