"""Codes in 32-bit words."""

import pytest
import torch

from lowbit.caches.words import from_words, to_words, words_of


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 5, 32, 64, 80])
def test_every_code_survives_its_words(bits, dim):
    codes = torch.randint(0, 2**bits, (3, 4, dim), dtype=torch.uint8)
    codes[0], codes[1] = 2**bits - 1, 0
    words = to_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, 4, words_of(dim, bits))
    assert torch.equal(from_words(words, bits, dim), codes)


def test_the_first_channel_is_in_the_lowest_bits():
    assert to_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8), 4).tolist() == [
        [0x87654321 - 2**32, 9]
    ]
