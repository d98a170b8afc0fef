// Many layers in one call: rows go through int8 products, norms and attention step after step, while what comes out of one step is
// still in a cache when the next one reads it (native_rows.py says what a step is and where its numbers lie).
//
// A thread takes whole sequences where there are enough of them, and waits for no other. Else it takes rows, and threads meet before
// each attention, which reads the keys and values of all of them.
#include <sched.h>

#include <atomic>

#include "attention.h"
#include "int8_product.h"
#include "norms.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace {

constexpr int64_t ROWS_AT_ONCE = 96;  // of a thread: so many rows of all that is between two attentions stay in the L2
constexpr int SPINS = 2000;           // about as long as a thread needs to be woken up
enum Kind { LINEAR, NORM, ATTENTION };
enum Where { GIVEN, KEPT, SHORT };

// Registers are numbers of entries in Plan::registers, -1 for none.
struct Step {
  int64_t kind, from, other, to, sum, columns, outputs;
  int64_t how;  // the activation; whether a norm is an RMS norm; whether attention is causal
  const void *weight, *scale, *sums, *bias, *mask;
  int64_t heads, kv_heads, depth, q_at, k_at, v_at;  // q_at: the column of `from` where the first query is
  int64_t mask_kind, mask_strides[4], is_rough;
  double number;  // eps; what scores are multiplied by
};

// A matrix of as many rows as all are: at `data`, or at a column of what a thread keeps for its rows or has for those at hand.
struct Register {
  int64_t where;
  void* data;
  int64_t at, columns;
};

struct Plan {
  const Step* steps;
  int64_t count;
  const Register* registers;
  int64_t registers_count, rows, length, is_bfloat16, is_by_sequence, kept_columns, short_columns, threads;
  uint8_t* scratch;
};

struct Sizes {
  int64_t quantized = 0, row = 0, attention = 0, shorts = 0, kept = 0, group = 0;
  int64_t own() const { return quantized + row + attention + shorts; }
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

attend::Problem problem_of(const Plan& p, const Step& s) {
  attend::Problem made{};
  made.batch = 1;
  made.heads = s.heads;
  made.kv_heads = s.kv_heads;
  made.queries = made.keys = p.length;
  made.depth = s.depth;
  for (int i = 0; i < 3; i++) {
    const int64_t strides[] = {0, s.depth, s.columns};
    made.q_strides[i] = made.k_strides[i] = made.v_strides[i] = strides[i];
  }
  for (int i = 0; i < 4; i++) made.mask_strides[i] = s.mask_strides[i];
  made.mask_kind = (int)s.mask_kind;
  made.is_causal = (int)s.how;
  made.is_rough = s.is_rough;
  made.scale = (float)s.number;
  return made;
}

Sizes sizes_of(const Plan& p) {
  Sizes sizes;
  const int64_t number = p.is_bfloat16 ? 2 : 4;
  for (int64_t i = 0; i < p.count; i++) {
    const Step& s = p.steps[i];
    const int64_t quantized = product::bytes_of(ROWS_AT_ONCE, s.columns), row = (s.columns + LANES) * 4;
    if (s.kind == LINEAR && quantized > sizes.quantized) sizes.quantized = quantized;
    if (s.kind == NORM && row > sizes.row) sizes.row = aligned(row);
    if (s.kind == ATTENTION) {
      const int64_t bytes = aligned(attend::floats_of(problem_of(p, s)) * 4);
      if (bytes > sizes.attention) sizes.attention = bytes;
    }
  }
  sizes.quantized = aligned(sizes.quantized);
  sizes.shorts = aligned(ROWS_AT_ONCE * p.short_columns * number);
  sizes.group = !p.is_by_sequence ? p.rows : p.length > ROWS_AT_ONCE ? p.length : ROWS_AT_ONCE / p.length * p.length;
  sizes.kept = aligned(sizes.group * p.kept_columns * number);
  return sizes;
}

// Threads meet: each waits until all `count` of them have come. One that has waited for long lets others have its core.
struct Meeting {
  std::atomic<int64_t> came{0};
  void wait(int64_t count, int64_t& turn) {
    const int64_t all_there = ++turn * count;
    came.fetch_add(1, std::memory_order_acq_rel);
    for (int64_t spin = 0; came.load(std::memory_order_acquire) < all_there; spin++) {
      if (spin < SPINS)
        _mm_pause();
      else
        sched_yield();
    }
  }
};

// What one thread works with.
template <typename Number>
struct Worker {
  const Plan& p;
  Number *kept, *shorts;
  int64_t kept_first, kept_rows, short_first;  // the rows that lie there
  product::Quantized quantized;
  float *row, *attention;

  Worker(const Plan& p, const Sizes& sizes, int64_t thread) : p(p), kept_first(0), kept_rows(sizes.group), short_first(0) {
    uint8_t* own = p.scratch + thread * (sizes.own() + (p.is_by_sequence ? sizes.kept : 0));
    quantized.scale = (float*)own;
    quantized.zero = (int32_t*)own + ROWS_AT_ONCE;
    quantized.q = (product::Quantum*)(own + ROWS_AT_ONCE * 8);
    row = (float*)(own + sizes.quantized);
    attention = (float*)((uint8_t*)row + sizes.row);
    shorts = (Number*)((uint8_t*)attention + sizes.attention);
    kept = (Number*)(p.is_by_sequence ? (uint8_t*)shorts + sizes.shorts : p.scratch + p.threads * sizes.own());
  }

  Number* at(int64_t number, int64_t row) const {
    if (number < 0) return nullptr;
    const Register& r = p.registers[number];
    if (r.where == GIVEN) return (Number*)r.data + row * r.columns;
    if (r.where == KEPT) return kept + r.at * kept_rows + (row - kept_first) * r.columns;
    return shorts + r.at * ROWS_AT_ONCE + (row - short_first) * r.columns;
  }

  void linear(const Step& s, int64_t first, int64_t count) {
    const product::Weight w{(const int8_t*)s.weight, (const float*)s.scale, (const int32_t*)s.sums, (s.columns + 3) / 4 * 4, s.outputs};
    const Number* x = at(s.from, first);
    quantized.stride = product::stride_of(s.columns);
    for (int64_t i = 0; i < count; i++)
      product::quantize(x + i * s.columns, s.columns, quantized.q + i * quantized.stride, quantized.scale + i, quantized.zero + i);
    product::outputs<Number>(w, quantized, false, 0, count, (const float*)s.bias, (product::Activation)s.how, at(s.to, first));
  }

  void norm(const Step& s, int64_t first, int64_t count) {
    const Number *weight = (const Number*)s.weight, *bias = (const Number*)s.bias;
    for (int64_t r = first; r < first + count; r++) {
      if (s.how)
        norms::rms_norm(at(s.from, r), at(s.other, r), weight, (float)s.number, s.columns, at(s.to, r), at(s.sum, r), row);
      else
        norms::layer_norm(at(s.from, r), at(s.other, r), weight, bias, (float)s.number, s.columns, at(s.to, r), at(s.sum, r), row);
    }
  }

  // Of the queries of rows [first, last).
  void attend_rows(const Step& s, int64_t first, int64_t last) {
    attend::Problem made = problem_of(p, s);
    for (int64_t b = first / p.length; b * p.length < last; b++) {
      const int64_t start = b * p.length, from = first > start ? first - start : 0;
      const int64_t to = last < start + p.length ? last - start : p.length;
      const Number* x = at(s.from, start);
      made.q = x + s.q_at;
      made.k = x + s.k_at;
      made.v = x + s.v_at;
      made.mask = (const uint8_t*)s.mask + b * s.mask_strides[0] * (s.mask_kind == 1 ? 1 : (int64_t)sizeof(Number));
      made.y = at(s.to, start);
      for (int64_t group = 0; group < s.kv_heads; group++) attend::some_rows<Number>(made, 0, group, from, to, attention);
    }
  }

  // Steps from `begin` on, to the next attention, on rows [first, last), some at a time; returns where it ends.
  int64_t rowwise(int64_t begin, int64_t first, int64_t last) {
    int64_t end = begin;
    while (end < p.count && p.steps[end].kind != ATTENTION) end++;
    const int64_t parts = (last - first + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int64_t part = 0; part < parts; part++) {
      short_first = first + (last - first) * part / parts;
      const int64_t count = first + (last - first) * (part + 1) / parts - short_first;
      for (int64_t i = begin; i < end; i++) {
        if (p.steps[i].kind == LINEAR)
          linear(p.steps[i], short_first, count);
        else
          norm(p.steps[i], short_first, count);
      }
    }
    return end;
  }

  template <typename Before>
  void run(int64_t first, int64_t last, Before before_attention) {
    for (int64_t i = rowwise(0, first, last); i < p.count; i = rowwise(i + 1, first, last)) {
      before_attention();
      attend_rows(p.steps[i], first, last);
    }
  }
};

template <typename Number>
void run(const Plan& p) {
  const Sizes sizes = sizes_of(p);
  Meeting meeting;
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t me = omp_get_thread_num(), count = omp_get_num_threads();
    Worker<Number> worker(p, sizes, me);
    if (p.is_by_sequence) {
      const int64_t all = p.rows / p.length, first = all * me / count, last = all * (me + 1) / count;
      const int64_t most = sizes.group / p.length, groups = (last - first + most - 1) / most;
      for (int64_t group = 0; group < groups; group++) {
        const int64_t from = first + (last - first) * group / groups, to = first + (last - first) * (group + 1) / groups;
        worker.kept_first = from * p.length;
        worker.run(from * p.length, to * p.length, [] {});
      }
    } else {
      int64_t turn = 0;
      worker.run(p.rows * me / count, p.rows * (me + 1) / count, [&] { meeting.wait(count, turn); });
    }
  }
}

}  // namespace

extern "C" {

// Bytes of scratch.
int64_t int8_rows_scratch(const Plan* p) {
  const Sizes sizes = sizes_of(*p);
  return p->threads * sizes.own() + sizes.kept * (p->is_by_sequence ? p->threads : 1) + 64;
}

void int8_rows(const Plan* given) {
  Plan p = *given;
  p.scratch = (uint8_t*)aligned((int64_t)p.scratch);
  if (p.is_bfloat16)
    run<uint16_t>(p);
  else
    run<float>(p);
}

}
