"""The capabilities of a family, what each is asked, and which hooks answer.

A family is a light, picklable description of a model, chosen by class path in YAML; nothing else in longrl knows which
model it trains. A new one is a subclass of `longrl.models.base.CausalFamily`, which has a class for each capability:

    PretrainedFolder    which config and tokenizer does the folder or hub id hold?
        default         model_types, config, read_config, tokenizer, read_tokenizer, chat_template_file,
                        load_processing, text_folder
    PatchesMedia        what of an image, video or sound does the encoder read, and how many tokens is it?
        media           grid, pixel_patches, num_features
        default         resize, patch, patch_all, outline_media, temporal_patch_size, has_even_patches,
                        temporal_patches_per_encode, supports_audio, use_audio_in_video, dtype
    RendersPrompts      what does a row look like as token ids and positions?
        media           media_token_ids
        default         load_processing, reads_media, render, chat, chat_ids, tokenize_chat, row_messages, chat_content,
                        system_prompt, tools, media_text, media_pieces, placeholder_ids, position_ids, num_axes,
                        encode_response, encode_answer, encode_last_turn, observation, continuation, end_token_ids,
                        decode, keep_special_tokens, answer_tokens, identity, answer_options, training_options,
                        later_options
    EncodesMedia        how do patches become features?
        media           media_encoders, encode_media
        default         trained_encoders, projectors, feature_size, encoder_settings
    TextStack           which log-probabilities has the model for the completions of a micro-batch?
        write           backbone
        default         forward, text_inputs, media_rows, rows_and_offsets, hidden_states, layers, root_modules,
                        supports_sequence_parallel, casts_inputs, fp32_lm_head, router_replay
    EngineAdapter       how do the trainer's weights and prompts look to an engine?
        default         engine_options, engine_weight, engine_tensor, as_read, engine_request, media_enter_whole
    BuildsModel         how do weights become a model, and a trained model a folder that others load?
        write           auto_class
        default         build, attn_implementation, load_weights, save_weights, save_processing, export, text_part,
                        ignored_weight_prefixes
    HasPlanningSizes    how large is the model?
        default         planning_sizes, encoded_patches, time_tokens, audio_sizes, sound_tokens, sound_tokens_per_encode

Every family writes the hooks behind `write`, one that reads images or videos also those behind `media`; the others are
overridden where a model differs. What a hook gets and gives is said at its default. `CausalFamily` itself has
`export_adapters`, which writes what LoRA trained: it needs text stack and weights together. An option of a family
counts as one that changes answers unless `training_options` names it.

`longrl.testing.check_family` runs what README claims of a family on a tiny model of it, and names the capability and
the family's own hooks behind what is wrong. Example, a language model of transformers:

    class MistralFamily(CausalFamily):
        def auto_class(self):
            return transformers.AutoModelForCausalLM

        def backbone(self, model):
            return model.model
"""

from longrl.models.base import CausalFamily, EncodesMedia, TextStack
from longrl.models.building import BuildsModel
from longrl.models.engine_adapter import EngineAdapter
from longrl.models.patching import PatchesMedia
from longrl.models.planning_sizes import HasPlanningSizes
from longrl.models.pretrained_folder import PretrainedFolder
from longrl.models.reading import RendersPrompts

CAPABILITIES: tuple[type, ...] = (
    PretrainedFolder, PatchesMedia, RendersPrompts, EncodesMedia, TextStack, EngineAdapter, BuildsModel,
    HasPlanningSizes,
)  # fmt: skip
"""In the order of the table."""


def hooks_of(capability: type) -> list[str]:
    """Names of a capability's hooks."""
    return [name for name in vars(capability) if not name.startswith("_")]


def own_hooks(family: CausalFamily, capability: type) -> list[str]:
    """Those of them that a family does not leave to their defaults."""
    hooks = hooks_of(capability)
    defaults = {*CAPABILITIES, CausalFamily}
    return [name for name in hooks if any(name in vars(part) for part in type(family).__mro__ if part not in defaults)]
