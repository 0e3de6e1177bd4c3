"""`CausalFamily`: an autoregressive transformers model as longrl trains it, and its part of a training step.

`longrl/models/family.py` says which hooks a new family writes. Letters: L packed tokens, l those of one rank, R scored
rows, N media tokens, A position axes, D hidden size, V vocabulary.
"""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longrl.models.building import BuildsModel
from longrl.models.checkpoint_offload import OffloadedCheckpoints
from longrl.models.chunked_logprobs import chunked_scores
from longrl.models.engine_adapter import EngineAdapter
from longrl.models.expert_routing import expert_rows, layer_inputs
from longrl.models.kept_distributions import KeptDistributions
from longrl.models.lora import LoRASettings, export_adapters
from longrl.models.patching import PatchesMedia
from longrl.models.planning_sizes import HasPlanningSizes
from longrl.models.reading import RendersPrompts
from longrl.models.teacher_targets import TeacherTargets
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.types import Dtype, Features, GroupSpan, Media, Packed, PolicyOutput, to_device

logger = logging.getLogger(__name__)

ALL_ROWS = slice(0, None)


class EncodesMedia(PatchesMedia):
    """How do patches become features?"""

    def media_encoders(self, model: Any) -> tuple[nn.Module, ...]:
        """The modules that `encode_media` runs, the vision encoder first; a projector may be one of its own.

        One that reads what another gives, as a projector does, runs once for all media of an `encode_media`: where both
        train and are sharded, ranks go in step in the backward pass, however many calls the first one takes.
        """
        return ()

    def projectors(self, model: Any) -> tuple[nn.Module, ...]:
        """The parts of the encoders, or beside them, that lead from their width to the language model's."""
        return ()

    def trained_encoders(self, model: Any) -> list[nn.Module]:
        """The encoders whose features need gradients; with sharded weights, units of sharding."""
        encoders = []
        for encoder in self.media_encoders(model):
            trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
            if trained:
                encoders.append(encoder)
        return encoders

    def encode_media(self, model: Any, media: Sequence[Media]) -> list[Tensor]:
        """[N_i, D] features of each media item, in the order given."""
        for item in media:
            self._refuse_media(item.kind)
        return []

    @property
    def feature_size(self) -> int:
        """Columns of a media item's features: the hidden size, and once more for each level of DeepStack."""
        text_config = self.config.get_text_config()
        return text_config.hidden_size

    def encoder_settings(self) -> dict[str, Any]:
        """All that decides patches beside pixels, and features beside weights: the feature cache on disk hashes it."""
        raise ValueError(
            f"model.feature_cache_dir needs to know what decides the features of {type(self).__name__}; define its "
            "`encoder_settings`, or leave the option out"
        )


class TextStack(RendersPrompts):
    """Which log-probabilities has the model for the completions of a micro-batch?"""

    supports_sequence_parallel: ClassVar[bool] = True
    """True if ranks can share a sequence."""
    casts_inputs: ClassVar[bool] = True
    """True if sharded layers cast what they are given to the precision they compute in."""
    gradient_checkpointing: bool
    offload_checkpoints: bool
    compile_layers: bool
    fp32_lm_head: bool = False
    """Compute logits in float32 whatever the precision of the layers, in engines too: `model.algorithm.fp32_lm_head`,
    which `PolicyModule` sets here. Takes a float32 copy of the LM head while it is used."""
    router_replay: bool = False
    """Have the engine return the experts that it chose: `rollout.router_replay`; the rollout callback sets it here."""

    @abc.abstractmethod
    def backbone(self, model: Any) -> Any:
        """The text stack: embeddings in, last hidden states out."""

    def layers(self, model: Any) -> Sequence[nn.Module]:
        """The layers of the text stack: units of sharding."""
        return list(self.backbone(model).layers)

    def root_modules(self, model: Any) -> list[nn.Module]:
        """Modules that are sharded beside the layers, and gathered together: text stack and LM head."""
        lm_head = model.get_output_embeddings()
        return [self.backbone(model), lm_head]

    def forward(
        self,
        model: Any,
        packed: Packed,
        features: Features,
        temperature: float = 1.0,
        sequence: SequenceParallel = NO_SEQUENCE_PARALLEL,
        entropy_gradient: bool = False,
        teacher: TeacherTargets | None = None,
        keep: KeptDistributions | None = None,
    ) -> PolicyOutput:
        """Log-probabilities and entropies of the completions of a micro-batch.

        Args:
            model: made by `build`.
            packed: the micro-batch; all ranks of `sequence` give the same, and get the same scores.
            features: by media key, [N, D].
            temperature: the completions were sampled with.
            sequence: the ranks that share it.
            entropy_gradient: entropies carry a gradient, for a loss that reads them.
            teacher: whose distributions the rows' are compared with, with gradient.
            keep: what to return of the rows' own distributions, as a teacher is asked.
        """
        # 1. The rows of this rank, padded so that every rank has as many.
        device = model.get_input_embeddings().weight.device
        packed = packed.to(device, multiple=sequence.size)
        rows = ALL_ROWS if sequence.size == 1 else sequence.rows(len(packed.input_ids))
        positions = packed.position_ids[:, None, rows]  # [A, 1, l]

        # 2. Token embeddings, with features in place of the prompts' placeholders.
        inputs = self.text_inputs(model, packed, features, rows)  # [1, l, D] and what else the layers read
        given = None if packed.experts is None else packed.experts[rows]  # [l, M, k]
        experts = expert_rows(self, model, positions.shape[-1], given)
        inputs |= layer_inputs(experts)

        # 3. The layers. Attention alone looks beyond a rank's rows.
        offload: Any = contextlib.nullcontext()
        if self.offload_checkpoints and self.gradient_checkpointing:
            offload = OffloadedCheckpoints()
        with offload:
            hidden = self.hidden_states(model, positions, packed.spans, sequence=sequence, **inputs)
        load = None if experts is None else experts.load(packed.spans[-1].stop - rows.start)

        # 4. Logits for the scored rows only; several ranks take equal parts, wherever these rows lie.
        lm_head = model.get_output_embeddings().weight  # [V, D]
        num_scored = len(packed.target_ids)
        share = sequence.share(num_scored)
        if sequence.size == 1:
            scored = hidden[0][packed.predict_from]  # [R, D]
        else:
            assert packed.host_predict_from is not None  # since 1.
            scored = sequence.scored(hidden[0], packed.host_predict_from)  # [R / ranks, D]
        scores = chunked_scores(
            scored,
            lm_head,
            packed.target_ids[share],
            temperature,
            fp32=self.fp32_lm_head,
            entropy_gradient=entropy_gradient,
            teacher=None if teacher is None else teacher.share(share),
        )
        divergence = None if scores.divergence is None else sequence.gather(scores.divergence, num_scored)
        kept = None if keep is None else keep.of_rows(scored, lm_head, temperature, self.fp32_lm_head)
        logp = sequence.gather(scores.logp, num_scored)  # [R]
        entropy = sequence.gather(scores.entropy, num_scored)
        return PolicyOutput(logp, entropy, load, divergence, kept)

    def text_inputs(
        self,
        model: Any,
        packed: Packed,
        features: Features,
        rows: slice = ALL_ROWS,
    ) -> dict[str, Any]:
        """The text stack's inputs for these rows: `inputs_embeds` [1, rows, D], features in place of placeholders."""
        ids = packed.input_ids[rows]
        embeddings = model.get_input_embeddings()
        # Special tokens may lie behind the last row: NVILA-8B has 151648, and its video token is 151650. Placeholders
        # are replaced below.
        behind = ids >= embeddings.num_embeddings
        embeds = embeddings(ids.masked_fill(behind, 0))  # [rows, D]
        mask, values = self.media_rows(packed, features, rows)
        if values is None:
            return {"inputs_embeds": embeds[None]}
        values, offsets = self.rows_and_offsets(values)
        width = embeds.shape[1]
        first = values[:, :width].to(embeds)
        embeds = embeds.masked_scatter(mask[:, None], first)
        inputs: dict[str, Any] = {"inputs_embeds": embeds[None]}
        if offsets is not None:
            none = torch.zeros(len(ids), offsets.shape[1], dtype=offsets.dtype, device=ids.device)
            inputs["position_offsets"] = none.masked_scatter(mask[:, None], offsets.to(ids.device)).T  # [A, rows]
        if values.shape[1] > width:  # further columns are added behind the first layers (DeepStack, arXiv:2406.04334)
            levels = values[:, width:].split(width, -1)
            inputs["visual_pos_masks"] = mask[None]
            inputs["deepstack_visual_embeds"] = list(levels)
        return inputs

    def rows_and_offsets(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the text stack reads of [N, D] features, and what they add to their placeholders' positions.

        Returns:
            [N, D'] and [N, A] int64, None where a prompt's positions are known without its features.
        """
        return rows, None

    def media_rows(
        self,
        packed: Packed,
        features: Features,
        rows: slice,
    ) -> tuple[Tensor, Tensor | None]:
        """The rows of a micro-batch that are media placeholders, and the features that belong there.

        A placeholder token that a policy happens to sample is an ordinary token: media are in prompts, and in what
        completions were shown.

        Returns:
            [rows] bool; [true ones, D] in their order, None where no row is one.
        """
        # Asked of the ids on the host: a GPU would be waited for.
        device = packed.input_ids.device
        ids = packed.input_ids if packed.host_ids is None else packed.host_ids
        given = torch.zeros_like(ids, dtype=torch.bool) if packed.shown is None else packed.shown.clone()  # [L]
        for span in packed.spans:
            stop = span.start + span.prompt_tokens
            given[span.start : stop] = True

        # Media of a token fill its placeholders in order: a video's may stand among those of its sound track.
        tokens = self.media_token_ids()
        mask = torch.zeros_like(given[rows])
        indices: list[Tensor] = []
        parts: list[Tensor] = []
        for token in dict.fromkeys(tokens.values()):
            is_placeholder = given & (ids == token)  # [L]
            num_placeholders = int(is_placeholder.sum())
            media: list[Tensor] = []
            num_features = 0
            for key, kind in zip(packed.media_keys, packed.media_kinds, strict=True):
                if tokens[kind] == token:
                    media.append(features[key])
                    num_features += len(features[key])
            if num_features != num_placeholders:
                kinds = [kind for kind in tokens if tokens[kind] == token]
                raise ValueError(
                    f"{num_placeholders} {' and '.join(kinds)} placeholders in the packed sequence, but {num_features} "
                    "features"
                )
            if num_placeholders:
                first = int(is_placeholder[: rows.start].sum())
                here = is_placeholder[rows]
                index = here.nonzero()[:, 0]
                mask |= here
                indices.append(index)
                parts += rows_between(media, first, first + len(index))
        mask = to_device(mask, device)
        if not parts:
            return mask, None
        values = torch.cat(parts)
        if len(indices) > 1:
            order = torch.cat(indices).argsort()
            values = values[to_device(order, values.device)]
        return mask, values

    def hidden_states(
        self,
        model: Any,
        position_ids: Tensor,
        spans: tuple[GroupSpan, ...] | None = None,
        position_offsets: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Last hidden states of the text stack.

        Args:
            model: made by `build`.
            position_ids: [A, B, L].
            spans: layout of a packed sequence.
            position_offsets: [A, L] that features of media add to positions; `text_inputs` gives it.
            inputs: those of `text_inputs`; `sequence` and `layer_attention`, which with the layout reach the attention
                function in every layer; `expert_rows`, which reach the routers.

        Returns:
            [B, L, D].
        """
        if position_offsets is not None:
            position_ids = position_ids + position_offsets[:, None]
        if spans is not None:
            from longrl.packing.attention import PackedLayout

            inputs["layout"] = PackedLayout(spans)
        backbone = self.backbone(model)
        # Masks that transformers hands on as they are, for the attention function knows the layout: nothing for each
        # kind of layer, or an empty one of four dimensions where the stack takes no mapping.
        layer_types = getattr(backbone.config, "layer_types", None)
        no_mask: Any = torch.empty(1, 1, 0, 0)
        if layer_types is not None:
            no_mask = dict.fromkeys({"full_attention", *layer_types})
        if self.num_axes == 1:
            position_ids = position_ids[0]
        output = backbone(
            position_ids=position_ids,
            attention_mask=no_mask,
            use_cache=False,
            **inputs,
        )
        return output.last_hidden_state


class CausalFamily(TextStack, EncodesMedia, EngineAdapter, BuildsModel, HasPlanningSizes):
    """An autoregressive transformers model.

    Args:
        model: folder or hub id with config, tokenizer and weights.
        dtype: precision of the weights.
        random_init: build from the config with random weights instead of loading; for tiny models and pretraining.
        init_seed: seed of the random weights.
        init_device: where random weights are made, e.g. `cuda`: seconds for billions of them, minutes on a CPU; None is
            the CPU. The numbers depend on it.
        gradient_checkpointing: recompute layers in the backward pass.
        offload_checkpoints: keep what they are recomputed from, their inputs, in pinned host memory meanwhile.
        mlp_chunk_tokens: tokens that an MLP of the text stack computes together; None is all. Bounds memory, changes
            no result, for one more forward pass of the MLPs per update.
        compile_layers: have torch fuse what lies between the matrix products of the text stack's layers, when they
            first run; for training on GPUs. Rounds otherwise.
        chat_template_kwargs: passed to the chat template, e.g. `{enable_thinking: false}` for Qwen3.
        lora: train adapters of the text stack's linear layers and nothing else; `build` gives the model without them.
        chat_template_file: file of a Jinja chat template; None is the folder's own, which base models may lack.
        keep_special_tokens: leave special tokens (boxes, points, tokens of your own) in the text that rewards and
            evaluations read; the end token goes in any case.
        answer_tokens: special tokens that SFT targets hold, e.g. `[<|box_start|>, <|box_end|>]`; others that a row
            spells are text.
    """

    answer_options: ClassVar[tuple[str, ...]] = ("dtype",)
    training_options: ClassVar[tuple[str, ...]] = (
        "model", "random_init", "init_seed", "init_device", "lora", "gradient_checkpointing", "offload_checkpoints",
        "mlp_chunk_tokens", "compile_layers", "chat_template_file",  # the template itself is in `identity`
    )  # fmt: skip

    def __init__(
        self,
        model: str,
        dtype: Dtype = "float32",
        random_init: bool = False,
        init_seed: int = 0,
        gradient_checkpointing: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        lora: LoRASettings | None = None,
        offload_checkpoints: bool = False,
        mlp_chunk_tokens: int | None = None,
        chat_template_file: str | None = None,
        keep_special_tokens: bool = False,
        answer_tokens: list[str] | None = None,
        init_device: str | None = None,
        compile_layers: bool = False,
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
        self.init_device = init_device
        self.gradient_checkpointing = gradient_checkpointing
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.lora = lora
        self.offload_checkpoints = offload_checkpoints
        self.mlp_chunk_tokens = mlp_chunk_tokens
        self.chat_template_file = chat_template_file
        self.keep_special_tokens = keep_special_tokens
        self.answer_tokens = answer_tokens or []
        self.compile_layers = compile_layers

    def model_parts(self, model: Any) -> dict[str, Sequence[nn.Module]]:
        """Parts of a model whose gradients are measured apart; a projector within an encoder is its own, not that's."""
        lm_head = model.get_output_embeddings()
        is_tied = lm_head.weight is model.get_input_embeddings().weight
        return {
            "projector": self.projectors(model),
            "vision_encoder": self.media_encoders(model),
            "lm_head": () if is_tied else (lm_head,),
        }

    def export_adapters(self, adapters: Mapping[str, Tensor], folder: Path, base: str) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`, for the weights that `base` names.

        The model's own generation_config.json lies beside them.
        """
        export_adapters(self, adapters, folder, base)
        self._copy_generation_config(folder)


def rows_between(parts: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Rows start..stop of the parts laid end to end, without joining the others."""
    pieces = []
    for part in parts:
        first = max(start, 0)
        last = max(stop, 0)
        piece = part[first:last]
        if len(piece):
            pieces.append(piece)
        # Counted from the next part's first row.
        start -= len(part)
        stop -= len(part)
    return pieces
