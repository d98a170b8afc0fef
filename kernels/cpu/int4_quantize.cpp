// Rounds groups of numbers to 16, 8 or 4 levels, each with the best of some scales: fxc/schemes/int4.py says what is computed,
// in the same order and to the same bits.
#include "vectors.h"
#include <cmath>

constexpr int MOST = 128;    // numbers in a group
constexpr int STRIDE = 16;   // so many sums of squares are kept apart
constexpr float ZERO_GROUP = 1e-30f;

// x to the nearest bfloat16, of two the even one.
INLINE float as_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

// A product with 1 / s is this near to a quotient by s that is below 500: between, both are rounded to the same whole number.
constexpr float NEARLY_HALF = 0.4999f;

// Levels q of v, and the sum of squared errors.
INLINE float levels_of(const float* v, int64_t group, float scale, float zero, float top, uint8_t* q) {
  constexpr int PARTS = STRIDE / LANES;
  // Of larger scales it has too few bits, and of no number all is divided.
  const float inverse_scale = scale < 1e37f && scale > -1e37f ? 1.0f / scale : NAN;
  const Floats s = all(scale), inverse = all(inverse_scale), z = all(zero), least = all(0.0f), most = all(top);
  Floats sums[PARTS];
  for (int p = 0; p < PARTS; p++) sums[p] = all(0.0f);
  for (int64_t i = 0; i < group; i += STRIDE) {
    for (int p = 0; p < PARTS; p++) {
      const Floats x = load_floats(v + i + p * LANES);
      const Floats product = multiply(x, inverse);
      Floats nearest = whole(product);
      if (any_from(magnitude(subtract(product, nearest)), NEARLY_HALF)) nearest = whole(divide(x, s));
      const Floats level = smaller(larger(add(nearest, z), least), most);
      store_bytes(q + i + p * LANES, rounded(level));
      const Floats off = subtract(multiply(subtract(level, z), s), x);
      sums[p] = add(sums[p], multiply(off, off));
    }
  }
  float apart[STRIDE];
  for (int p = 0; p < PARTS; p++) store_floats(apart + p * LANES, sums[p]);
  for (int half = STRIDE / 2; half; half /= 2)
    for (int i = 0; i < half; i++) apart[i] += apart[i + half];
  return apart[0];
}

// weight: groups * group numbers; levels: a byte for each, or of 4 bits half a byte, the low half first; scales, zeros: one for
// each group. Returns 0 where a number is none.
extern "C" int int4_quantize(
    const void* weight, int is_bfloat16, int64_t groups, int64_t group, int bits, int symmetric, int full_range,
    int keeps_bfloat16, int tries, const float* shares, uint8_t* levels, float* scales, uint8_t* zeros, int threads) {
  const float top = float((1 << bits) - 1), middle = float(1 << (bits - 1));
  int are_finite = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : are_finite)
  for (int64_t g = 0; g < groups; g++) {
    alignas(64) float v[MOST];
    alignas(64) uint8_t made[2][MOST];
    Floats above, below;
    bool finite = true;
    for (int64_t i = 0; i < group; i += LANES) {
      const Floats x = is_bfloat16 ? from_bfloat16((const uint16_t*)weight + g * group + i)
                                   : load_floats((const float*)weight + g * group + i);
      store_floats(v + i, x);
      finite &= !any_from(magnitude(x), INFINITY);
      above = i ? larger(above, x) : x;
      below = i ? smaller(below, x) : x;
    }
    if (!finite) { are_finite = 0; continue; }
    const float highest = largest_of(above), lowest = -largest_of(subtract(all(0.0f), below));
    const float size = highest > -lowest ? highest : -lowest;
    int64_t first = 0;
    while (!any_from(magnitude(load_floats(v + first)), size)) first += LANES;
    while (v[first] != size && v[first] != -size) first++;
    const float largest = v[first];
    const float lo = lowest < 0 ? lowest : 0.0f;
    const float span = symmetric ? size : (highest > 0 ? highest : 0.0f) - lo;
    float best_scale = 0, best_zero = 0, least = 0;
    int best = 0;
    for (int step = 0; step < tries; step++) {
      const float share = shares[step];
      float scale = symmetric ? share * (full_range ? largest / -middle : span / (top - middle)) : share * span / top;
      scale = span <= ZERO_GROUP ? 1.0f : scale;
      scale = keeps_bfloat16 ? as_bfloat16(scale) : scale;
      float zero = middle;
      if (!symmetric) {
        zero = __builtin_rintf(-share * lo / scale);
        zero = zero < 0 ? 0 : zero > top ? top : zero;
      }
      const float error = levels_of(v, group, scale, zero, top, made[1 - best]);
      if (step == 0 || error < least) { best = 1 - best; least = error; best_scale = scale; best_zero = zero; }
    }
    scales[g] = best_scale;
    zeros[g] = uint8_t(best_zero);
    if (bits == 4) {
      uint8_t* out = levels + g * group / 2;
      for (int64_t i = 0; i < group / 2; i++) out[i] = uint8_t(made[best][2 * i] | made[best][2 * i + 1] << 4);
    } else {
      memcpy(levels + g * group, made[best], group);
    }
  }
  return are_finite;
}
