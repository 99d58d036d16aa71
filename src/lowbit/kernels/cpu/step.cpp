// One token through a whole model in one call, by one team of threads: what a token costs beside its products is then a
// few barriers, not the calls of a thousand operators.
//
// A block is five phases with a barrier after each: q, k and v; attention; o; gate and up; down. Where a matrix normalizes its
// output, which must be whole by then, its product is two phases. What is short and needed by all (norms, the prepared input
// of a product, the mean of an output) every thread computes for itself, which costs less than to wait for one that does.
// Everything between weights is float32; keys and values are rounded to the type of their cache.
#include "step.h"

#include "cache.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pack.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace lowbit {
namespace {

// ---- the team ---------------------------------------------------------------------------------------------------------

// torch's own pool, see module.cpp. It may give fewer threads than were asked for, so that a team counts itself.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Count = int (*)();
Parallel pool = nullptr;
Count team_size = nullptr, own_number = nullptr;

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Barrier {
 public:
  void wait(int threads) {
    const int32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 1024) pause_briefly();
      else std::this_thread::yield();  // more threads than cores: the one that is awaited may need this one's
    }
  }
  void reset() { arrived_.store(0, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
};

// Forks that led to this process. A child inherits locks that threads of its parent held, and none of these threads.
int64_t forks = 0;

// Lets one thread of this process in at a time, whatever a thread of the parent was at when it forked.
class Turn {
 public:
  // Returns whether a thread that does not exist here was inside.
  bool take() {
    for (int spins = 0;; ++spins) {
      int64_t holder = NOBODY;
      if (holder_.compare_exchange_strong(holder, forks, std::memory_order_acquire)) return false;
      if (holder != forks && holder_.compare_exchange_strong(holder, forks, std::memory_order_acquire)) return true;
      if (spins < 1024) pause_briefly();
      else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  void give() { holder_.store(NOBODY, std::memory_order_release); }

 private:
  static constexpr int64_t NOBODY = -1;
  std::atomic<int64_t> holder_{NOBODY};
};

// Memory on lines of its own.
template <class T>
class Aligned {
 public:
  void reserve(int64_t n) {
    if (n <= size_) return;
    data_.reset(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))));
    std::fill_n(data_.get(), n, T{});
    size_ = n;
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// ---- the model --------------------------------------------------------------------------------------------------------

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Matrix {
  int64_t rows, cols;
  Job job{};                       // packed: what is the same for every token; its tiles are `tiles`
  Tiles tiles{};
  bool packed = false;
  const void* dense = nullptr;     // not packed: [rows, cols]
  int32_t dense_type = NONE;
  const void* bias = nullptr;
  int32_t bias_type = NONE;
  std::vector<Side> sides;         // added to the product
  const float *before = nullptr, *after = nullptr;  // [cols] and [rows]: what multiplies input and output, or null
  bool normalized = false;         // the output, before the bias: (y - mean) / sqrt(variance + eps)
  float eps = 0;

  int64_t plane() const { return tiles.padded_cols() * (tiles.kind == CODEBOOK ? LANES : 1); }
  int64_t planes() const { return job.input == FLOATS ? 0 : job.input; }

  // Whether an input prepared for `other` is prepared for this one.
  bool reads_as(const Matrix& other) const {
    if (!packed || !other.packed) return packed == other.packed;
    if (before != other.before) return false;
    const Job &a = job, &b = other.job;
    return tiles.cols == other.tiles.cols && tiles.group == other.tiles.group && tiles.padded == other.tiles.padded &&
           (tiles.kind == CODEBOOK) == (other.tiles.kind == CODEBOOK) && a.input == b.input && a.act_bits == b.act_bits &&
           a.act_symmetric == b.act_symmetric && a.act_reach == b.act_reach && a.act_scale == b.act_scale &&
           a.act_zero == b.act_zero;
  }
};

struct Norm {
  const void* gain;
  int32_t type;
  int64_t size;
  float offset, eps;
};

struct Block {
  int attention_norm, mlp_norm, q_norm, k_norm;  // the last two may be -1: none
  int q, k, v, o, gate, up, down;
};

// An input that a product has prepared.
struct Prepared {
  Aligned<float> scaled;           // the input times `before` of its matrix
  Aligned<float> floats;
  Aligned<int8_t> integers;
};

// What a thread has for itself.
struct Own {
  Aligned<float> x, normed;        // the residual stream, and what is read from it
  Aligned<float> heads;            // queries of a group, a key, a value
  Aligned<float> scores, row;
  Aligned<float> weight;           // rows of a block, decoded
  Aligned<float> attended;         // from a packed cache
  CacheRoom cache;
  Prepared inputs[3];
};

struct Token {
  const void* x;
  int32_t x_type;
  std::vector<uintptr_t> keys, values;  // a layer's cache, [key-value heads, capacity, dim]
  int32_t cache_type;
  int64_t capacity, length;             // tokens before this one
  std::vector<LayerSide*> key_sides, value_sides;  // instead of all these: each layer's tokens, packed
  const float *cos, *sin;               // [rotary]
  void* logits;
  int32_t logits_type;
};

class Step {
 public:
  Step(const Kernels* kernels, int64_t hidden, int64_t heads, int64_t groups, int64_t dim, int64_t rotary, float scaling)
      : k_(*kernels), s_(*kernels->step), hidden_(hidden), heads_(heads), groups_(groups), dim_(dim), rotary_(rotary),
        scaling_(scaling) {
    if (hidden < 1 || groups < 1 || heads % groups || dim < 1 || rotary < 0 || rotary > dim || rotary % 2)
      throw std::invalid_argument("no attention has these heads");
  }

  int packed(uintptr_t tiles, int64_t bytes, uintptr_t table, int64_t values, int input, int act_bits, bool act_symmetric,
             float act_reach, uintptr_t act_scale, uintptr_t act_zero, uintptr_t bias, int bias_type) {
    Matrix m{};
    m.tiles = header(at<uint8_t>(tiles), bytes);
    if (m.tiles.kind == TABLE && (!table || values < int64_t{1} << m.tiles.bits))
      throw std::invalid_argument("the table has fewer values than the packed tiles have codes");
    if (input == FLOATS && m.tiles.kind != TABLE && m.tiles.kind != CODEBOOK)
      throw std::invalid_argument("only values that are looked up meet floats");
    m.rows = m.tiles.rows;
    m.cols = m.tiles.cols;
    m.packed = true;
    m.job.data = at<uint8_t>(tiles);
    m.job.table = at<float>(table);
    m.job.x_type = m.job.y_type = F32;
    m.job.m = 1;
    m.job.input = input;
    m.job.act_bits = act_bits;
    m.job.act_symmetric = act_symmetric;
    m.job.act_reach = act_reach;
    m.job.act_shared = true;
    m.job.act_scale = at<float>(act_scale);
    m.job.act_zero = at<float>(act_zero);
    return keep(m, bias, bias_type);
  }

  int dense(uintptr_t weight, int type, int64_t rows, int64_t cols, uintptr_t bias, int bias_type) {
    Matrix m{};
    m.rows = rows;
    m.cols = cols;
    m.dense = at<void>(weight);
    m.dense_type = type;
    return keep(m, bias, bias_type);
  }

  // A side term of a matrix.
  void beside(int matrix, int64_t rows, uintptr_t start, uintptr_t column, int column_bytes, uintptr_t value, int64_t width) {
    Matrix& m = matrices_.at(matrix);
    if (m.rows != rows) throw std::invalid_argument("a side term has other rows than its matrix");
    m.sides.push_back({at<int32_t>(start), at<void>(column), column_bytes, at<uint16_t>(value), width, m.rows, 1, nullptr, nullptr,
                       F32});
  }

  // What a matrix does to its input and its output; addresses may be 0.
  void around(int matrix, uintptr_t before, uintptr_t after, bool normalized, float eps) {
    Matrix& m = matrices_.at(matrix);
    if (!m.packed) throw std::invalid_argument("only a packed matrix scales its input or output");
    m.before = at<float>(before);
    m.after = at<float>(after);
    m.normalized = normalized;
    m.eps = eps;
  }

  int norm(uintptr_t gain, int type, int64_t size, float offset, float eps) {
    norms_.push_back({at<void>(gain), type, size, offset, eps});
    return static_cast<int>(norms_.size()) - 1;
  }

  void block(int attention_norm, int q, int k, int v, int q_norm, int k_norm, int o, int mlp_norm, int gate, int up, int down) {
    const int64_t width = heads_ * dim_, shared = groups_ * dim_;
    expect(q, width, hidden_);
    expect(k, shared, hidden_);
    expect(v, shared, hidden_);
    expect(o, hidden_, width);
    expect(gate, matrices_.at(up).rows, hidden_);
    expect(up, matrices_.at(up).rows, hidden_);
    expect(down, hidden_, matrices_.at(up).rows);
    for (int n : {attention_norm, mlp_norm}) expect_norm(n, hidden_);
    for (int n : {q_norm, k_norm})
      if (n >= 0) expect_norm(n, dim_);
    blocks_.push_back({attention_norm, mlp_norm, q_norm, k_norm, q, k, v, o, gate, up, down});
    inner_ = std::max(inner_, matrices_.at(up).rows);
  }

  void finish(int norm, int head) {
    expect_norm(norm, hidden_);
    expect(head, matrices_.at(head).rows, hidden_);
    final_norm_ = norm;
    head_ = head;
    qkv_.reserve((heads_ + 2 * groups_) * dim_ + 3 * LANES);
    attended_.reserve(heads_ * dim_);
    part_.reserve(PARTS * heads_ * (dim_ + 2));
    out_.reserve(hidden_ + LANES);
    mlp_.reserve(2 * (inner_ + LANES));
    logits_.reserve(matrices_.at(head).rows + LANES);
    bool normalized = false;
    for (int i = 0; i < static_cast<int>(matrices_.size()); ++i) {
      normalized = normalized || matrices_[i].normalized;
      if (i != head || matrices_[i].normalized) raw_rows_ = std::max(raw_rows_, matrices_[i].rows);
    }
    raw_rows_ = (raw_rows_ / LANES + 2) * LANES;
    if (normalized) raw_.reserve(3 * raw_rows_);
    next_ = std::vector<std::atomic<int64_t>>(9 * blocks_.size() + 2);
  }

  void run(Token& token, int threads) {
    if (turn_.take()) barrier_.reset();
    const struct Giving {
      Turn& turn;
      ~Giving() { turn.give(); }
    } giving{turn_};
    threads = pool == nullptr ? 1 : std::max(threads, 1);
    while (static_cast<int>(own_.size()) < threads) own_.emplace_back(std::make_unique<Own>());
    for (int i = 0; i < threads; ++i) make_room(*own_[i], token);
    for (auto& n : next_) n.store(0, std::memory_order_relaxed);
    struct Work {
      Step* step;
      Token* token;
    } work{this, &token};
    if (threads == 1) return walk(token, *own_[0], 0, 1);
    pool(
        [](void* p) {
          auto* w = static_cast<Work*>(p);
          const int number = own_number();
          w->step->walk(*w->token, *w->step->own_[number], number, team_size());
        },
        &work, static_cast<unsigned>(threads), 0);
  }

  // Whether a scale was not finite in its storage since the last look.
  bool unstorable() { return unstorable_.exchange(false); }

  void expect_side(const LayerSide& side, int64_t length) const {
    if (side.batch != 1 || side.heads != groups_ || side.dim() != dim_ || side.length() != length ||
        side.start + side.waiting_length >= side.waiting_room || side.leaving > side.waiting_length + 1 ||
        !side.has_room() || !side.turns_all(1))
      throw std::invalid_argument("the cache has no room for the token, or is another model's");
  }

  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t vocabulary() const { return matrices_[head_].rows; }

 private:
  int keep(Matrix& m, uintptr_t bias, int bias_type) {
    m.bias = at<void>(bias);
    m.bias_type = bias_type;
    matrices_.push_back(m);
    return static_cast<int>(matrices_.size()) - 1;
  }

  void expect(int matrix, int64_t rows, int64_t cols) const {
    const Matrix& m = matrices_.at(matrix);
    if (m.rows != rows || m.cols != cols) throw std::invalid_argument("the matrices of a block do not fit each other");
  }

  void expect_norm(int norm, int64_t size) const {
    if (norms_.at(norm).size != size) throw std::invalid_argument("a norm does not fit what it normalizes");
  }

  void make_room(Own& own, const Token& token) {
    const int64_t group = heads_ / groups_;
    own.x.reserve(hidden_);
    own.normed.reserve(std::max(hidden_, dim_));
    own.heads.reserve((group + 2) * dim_);
    own.row.reserve(dim_ + LANES);
    own.attended.reserve(heads_ * dim_);
    own.scores.reserve(group * token.capacity);  // of plain caches
    own.weight.reserve(LANES * widest_());
    for (auto& input : own.inputs) {
      input.scaled.reserve(scaled_());
      input.floats.reserve(floats_());
      input.integers.reserve(integers_());
    }
  }

  int64_t widest_() const {
    int64_t most = 1;
    for (const Matrix& m : matrices_)
      if (m.packed) most = std::max(most, m.cols);
    return most;
  }
  int64_t scaled_() const {
    int64_t most = 0;
    for (const Matrix& m : matrices_)
      if (m.before != nullptr) most = std::max(most, m.cols);
    return most;
  }
  int64_t floats_() const {
    int64_t most = 1;
    for (const Matrix& m : matrices_)
      if (m.packed) most = std::max(most, m.plane() + m.tiles.segments() + m.tiles.groups + 1);
    return most;
  }
  int64_t integers_() const {
    int64_t most = 1;
    for (const Matrix& m : matrices_)
      if (m.packed) most = std::max(most, m.plane() * m.planes());
    return most;
  }

  // ---- products ----

  Job job_of(const Matrix& m, const float* x, const Prepared& input) const {
    Job job = m.job;
    job.tiles = &m.tiles;
    job.x = x;
    job.xf = input.floats.get();
    job.xs = job.xf + m.plane();
    job.xsum = job.xs + m.tiles.segments();
    job.xzero = job.xsum + m.tiles.groups;
    job.xq = input.integers.get();
    return job;
  }

  // All of an output but its bias where it is normalized afterwards. `weight`: room for decoded rows where the input drowns in
  // fixed point, else null.
  void rows(const Matrix& m, const Job& job, const float* x, int64_t first, int64_t last, float* y, float* weight) const {
    if (m.packed && weight != nullptr) {
      for (int64_t row = first; row < last; row += LANES) {
        const int64_t n = std::min<int64_t>(LANES, last - row);
        k_.decode(m.tiles, job.data, job.table, row, row + n, weight, F32);
        s_.dense(weight, F32, m.cols, x, 0, n, y + row);
      }
    } else if (m.packed) {
      Job there = job;
      there.y = y;
      const int64_t height = m.tiles.kind == CODEBOOK ? 1 : LANES;
      k_.multiply(there, first / height, (last + height - 1) / height);
    } else {
      s_.dense(m.dense, m.dense_type, m.cols, x, first, last, y);
    }
    for (Side side : m.sides) {
      side.x = x;
      side.y = y;
      k_.side(side, first, last);
    }
    if (m.after != nullptr)
      for (int64_t i = first; i < last; ++i) y[i] *= m.after[i];
    if (m.bias != nullptr && !m.normalized) s_.add_typed(y + first, m.bias, m.bias_type, first, last - first);
  }

  // Cuts the outputs of `count` matrices into pieces of whole blocks, and calls `piece` with the number of a matrix and its rows
  // for those that this thread is to do. Where they are `paired`, with the same rows of all of them in turn, and then `after`.
  template <class Piece, class After>
  void pieces(const int* which, int count, bool paired, int threads, int phase, const Piece& piece, const After& after) {
    int64_t blocks[3], total = 0;
    for (int i = 0; i < count; ++i) {
      blocks[i] = (matrices_[which[i]].rows + LANES - 1) / LANES;
      total = paired ? blocks[i] : total + blocks[i];
    }
    const int64_t number = std::min<int64_t>(total, threads == 1 ? 1 : 4 * threads);
    for (int64_t p; (p = next_[phase].fetch_add(1, std::memory_order_relaxed)) < number;) {
      int64_t first = total * p / number, last = total * (p + 1) / number;
      for (int i = 0; i < count; ++i) {
        const int64_t a = std::max<int64_t>(first, 0), b = std::min(last, blocks[i]);
        if (a < b) piece(i, a * LANES, std::min(b * LANES, matrices_[which[i]].rows));
        if (!paired) first -= blocks[i], last -= blocks[i];
      }
      if (paired) after(first * LANES, std::min(last * LANES, matrices_[which[0]].rows));
    }
  }

  // Products of one input with `count` matrices, see pieces(). A phase, or two where an output is normalized.
  template <class After>
  void products(const int* which, int count, bool paired, const float* x, float* const* y, Own& own, int threads, int& phase,
                const After& after) {
    Job jobs[3];
    int slots[3];
    bool drowned[3] = {}, normalized = false;
    const float* inputs[3];
    float* raw[3];
    for (int i = 0; i < count; ++i) {
      const Matrix& m = matrices_[which[i]];
      slots[i] = i;
      for (int j = i - 1; j >= 0; --j)
        if (m.reads_as(matrices_[which[j]])) slots[i] = slots[j];
      inputs[i] = slots[i] == i ? x : inputs[slots[i]];
      if (m.before != nullptr && slots[i] == i) {
        float* scaled = own.inputs[i].scaled.get();
        for (int64_t c = 0; c < m.cols; ++c) scaled[c] = x[c] * m.before[c];
        inputs[i] = scaled;
      }
      if (m.packed) {
        jobs[i] = job_of(m, inputs[i], own.inputs[slots[i]]);
        if (slots[i] == i) k_.prepare(jobs[i], 0, 1);
        drowned[i] = jobs[i].input == FIXED && (slots[i] == i ? drowns(m.tiles, inputs[i]) : drowned[slots[i]]);
      }
      normalized = normalized || m.normalized;
    }
    const auto nothing = [](int64_t, int64_t) {};
    for (int i = 0; i < count; ++i) raw[i] = normalized ? raw_.get() + i * raw_rows_ : y[i];
    const auto multiply = [&](int i, int64_t first, int64_t last) {
      rows(matrices_[which[i]], jobs[i], inputs[i], first, last, raw[i], drowned[i] ? own.weight.get() : nullptr);
    };
    if (!normalized) return pieces(which, count, paired, threads, phase++, multiply, after);
    pieces(which, count, paired, threads, phase++, multiply, nothing);
    barrier_.wait(threads);
    float mean[3] = {}, by[3] = {1, 1, 1};
    for (int i = 0; i < count; ++i) {
      const Matrix& m = matrices_[which[i]];
      if (!m.normalized) continue;
      s_.spread(raw[i], m.rows, mean + i, by + i);
      by[i] = 1.0f / std::sqrt(by[i] + m.eps);
    }
    const auto normalize = [&](int i, int64_t first, int64_t last) {
      const Matrix& m = matrices_[which[i]];
      for (int64_t r = first; r < last; ++r) y[i][r] = (raw[i][r] - mean[i]) * by[i];
      if (m.bias != nullptr && m.normalized) s_.add_typed(y[i] + first, m.bias, m.bias_type, first, last - first);
    };
    pieces(which, count, paired, threads, phase++, normalize, after);
  }

  // ---- attention ----

  void turn(float* head, const Token& token) const {
    const int64_t half = rotary_ / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = head[i], b = head[i + half];
      head[i] = a * token.cos[i] - b * token.sin[i];
      head[i + half] = b * token.cos[i + half] + a * token.sin[i + half];
    }
  }

  void head(const float* from, int norm, const Token& token, float* to) const {
    if (norm < 0) std::copy_n(from, dim_, to);
    else normalize(norm, from, to);
    turn(to, token);
  }

  void attention(const Block& b, int64_t layer, const Token& token, Own& own, int64_t g) const {
    const int64_t group = heads_ / groups_, at_token = (g * token.capacity + token.length) * dim_;
    const float *q = qkv_.get() + g * group * dim_, *k = keys_of_token() + g * dim_, *v = values_of_token() + g * dim_;
    float *queries = own.heads.get(), *key = queries + group * dim_;
    head(k, b.k_norm, token, key);
    s_.write(key, dim_, at<void>(token.keys[layer]), token.cache_type, at_token);
    s_.write(v, dim_, at<void>(token.values[layer]), token.cache_type, at_token);
    for (int64_t i = 0; i < group; ++i) {
      head(q + i * dim_, b.q_norm, token, queries + i * dim_);
      for (int64_t d = 0; d < dim_; ++d) queries[i * dim_ + d] *= scaling_;
    }
    const int64_t skip = g * token.capacity * dim_ * (token.cache_type == F32 ? 4 : 2);
    s_.attend({queries, at<char>(token.keys[layer]) + skip, at<char>(token.values[layer]) + skip, token.cache_type, group,
               dim_, token.length + 1, own.scores.get(), own.row.get(), attended_.get() + g * group * dim_});
  }

  // The token waits with the newest ones; those that leave them are packed once it has attended. Every head's tokens are cut
  // into `parts`, which put_together() joins.
  void packed_attention(const Block& b, LayerSide& keys, LayerSide& values, const Token& token, Own& own, int64_t g, Part part) {
    const int64_t group = heads_ / groups_;
    const float *q = qkv_.get() + g * group * dim_, *k = keys_of_token() + g * dim_, *v = values_of_token() + g * dim_;
    float *queries = own.heads.get(), *key = queries + group * dim_;
    const bool last = part.number + 1 == part.of;
    if (last) {
      head(k, b.k_norm, token, key);
      for (const auto& [side, state] : {std::pair{&keys, static_cast<const float*>(key)}, std::pair{&values, v}})
        s_.write(state, dim_, at<void>(side->waiting), side->type,
                 (g * side->waiting_room + side->start + side->waiting_length) * dim_);
    }
    for (int64_t i = 0; i < group; ++i) {
      head(q + i * dim_, b.q_norm, token, queries + i * dim_);
      for (int64_t d = 0; d < dim_; ++d) queries[i * dim_ + d] *= scaling_;
    }
    int32_t begin[CACHE_QUERIES] = {}, end[CACHE_QUERIES];
    std::fill_n(end, CACHE_QUERIES, static_cast<int32_t>(token.length + 1));
    float* to = part_.get() + (g * PARTS + part.number) * group * (dim_ + 2);
    for (int64_t i = 0; i < group; i += CACHE_QUERIES)
      attend_head(*k_.cache, keys, values, g, 1, queries + i * dim_, std::min(CACHE_QUERIES, group - i), begin, end,
                  to + 2 * group + i * dim_, own.cache, part, to + i, to + group + i);
    if (!last) return;
    for (const LayerSide* side : {&keys, &values})
      if (!pack_head(*k_.cache, *side, g, side->leaving, s_.read, own.cache)) unstorable_.store(true, std::memory_order_relaxed);
  }

  // What the parts of all heads give together, to `out` [heads, dim].
  void put_together(int64_t parts, float* out) const {
    const int64_t group = heads_ / groups_;
    for (int64_t g = 0; g < groups_; ++g)
      for (int64_t r = 0; r < group; ++r) {
        const auto part = [&](int64_t p) { return part_.get() + (g * PARTS + p) * group * (dim_ + 2); };
        float most = part(0)[r], sum = 0;
        for (int64_t p = 1; p < parts; ++p) most = std::max(most, part(p)[r]);
        float* to = out + (g * group + r) * dim_;
        std::fill_n(to, dim_, 0.0f);
        for (int64_t p = 0; p < parts; ++p) sum += part(p)[group + r] * std::exp(part(p)[r] - most);
        for (int64_t p = 0; p < parts; ++p) {
          const float by = part(p)[group + r] * std::exp(part(p)[r] - most) / sum;
          const float* from = part(p) + 2 * group + r * dim_;
          for (int64_t d = 0; d < dim_; ++d) to[d] += by * from[d];
        }
      }
  }

  float* keys_of_token() const { return qkv_.get() + heads_ * dim_ + LANES; }
  float* values_of_token() const { return keys_of_token() + groups_ * dim_ + LANES; }

  // ---- the walk ----

  void normalize(int norm, const float* x, float* out) const {
    const Norm& n = norms_[norm];
    s_.norm(x, n.size, n.gain, n.type, n.offset, n.eps, out);
  }

  void walk(const Token& token, Own& own, int number, int threads) {
    (void)number;
    const auto nothing = [](int64_t, int64_t) {};
    float *x = own.x.get(), *normed = own.normed.get(), *out = out_.get();
    float *gate = mlp_.get(), *up = gate + inner_ + LANES;
    int phase = 0;
    s_.read(token.x, token.x_type, 0, hidden_, x);
    for (int64_t layer = 0; layer < blocks(); ++layer) {
      const Block& b = blocks_[layer];
      const auto product = [&](int which, const float* input, float* y) {
        products(&which, 1, false, input, &y, own, threads, phase, nothing);
        barrier_.wait(threads);
        s_.add(x, out, hidden_);
      };
      normalize(b.attention_norm, x, normed);
      const int qkv[] = {b.q, b.k, b.v};
      float* const to[] = {qkv_.get(), keys_of_token(), values_of_token()};
      products(qkv, 3, false, normed, to, own, threads, phase, nothing);
      barrier_.wait(threads);
      const bool packed = !token.key_sides.empty();
      const int64_t parts = packed ? parts_of(*token.key_sides[layer], *token.value_sides[layer]) : 1;
      for (int64_t p; (p = next_[phase].fetch_add(1, std::memory_order_relaxed)) < groups_ * parts;) {
        if (packed) packed_attention(b, *token.key_sides[layer], *token.value_sides[layer], token, own, p / parts, {p % parts, parts});
        else attention(b, layer, token, own, p);
      }
      ++phase;
      barrier_.wait(threads);
      if (packed) put_together(parts, own.attended.get());
      product(b.o, packed ? own.attended.get() : attended_.get(), out);
      normalize(b.mlp_norm, x, normed);
      const int gated[] = {b.gate, b.up};
      float* const both[] = {gate, up};
      products(gated, 2, true, normed, both, own, threads, phase,
               [&](int64_t first, int64_t last) { s_.gate(gate + first, up + first, last - first); });
      barrier_.wait(threads);
      product(b.down, gate, out);
    }
    normalize(final_norm_, x, normed);
    float* const logits[] = {logits_.get()};
    products(&head_, 1, true, normed, logits, own, threads, phase, [&](int64_t first, int64_t last) {
      s_.write(logits_.get() + first, last - first, token.logits, token.logits_type, first);
    });
  }

  const Kernels& k_;
  const StepKernels& s_;
  int64_t hidden_, heads_, groups_, dim_, rotary_, inner_ = 0;
  float scaling_;
  std::vector<Matrix> matrices_;
  std::vector<Norm> norms_;
  std::vector<Block> blocks_;
  int final_norm_ = -1, head_ = -1;

  std::atomic<bool> unstorable_{false};
  Turn turn_;
  Barrier barrier_;
  std::vector<std::atomic<int64_t>> next_;  // the next piece of each phase
  static constexpr int64_t PARTS = 2;  // at most, see parts_of
  Aligned<float> qkv_, attended_, part_, out_, mlp_, logits_;
  Aligned<float> raw_;  // [3, raw_rows_]: outputs of up to three matrices before they are normalized
  int64_t raw_rows_ = 0;
  std::vector<std::unique_ptr<Own>> own_;
};

// ---- what a description was made from ---------------------------------------------------------------------------------

// Entries of Python dictionaries that have to be the same objects, and dictionaries that have to be empty: a thousand look-ups
// for each token, which Python itself would take a quarter of a millisecond for.
class Watch {
 public:
  void entry(nb::dict place, nb::str name, nb::object value, bool present) {
    entries_.push_back({std::move(place), std::move(name), present ? std::move(value) : nb::object()});
  }
  void empty(nb::dict place) { empty_.push_back(std::move(place)); }

  bool same() const {
    for (const Entry& e : entries_) {
      PyObject* now = PyDict_GetItemWithError(e.place.ptr(), e.name.ptr());
      if (now != e.value.ptr()) return false;
    }
    return true;
  }
  bool all_empty() const {
    for (const nb::dict& d : empty_)
      if (PyDict_Size(d.ptr()) > 0) return false;
    return true;
  }

 private:
  struct Entry {
    nb::dict place;
    nb::str name;
    nb::object value;  // null: absent
  };
  std::vector<Entry> entries_;
  std::vector<nb::dict> empty_;
};

}  // namespace

void bind_step(nb::module_& m, const Kernels* (*kernels_called)(const std::string&)) {
  pthread_atfork(nullptr, nullptr, [] { ++forks; });
  m.def("use_team", [](uintptr_t parallel, uintptr_t size, uintptr_t number) {
    const bool all = parallel && size && number;
    pool = all ? reinterpret_cast<Parallel>(parallel) : nullptr;
    team_size = reinterpret_cast<Count>(size);
    own_number = reinterpret_cast<Count>(number);
  });
  nb::class_<Watch>(m, "Watch")
      .def(nb::init<>())
      .def("entry", &Watch::entry, nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
      .def("empty", &Watch::empty)
      .def("same", &Watch::same)
      .def("all_empty", &Watch::all_empty);
  nb::class_<Step>(m, "Step")
      .def("__init__", [kernels_called](Step* self, const std::string& isa, int64_t hidden, int64_t heads, int64_t groups,
                                        int64_t dim, int64_t rotary, float scaling) {
        const Kernels* k = kernels_called(isa);
        new (self) Step(k->otherwise ? k->otherwise : k, hidden, heads, groups, dim, rotary, scaling);
      })
      .def("packed", &Step::packed)
      .def("dense", &Step::dense)
      .def("beside", &Step::beside)
      .def("around", &Step::around)
      .def("norm", &Step::norm)
      .def("block", &Step::block)
      .def("finish", &Step::finish)
      .def("run", [](Step& self, uintptr_t x, int x_type, std::vector<uintptr_t> keys, std::vector<uintptr_t> values,
                     int cache_type, int64_t capacity, int64_t length, uintptr_t cos, uintptr_t sin, uintptr_t logits,
                     int logits_type, int threads) {
        if (static_cast<int64_t>(keys.size()) != self.blocks() || keys.size() != values.size() || length < 0 ||
            length >= capacity)
          throw std::invalid_argument("the cache has no room for the token");
        Token token{at<void>(x), x_type, std::move(keys), std::move(values), cache_type, capacity, length, {}, {},
                    at<float>(cos), at<float>(sin), at<void>(logits), logits_type};
        nb::gil_scoped_release release;
        self.run(token, threads);
      })
      // The same with packed tokens, `length` of them. False: a number did not fit the storage of its scale.
      .def("run_packed", [](Step& self, uintptr_t x, int x_type, std::vector<LayerSide*> keys, std::vector<LayerSide*> values,
                            int64_t length, uintptr_t cos, uintptr_t sin, uintptr_t logits, int logits_type, int threads) {
        if (static_cast<int64_t>(keys.size()) != self.blocks() || keys.size() != values.size())
          throw std::invalid_argument("the cache is another model's");
        for (const auto* sides : {&keys, &values})
          for (const LayerSide* side : *sides) self.expect_side(*side, length);
        Token token{at<void>(x), x_type, {}, {}, NONE, 0, length, keys, values, at<float>(cos), at<float>(sin),
                    at<void>(logits), logits_type};
        nb::gil_scoped_release release;
        self.run(token, threads);
        for (const auto* sides : {&keys, &values})
          for (LayerSide* side : *sides) side->advance();
        return !self.unstorable();
      });
}

}  // namespace lowbit
