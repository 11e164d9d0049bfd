"""What the decoders of the families take to work in: bytes for each pixel that they make, in numbers of two bytes.

Decoders of the same widths take the same, whoever trained them. Counted as the most that tensors hold at once while a
picture is decoded; the largest are at full size.
"""

# The autoencoder of one latent for 8x8 pixels, of 128 to 512 channels: three times 256 channels, where its last block
# halves them.
KL_F8_BYTES_PER_PIXEL = 1536

# The causal one for films, of 96 to 384 channels, on a lone picture: it enlarges 192 channels in four bytes, and keeps
# the inputs of all its convolutions for a next frame.
CAUSAL_PICTURE_BYTES_PER_PIXEL = 3476

# The same on a film, in hand while a group of four frames is made: what it keeps does not grow with the film.
CAUSAL_FILM_BYTES_PER_PIXEL = 9500

# And for each frame, since those that are done are kept, and copied when the next are put to them. Both are fitted to
# what was measured in bf16: in all 3494 bytes for each pixel of one frame, 9226 of five, 9851 of nine, some 12,900 of
# 81.
CAUSAL_FRAME_BYTES_PER_PIXEL = 43

# Tiles are as large as the pictures that a decoder was trained on; the causal ones have tiles of their own.
CAUSAL_TILE_PX = 256
