"""CLIPScore, PickScore and the aesthetic predictor of a tiny random CLIP against a plain forward in float64."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from longrl.diffusion.rewards.clip import AestheticScore, ClipScore, PickScore
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import Row

SIZE, HEADS = 32, 2
PROMPTS = ["a red cat", "a dog", "a red cat"]
START, END = 0, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP of two layers on each side, with a tokenizer of single characters."""
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    sides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    text = {**sides, **ends, "vocab_size": len(words), "max_position_embeddings": 12}
    vision = {**sides, "image_size": SIZE, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.logit_scale.data.fill_(math.log(50.0))
    model.save_pretrained(path)
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=12)
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(path)
    return path


def samples() -> list[torch.Tensor]:
    """PictureGrids, and a video of two frames in the middle."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8) for n in (1, 2, 1)]


def rows() -> list[Row]:
    return [Row(id=str(number), problem=prompt, answer="") for number, prompt in enumerate(PROMPTS)]


# ---- the plain forward ----


class PlainClip:
    """CLIP (arXiv:2103.00020) from a state dict, in float64."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder)
        self.weights = {name: value.double() for name, value in self.model.state_dict().items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def layers(self, side: str, x: torch.Tensor, causal: bool) -> torch.Tensor:
        mask = torch.ones(len(x), len(x)).tril().bool() if causal else torch.ones(len(x), len(x)).bool()
        for number in range(2):
            name = f"{side}.encoder.layers.{number}"
            y = self.norm(f"{name}.layer_norm1", x)
            query, key, value = (self.linear(f"{name}.self_attn.{part}_proj", y).chunk(HEADS, -1) for part in "qkv")
            heads = [
                (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf).softmax(-1) @ v
                for q, k, v in zip(query, key, value, strict=True)
            ]
            x = x + self.linear(f"{name}.self_attn.out_proj", torch.cat(heads, -1))
            y = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x))
            x = x + self.linear(f"{name}.mlp.fc2", y * torch.sigmoid(1.702 * y))  # quick GELU
        return x

    def image(self, frame: torch.Tensor) -> torch.Tensor:
        """Embedding of length 1 of a frame [3, 32, 32] uint8."""
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
        pixels = (frame.double() / 255 - mean) / std
        kernel = self.weights["vision_model.embeddings.patch_embedding.weight"].flatten(1)  # [16, 3 * 16 * 16]
        corners = [(top, left) for top in (0, 16) for left in (0, 16)]
        patches = torch.stack([pixels[:, top : top + 16, left : left + 16].flatten() for top, left in corners])
        cls = self.weights["vision_model.embeddings.class_embedding"][None]
        x = torch.cat([cls, patches @ kernel.T]) + self.weights["vision_model.embeddings.position_embedding.weight"]
        x = self.layers("vision_model", self.norm("vision_model.pre_layrnorm", x), causal=False)
        return unit(self.norm("vision_model.post_layernorm", x[0]) @ self.weights["visual_projection.weight"].T)

    def text(self, prompt: str) -> torch.Tensor:
        """Embedding of length 1 of a prompt in small letters."""
        pieces = [[2 + ord(c) - 97 for c in word[:-1]] + [28 + ord(word[-1]) - 97] for word in prompt.split()]
        ids = torch.tensor([START, *[number for piece in pieces for number in piece], END])
        x = self.weights["text_model.embeddings.token_embedding.weight"][ids]
        x = x + self.weights["text_model.embeddings.position_embedding.weight"][: len(ids)]
        x = self.norm("text_model.final_layer_norm", self.layers("text_model", x, causal=True))
        return unit(x[-1] @ self.weights["text_projection.weight"].T)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.square().sum().sqrt()


def cosines(folder: Path) -> list[list[float]]:
    """Of every frame of every sample with its prompt."""
    plain = PlainClip(folder)
    return [
        [float(plain.image(frame) @ plain.text(prompt)) for frame in frames]
        for frames, prompt in zip(samples(), PROMPTS, strict=True)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- rewards ----


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_clip_score_and_pick_score_are_the_plain_forwards(folder, batch_size):
    found = cosines(folder)
    clip = ClipScore(str(folder), batch_size=batch_size)
    pick = PickScore(str(folder), batch_size=batch_size)
    assert clip.score_all(samples(), rows()) == pytest.approx([mean([2.5 * max(c, 0) for c in own]) for own in found])
    assert pick.score_all(samples(), rows()) == pytest.approx([50 * mean(own) for own in found], rel=1e-4)


def test_a_picture_against_its_prompt_gets_no_clip_score_and_a_negative_pick_score(folder):
    for reward, wanted in ((ClipScore(str(folder)), [2.5, 0.0]), (PickScore(str(folder)), [50.0, -50.0])):
        text = reward.text_embeddings(["a dog"])
        scores = reward.frame_scores(torch.cat([text, -text]), ["a dog", "a dog"])
        torch.testing.assert_close(scores, torch.tensor(wanted))


def test_the_aesthetic_heads_are_affine_layers_on_the_image_embedding(folder, tmp_path):
    generator = torch.Generator().manual_seed(2)

    def layer(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)

    first, second, linear = layer(8, 5), layer(5, 1), layer(8, 1)
    improved = {"layers.2.weight": first[0], "layers.2.bias": first[1]}
    improved |= {"layers.10.weight": second[0], "layers.10.bias": second[1]}
    save_file(improved, tmp_path / "improved.safetensors")
    save_file({"weight": linear[0], "bias": linear[1]}, tmp_path / "linear.safetensors")
    images = [[PlainClip(folder).image(frame) for frame in frames] for frames in samples()]
    deep = AestheticScore(str(folder), head=str(tmp_path / "improved.safetensors"))
    flat = AestheticScore(str(folder), head=str(tmp_path / "linear.safetensors"))
    (one, two, three) = ([tensor.double() for tensor in pair] for pair in (first, second, linear))
    by_hand = [mean([float((two[0] @ (one[0] @ x + one[1]) + two[1]).item()) for x in own]) for own in images]
    assert deep.score_all(samples(), rows()) == pytest.approx(by_hand, rel=1e-4)
    by_hand = [mean([float((three[0] @ x + three[1]).item()) for x in own]) for own in images]
    assert flat.score_all(samples(), rows()) == pytest.approx(by_hand, rel=1e-4)


def test_a_head_of_another_width_is_an_error_before_anything_is_judged(folder, tmp_path):
    head = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, head)
    with pytest.raises(ValueError, match=r"from the model's 8 values to 1.*take \[768\] and give \[1\]"):
        RewardSum([RewardTerm(AestheticScore(str(folder), head=str(head)))]).score([])
    save_file({"weight": torch.zeros(1, 8)}, head)
    with pytest.raises(ValueError, match=r"must hold a weight and a bias for each layer, got \['weight'\]"):
        AestheticScore(str(folder), head=str(head)).prepare()
    with pytest.raises(ValueError, match="must be a safetensors file, got ''"):
        AestheticScore(str(folder)).prepare()


def test_a_long_prompt_is_cut_and_a_picture_of_any_size_is_resized(folder):
    pictures = [torch.full((1, 3, 40, 64), 200, dtype=torch.uint8), torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)]
    asked = [Row(id="1", problem="many letters in a very long prompt", answer="")] * 2
    values = ClipScore(str(folder)).score_all(pictures, asked)
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_a_folder_that_is_not_there_ends_the_run():
    with pytest.raises(ValueError, match=r"PickScore reads a CLIP model from a local folder, but 'nowhere' is none"):
        RewardSum([RewardTerm(PickScore("nowhere"))]).score([])
