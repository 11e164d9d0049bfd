"""The demonstration model `shapes`: its pictures, its training, its measured bar.

    pictures -> captions -> data ----.
                                     v
    autoencoder (1) -> text (2) -> denoiser (3) -> folder -> evaluate

Everything is drawn by this package; nothing is downloaded. Start it with
``python -m workers.training.shapes train`` or ``evaluate``.
"""
