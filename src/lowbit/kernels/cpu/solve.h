// What quantizing a model needs of an instruction set: the range of a grid that loses least, the rounding of one column after
// another, and how far two models' distributions are apart. Matrices of a solver are column-major: [columns, rows], and lanes are rows.
#pragma once

#include <cstdint>

namespace lowbit {

// Levels and their codes, in units of the scale.
struct Grid {
  int64_t count;            // of listed levels; 0: evenly spaced
  // Evenly spaced: clamp(rint(x / scale + zero), 0, most), or clamp(rint(x / scale) + zero, 0, most) where zero is whole.
  float most, middle;       // middle: the zero of a grid without zero points
  bool whole;
  // Listed: a number's level is the one after all midpoints below the number.
  bool own;                 // every row has its own levels, and no scale
  const float* values;      // rising: [count], or [sets, rows, count]
  const float* midpoints;   // the same with count - 1
  const uint8_t* codes;     // as values
};

// For each granule the first of the candidates that loses least: sum of importance * |x - rounded x|**norm.
struct Search {
  Grid grid;
  const float* x;           // [granules, size]
  int64_t granules, size;
  const float* importance;  // null: one; the next granule's is `importance_step` further
  int64_t importance_step;
  const float* scale;       // [granules, tried]
  const float* zero;        // the same, or null
  int64_t tried;
  float norm;
  int64_t parts;            // into which the candidates of a granule are cut
  double* loss;             // [granules, parts]: the least of each part; infinite if none is below infinity
  int32_t* best;            // and its number; -1 if none
};

// Some columns of a lazy block. Column i is first corrected by earlier ones: input i plus the sum over k < i of
// mix[i, k] * moved[k]. Then it is rounded, and moves the later ones.
//
// The recursion: the corrected input is the weight; moved = (weight - rounded) / divisor.
// Descent (with `target`): the corrected input is the gradient; the weight is rounded - gradient / divisor, with the codes
// so far; moved = the change of the rounded value.
struct Columns {
  Grid grid;
  int64_t rows, columns, pitch;  // pitch: from one column to the next of all matrices with `rows` rows
  const float* input;
  const float* mix;         // [columns, columns]
  const float* divisor;     // [columns]
  const int32_t* set;       // [columns]: which parameters
  const float* scale;       // [sets, rows]
  const float* zero;        // the same, or null
  uint8_t* codes;
  float* moved;             // written by the recursion only
  // Kept weights, or null: their code is that of zero, and `value`, a number of float16, is added to what it decodes to.
  uint8_t* kept;
  float* value;
  float limit;              // the recursion also keeps weights whose moved**2 exceeds it; negative: none
  // Descent, or null
  const float* target;
  float* error;             // rounded - target
};

// Granules as an evenly spaced grid restores them, and the gradients of that: straight through the rounding.
struct Fake {
  Grid grid;
  const float* x;           // [granules, size]
  int64_t granules, size;
  const float* scale;       // [granules]
  const float* zero;        // the same, or null
  float* y;                 // [granules, size], written forward
  const float* g;           // the gradient of y, read backward
  float* of_x;              // the gradients of x, scale and zero, written backward; null: not wanted
  float* of_scale;
  float* of_zero;
};

// Rows of logits of an original, p, and of a model, q, as distributions.
struct Compare {
  const float *p, *q;       // [rows, size]
  int64_t rows, size;
  double* found;            // [rows, COMPARED]: KL(p || q), KL(q || p), the logarithms of the sums of exponentials of p and of q
  uint8_t* same;            // [rows]: whether the same token is the likeliest
  float* gradient;          // null, or [rows, size]: of weight * (reverse KL(q || p) + (1 - reverse) KL(p || q)), for q
  float reverse, weight;
};

constexpr int64_t COMPARED = 4;

constexpr int64_t SUMMED = 512;  // gradients of a granule between two looks at the sums

constexpr int64_t STRIP = 64;  // rows that go through all columns together

struct SolveKernels {
  void (*search)(const Search&, int64_t granule, int64_t part);
  // Rows [STRIP * strip, STRIP * (strip + 1)); true if a code changed in descent. room: columns_room() floats.
  bool (*columns)(const Columns&, int64_t strip, float* room);
  void (*fake_forward)(const Fake&, int64_t granule, int64_t from, int64_t to);
  void (*fake_backward)(const Fake&, int64_t granule);
  void (*extremes)(const float* x, int64_t n, float* lo, float* hi);
  void (*extremes_backward)(const float* x, int64_t n, float lo, float hi, float of_lo, float of_hi, float* of_x);
  void (*compare)(const Compare&, int64_t row);
};

inline int64_t columns_room(const Columns& c) { return (c.columns + c.grid.count) * STRIP; }

}  // namespace lowbit
