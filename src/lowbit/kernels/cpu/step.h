// What a step of a whole model, one token, needs of an instruction set beside the products with packed weights.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace lowbit {

// Query heads that share a key-value head, on the tokens so far.
struct Attention {
  const float* q;               // [group, dim], scaled
  const void* keys;             // [tokens, dim]
  const void* values;           // [tokens, dim]
  int32_t type;                 // of both: F32, F16 or BF16
  int64_t group, dim, tokens;
  float* scores;                // [group, tokens]
  float* row;                   // [4, dim rounded up to LANES]
  float* out;                   // [group, dim]
};

struct StepKernels {
  void (*add)(float* x, const float* y, int64_t n);                                                    // x += y
  void (*add_typed)(float* x, const void* y, int32_t type, int64_t offset, int64_t n);                // x += y[offset..]
  // x / rms(x) * (gain + gain_offset)
  void (*norm)(const float* x, int64_t n, const void* gain, int32_t type, float gain_offset, float eps, float* out);
  void (*spread)(const float* x, int64_t n, float* mean, float* variance);
  void (*gate)(float* gate, const float* up, int64_t n);                                              // gate = silu(gate) * up
  void (*dense)(const void* weight, int32_t type, int64_t cols, const float* x, int64_t first, int64_t last, float* y);
  void (*attend)(const Attention&);
  void (*read)(const void* source, int32_t type, int64_t offset, int64_t n, float* out);
  void (*write)(const float* source, int64_t n, void* target, int32_t type, int64_t offset);
};

}  // namespace lowbit
