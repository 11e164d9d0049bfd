"""What tiny pipelines are made of: text encoders that read letters, their tokenizers, VAEs."""

import string
from typing import Any

CLIP_TOKENS = 77
WIDTH = 32


def clip_tokenizer() -> Any:
    """Letters as tokens."""
    from transformers import CLIPTokenizer

    pieces = [
        *string.ascii_lowercase,
        *(f"{letter}</w>" for letter in string.ascii_lowercase),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def clip_config() -> Any:
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> Any:
    """Letters as tokens, each word with its mark."""
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, *string.punctuation]
    return T5TokenizerFast(
        vocab=[(piece, 0.0 if piece.startswith("<") else -float(place)) for place, piece in enumerate(pieces)],
        extra_ids=0,
    )


def t5_encoder() -> Any:
    from transformers import T5EncoderModel

    return T5EncoderModel(t5_config())


def t5_config(*, multilingual: bool = False) -> Any:
    """Its width is what a transformer takes as `joint_attention_dim`."""
    from transformers import T5Config, UMT5Config

    return (UMT5Config if multilingual else T5Config)(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )


def picture_vae(*, latent_channels: int, **more: Any) -> Any:
    """One latent for 8x8 pixels."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        **more,
    )


def flow_scheduler(**more: Any) -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(**more)
