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

# The same on a film, for each pixel of each frame: it has four frames in hand, and what it keeps does not grow, so
# that this falls with the film's length. Counted for 81 frames; a shorter film takes less than one of them in all.
CAUSAL_FILM_BYTES_PER_PIXEL = 160
