// Attention of a few queries over tokens that a cache holds: its first ones and its newest as floats, all others packed.
#pragma once

#include <cstdint>
#include <vector>

#include "tiles.h"

namespace lowbit {

// Packed tokens of one head. A word holds codes of consecutive channels of one token, the first in its lowest bits; the words
// of LANES tokens lie side by side (a tile), so that lanes are tokens.
struct PackedTokens {
  uint32_t* codes;           // [tiles, words, LANES]
  void* scale;               // [tiles, groups, LANES], or of blocks of tokens [blocks, groups]
  void* zero;                // the same, or null: `middle`
  int32_t number;            // of both: F16, BF16 or F32
  int32_t bits;
  const float* table;        // values of the codes, in units of the scale; null: the codes themselves
  float middle;
  int64_t dim, words;
  int64_t groups, width;     // ranges of a token's channels, and the channels of one
  int64_t rows;              // tokens of a block, which begins a tile; 1: a scale belongs to one token
  const int32_t* counts;     // tokens that each block still has
  int64_t blocks, length;    // length: tokens in all

  int64_t tile_words() const { return words * LANES; }
  int64_t block_tiles() const { return (rows + LANES - 1) / LANES; }
};

// Packed keys as they were before the rotary embedding, which is applied again on reading: then a query meets them in the model's own
// coordinates. cos, sin: [turned, room], of every position; channel i turns with channel i + turned.
struct Turning {
  const float *cos = nullptr, *sin = nullptr;  // null: keys are packed after the embedding
  int64_t turned = 0, room = 0;
  int64_t position = 0;      // of the first packed token
  const float *rotation = nullptr, *scale = nullptr, *shift = nullptr;  // the coordinates of this head's packed keys
};

struct FloatTokens {
  const void* data;          // [length, dim]
  int64_t length;
};

// Keys, or values, in order.
struct CacheSide {
  FloatTokens kept;
  PackedTokens packed;
  FloatTokens waiting;
  int32_t type;              // of the floats: F32, F16 or BF16

  int64_t length() const { return kept.length + packed.length + waiting.length; }
};

constexpr int64_t CACHE_QUERIES = 16;  // of one head that go through its tokens together, at most

// Queries that share a key-value head.
struct CacheAttention {
  const float* q;            // [rows, dim of keys], scaled, for floats
  const float* packed_q;     // the same in the coordinates of packed keys, where they are not turned
  Turning turning;
  const float* constant;     // [rows], added to the scores of packed keys; or null
  const int32_t *begin, *end;  // [rows]: the keys that a query sees
  int64_t rows;
  CacheSide keys, values;
  float* room;               // cache_room() floats
  float* out;                // [rows, dim of values]: the mixture of floats
  float* packed_out;         // the same of packed values, in their coordinates
  float* weight;             // [rows]: what packed values weigh in all
  float *most, *total;       // [rows]: the highest score, and the sum of exponentials below it
};

// Keys, or values, of all sequences and heads of a layer, as Python describes them.
struct LayerSide {
  int64_t batch = 0, heads = 0;
  PackedTokens packed{};         // of the first head of the first sequence; the next one's are so many tiles, or parameters, on
  int64_t tiles = 0, params = 0;
  std::vector<int32_t> counts;
  std::vector<float> table;
  bool symmetric = false, whole = false;
  uintptr_t kept = 0, waiting = 0;       // [batch, heads, room, dim]
  int64_t kept_room = 0, kept_length = 0, waiting_room = 0, start = 0, waiting_length = 0;
  int32_t type = F32;
  int64_t leaving = 0;                   // tokens that the step packs once it has attended
  // Coordinates of packed tokens: ((x - shift) / scale) rotation; null: none. The next head's are so many numbers on.
  const float *rotation = nullptr, *scale = nullptr, *shift = nullptr;
  int64_t rotation_step = 0, shift_step = 0;  // shift_step: from one sequence to the next
  Turning turning{};                     // without coordinates and position

  int64_t dim() const { return packed.dim; }
  uintptr_t head_of(uintptr_t floats, int64_t room, int64_t head, int64_t token) const {
    return floats + ((head * room + token) * dim()) * number_bytes(type);
  }
  // Of head number `head` of all sequences; `more`: tokens that wait beside those counted.
  CacheSide of(int64_t head, int64_t more = 0) const {
    CacheSide side{{reinterpret_cast<void*>(head_of(kept, kept_room, head, 0)), kept_length}, packed,
                   {reinterpret_cast<void*>(head_of(waiting, waiting_room, head, start)), waiting_length + more}, type};
    PackedTokens& t = side.packed;
    const int64_t at = head * params * number_bytes(t.number);
    t.codes += head * tiles * t.tile_words();
    t.scale = static_cast<char*>(t.scale) + at;
    if (t.zero) t.zero = static_cast<char*>(t.zero) + at;
    t.table = table.empty() ? nullptr : table.data();
    t.counts = counts.data();
    t.blocks = static_cast<int64_t>(counts.size());
    return side;
  }
  int64_t length() const { return kept_length + packed.length + waiting_length; }
  // Whether those that leave can be packed.
  bool has_room() const {
    if (!leaving) return true;
    const int64_t filled = packed.rows > 1 ? (static_cast<int64_t>(counts.size()) + leaving / packed.rows) * packed.block_tiles() * LANES
                                           : packed.length + leaving;
    return packed.bits > 0 && packed.codes != nullptr && leaving % packed.rows == 0 && filled <= tiles * LANES;
  }
  // Counts a token that the step has added, and those that it has packed.
  void advance() {
    ++waiting_length;
    if (!leaving) return;
    packed.length += leaving;
    if (packed.rows > 1) counts.insert(counts.end(), leaving / packed.rows, static_cast<int32_t>(packed.rows));
    start += leaving;
    waiting_length -= leaving;
    leaving = 0;
  }
  const float* shift_of(int64_t head) const {
    return shift ? shift + head / heads * shift_step + head % heads * dim() : nullptr;
  }
  const float* scale_of(int64_t head) const { return scale ? scale + head % heads * dim() : nullptr; }
  Turning turning_of(int64_t head) const {
    Turning t = turning;
    t.position = kept_length;
    t.rotation = rotation_of(head), t.scale = scale_of(head), t.shift = shift_of(head);
    return t;
  }
  // Whether the embedding is known at all positions and so many more, and a tile's beyond.
  bool turns_all(int64_t more) const { return !turning.cos || length() + more + LANES <= turning.room; }
  const float* rotation_of(int64_t head) const { return rotation ? rotation + head % heads * rotation_step : nullptr; }
};

// Floats that a thread needs to attend with so many rows.
struct CacheRoom {
  std::vector<float> room, queries, constant, packed_out, weight, softmax, x;
};

// One of several runs of tokens, whose results are put together by `most` and `total`.
struct Part {
  int64_t number = 0, of = 1;
};
// The runs into which tokens can be cut: their keys and values are packed from the same token on, in whole blocks.
int64_t parts_of(const LayerSide& keys, const LayerSide& values);

// Attention of `rows` queries, CACHE_QUERIES at most, [rows, dim of keys] of one head; out [rows, dim of values]. `more`: see LayerSide::of.
// most, total [rows]: of the part; null: not wanted.
void attend_head(const CacheKernels& k, const LayerSide& keys, const LayerSide& values, int64_t head, int64_t more, const float* q,
                 int64_t rows, const int32_t* begin, const int32_t* end, float* out, CacheRoom& room, Part part = {},
                 float* most = nullptr, float* total = nullptr);
// Packs the first `count` waiting tokens of one head, `more` as above. False: a scale is not finite in its storage.
bool pack_head(const CacheKernels& k, const LayerSide& side, int64_t head, int64_t count,
               void (*read)(const void*, int32_t, int64_t, int64_t, float*), CacheRoom& room);

constexpr int64_t CACHE_TILES = 4;  // tiles of values that are unpacked together

inline int64_t cache_room(const CacheAttention& a) {
  const PackedTokens &k = a.keys.packed, &v = a.values.packed;
  const int64_t dim = (k.dim > v.dim ? k.dim : v.dim) + 32, groups = k.groups > v.groups ? k.groups : v.groups;
  const int64_t keys = a.keys.length() + 2 * LANES;
  return a.rows * (keys + k.dim + groups + 1)                  // scores, scaled queries and their sums
         + CACHE_TILES * (dim + a.rows) * LANES                // unpacked tiles, scaled probabilities
         + a.rows * (v.dim + 32 + v.groups) * LANES + dim + 2 * LANES  // mixtures by lane; a row of floats
         + a.rows * (k.words * 32 / (k.bits ? k.bits : 8)) + LANES;    // queries as integers, three bytes a channel
}

struct CacheKernels {
  void (*attend)(const CacheAttention&);
  // All LANES slots of a tile as floats [LANES, dim]. room: (dim + 32) * LANES floats.
  void (*decode)(const PackedTokens& t, int64_t tile, float* out, float* room);
  // Quantizes tokens to integers by their extremes, behind those of `t`, whose length and counts the caller raises after it.
  // False: a scale or zero point is not finite in its storage.
  bool (*pack)(const PackedTokens& t, const float* x, int64_t count, bool symmetric, bool whole, float* room);
};

inline int64_t pack_room(const PackedTokens& t) { return (t.rows * t.dim + 3) / 4 + LANES; }  // floats

}  // namespace lowbit
