"""Stage 2: a vocabulary and two small CLIP text encoders that read captions.

The encoders learn to read off what a caption states: from the end token of the layer that the
denoiser attends to, and, for the second, as a code in its pooled embedding. Then they are frozen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from workers.training.shapes.captions import Stated, example_captions, split_subjects, varied_caption
from workers.training.shapes.pictures import COLOURS, SHAPES, SIZES
from workers.training.shapes.stage import (
    ProgressLines,
    learning_rate,
    load_checkpoint,
    numpy_source,
    save_atomically,
    set_learning_rate,
)

STAGE = 2
BATCH = 128
PEAK_RATE = 2e-3
LENGTH = 32
"""Tokens per prompt, begin and end included; longer prompts are cut by the pipelines."""
WIDTH = 64
CODE_SIZES = (len(SHAPES) + 1, len(COLOURS) + 1, len(COLOURS) + 1, len(SIZES))
"""Parts of the pooled code: shape, colour, background (each with a place for 'not said'), size."""
CODE_SCALE = 3.0
EMPTY = Stated(None, None, None, "")

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"""[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True, slots=True)
class TextModels:
    """One tokenizer and the two encoders that read its tokens; the pipelines get the tokenizer twice."""

    tokenizer: CLIPTokenizer
    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Turn captions into int64 [captions, LENGTH], padded and cut as the pipelines do."""
        encoded: Any = self.tokenizer(
            list(captions), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids

    def unused_tokenizer(self) -> CLIPTokenizer:
        """Copy the tokenizer as it was made: one that was used would be saved with its last call's padding."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        return _tokenizer(backend["vocab"], [tuple(pair) for pair in backend["merges"]])

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed captions as the pipelines do.

        Returns float32 [captions, LENGTH, 2 * WIDTH] for cross-attention and float32
        [captions, sum(CODE_SIZES)] pooled.
        """
        ids = self.tokens(captions)
        first = self.first(ids, output_hidden_states=True)
        second = self.second(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def build_tokenizer(seed: int) -> CLIPTokenizer:
    """Learn a byte-level BPE vocabulary from training captions; every possible text has tokens."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=25, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    learner.train_from_iterator(example_captions(seed, 6000), trainer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) for pair in _merges(learner)]
    # Every byte, alone and at a word's end, comes first: so no text is unknown.
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges), _BEGIN, _END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return _tokenizer(vocabulary, merges)


def build_text_models(seed: int) -> TextModels:
    """Make the vocabulary and the untrained encoders; their weights follow torch's global seed."""
    tokenizer = build_tokenizer(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=sum(CODE_SIZES),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextModels(tokenizer, CLIPTextModel(config), CLIPTextModelWithProjection(config))


def code_of(stated: Sequence[Stated]) -> Tensor:
    """Write statements as int64 [statements, 4]: places in `SHAPES`, `COLOURS` twice, `SIZES`.

    What is not said takes the place after the last.
    """
    return torch.tensor(
        [
            [
                SHAPES.index(s.shape) if s.shape else len(SHAPES),
                COLOURS.index(s.colour) if s.colour else len(COLOURS),
                COLOURS.index(s.background) if s.background else len(COLOURS),
                SIZES.index(s.size),
            ]
            for s in stated
        ]
    )


def train_text_models(seed: int, steps: int, checkpoint: Path) -> TextModels:
    """Train the encoders, or take the finished ones from `checkpoint`, and return them frozen.

    `steps` are batches of `BATCH` captions of training subjects. The same seed and steps give the
    same weights on the same machine with one torch thread.
    """
    torch.manual_seed(seed * 16 + STAGE)
    text = build_text_models(seed)
    readers = nn.ModuleList(nn.Linear(WIDTH, sum(CODE_SIZES)) for _ in range(2))
    modules = nn.ModuleList([text.first, text.second, readers])
    if (state := load_checkpoint(checkpoint)) is not None and state["step"] == steps:
        modules.load_state_dict(state["model"])
        return _frozen(text)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    subjects, _ = split_subjects(seed)
    lines = ProgressLines("text", steps, every=100)
    for step in range(steps):
        rng = numpy_source(seed, STAGE, step)
        pairs = [varied_caption(subjects[int(i)], rng) for i in rng.integers(len(subjects), size=BATCH - 2)]
        pairs += [("", EMPTY)] * 2
        set_learning_rate(optimizer, learning_rate(step, steps, PEAK_RATE, warmup=50, decay_share=0.7))
        loss = _loss(text, readers, text.tokens([caption for caption, _ in pairs]), code_of([s for _, s in pairs]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        lines.step(step, loss.item())
    save_atomically({"model": modules.state_dict(), "step": steps}, checkpoint)
    return _frozen(text)


def read_code(pooled: Tensor) -> Tensor:
    """Read pooled embeddings back into `code_of`'s form, int64 [captions, 4]."""
    return torch.stack([part.argmax(dim=-1) for part in pooled.split(CODE_SIZES, dim=-1)], dim=-1)


def _loss(text: TextModels, readers: nn.ModuleList, ids: Tensor, code: Tensor) -> Tensor:
    rows = torch.arange(len(ids))
    ends = (ids == text.tokenizer.eos_token_id).int().argmax(dim=-1)
    loss = torch.zeros(())
    pooled = torch.empty(0)
    for encoder, reader in zip((text.first, text.second), readers, strict=True):
        out = encoder(ids, output_hidden_states=True)
        read: Tensor = reader(out.hidden_states[-2][rows, ends])
        for place, part in enumerate(read.split(CODE_SIZES, dim=-1)):
            loss = loss + functional.cross_entropy(part, code[:, place])
        pooled = out.text_embeds if encoder is text.second else pooled
    target = torch.cat([functional.one_hot(code[:, i], size) for i, size in enumerate(CODE_SIZES)], dim=-1)
    return loss + 4.0 * functional.mse_loss(pooled, CODE_SCALE * target.float())


def _frozen(text: TextModels) -> TextModels:
    for model in (text.first, text.second):
        model.requires_grad_(False).eval()
    return text


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def _merges(learner: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    return merges
