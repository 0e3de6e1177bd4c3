"""`CausalFamily`: what every autoregressive model shares in being built, scored, exported and served.

A subclass says where its text stack and encoders are; `longrl/models/reading.py` has how it reads prompts.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.models.family import OWN_WEIGHTS
from longrl.models.loading import check_loaded
from longrl.models.lora import LoRASettings, export_adapters
from longrl.models.reading import ReadsChats
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.types import Media, Packed, PolicyOutput, Prompt

logger = logging.getLogger(__name__)

ALL_ROWS = slice(0, None)


class CausalFamily(ReadsChats):
    """An autoregressive transformers model.

    Args:
        model: folder or hub id with config, tokenizer and weights.
        dtype: precision of the weights.
        random_init: build from the config with random weights instead of loading; for tiny models and pretraining.
        init_seed: seed of the random weights.
        gradient_checkpointing: recompute layers in the backward pass.
        offload_checkpoints: keep what they are recomputed from, their inputs, in pinned host memory meanwhile.
        mlp_chunk_tokens: tokens that an MLP of the text stack computes together; None is all. Bounds memory, changes
            no result, for one more forward pass of the MLPs per update.
        chat_template_kwargs: passed to the chat template, e.g. `{enable_thinking: false}` for Qwen3.
        lora: train adapters of the text stack's linear layers and nothing else; `build` gives the model without them.
    """

    supports_sequence_parallel = True
    num_axes: ClassVar[int] = 1
    """Number of position axes."""
    text_part: ClassVar[str] = ""
    """Folder of the text model within an exported folder, where generation config and tokenizer are."""
    ignored_weight_prefixes: ClassVar[tuple[str, ...]] = ()
    """How the names of weights begin that a released folder holds for other models beside this one."""

    def __init__(
        self,
        model: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        random_init: bool = False,
        init_seed: int = 0,
        gradient_checkpointing: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        lora: LoRASettings | None = None,
        offload_checkpoints: bool = False,
        mlp_chunk_tokens: int | None = None,
    ) -> None:
        if mlp_chunk_tokens is not None and mlp_chunk_tokens < 1:
            raise ValueError(
                f"model.family.init_args.mlp_chunk_tokens must be at least 1, got {mlp_chunk_tokens}; 8192 is usual, "
                "null computes all tokens together"
            )
        if offload_checkpoints and not gradient_checkpointing:
            logger.warning(
                "model.family.init_args.offload_checkpoints has no effect without gradient_checkpointing; set that too"
            )
        self.model_path = model
        self.dtype = dtype
        self.random_init = random_init
        self.init_seed = init_seed
        self.gradient_checkpointing = gradient_checkpointing
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.lora = lora
        self.offload_checkpoints = offload_checkpoints
        self.mlp_chunk_tokens = mlp_chunk_tokens

    def __getstate__(self) -> dict[str, Any]:
        """Workers load their own tokenizer and processor."""
        cached = {"config", "tokenizer", "processor"}
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    @override
    def identity(self) -> dict[str, Any]:
        return super().identity() | {"dtype": self.dtype}

    # -- what a subclass says ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def auto_class(self) -> Any:
        """The transformers Auto class that builds the model."""

    @abc.abstractmethod
    def backbone(self, model: nn.Module) -> nn.Module:
        """The text stack: embeddings in, last hidden states out."""

    @property
    def feature_size(self) -> int:
        """Columns of a medium's features."""
        return self.config.get_text_config().hidden_size

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes weights, configs, tokenizer and processor."""
        self.save(model, folder)
        self.save_processing(folder)
        self._keep_generation_config(folder)

    def _keep_generation_config(self, folder: Path) -> None:
        """Its own in place of the one that transformers makes up for a model that is built from a checkpoint."""
        from transformers.utils import cached_file

        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        own = cached_file(self.engine_folder(), "generation_config.json", **options)
        if own is not None:
            shutil.copyfile(own, folder / self.text_part / "generation_config.json")

    def export_adapters(self, adapters: Mapping[str, Tensor], folder: Path, base: str) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`, for the weights that `base` names."""
        export_adapters(self, adapters, folder, base)

    def root_modules(self, model: nn.Module) -> list[nn.Module]:
        """What is sharded beside the layers, and gathered together: text stack and LM head."""
        return [self.backbone(model), model.get_output_embeddings()]

    def vision_encoder(self, model: nn.Module) -> nn.Module | None:
        """See `ModelFamily.encoder`."""
        return None

    def media_encoders(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The modules that `encode_media` reads: the encoder, and a projector if that is none of its own."""
        vision_encoder = self.vision_encoder(model)
        return () if vision_encoder is None else (vision_encoder,)

    def sharded_encoders(self, model: nn.Module) -> list[nn.Module]:
        """The encoders that train: units of sharding."""
        vision_encoder = self.vision_encoder(model)
        return [vision_encoder] if vision_encoder is not None and self.vision_encoder_trains(model) else []

    def encoder_settings(self) -> dict[str, Any]:
        """What decides patches beside pixels, and features beside weights: the feature cache on disk hashes it."""
        raise ValueError(
            f"model.feature_cache_dir needs to know what decides the features of {type(self).__name__}; define its "
            "`encoder_settings`, or leave the option out"
        )

    def vision_encoder_trains(self, model: nn.Module) -> bool:
        """Whether features need gradients."""
        vision_encoder = self.vision_encoder(model)
        return vision_encoder is not None and any(parameter.requires_grad for parameter in vision_encoder.parameters())

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers of the text stack: the units of sharding."""
        return list(self.backbone(model).layers)

    # -- building ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.read_config(self._existing_path())

    def read_config(self, source: str | Path) -> Any:
        """The config of a folder or hub id."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._existing_path())

    def _existing_path(self) -> str:
        """The folder or hub id; a string that looks like a path must exist, so that a typo never asks the hub."""
        path = Path(self.model_path).expanduser()
        if is_local(self.model_path) and not (path / "config.json").is_file():
            raise ValueError(
                f"model.family's model={self.model_path!r} is no folder with a config.json; give an exported Hugging "
                "Face folder or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
            )
        return str(path) if path.exists() else self.model_path

    def attention(self) -> str | dict[str, str]:
        """Attention implementation per sub-config: packed groups in the text stack, the model's own elsewhere."""
        from longrl.packing.attention import ATTENTION_NAME

        return ATTENTION_NAME

    def build(self, weights: str | None = OWN_WEIGHTS) -> nn.Module:
        """See `ModelFamily.build`."""
        source = (None if self.random_init else self._existing_path()) if weights == OWN_WEIGHTS else weights
        dtype = getattr(torch, self.dtype)
        if source is None:
            config = copy.deepcopy(self.config)  # the model keeps it and sets its attention in it
            with _seeded(self.init_seed):
                model = self.auto_class().from_config(config, attn_implementation=self.attention(), dtype=dtype)
        else:
            self._check_same_architecture(source)
            options = {"attn_implementation": self.attention(), "dtype": dtype, **self.loading(source)}
            model = self.load(source, **options)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def loading(self, source: str) -> dict[str, Any]:
        """Further keywords of `from_pretrained`, for a model that is part of what a folder holds."""
        return {}

    def load(self, source: str, **options: Any) -> nn.Module:
        """The model with the weights of a folder or hub id, all of them and nothing else.

        Raises:
            ValueError: names or shapes are not the model's.
        """
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = self.auto_class().from_pretrained(source, **options)
        info["unexpected_keys"] = [
            key for key in info["unexpected_keys"] if not key.startswith(self.ignored_weight_prefixes)
        ]
        check_loaded(source, **info)
        return model

    def _check_same_architecture(self, source: str) -> None:
        """Raises ValueError before any weight is read if `source` holds a model of other sizes."""
        found, wanted = self.read_config(source), self.config
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
            got, want = (getattr(config.get_text_config(), name, None) for config in (found, wanted))
            if got != want:
                raise ValueError(
                    f"{source!r} holds another model than model.family describes: {name} is {got} instead of {want}; "
                    "use the family the weights were made with"
                )

    def save(self, model: nn.Module, folder: str | Path) -> None:
        """Writes weights and config, with names and layout of the released files."""
        model.save_pretrained(folder)

    def save_processing(self, folder: str | Path) -> None:
        """Writes what turns text and media into model inputs, beside exported weights."""
        self.tokenizer.save_pretrained(folder)

    # -- scoring -------------------------------------------------------------------------------------------------

    def embed(self, model: nn.Module, packed: Packed, features: Mapping[str, Tensor], rows: slice = ALL_ROWS) -> Tensor:
        """[rows, D] embeddings of a micro-batch, media features in place of the prompts' placeholders.

        A placeholder token that a policy happens to sample is an ordinary token.
        """
        embeds = self.embed_tokens(model, packed.input_ids[rows])
        here, media = self._media_rows(packed, features, rows)
        if media:
            embeds = embeds.masked_scatter(here[:, None], torch.cat(media).to(embeds))
        return embeds

    def backbone_inputs(self, packed: Packed, features: Mapping[str, Tensor], rows: slice = ALL_ROWS) -> dict[str, Any]:
        """Further keywords of the text stack's forward for these rows, for a model that reads media in its layers."""
        return {}

    def _media_rows(self, packed: Packed, features: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, list[Tensor]]:
        """[rows] True where a media placeholder is, and the features that belong there."""
        media = [features[key] for key in packed.media_keys]
        count = sum(len(item) for item in media)
        places = self._media_places(packed)
        if count != int(places.sum()):
            raise ValueError(f"{int(places.sum())} media placeholders in the packed prompts, but {count} features")
        start = int(places[: rows.start].sum())
        here = places[rows]
        return here, rows_between(media, start, start + int(here.sum()))

    def embed_tokens(self, model: nn.Module, ids: Tensor) -> Tensor:
        """[L] token ids -> [L, D]; what placeholders get does not matter."""
        return model.get_input_embeddings()(ids)

    def _media_places(self, packed: Packed) -> Tensor:
        """[L] True where a prompt has a media placeholder."""
        ids = packed.input_ids
        in_prompt = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for span in packed.spans:
            in_prompt[span.start : span.start + span.prompt_tokens] = True
        return in_prompt & torch.isin(ids, torch.tensor(list(self.media_token_ids().values()), device=ids.device))

    def hidden_states(self, model: nn.Module, embeds: Tensor, position_ids: Tensor, **inputs: Any) -> Tensor:
        """[B, L, D] embeddings and [A, B, L] positions -> [B, L, D] last hidden states.

        Of `inputs`, `spans=`, `sequence=` and `layer_attention=` reach the attention function in every layer; others
        (`backbone_inputs`) are the text stack's own.
        """
        backbone, attention_mask = self.backbone(model), self.attention_mask(model)
        positions = position_ids if self.num_axes > 1 else position_ids[0]
        output = backbone(
            inputs_embeds=embeds, position_ids=positions, attention_mask=attention_mask, use_cache=False, **inputs
        )
        return output.last_hidden_state

    def attention_mask(self, model: nn.Module) -> Any:
        """The `attention_mask` with which the text stack makes no mask: the attention function knows the layout."""
        return dict.fromkeys({"full_attention", *self.backbone(model).config.layer_types})

    def lm_head(self, model: nn.Module) -> Tensor:
        """[V, D] weights of the output layer."""
        return model.get_output_embeddings().weight

    def forward(
        self,
        model: nn.Module,
        packed: Packed,
        features: Mapping[str, Tensor],
        temperature: float = 1.0,
        sequence: SequenceParallel = NO_SEQUENCE_PARALLEL,
    ) -> PolicyOutput:
        """See `ModelFamily.forward`; ranks of `sequence` give the same micro-batch, and get the same scores."""
        from longrl.packing.logprobs import chunked_logprobs

        packed = packed.padded(sequence.size).to(model.get_input_embeddings().weight.device)
        rows, count = sequence.rows(len(packed.input_ids)), len(packed.target_ids)
        embeds = self.embed(model, packed, features, rows)
        positions = packed.position_ids[:, None, rows]
        layout = {"spans": packed.spans, "sequence": sequence, **self.backbone_inputs(packed, features, rows)}
        with self._saving():
            hidden = self.hidden_states(model, embeds[None], positions, **layout)[0]
        scored, targets = sequence.scored(hidden, packed.predict_from), packed.target_ids[sequence.share(count)]
        logp, entropy = chunked_logprobs(scored, self.lm_head(model), targets, temperature)
        return PolicyOutput(sequence.gather(logp, count), sequence.gather(entropy, count))

    def _saving(self) -> contextlib.AbstractContextManager[Any]:
        """Where the text stack keeps what its backward pass needs: layers that are recomputed keep their input alone.

        torch's own hook and not transformers' `offload`, which asks for pinned memory also where there is no GPU.
        """
        if self.offload_checkpoints and self.gradient_checkpointing:
            return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        return contextlib.nullcontext()

    # -- rollout engines -----------------------------------------------------------------------------------------

    def engine_folder(self) -> str:
        """Where an engine with a model of its own finds config, tokenizer and processor."""
        return self._existing_path()

    def engine_options(self) -> dict[str, Any]:
        """What vLLM must be told of the model beside its folder."""
        return {}

    def engine_weight(self, name: str) -> str | None:
        """What vLLM calls a weight of the trainer's `state_dict`; None for what it never computes with."""
        return name

    def engine_tensor(self, name: str, weight: Tensor) -> Tensor:
        """The weight `name` laid out as vLLM reads it: as in the files that the model was released with."""
        return weight

    def engine_request(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """A prompt as vLLM takes it."""
        return {"prompt_token_ids": prompt.input_ids.tolist()}

    def encode_media(self, model: nn.Module, media: Sequence[Media]) -> list[Tensor]:
        """See `ModelFamily.encode_media`; a text model has no media."""
        if media:
            raise ValueError(f"{type(self).__name__} reads text only, but got {len(media)} media")
        return []


def rows_between(parts: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Rows start..stop of the parts laid end to end, without joining the others."""
    found, offset = [], 0
    for part in parts:
        piece = part[max(start - offset, 0) : max(stop - offset, 0)]
        if len(piece):
            found.append(piece)
        offset += len(part)
    return found


def is_local(source: str) -> bool:
    """Whether `source` is meant as a path: `owner/name` asks the hub, unless `owner` is a folder here (`runs/sft`)."""
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).parent.is_dir()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from `seed`, the trainer's own random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
