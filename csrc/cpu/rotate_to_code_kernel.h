#include "half_kernel.h"

template <class T>
T squared_error(const T* z, const T* q, int64_t D) {  // z [D], q [D]
  using V = Vec<T>;
  constexpr int W = V::width;
  const V minus = V::broadcast(-1);
  V acc0 = V::broadcast(0), acc1 = acc0;
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    const V x0 = V::multiply_add(V::load(q + d), minus, V::load(z + d));
    const V x1 = V::multiply_add(V::load(q + d + W), minus, V::load(z + d + W));
    acc0 = V::multiply_add(x0, x0, acc0);
    acc1 = V::multiply_add(x1, x1, acc1);
  }
  for (; d + W <= D; d += W) {
    const V x = V::multiply_add(V::load(q + d), minus, V::load(z + d));
    acc0 = V::multiply_add(x, x, acc0);
  }
  T sum = acc0.sum() + acc1.sum();
  for (; d < D; ++d) sum += (z[d] - q[d]) * (z[d] - q[d]);
  return sum;
}

// |z|², |q|² and g·q in one pass.
template <class T>
inline void products(const T* g, const T* z, const T* q, int64_t D, T* zz, T* qq, T* gq) {
  using V = Vec<T>;
  constexpr int W = V::width;
  V acc_zz = V::broadcast(0), acc_qq = acc_zz, acc_gq = acc_zz;
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const V vz = V::load(z + d), vq = V::load(q + d);
    acc_zz = V::multiply_add(vz, vz, acc_zz);
    acc_qq = V::multiply_add(vq, vq, acc_qq);
    acc_gq = V::multiply_add(V::load(g + d), vq, acc_gq);
  }
  *zz = acc_zz.sum();
  *qq = acc_qq.sum();
  *gq = acc_gq.sum();
  for (; d < D; ++d) {
    *zz += z[d] * z[d];
    *qq += q[d] * q[d];
    *gq += g[d] * q[d];
  }
}

// |s|² and g·s of s = z + scale q, which is summed as it stands: from products it would cancel where q points away
// from z.
template <class T>
inline void bisector_products(const T* g, const T* z, const T* q, T scale, int64_t D, T* ss, T* gs) {
  using V = Vec<T>;
  constexpr int W = V::width;
  const V factor = V::broadcast(scale);
  V acc_ss = V::broadcast(0), acc_gs = acc_ss;
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const V s = V::multiply_add(V::load(q + d), factor, V::load(z + d));
    acc_ss = V::multiply_add(s, s, acc_ss);
    acc_gs = V::multiply_add(V::load(g + d), s, acc_gs);
  }
  *ss = acc_ss.sum();
  *gs = acc_gs.sum();
  for (; d < D; ++d) {
    const T s = z[d] + scale * q[d];
    *ss += s * s;
    *gs += g[d] * s;
  }
}

// With u = z/|z|, v = q/|q|, the bisector s = |z| (u + v) and λ = |q|/|z|, all taken as constants, q is the rotation
//     q = λ (z - 2 (z·s) s/|s|² + 2 (z·u) v),   so   grad_z = λ (g - 2 (g·s) s/|s|² + 2 (g·v) u).
// |z|, |q| and |s|/|z| are kept above 1e-6 where they divide. A row shorter than that has no direction to rotate: its
// gradient goes straight through. `commitment` is grad_loss times 2 over the number of elements in the mean.
template <class T>
void gradient_row(const T* g, const T* z, const T* q, int64_t D, bool rotate, T commitment, T* grad_z) {
  using V = Vec<T>;
  constexpr int W = V::width;
  constexpr T least = T(1e-6);
  T of_g = 1, of_z = commitment, of_s = 0, scale = 0;
  if (rotate) {
    T zz, qq, gq, ss, gs;
    products(g, z, q, D, &zz, &qq, &gq);
    const T norm_z = std::sqrt(zz), norm_q = std::sqrt(qq);
    if (norm_z >= least) {
      const T inverse_z = 1 / norm_z, inverse_q = 1 / (norm_q > least ? norm_q : least);
      scale = norm_z * inverse_q;
      bisector_products(g, z, q, scale, D, &ss, &gs);
      const T floor_s = least * least * zz;
      of_g = norm_q * inverse_z;
      of_z += 2 * of_g * gq * inverse_q * inverse_z;
      of_s = -2 * of_g * gs / (ss > floor_s ? ss : floor_s);
    }
  }
  const V scale_g = V::broadcast(of_g), scale_z = V::broadcast(of_z), scale_s = V::broadcast(of_s);
  const V factor = V::broadcast(scale), scale_q = V::broadcast(-commitment), zero = V::broadcast(0);
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const V vz = V::load(z + d), vq = V::load(q + d);
    V sum = V::multiply_add(scale_g, V::load(g + d), zero);
    sum = V::multiply_add(scale_z, vz, sum);
    sum = V::multiply_add(scale_q, vq, sum);
    V::multiply_add(scale_s, V::multiply_add(vq, factor, vz), sum).store(grad_z + d);
  }
  for (; d < D; ++d) grad_z[d] = of_g * g[d] + of_z * z[d] - commitment * q[d] + of_s * (z[d] + scale * q[d]);
}

template <class T>
Kernel<T> kernel() {
  return {&squared_error<T>, &gradient_row<T>, &widen, &narrow};
}
