"""What a family is asked, capability by capability, and which hooks of it answer.

A family is a light, picklable description of a model, chosen by class path in YAML; nothing else in longrl knows which
model it trains. A new one is a `longrl.models.base.CausalFamily` that writes the hooks of its kind:

- reads text: `write` of every capability, two methods;
- reads images or videos: those, and `for_media`.

Every other hook has a default, to be overridden where the model differs. `longrl.testing.check_family` runs what README
claims of a family on a tiny model of it, and names the capability and the hooks behind what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """One question, its asker, and the hooks that answer it."""

    question: str
    asked_by: str
    """Packages and commands that need it."""
    written_in: str
    """Class with the hooks and their defaults."""
    write: tuple[str, ...] = ()
    """Hooks that every family writes."""
    for_media: tuple[str, ...] = ()
    """Hooks that a family writes if it reads images or videos."""
    defaults: tuple[str, ...] = ()
    """Hooks that most families leave alone."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """All of them."""
        return self.write + self.for_media + self.defaults


CAPABILITIES = {
    "reads its folder": Capability(
        question="Which config and tokenizer does the folder or hub id hold?",
        asked_by="all",
        written_in="longrl.models.reading.PretrainedFolder",
        defaults=("config", "read_config", "tokenizer", "load_processing", "text_folder"),
    ),
    "patches media": Capability(
        question="What of an image, video or sound does the encoder read, and how many tokens is it?",
        asked_by="datamodules, features, plan",
        written_in="longrl.models.reading.PatchesMedia",
        for_media=("grid", "pixel_patches", "num_features"),
        defaults=(
            "resize", "patch", "patch_all", "outline_media", "media_key", "temporal_patch_size",
            "temporal_patches_per_encode", "supports_audio", "use_audio_in_video",
        ),
    ),
    "renders prompts": Capability(
        question="What does a row look like as token ids and positions?",
        asked_by="datamodules, engines, evaluation",
        written_in="longrl.models.reading.RendersPrompts",
        for_media=("media_token_ids",),
        defaults=(
            "render", "chat_ids", "chat_content", "system_prompt", "placeholder_ids", "position_ids", "num_axes",
            "encode_response", "decode", "identity",
        ),
    ),
    "encodes media": Capability(
        question="How do patches become features?",
        asked_by="features, strategies, cache-features",
        written_in="longrl.models.base.EncodesMedia",
        for_media=("media_encoders", "encode_media"),
        defaults=("trained_encoders", "feature_size", "encoder_settings"),
    ),
    "text stack": Capability(
        question="Which log-probabilities has the model for the completions of a micro-batch?",
        asked_by="modules, strategies, engines.hf",
        written_in="longrl.models.base.TextStack",
        write=("backbone",),
        defaults=(
            "forward", "text_inputs", "media_rows", "hidden_states", "attention_mask", "lm_head", "layers",
            "root_modules", "supports_sequence_parallel", "casts_inputs",
        ),
    ),
    "builds and exports": Capability(
        question="How do weights become a model, and a trained model a folder that others load?",
        asked_by="modules, export",
        written_in="longrl.models.building.BuildsModel",
        write=("auto_class",),
        defaults=(
            "build", "attn_implementation", "load_weights", "save_weights", "save_processing", "export", "text_part",
            "ignored_weight_prefixes",
        ),
    ),
    "engine adapter": Capability(
        question="How do the trainer's weights and prompts look to an engine with a model of its own?",
        asked_by="engines",
        written_in="longrl.models.engine_adapter.EngineAdapter",
        defaults=("engine_options", "engine_weight", "engine_tensor", "engine_request"),
    ),
    "planning sizes": Capability(
        question="How large is the model?",
        asked_by="plan",
        written_in="longrl.models.planning_sizes.HasPlanningSizes",
        defaults=("planning_sizes", "time_tokens"),
    ),
}  # fmt: skip
