"""One formula for each kind of memory, taken from the code it names.

Letters as in `longrl.planning.inputs`, and: w bytes of a weight in its shard, c of a gathered one and of the residual
stream, b of what enters a matrix product; l rows of a micro-batch on one rank, L on all ranks that share it; r scored
rows on one rank; M features of B values of a prompt, P prompts of a sequence-parallel group; m ranks that hold one copy
of the weights.
"""

from __future__ import annotations

import math

from longrl.engines.prefix_cache import TILE_KEYS
from longrl.models.chunked_logprobs import MAX_LOGITS
from longrl.planning import delta_formulas as delta
from longrl.planning.inputs import Plan

ADAPTER_BYTES = 4
"""Size of a value of LoRA's matrices (longrl/models/lora.py)."""
AVERAGE_BYTES = 4
"""Size of a value of a moving reference (longrl/models/ema.py)."""
MemoryParts = dict[str, float]
"""{kind: bytes on one device}."""

# ------------------------------------------------------------------------------------------------- what always stays


def weight_memory(plan: Plan) -> float:
    """Shards of the policy, `fully_shard` in strategies/fsdp.py: w (text + trained encoder) / m; none with offload."""
    sharded = plan.sizes.text_params + plan.sizes.encoder_params - plan.sizes.frozen_encoder_params
    return 0.0 if plan.offload else plan.weight_bytes * sharded / plan.shards


def adapter_memory(plan: Plan) -> float:
    """Shards of LoRA's matrices, always in float32: 4 / m per parameter; none with offload."""
    return 0.0 if plan.offload else ADAPTER_BYTES * plan.sizes.adapter_params / plan.shards


def trained_memory(plan: Plan) -> float:
    """Shards of what the optimizer changes, and of its gradients: the adapters, if any, else all that is sharded."""
    return adapter_memory(plan) if plan.sizes.adapter_params else weight_memory(plan)


def frozen_encoder_memory(plan: Plan) -> float:
    """In full on every rank, so that encoding needs no communication, in the precision of computing: c each."""
    return float(plan.encoder_bytes * plan.sizes.frozen_encoder_params)


def trained_numbers(plan: Plan) -> float:
    """Numbers in this rank's shards of what the optimizer changes; none with offload."""
    return trained_memory(plan) / (ADAPTER_BYTES if plan.sizes.adapter_params else plan.weight_bytes)


def reference_memory(plan: Plan) -> float:
    """Shards of the reference, its own encoder in full, for it does not train, and its root unit gathered.

    Without a backward pass nothing lets that go (`reshard_after_forward=False`): w text / m + c (encoder + root). With
    adapters it is the policy without them. One that moves has the numbers of what trains in float32, and while it
    scores the policy's are kept beside it: (4 + w) / m per number; none with offload.
    """
    if plan.reference and plan.moving_reference:
        return trained_memory(plan) + trained_numbers(plan) * AVERAGE_BYTES
    if not plan.reference or plan.sizes.adapter_params:
        return 0.0
    text = 0.0 if plan.offload else plan.sizes.text_params / plan.shards
    encoder = min(plan.weight_bytes, plan.gathered_bytes) * plan.sizes.encoder_params
    return plan.weight_bytes * text + encoder + plan.gathered_bytes * plan.sizes.root_params


def optimizer_memory(plan: Plan) -> float:
    """AdamW's two moments, in the precision of what trains or in 8 bits: 2 w / m; none with either offload."""
    if plan.optimizer_offload:
        return 0.0
    weight_bytes = ADAPTER_BYTES if plan.sizes.adapter_params else plan.weight_bytes
    return 2 * trained_memory(plan) * (plan.moment_bytes or weight_bytes) / weight_bytes


def feature_memory(plan: Plan) -> float:
    """Features of all prompts and completions of the batch, on every rank of the sequence-parallel group: w P M B."""
    tokens = plan.feature_tokens + plan.crop_tokens
    return float(plan.encoder_bytes * plan.prompts_per_batch * tokens * plan.sizes.feature_size)


def standing_memory(plan: Plan) -> MemoryParts:
    """Kinds that are there in every phase."""
    features = feature_memory(plan)
    if plan.sizes.frozen_encoder_params:  # `FeatureCache` keeps those of earlier steps beside them, up to its limit
        features += max(0.0, plan.feature_cache_bytes - features)
    return {
        "weights": weight_memory(plan) + adapter_memory(plan),
        "vision encoder": frozen_encoder_memory(plan),
        "reference": reference_memory(plan),
        "optimizer": optimizer_memory(plan),
        "features": features,
        "workspace": float(plan.workspace_bytes),
    }


# -------------------------------------------------------------------------------------------------- gathered weights


def gathered_root(plan: Plan) -> float:
    """Embeddings, norm and LM head, from the first use of the policy to the end of its backward pass: c each."""
    return float(plan.gathered_bytes * plan.sizes.root_params)


def gathered_layers(plan: Plan) -> float:
    """The layer at work and the message in which the next one arrives: 2 c of the largest layer."""
    return 2.0 * plan.gathered_bytes * max(plan.sizes.layer_params)


def layer_gradients(plan: Plan, *, before: bool) -> float:
    """Gradients of the layer at work, c each, and the message of the one before it, in the precision of the sum."""
    if plan.sizes.adapter_params:
        return plan.sizes.adapter_params / len(plan.sizes.layer_params) * ADAPTER_BYTES * (1 + before)
    return max(plan.sizes.layer_params) * (plan.gathered_bytes + before * reduced_bytes(plan))


def reduced_bytes(plan: Plan) -> int:
    """Size of a value in the message that sums gradients: float32 where weights are gathered in less than theirs."""
    return max(plan.gathered_bytes, 4) if plan.gathered_bytes < plan.weight_bytes else plan.gathered_bytes


def weight_casts(plan: Plan) -> float:
    """Under autocast every product saves its weights in b for the backward pass.

    Of all layers, or with checkpointing of one. They are not sharded.
    """
    cast = plan.matmul_bytes if plan.matmul_bytes != plan.gathered_bytes else 0
    layers = plan.sizes.layer_params
    return float(cast * (max(layers) if plan.gradient_checkpointing else sum(layers)))


# ------------------------------------------------------------------------------------------------------- activations


def norm_saved(width: int, bytes_in: int) -> int:
    """Per row, RMSNorm: its input, that in float32 if it is not, and the normalised one: width (c + 4 [c < 4] + c)."""
    return width * (2 * bytes_in + (4 if bytes_in < 4 else 0))


def attention_saved(plan: Plan, rows: int) -> float:
    """`_SharedPrefix` and `SequenceParallel.to_heads`: queries, keys, values, output and its log-sum-exp.

    One rank: l (2 A + 2 C) b + 4 l H. Of several, each has L rows of its padded heads, h of them with k key heads, and
    once more its own rows of the output: L ((h + 2 k) d + h d) b + 4 L h + l A b; queries are copied if k > 1. With
    gated output the gates and their product with it as well: 2 l A b.
    """
    sizes, heads, b = plan.sizes, plan.heads, plan.matmul_bytes
    gated = 2 * rows * sizes.query_width * b if sizes.gated_attention else 0
    if plan.sequence_parallel_size == 1:
        return gated + rows * ((2 * sizes.query_width + 2 * sizes.key_width) * b + 4 * sizes.num_heads)
    all_rows = rows * plan.sequence_parallel_size
    local_heads = heads.per_rank * heads.size
    copies = local_heads if heads.per_rank > 1 else 0
    width = (2 * local_heads + 2 * heads.per_rank + copies) * sizes.head_size
    return gated + all_rows * (width * b + 4 * local_heads) + rows * sizes.query_width * b


def layer_saved(plan: Plan, rows: int, *, delta_net: bool = False) -> float:
    """All that a layer keeps for its backward pass.

    Two norms with the product's input behind each, attention or a gated delta net, and of the MLP gate, its activation,
    up and their product: 2 norm + 2 l D b + attention + 4 l F b; the MLP's none in pieces. And what adapters add.
    """
    sizes, b = plan.sizes, plan.matmul_bytes
    per_row = 2 * (norm_saved(sizes.hidden, plan.gathered_bytes) + sizes.hidden * b)
    if sizes.head_norms and not delta_net:
        per_row += norm_saved(sizes.query_width + sizes.key_width, b)
    mixing = delta.saved_memory(plan, rows) if delta_net else attention_saved(plan, rows)
    return rows * per_row + mixing + mlp_saved(plan, rows) + adapters_saved(plan, rows)


def widest_layer_saved(plan: Plan, rows: int) -> float:
    """The same of the layer that keeps most."""
    attending = layer_saved(plan, rows)
    return max(attending, layer_saved(plan, rows, delta_net=True)) if plan.sizes.delta_nets else attending


def is_mlp_chunked(plan: Plan, rows: int) -> bool:
    """True if an MLP computes its rows in several chunks (models/chunked_mlp.py)."""
    return plan.mlp_chunk_tokens is not None and rows > plan.mlp_chunk_tokens


def mlp_saved(plan: Plan, rows: int) -> float:
    """Gate, its activation, up and their product, 4 l F b; nothing of an MLP in pieces beside its input.

    Experts have a copy of a row for each that it goes through, in and out: 2 l k D b.
    """
    sizes = plan.sizes
    width = 4 * sizes.mlp_width + 2 * sizes.experts_per_token * sizes.hidden
    return 0.0 if is_mlp_chunked(plan, rows) else float(rows * width * plan.matmul_bytes)


def adapters_saved(plan: Plan, rows: int) -> float:
    """Each adapter keeps a copy of its input in its own precision, a; the frozen layer beside it keeps none.

    l a I, I values that enter the adapters of a layer, less the two inputs and the product that `layer_saved` counts,
    l (2 D + F) b. No copy if an adapter computes in the precision of its input. The rank is small and left out. Of an
    MLP in pieces only the attention's.
    """
    sizes, b = plan.sizes, plan.matmul_bytes
    inputs, counted = sizes.adapter_inputs, 2 * sizes.hidden + sizes.mlp_width
    if is_mlp_chunked(plan, rows):
        inputs, counted = inputs - sizes.adapter_mlp_inputs, sizes.hidden
    return max(0.0, rows * (adapter_copy_bytes(plan) * inputs - counted * b))


def adapter_copy_bytes(plan: Plan) -> int:
    """Size of a value in the copy that an adapter keeps of its input; 0 if it keeps none."""
    a = plan.matmul_bytes if plan.autocast else ADAPTER_BYTES
    copies = plan.sizes.adapter_params and (plan.autocast or a != plan.gathered_bytes)
    return a if copies else 0


def layers_saved(plan: Plan, rows: int) -> float:
    """Tensors that all layers keep as the backward pass begins: N layers, or with checkpointing their inputs, N l D c.

    If their inputs are in host memory, the one in use and the one on its way back: 2 l D c.
    """
    sizes = plan.sizes
    if plan.gradient_checkpointing:
        return checkpoint_memory(plan, rows, 2 if plan.checkpoints_on_host else len(sizes.layer_params))
    attending = sizes.num_attending * layer_saved(plan, rows)
    if not sizes.num_delta_nets:
        return attending
    return attending + sizes.num_delta_nets * layer_saved(plan, rows, delta_net=True)


def checkpoint_memory(plan: Plan, rows: int, count: int) -> float:
    """The inputs of so many layers: l D c each."""
    return float(count * rows * plan.sizes.hidden * plan.gathered_bytes)


def ends_saved(plan: Plan, rows: int) -> float:
    """Input and normalised input of the final norm, cosine and sine of the positions: norm + 2 l d c."""
    sizes = plan.sizes
    return rows * (norm_saved(sizes.hidden, plan.gathered_bytes) + 2 * sizes.head_size * plan.gathered_bytes)


def backward_working_set(plan: Plan, rows: int) -> float:
    """Memory that an MLP's backward pass needs beside the layer's saved tensors.

    Gradients of product, activation and up less the product itself, and of the stream: 2 l F b + 2 l D c. In pieces of
    l' rows all of a piece, with what its adapters copy, and the gradients of the pieces before it: 6 l' F b + l D b.
    """
    sizes, b = plan.sizes, plan.matmul_bytes
    stream = 2.0 * rows * sizes.hidden * plan.gathered_bytes
    if not is_mlp_chunked(plan, rows):
        return stream + rows * 2 * sizes.mlp_width * b
    copied = adapter_copy_bytes(plan) * sizes.adapter_mlp_inputs
    adapters = max(0, copied - (sizes.hidden + sizes.mlp_width) * b)
    return stream + rows * sizes.hidden * b + (plan.mlp_chunk_tokens or 0) * (6 * sizes.mlp_width * b + adapters)


def attention_exchange(plan: Plan, rows: int) -> float:
    """Memory that attention's backward pass needs beside the stream.

    Gradients of h heads of output, query, key and value, the last three once more as a kernel returns them, with
    CUDA's sums in float32; with several ranks the message of the all-to-all, before and after: L h d (5 b + 4
    [CUDA]) + 2 L k d b + 2 L (h + 2 k) d b [sp > 1].
    """
    sizes, heads, b = plan.sizes, plan.heads, plan.matmul_bytes
    queries = heads.per_rank * heads.size * sizes.head_size
    keys = heads.per_rank * sizes.head_size
    message = 2 * (queries + 2 * keys) * b if plan.sequence_parallel_size > 1 else 0
    in_float32 = 4 if plan.cuda else 0
    all_rows = rows * plan.sequence_parallel_size
    return all_rows * (queries * (5 * b + in_float32) + 2 * keys * b + message)


def layer_backward(plan: Plan, rows: int) -> float:
    """The most that a layer's backward pass adds to what `layers_saved` counts.

    While attention, or a gated delta net, goes backward, the MLP's saved tensors are gone.
    """
    recomputed = widest_layer_saved(plan, rows) if plan.gradient_checkpointing else 0.0
    mixing = attention_exchange(plan, rows)
    if plan.sizes.delta_nets:
        mixing = max(mixing, delta.backward_memory(plan, rows))
    return recomputed + max(backward_working_set(plan, rows), mixing - mlp_saved(plan, rows))


def forward_working_set(plan: Plan, rows: int) -> float:
    """Without gradient a layer holds its input, the MLP's input, and gate, up and product: l (2 D c + D b + 3 F b).

    Of an MLP in pieces of l' rows the last three are l' 3 F b, and its output is there in pieces and joined: 2 l D b.
    Experts have copies of their rows, 2 l k D b. A gated delta net may need more than the MLP.
    """
    sizes, b = plan.sizes, plan.matmul_bytes
    stream = rows * (2 * sizes.hidden * plan.gathered_bytes + sizes.hidden * b)
    width = (3 * sizes.mlp_width + 2 * sizes.experts_per_token * sizes.hidden) * b
    mlp = rows * width
    if is_mlp_chunked(plan, rows):
        mlp = rows * 2 * sizes.hidden * b + (plan.mlp_chunk_tokens or 0) * width
    mixing = delta.forward_memory(plan, rows) if sizes.delta_nets else 0.0
    return float(stream + max(mlp, mixing))


def logit_memory(plan: Plan, scored: int, *, backward: bool) -> float:
    """Logits of a chunk of scored rows, models/chunked_logprobs.py.

    A chunk has r' = min(r, MAX_LOGITS / V) rows in float32: logits and the two temporaries of the entropy, 12 r' V;
    in the backward pass logits and three gradients, 16 r' V. The head's input: r D b. A head in float32 of less precise
    weights is a copy of them, in the backward pass with its gradient: 4 V D, 8 V D.
    """
    local = math.ceil(scored / plan.sequence_parallel_size)
    chunk = min(local, max(1, MAX_LOGITS // plan.sizes.vocabulary))
    copies = (8 if backward else 4) * fp32_head_values(plan)
    logits = chunk * plan.sizes.vocabulary * (16 if backward else 12)
    return logits + copies + local * plan.sizes.hidden * plan.matmul_bytes


def fp32_head_values(plan: Plan) -> int:
    """Numbers of an LM head that is computed in float32 from a copy: V D, or none."""
    has_copy = plan.fp32_lm_head and plan.gathered_bytes < 4
    return plan.sizes.vocabulary * plan.sizes.hidden if has_copy else 0


def head_gradient(plan: Plan) -> float:
    """The LM head's gradient, not sharded until the backward pass ends: c V D; under autocast its cast, b V D, as well.

    None beside adapters.
    """
    cast = plan.matmul_bytes if plan.matmul_bytes < plan.gathered_bytes else 0
    values = 0 if plan.sizes.adapter_params else plan.sizes.vocabulary * plan.sizes.hidden
    return values * float(plan.gathered_bytes + cast)


def root_reduction(plan: Plan) -> float:
    """The end of the backward pass.

    Gradients of head and embeddings, c V D each; then those of the root, as one, and the message that sums them. None
    beside adapters.
    """
    sizes, c = plan.sizes, plan.gathered_bytes
    both = 2 * sizes.vocabulary * sizes.hidden * c
    return 0.0 if sizes.adapter_params else float(max(both, sizes.root_params * (c + reduced_bytes(plan))))


def optimizer_working_set(plan: Plan) -> float:
    """A fused AdamW and one of 8 bits change moments where they lie, and the CPU's takes weights one by one: nothing.

    From host memory moments come one by one: of the largest weight both and a square root, 3 w max(V, F) D / m.
    """
    if plan.offload or not plan.cuda or not plan.optimizer_offload:
        return 0.0
    return 3.0 * min(plan.weight_bytes * largest_weight(plan) / plan.shards, trained_memory(plan))


def largest_weight(plan: Plan) -> int:
    """Numbers of the largest weight: D max(V, F), or all experts' of a layer."""
    sizes = plan.sizes
    return max(sizes.hidden * max(sizes.vocabulary, sizes.mlp_width), sizes.largest_expert_weight)


# ---------------------------------------------------------------------------------------------- encoding and rollout


def encoder_activations(plan: Plan) -> float:
    """One call of an encoder, of what is seen or heard: whichever needs more."""
    return max(vision_activations(plan), audio_activations(plan))


def audio_activations(plan: Plan) -> float:
    """One call of the audio encoder, of t tokens, of width X.

    Its convolutions hold `convolved_values` for a token, its MLP 2 X + 3 F for each of a token's states. Nothing is
    counted for a backward pass through it.
    """
    audio = plan.sizes.audio_encoder
    if audio is None:
        return 0.0
    tokens = math.ceil(plan.sound_tokens / plan.sp_group)
    if plan.sound_together is not None:
        tokens = min(tokens, plan.sound_together)
    widest = max(audio.convolved_values, audio.states_per_token * (2 * audio.width + 3 * audio.mlp_width))
    return float(tokens * widest * plan.encoder_bytes)


def vision_activations(plan: Plan) -> float:
    """One call of the vision encoder: n patches of width X, this rank's of one video or as many as it reads together.

    Patches, positions and, at its widest, rotary embeddings in float32: n (3 Y w + 5 X w + 16 X), or the MLP: n (2
    X + 3 F) w. On a CPU the patches are the loader's, which the host holds anyway.
    """
    vision_encoder = plan.sizes.vision_encoder
    if vision_encoder is None:
        return 0.0
    w, x = plan.encoder_bytes, vision_encoder.width
    rotary = 5 * x * w + 16 * x
    mlp = (2 * x + 3 * vision_encoder.mlp_width) * w
    patches = vision_encoder.patch_values * w if plan.cuda else 0
    per_patch = patches + max(rotary, mlp)
    if vision_encoder.trains:  # two norms and what follows, q, k, v, output, and four of the MLP, in every layer
        norms = 2 * (norm_saved(x, w) + x * w)
        per_patch += vision_encoder.num_layers * (norms + 5 * x * w + 4 * vision_encoder.mlp_width * w)
    together = plan.local_patches
    if plan.encoded_together is not None:
        together = min(together, plan.encoded_together * plan.shared_patches)
    return float(together * per_patch)


def feature_exchange(plan: Plan) -> float:
    """`gather_rows` beside what was there before.

    All ranks' rows as they arrive and in order, then each video's copy: w P M B (2 + 1 / ranks), the first 1 over
    `num_gather_chunks`; on one rank rows and copies, 2 w P M B.
    """
    copies = 1 / plan.sp_group + 1 / plan.num_gather_chunks + 1 if plan.sp_group > 1 else 1.0
    return feature_memory(plan) * copies


def prefilled_prompts(plan: Plan) -> int:
    """Prompts that one rank decodes together: engines/rollout_engine.py and `HFEngine.max_sequences`.

    An engine that takes what is free needs room for one.
    """
    if plan.max_sequences is None:
        return 1
    return min(plan.local_prompts, max(1, plan.max_sequences // plan.rank_completions))


def kv_cache(plan: Plan) -> float:
    """`PrefixCache`: keys of a prompt once, of its completions apart: 2 N C b prompts (T + G S); and G states."""
    sizes = plan.sizes
    tokens = plan.prompt_tokens + plan.rank_completions * plan.completion_tokens
    width = 2 * sizes.num_attending * sizes.key_width
    keys = float(width * plan.matmul_bytes * prefilled_prompts(plan) * tokens)
    return keys + delta.state_memory(plan, prefilled_prompts(plan) * plan.rank_completions)


def prefill_memory(plan: Plan) -> float:
    """A chunk of the prompts on one rank, without sequence parallelism: `forward_working_set` of its rows."""
    return forward_working_set(plan, min(plan.prefill_chunk_tokens, prefilled_prompts(plan) * plan.prompt_tokens))


def decoding_memory(plan: Plan) -> float:
    """`PrefixCache.decode` and sampling, of one token of all completions.

    Scores on their own tokens, twice in float32 and once in b, and of n tiles of the prompt queries, those in the
    kernel's order, outputs and their weighted sum: G H S (8 + b) + G n A (3 b + 4). Of sampling, three copies of the
    distribution in float64: 28 G V. A head in float32: 4 V D.
    """
    sizes, sequences = plan.sizes, prefilled_prompts(plan) * plan.rank_completions
    scores = sizes.num_heads * plan.completion_tokens * (8 + plan.matmul_bytes)
    tiles = math.ceil(plan.prompt_tokens / TILE_KEYS) * sizes.query_width * (3 * plan.matmul_bytes + 4)
    return float(sequences * (scores + tiles + 28 * sizes.vocabulary) + 4 * fp32_head_values(plan))
