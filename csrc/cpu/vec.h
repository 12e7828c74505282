#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#ifdef NCFAST_X86
// GCC 12 warns about the undefined operands inside its own AVX-512 intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifdef NCFAST_NEON
#include <arm_neon.h>
#endif

// Between NCFAST_TARGET(...) and NCFAST_TARGET_END every function, template or not, is compiled for those instruction
// sets. Code there must not instantiate std:: templates: the linker could pick that copy for the whole program.
#ifdef NCFAST_X86
#if defined(__clang__)
#define NCFAST_PRAGMA(text) _Pragma(#text)
#define NCFAST_TARGET(isas) NCFAST_PRAGMA(clang attribute push(__attribute__((target(isas))), apply_to = function))
#define NCFAST_TARGET_END _Pragma("clang attribute pop")
#else
#define NCFAST_PRAGMA(text) _Pragma(#text)
#define NCFAST_TARGET(isas) _Pragma("GCC push_options") NCFAST_PRAGMA(GCC target(isas))
#define NCFAST_TARGET_END _Pragma("GCC pop_options")
#endif
#define NCFAST_TARGET_AVX2 NCFAST_TARGET("avx2,fma,f16c")
#define NCFAST_TARGET_AVX512 NCFAST_TARGET("avx512f,avx2,fma,f16c")
#endif

#if defined(__clang__)
#define NCFAST_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define NCFAST_UNROLL _Pragma("GCC unroll 16")
#else
#define NCFAST_UNROLL
#endif

#if defined(__GNUC__)
#define NCFAST_NOINLINE __attribute__((noinline))
#else
#define NCFAST_NOINLINE __declspec(noinline)
#endif

// Vec<T>: one register of T, the same interface in every namespace. tile_rows is how many rows, at two registers of
// accumulators each, leave room for the operands. max(a, b) is b where either is NaN. Of float only:
// power_of_two(n + 1.5 * 2^23), which is 2^n for the integers n of -126..127 and 0 for -127 (the sum keeps n in its low
// bits), and transpose(rows) of a square.
namespace ncfast::cpu {

inline int lowest_bit(uint32_t mask) {
#if defined(__GNUC__)
  return __builtin_ctz(mask);
#else
  int bit = 0;
  while (!(mask >> bit & 1)) ++bit;
  return bit;
#endif
}

namespace portable {

// 16-byte vectors where the compiler has them (SSE2, NEON), scalars elsewhere.
template <class T>
struct Vec {
#if defined(__GNUC__)
  typedef T Lanes __attribute__((vector_size(16)));
#else
  typedef T Lanes;
#endif
  static constexpr int width = sizeof(Lanes) / sizeof(T);
  static constexpr int tile_rows = 6;
  Lanes lanes;

  static Vec load(const T* from) {
    Vec to;
    std::memcpy(&to.lanes, from, sizeof(Lanes));
    return to;
  }
  static Vec broadcast(T value) { return {Lanes{} + value}; }
  void store(T* to) const { std::memcpy(to, &lanes, sizeof(Lanes)); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {a.lanes * b.lanes + c.lanes}; }
  static Vec add(Vec a, Vec b) { return {a.lanes + b.lanes}; }
  static Vec subtract(Vec a, Vec b) { return {a.lanes - b.lanes}; }
  static Vec multiply(Vec a, Vec b) { return {a.lanes * b.lanes}; }
  static bool any_at_least(Vec a, Vec b, T bound) {
    const auto hit = (a.lanes >= bound) | (b.lanes >= bound);
    uint64_t bits[2] = {0, 0};
    static_assert(sizeof(hit) <= sizeof(bits));
    std::memcpy(bits, &hit, sizeof(hit));
    return (bits[0] | bits[1]) != 0;
  }
  uint32_t lanes_at_least(T bound) const {
    T lane[width];
    store(lane);
    uint32_t mask = 0;
    for (int i = 0; i < width; ++i) mask |= uint32_t(lane[i] >= bound) << i;
    return mask;
  }
  static Vec max(Vec a, Vec b) {
    T lane_a[width], lane_b[width];
    a.store(lane_a);
    b.store(lane_b);
    for (int i = 0; i < width; ++i) lane_a[i] = lane_a[i] > lane_b[i] ? lane_a[i] : lane_b[i];
    return load(lane_a);
  }
  static Vec power_of_two(Vec shifted) {
    uint32_t bits[width];
    shifted.store(reinterpret_cast<T*>(bits));
    for (int i = 0; i < width; ++i) bits[i] = (bits[i] << 23) + 0x3f800000u;
    return load(reinterpret_cast<const T*>(bits));
  }
  static void transpose(Vec (&rows)[width]) {
    T lane[width][width], turned[width][width];
    for (int i = 0; i < width; ++i) rows[i].store(lane[i]);
    for (int i = 0; i < width; ++i) {
      for (int j = 0; j < width; ++j) turned[j][i] = lane[i][j];
    }
    for (int i = 0; i < width; ++i) rows[i] = load(turned[i]);
  }
  T largest() const {
    T lane[width];
    store(lane);
    T most = lane[0];
    for (int i = 1; i < width; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
  }
  T sum() const {
    T lane[width];
    store(lane);
    T total = 0;
    for (int i = 0; i < width; ++i) total += lane[i];
    return total;
  }
};

inline void widen_f16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    // Shifted into place, the exponent is 112 short; multiplying by 2^112 corrects it, subnormals included. What was
    // infinite or NaN is then 2^16 or more, and gets the exponent of those back.
    const uint32_t shifted = uint32_t(from[i] & 0x7fff) << 13;
    float magnitude;
    std::memcpy(&magnitude, &shifted, sizeof(float));
    magnitude *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof(float));
    if (magnitude >= 65536.0f) bits |= 0x7f800000u;
    bits |= uint32_t(from[i] & 0x8000) << 16;
    std::memcpy(to + i, &bits, sizeof(float));
  }
}

inline void narrow_f16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(float));
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity; above it lie the NaNs
      magnitude = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal below 2^-14: adding 1/2 leaves a multiple of 2^-24, rounded
      float value;
      std::memcpy(&value, &magnitude, sizeof(float));
      value += 0.5f;
      std::memcpy(&magnitude, &value, sizeof(float));
      magnitude -= 0x3f000000;
    } else {
      magnitude = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    to[i] = uint16_t(bits >> 16 & 0x8000) | uint16_t(magnitude);
  }
}

}  // namespace portable

#ifdef NCFAST_NEON
namespace neon {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int width = 4;
  static constexpr int tile_rows = 8;
  float32x4_t lanes;

  static Vec load(const float* from) { return {vld1q_f32(from)}; }
  static Vec broadcast(float value) { return {vdupq_n_f32(value)}; }
  void store(float* to) const { vst1q_f32(to, lanes); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.lanes, a.lanes, b.lanes)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f32(a.lanes, b.lanes)}; }
  static Vec subtract(Vec a, Vec b) { return {vsubq_f32(a.lanes, b.lanes)}; }
  static Vec multiply(Vec a, Vec b) { return {vmulq_f32(a.lanes, b.lanes)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.lanes, b.lanes), a.lanes, b.lanes)}; }
  static Vec power_of_two(Vec shifted) {
    const uint32x4_t bits = vshlq_n_u32(vreinterpretq_u32_f32(shifted.lanes), 23);
    return {vreinterpretq_f32_u32(vaddq_u32(bits, vdupq_n_u32(0x3f800000)))};
  }
  static void transpose(Vec (&rows)[width]) {
    // Pairs of rows, then pairs of pairs.
    for (int half = 0; half < 4; half += 2) {
      const float32x4_t even = vtrn1q_f32(rows[half].lanes, rows[half + 1].lanes);
      rows[half + 1].lanes = vtrn2q_f32(rows[half].lanes, rows[half + 1].lanes);
      rows[half].lanes = even;
    }
    for (int i = 0; i < 2; ++i) {
      const float64x2_t low = vreinterpretq_f64_f32(rows[i].lanes), high = vreinterpretq_f64_f32(rows[i + 2].lanes);
      rows[i].lanes = vreinterpretq_f32_f64(vtrn1q_f64(low, high));
      rows[i + 2].lanes = vreinterpretq_f32_f64(vtrn2q_f64(low, high));
    }
  }
  static bool any_at_least(Vec a, Vec b, float bound) { return vmaxnmvq_f32(vmaxnmq_f32(a.lanes, b.lanes)) >= bound; }
  uint32_t lanes_at_least(float bound) const {
    constexpr uint32_t kBits[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(lanes, vdupq_n_f32(bound)), vld1q_u32(kBits)));
  }
  float largest() const { return vmaxnmvq_f32(lanes); }
  float sum() const { return vaddvq_f32(lanes); }
};

template <>
struct Vec<double> {
  static constexpr int width = 2;
  static constexpr int tile_rows = 8;
  float64x2_t lanes;

  static Vec load(const double* from) { return {vld1q_f64(from)}; }
  static Vec broadcast(double value) { return {vdupq_n_f64(value)}; }
  void store(double* to) const { vst1q_f64(to, lanes); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {vfmaq_f64(c.lanes, a.lanes, b.lanes)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f64(vcgtq_f64(a.lanes, b.lanes), a.lanes, b.lanes)}; }
  static bool any_at_least(Vec a, Vec b, double bound) { return vmaxnmvq_f64(vmaxnmq_f64(a.lanes, b.lanes)) >= bound; }
  uint32_t lanes_at_least(double bound) const {
    const uint64x2_t hits = vshrq_n_u64(vcgeq_f64(lanes, vdupq_n_f64(bound)), 63);
    return uint32_t(vgetq_lane_u64(hits, 0) | vgetq_lane_u64(hits, 1) << 1);
  }
  double largest() const { return vmaxnmvq_f64(lanes); }
  double sum() const { return vaddvq_f64(lanes); }
};

inline void widen_f16(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
  portable::widen_f16(from + i, to + i, count - i);
}

inline void narrow_f16(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
  portable::narrow_f16(from + i, to + i, count - i);
}

}  // namespace neon
#endif

#ifdef NCFAST_X86

NCFAST_TARGET_AVX2
namespace avx2 {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int width = 8;
  static constexpr int tile_rows = 6;
  __m256 lanes;

  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* to) const { _mm256_storeu_ps(to, lanes); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
  static Vec subtract(Vec a, Vec b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
  static Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lanes, b.lanes)}; }
  static Vec power_of_two(Vec shifted) {
    const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted.lanes), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000)))};
  }
  static void transpose(Vec (&rows)[width]) {
    // Pairs of rows, then pairs of pairs, then halves.
    __m256 pairs[8], fours[8];
    NCFAST_UNROLL
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i].lanes, rows[i + 1].lanes);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i].lanes, rows[i + 1].lanes);
    }
    NCFAST_UNROLL
    for (int i = 0; i < 8; i += 4) {
      NCFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const __m256d low = _mm256_castps_pd(pairs[i + half]), high = _mm256_castps_pd(pairs[i + half + 2]);
        fours[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
        fours[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
      }
    }
    NCFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      rows[i].lanes = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      rows[i + 4].lanes = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  static bool any_at_least(Vec a, Vec b, float bound) { return max(a, b).lanes_at_least(bound) != 0; }
  uint32_t lanes_at_least(float bound) const {
    return _mm256_movemask_ps(_mm256_cmp_ps(lanes, _mm256_set1_ps(bound), _CMP_GE_OQ));
  }
  float largest() const {
    const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
  }
  float sum() const {
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }
};

template <>
struct Vec<double> {
  static constexpr int width = 4;
  static constexpr int tile_rows = 6;
  __m256d lanes;

  static Vec load(const double* from) { return {_mm256_loadu_pd(from)}; }
  static Vec broadcast(double value) { return {_mm256_set1_pd(value)}; }
  void store(double* to) const { _mm256_storeu_pd(to, lanes); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.lanes, b.lanes, c.lanes)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.lanes, b.lanes)}; }
  static bool any_at_least(Vec a, Vec b, double bound) { return max(a, b).lanes_at_least(bound) != 0; }
  uint32_t lanes_at_least(double bound) const {
    return _mm256_movemask_pd(_mm256_cmp_pd(lanes, _mm256_set1_pd(bound), _CMP_GE_OQ));
  }
  double largest() const {
    const __m128d m2 = _mm_max_pd(_mm256_castpd256_pd128(lanes), _mm256_extractf128_pd(lanes, 1));
    return _mm_cvtsd_f64(_mm_max_sd(m2, _mm_unpackhi_pd(m2, m2)));
  }
  double sum() const {
    const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(lanes), _mm256_extractf128_pd(lanes, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
  }
};

inline void widen_f16(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) to[i] = _cvtsh_ss(from[i]);
}

inline void narrow_f16(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  for (; i < count; ++i) to[i] = uint16_t(_cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace avx2
NCFAST_TARGET_END

NCFAST_TARGET_AVX512
namespace avx512 {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int width = 16;
  static constexpr int tile_rows = 14;
  __m512 lanes;

  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* to) const { _mm512_storeu_ps(to, lanes); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
  static Vec subtract(Vec a, Vec b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
  static Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
  static Vec power_of_two(Vec shifted) {
    const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(shifted.lanes), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3f800000)))};
  }
  static void transpose(Vec (&rows)[width]) {
    // Pairs of rows, then pairs of pairs: fours[i + j] holds column j of each quarter of four rows. Then the quarters.
    __m512 pairs[16], fours[16];
    NCFAST_UNROLL
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i].lanes, rows[i + 1].lanes);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i].lanes, rows[i + 1].lanes);
    }
    NCFAST_UNROLL
    for (int i = 0; i < 16; i += 4) {
      NCFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const __m512d low = _mm512_castps_pd(pairs[i + half]), high = _mm512_castps_pd(pairs[i + half + 2]);
        fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    NCFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512 low_even = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0x88);
      const __m512 low_odd = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0xdd);
      const __m512 high_even = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0x88);
      const __m512 high_odd = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0xdd);
      rows[j].lanes = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
      rows[j + 4].lanes = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
      rows[j + 8].lanes = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
      rows[j + 12].lanes = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
  }
  static bool any_at_least(Vec a, Vec b, float bound) {
    const __m512 limit = _mm512_set1_ps(bound);
    const __mmask16 hit_a = _mm512_cmp_ps_mask(a.lanes, limit, _CMP_GE_OQ);
    const __mmask16 hit_b = _mm512_cmp_ps_mask(b.lanes, limit, _CMP_GE_OQ);
    return !_mm512_kortestz(hit_a, hit_b);
  }
  uint32_t lanes_at_least(float bound) const { return _mm512_cmp_ps_mask(lanes, _mm512_set1_ps(bound), _CMP_GE_OQ); }
  float largest() const { return _mm512_reduce_max_ps(lanes); }
  float sum() const { return _mm512_reduce_add_ps(lanes); }
};

template <>
struct Vec<double> {
  static constexpr int width = 8;
  static constexpr int tile_rows = 14;
  __m512d lanes;

  static Vec load(const double* from) { return {_mm512_loadu_pd(from)}; }
  static Vec broadcast(double value) { return {_mm512_set1_pd(value)}; }
  void store(double* to) const { _mm512_storeu_pd(to, lanes); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.lanes, b.lanes, c.lanes)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.lanes, b.lanes)}; }
  static bool any_at_least(Vec a, Vec b, double bound) {
    const __m512d limit = _mm512_set1_pd(bound);
    const __mmask8 hit_a = _mm512_cmp_pd_mask(a.lanes, limit, _CMP_GE_OQ);
    const __mmask8 hit_b = _mm512_cmp_pd_mask(b.lanes, limit, _CMP_GE_OQ);
    return !_mm512_kortestz(hit_a, hit_b);
  }
  uint32_t lanes_at_least(double bound) const { return _mm512_cmp_pd_mask(lanes, _mm512_set1_pd(bound), _CMP_GE_OQ); }
  double largest() const { return _mm512_reduce_max_pd(lanes); }
  double sum() const { return _mm512_reduce_add_pd(lanes); }
};

inline void widen_f16(const uint16_t* from, float* to, int64_t count) { avx2::widen_f16(from, to, count); }
inline void narrow_f16(const float* from, uint16_t* to, int64_t count) { avx2::narrow_f16(from, to, count); }

}  // namespace avx512
NCFAST_TARGET_END

#endif

}  // namespace ncfast::cpu
