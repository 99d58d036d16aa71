#include "pack.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lowbit {

float float_of_half(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? std::nanf("") : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24));
}

// Toward zero; exact or not is for the caller to ask.
uint16_t half_of(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (x >= 65536.0f) return sign | 0x7c00;
  int exponent;
  const float mantissa = std::frexp(x, &exponent);  // in [0.5, 1)
  if (x == 0.0f || exponent < -23) return sign;
  if (exponent < -13) return sign | static_cast<uint16_t>(std::ldexp(mantissa, exponent + 24));
  return sign | static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(std::ldexp(mantissa, 11)) & 1023));
}

namespace {

bool all_halves(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (float_of_half(half_of(x[i])) != x[i]) return false;
  return true;
}

bool all_bytes(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!(x[i] >= 0 && x[i] <= 255 && x[i] == std::floor(x[i]))) return false;
  return true;
}

void put(uint8_t* at, int32_t number, float x) {
  if (number == U8) {
    *at = static_cast<uint8_t>(x);
  } else if (number == F16) {
    const uint16_t h = half_of(x);
    std::memcpy(at, &h, 2);
  } else {
    std::memcpy(at, &x, 4);
  }
}

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where column k of a row lies: its chunk, quad and byte of the quad.
struct Place {
  int64_t chunk;
  int quad, byte;
};

Place place(int64_t padded_column) {
  const int within = static_cast<int>(padded_column % CHUNK);
  return {padded_column / CHUNK, within / 4, within % 4};
}

// A code into the planes of its chunk, and out of them.
void put_code(uint8_t* chunk, const Tiles& t, int lane, Place p, int code) {
  const int at = 4 * lane + p.byte;
  if (t.kind == BINARY) {
    for (int b = 0; b < t.bits; ++b) chunk[64 * b + at] |= static_cast<uint8_t>((code >> b & 1) << p.quad);
    return;
  }
  int below = 0;
  for (const int width : {8, 4, 2, 1}) {
    if (!(t.bits & width)) continue;
    const int fields = 8 / width;
    const int field = code >> below & ((1 << width) - 1);
    chunk[64 * (p.quad / fields) + at] |= static_cast<uint8_t>(field << (width * (p.quad % fields)));
    chunk += 64 * width;
    below += width;
  }
}

int get_code(const uint8_t* chunk, const Tiles& t, int lane, Place p) {
  const int at = 4 * lane + p.byte;
  int code = 0, below = 0;
  if (t.kind == BINARY) {
    for (int b = 0; b < t.bits; ++b) code |= (chunk[64 * b + at] >> p.quad & 1) << b;
    return code;
  }
  for (const int width : {8, 4, 2, 1}) {
    if (!(t.bits & width)) continue;
    const int fields = 8 / width;
    const int unit = chunk[64 * (p.quad / fields) + at];
    code |= (unit >> (width * (p.quad % fields)) & ((1 << width) - 1)) << below;
    chunk += 64 * width;
    below += width;
  }
  return code;
}

// Calls f(row, lane, column, place) for every weight of a block.
template <class F>
void each(const Tiles& t, int64_t block, F&& f) {
  if (t.kind == CODEBOOK) {
    for (int64_t k = 0; k < t.cols; ++k) f(block, static_cast<int>(k % LANES), k, place(k / LANES));
    return;
  }
  for (int lane = 0; lane < LANES && block * LANES + lane < t.rows; ++lane)
    for (int64_t k = 0; k < t.cols; ++k)
      f(block * LANES + lane, lane, k, place(k / t.group * t.padded + k % t.group));
}

// Parameters of a granule.
int64_t width_of(const Tiles& t) { return t.kind == BINARY ? t.bits : t.kind == CODEBOOK ? 1 << t.bits : 1; }

// Where everything lies, from the kind, the widths and the shape.
void lay_out(Tiles& t) {
  t.groups = (t.cols + t.group - 1) / t.group;
  if (t.kind == CODEBOOK) {
    t.padded = up((t.cols + LANES - 1) / LANES, CHUNK);
    t.blocks = t.rows;
    t.group_bytes = width_of(t) * 4;
  } else {
    t.padded = t.group <= CHUNK / 2 && t.groups > 1 ? CHUNK / 2 : up(t.group, CHUNK);
    t.blocks = (t.rows + LANES - 1) / LANES;
    t.group_bytes = LANES * (width_of(t) * number_bytes(t.scale) + number_bytes(t.zero));
  }
  t.codes_bytes = up(t.groups * t.padded, CHUNK) / CHUNK * 64 * t.bits;
  t.block_bytes = up(t.codes_bytes + t.groups * t.group_bytes, 64);
  t.sums_offset = HEADER + t.blocks * t.block_bytes;
  t.total_bytes = t.sums_offset + up(t.kind == UNIFORM ? t.rows * 4 : 0, 64);
}

// Whether some weight can have this header, in a buffer of so many bytes.
bool sound(const Tiles& t, int64_t bytes) {
  const bool numbers = (t.scale == F16 || t.scale == F32) && t.zero >= NONE && t.zero <= F32;
  if (t.magic != MAGIC || t.kind < UNIFORM || t.kind > BINARY || t.bits < 1 || t.bits > 8 || !numbers) return false;
  if (t.rows < 1 || t.cols < 1 || t.group < 1 || t.group > t.cols || t.rows > 8 * bytes / t.cols) return false;
  Tiles expected = t;
  lay_out(expected);
  return t.total_bytes == bytes && std::memcmp(&expected, &t, sizeof t) == 0;
}

}  // namespace

Tiles describe(const Canonical& from) {
  Tiles t{};
  t.magic = MAGIC;
  t.kind = from.kind;
  t.bits = from.bits;
  t.rows = from.rows;
  t.cols = from.cols;
  t.group = from.group;
  t.zero_constant = from.zero_constant;
  const int64_t count = from.rows * ((from.cols + from.group - 1) / from.group);
  t.scale = from.kind != CODEBOOK && all_halves(from.scale, count * width_of(t)) ? F16 : F32;
  t.zero = from.zero == nullptr ? NONE : all_bytes(from.zero, count) ? U8 : all_halves(from.zero, count) ? F16 : F32;
  lay_out(t);
  return t;
}

void write_header(const Tiles& t, uint8_t* data) {
  std::memset(data, 0, HEADER);
  std::memcpy(data, &t, sizeof t);
}

Tiles header(const uint8_t* data, int64_t bytes) {
  Tiles t;
  if (bytes < HEADER) throw std::invalid_argument("packed tiles start with a header, found " + std::to_string(bytes) + " bytes");
  std::memcpy(&t, data, sizeof t);
  if (!sound(t, bytes))
    throw std::invalid_argument("these bytes are no packed tiles, or tiles that were cut off");
  return t;
}

void pack(const Canonical& from, const Tiles& t, uint8_t* data, int64_t first, int64_t last) {
  const int64_t row_bytes = (t.cols * t.bits + 7) / 8;
  const int width = t.kind == BINARY ? t.bits : 1;
  float* sums = reinterpret_cast<float*>(data + t.sums_offset);
  for (int64_t b = first; b < last; ++b) {
    uint8_t* block = data + HEADER + b * t.block_bytes;
    std::memset(block, 0, t.block_bytes);
    each(t, b, [&](int64_t row, int lane, int64_t k, Place p) {
      const uint8_t* line = from.codes + row * row_bytes;
      const int64_t bit = k * t.bits, byte = bit / 8;
      const int two = line[byte] | (byte + 1 < row_bytes ? line[byte + 1] << 8 : 0);
      put_code(block + p.chunk * 64 * t.bits, t, lane, p, two >> (bit % 8) & ((1 << t.bits) - 1));
    });
    uint8_t* params = block + t.codes_bytes;
    if (t.kind == CODEBOOK) {
      std::memcpy(params, from.scale + b * (1 << t.bits), t.group_bytes);
      continue;
    }
    for (int lane = 0; lane < LANES && b * LANES + lane < t.rows; ++lane) {
      const int64_t row = b * LANES + lane;
      double sum = 0;
      for (int64_t g = 0; g < t.groups; ++g) {
        uint8_t* at = params + g * t.group_bytes;
        const int64_t n = row * t.groups + g;
        for (int i = 0; i < width; ++i) {
          put(at + lane * number_bytes(t.scale), t.scale, from.scale[n * width + i]);
          at += LANES * number_bytes(t.scale);
        }
        if (t.zero != NONE) put(at + lane * number_bytes(t.zero), t.zero, from.zero[n]);
        if (t.kind != UNIFORM) continue;
        const double zero = t.zero == NONE ? t.zero_constant : from.zero[n];
        int64_t levels = 0, columns = 0;
        for (int64_t k = g * t.group; k < t.cols && k < (g + 1) * t.group; ++k, ++columns) {
          const Place p = place(g * t.padded + k - g * t.group);
          levels += get_code(block + p.chunk * 64 * t.bits, t, lane, p);
        }
        sum += from.scale[n] * (static_cast<double>(levels) - static_cast<double>(columns) * zero);
      }
      if (t.kind == UNIFORM) sums[row] = static_cast<float>(sum);
    }
  }
}

bool drowns(const Tiles& t, const float* x) {
  const auto bits_of = [](float v) {
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits & 0x7fffffff;  // of the magnitude, which are ordered as magnitudes are
  };
  for (int64_t group = 0; group < t.cols; group += t.group) {
    const int64_t end = group + t.group < t.cols ? group + t.group : t.cols;
    for (int64_t begin = group; begin < end; begin += t.segment()) {
      const int64_t stop = begin + t.segment() < end ? begin + t.segment() : end;
      int32_t most = 0, any = 0, small = 0;
      for (int64_t i = begin; i < stop; ++i) most = bits_of(x[i]) > most ? bits_of(x[i]) : most;
      if (most >= 0x7f800000 || most <= 13 << 23) continue;  // NaN and Inf; nothing
      const int32_t lost = most - (12 << 23);  // 12 binary orders below the largest
      for (int64_t i = begin; i < stop; ++i) {
        any += bits_of(x[i]) > 0;
        small += bits_of(x[i]) > 0 && bits_of(x[i]) < lost;
      }
      if (small > 0 && 2 * small >= any) return true;
    }
  }
  return false;
}

void unpack(const Tiles& t, const uint8_t* data, uint8_t* codes, int64_t first, int64_t last) {
  const int64_t row_bytes = (t.cols * t.bits + 7) / 8, height = t.kind == CODEBOOK ? 1 : LANES;
  for (int64_t b = first; b < last; ++b) {
    const int64_t rows = t.rows - b * height < height ? t.rows - b * height : height;
    std::memset(codes + b * height * row_bytes, 0, rows * row_bytes);
    const uint8_t* block = data + HEADER + b * t.block_bytes;
    each(t, b, [&](int64_t row, int lane, int64_t k, Place p) {
      const int code = get_code(block + p.chunk * 64 * t.bits, t, lane, p) << (k * t.bits % 8);
      uint8_t* at = codes + row * row_bytes + k * t.bits / 8;
      at[0] |= static_cast<uint8_t>(code);
      if (code >> 8) at[1] |= static_cast<uint8_t>(code >> 8);
    });
  }
}

}  // namespace lowbit
