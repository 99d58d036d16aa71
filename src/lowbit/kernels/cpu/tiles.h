// The layout that the kernels of this folder read, and the description of one call. No instruction set is assumed here.
//
// A weight [rows, cols] is cut into blocks of 16 output rows. A block is one stream: the codes of all its groups, then
// the parameters of all its groups. Codes come in chunks of 32 columns, and a chunk in planes of 8, 4, 2 or 1 bits:
// 3 bits are a plane of 2 (the low bits) and one of 1. A unit of 64 bytes is 16 rows by 4 bytes, a byte holding one
// column's field of each of 8 / width "quads" (4 consecutive columns): field f of unit u is quad u * (8 / width) + f.
// So a unit, shifted and masked, is 16 rows by 4 columns of codes, which is what a dot-product instruction of bytes
// reads, each 32-bit lane one output row; no horizontal sum is ever taken.
//
// Groups are padded to whole chunks (a group of at most 16 to half a chunk) with codes that meet inputs of zero.
//
// A codebook is another matter: every row has a table of its own, so lanes must be columns. Row r becomes a block whose
// lane l holds columns l, 16 + l, 32 + l, ...: the same layout of a [16, cols / 16] matrix.
#pragma once

#include <cstdint>

namespace lowbit {

enum Kind : int32_t { UNIFORM = 0, TABLE = 1, CODEBOOK = 2, BINARY = 3 };
enum Number : int32_t { NONE = 0, U8 = 1, F16 = 2, F32 = 3, BF16 = 4 };

constexpr int LANES = 16;          // rows of a block
constexpr int CHUNK = 32;          // columns of a chunk
constexpr int SEGMENT = 128;       // columns that share one scale of a dynamically quantized input, at most
constexpr int64_t HEADER = 256;    // bytes before the first block
constexpr int64_t MAGIC = 0x3174696277'6f6cLL;  // "lowbit1"

inline int number_bytes(int32_t number) { return number == NONE ? 0 : number == U8 ? 1 : number == F32 ? 4 : 2; }

// First in the buffer of a packed weight, so that the buffer explains itself.
struct Tiles {
  int64_t magic, total_bytes;
  int64_t rows, cols;           // as the layer has them
  int64_t group;                // columns that share parameters, the last group may be shorter
  int64_t groups;               // in a row
  int64_t padded;               // columns that a group takes here
  int64_t blocks;               // of LANES rows, or of one row of a codebook
  int64_t codes_bytes;          // of a block
  int64_t group_bytes;          // of a group's parameters in a block
  int64_t block_bytes;          // codes, parameters, padding to 64
  int64_t sums_offset;          // float32 [rows]: the sum of each row's decoded weights
  int32_t kind, bits;
  int32_t scale, zero;          // Numbers; a codebook's table and the bases of binary coding are its scale
  float zero_constant;          // where zero is NONE
  int32_t unused;

  int64_t padded_cols() const { return groups * padded; }
  int64_t segment() const { return padded < SEGMENT ? padded : SEGMENT; }
  int64_t group_segments() const { return (padded + SEGMENT - 1) / SEGMENT; }
  int64_t segments() const { return groups * group_segments(); }
  bool half() const { return padded == CHUNK / 2; }
};
static_assert(sizeof(Tiles) <= HEADER);

// How the input reaches the product.
enum Input : int32_t {
  FLOATS = 0,   // as it is, in float32: tables
  INT8 = 1,     // integers of 8 bits: one dot product
  HALVES = 2,   // bfloat16 as it is, the weight rounded to bfloat16: matrix tiles
  FIXED = 3,    // fixed point of 24 bits a segment, in three dot products: float32 for all purposes
};

struct Job {
  const Tiles* tiles;
  const uint8_t* data;          // the buffer, header included
  const float* table;           // values of the codes of a TABLE, 2**bits
  const void* x;                // [m, cols]
  void* y;                      // [m, rows]
  int32_t x_type, y_type;       // F32, F16 or BF16
  int64_t m;
  int32_t input;
  // INT8 with act_bits: quantized as the recipe says, a scale a token or one for all; 0: by segment.
  int32_t act_bits;
  bool act_symmetric, act_shared;
  float act_reach = 1.0f;       // share of a fitted range that the levels span; what lies beyond is clipped
  const float* act_scale;       // given ones (static), or null
  const float* act_zero;
  // Workspace, by token: floats [padded_cols], integers [input, padded_cols], scales [segments], sums [groups], and what
  // the zero point of the input adds for each unit of a row's sum.
  float* xf;
  int8_t* xq;
  float* xs;
  float* xsum;
  float* xzero;
};

// Few weights in float16 beside the codes: compressed rows, or rows of `width` values each at the same columns.
struct Side {
  const int32_t* start;         // [rows + 1], or null
  const void* column;           // of each value, or of each place in a row; null: all columns
  int32_t column_bytes;         // 2, 4 or 0
  const uint16_t* value;
  int64_t width, rows;
  int64_t tokens;               // 1 to LANES
  const float* x;               // [columns] of one token, [columns, LANES] of more, those that are missing zero
  void* y;                      // [tokens, rows], added to
  int32_t y_type;
};

struct StepKernels;
struct SolveKernels;
struct CacheKernels;

// What an instruction set provides. Ranges are of tokens, of blocks, of rows and of columns.
struct Kernels {
  const char* name;
  void (*prepare)(const Job&, int64_t first, int64_t last);
  void (*multiply)(const Job&, int64_t first, int64_t last);
  void (*decode)(const Tiles&, const uint8_t* data, const float* table, int64_t first, int64_t last, void* out, int32_t type);
  double (*read)(const uint8_t* data, int64_t bytes);  // a pass over memory at this instruction set's widest load
  void (*side)(const Side&, int64_t first, int64_t last);
  void (*side_input)(const Side&, const void* x, int32_t type, int64_t cols, float* out, int64_t first, int64_t last);
  const StepKernels* step = nullptr;
  const SolveKernels* solve = nullptr;
  const CacheKernels* cache = nullptr;
  // Kernels of matrix tiles only: what they take, who runs all else, and the bytes of a job's xq. They use no xf.
  bool (*takes)(const Tiles&, int32_t input, int64_t m) = nullptr;
  const Kernels* otherwise = nullptr;
  int64_t (*input_bytes)(const Tiles&, int32_t input, int64_t m) = nullptr;
};

const Kernels* portable_kernels();
#if defined(__x86_64__) || defined(_M_X64)
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
#elif defined(__aarch64__)
const Kernels* neon_kernels();
#endif

}  // namespace lowbit
