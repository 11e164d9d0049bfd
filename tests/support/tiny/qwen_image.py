"""A tiny Qwen-Image: a vision language model as text encoder, a causal 3D VAE."""

from typing import Any

from tests.support.tiny.parts import WIDTH, flow_scheduler

LATENT_CHANNELS = 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def tiny_qwen_image() -> Any:
    import diffusers

    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.QwenImagePipeline(
        scheduler=flow_scheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", max_shift=0.9, max_image_seq_len=8192
        ),
        vae=diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=LATENT_CHANNELS, num_res_blocks=1),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        transformer=transformer,
    )


def _tokenizer() -> Any:
    """Bytes as tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pieces = (*SPECIAL, *sorted(ByteLevel.alphabet()))
    return Qwen2Tokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)},
        merges=[],
        additional_special_tokens=list(SPECIAL[1:]),
    )


def _text_encoder() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1_000_000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)
