// Canonical codes to tiles and back.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace lowbit {

// What a packed weight is made from: codes as lowbit.layouts.bitstream stores them, parameters in float32.
struct Canonical {
  int32_t kind, bits;
  int64_t rows, cols, group;
  const uint8_t* codes;    // [rows, ceil(cols * bits / 8)]
  const float* scale;      // [rows, groups, width]; width: 1, bits of binary coding, 2**bits of a codebook
  const float* zero;       // [rows, groups] or null: zero points, or the offsets of binary coding
  float zero_constant;
};

// Where everything will lie. Looks at the parameters, which are kept in the narrowest type that holds all of them.
Tiles describe(const Canonical& from);

// Blocks first..last of the buffer that `describe` sized. Its header is written by write_header.
void pack(const Canonical& from, const Tiles& t, uint8_t* data, int64_t first, int64_t last);
void write_header(const Tiles& t, uint8_t* data);

// The header of a buffer; throws std::invalid_argument where it is none of ours. All its sizes are then those of the buffer.
Tiles header(const uint8_t* data, int64_t bytes);

// Canonical codes of blocks first..last.
void unpack(const Tiles& t, const uint8_t* data, uint8_t* codes, int64_t first, int64_t last);

// Whether fixed point with one scale a segment loses most of an input: values of which half have under half of the digits.
bool drowns(const Tiles& t, const float* x);

uint16_t half_of(float x);
float float_of_half(uint16_t h);

}  // namespace lowbit
