"""A tiny Wan 2.1: films, four frames to a latent after the first."""

from typing import Any

from tests.support.tiny.parts import WIDTH, t5_config, t5_tokenizer

LATENT_CHANNELS = 16


def tiny_wan() -> Any:
    import diffusers
    from transformers import UMT5EncoderModel

    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(t5_config(multilingual=True)),
        vae=diffusers.AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS, num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        transformer=transformer,
    )
