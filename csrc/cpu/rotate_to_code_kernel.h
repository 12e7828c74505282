#include "half_kernel.h"

// sum over d of (a[d] + scale b[d])²
template <class T>
inline T square_sum(const T* a, T scale, const T* b, int64_t D) {  // a [D], b [D]
  using V = Vec<T>;
  constexpr int W = V::width;
  const V factor = V::broadcast(scale);
  V acc0 = V::broadcast(0), acc1 = acc0;
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    const V x0 = V::multiply_add(V::load(b + d), factor, V::load(a + d));
    const V x1 = V::multiply_add(V::load(b + d + W), factor, V::load(a + d + W));
    acc0 = V::multiply_add(x0, x0, acc0);
    acc1 = V::multiply_add(x1, x1, acc1);
  }
  for (; d + W <= D; d += W) {
    const V x = V::multiply_add(V::load(b + d), factor, V::load(a + d));
    acc0 = V::multiply_add(x, x, acc0);
  }
  T sum = acc0.sum() + acc1.sum();
  for (; d < D; ++d) {
    const T x = a[d] + scale * b[d];
    sum += x * x;
  }
  return sum;
}

template <class T>
T squared_error(const T* z, const T* q, int64_t D) {  // z [D], q [D]
  return square_sum(z, T(-1), q, D);
}

// |z|², |q|², g·z and g·q in one pass.
template <class T>
inline void products(const T* g, const T* z, const T* q, int64_t D, T* zz, T* qq, T* gz, T* gq) {
  using V = Vec<T>;
  constexpr int W = V::width;
  V acc_zz = V::broadcast(0), acc_qq = acc_zz, acc_gz = acc_zz, acc_gq = acc_zz;
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const V vg = V::load(g + d), vz = V::load(z + d), vq = V::load(q + d);
    acc_zz = V::multiply_add(vz, vz, acc_zz);
    acc_qq = V::multiply_add(vq, vq, acc_qq);
    acc_gz = V::multiply_add(vg, vz, acc_gz);
    acc_gq = V::multiply_add(vg, vq, acc_gq);
  }
  *zz = acc_zz.sum();
  *qq = acc_qq.sum();
  *gz = acc_gz.sum();
  *gq = acc_gq.sum();
  for (; d < D; ++d) {
    *zz += z[d] * z[d];
    *qq += q[d] * q[d];
    *gz += g[d] * z[d];
    *gq += g[d] * q[d];
  }
}

// With u = z/|z|, v = q/|q|, s = u + v and λ = |q|/|z|, all taken as constants, q is the rotation
//     q = λ (z - 2 (z·s) s/|s|² + 2 (z·u) v),   so   grad_z = λ (g - 2 (g·s) s/|s|² + 2 (g·v) u).
// Norms are kept above 1e-6 where they divide. A row shorter than that has no direction to rotate: its gradient goes
// straight through. `commitment` is grad_loss times 2 over the number of elements in the mean.
template <class T>
void gradient_row(const T* g, const T* z, const T* q, int64_t D, bool rotate, T commitment, T* grad_z) {
  using V = Vec<T>;
  constexpr int W = V::width;
  constexpr T least = T(1e-6);
  T of_g = 1, of_z = commitment, of_q = -commitment;
  if (rotate) {
    T zz, qq, gz, gq;
    products(g, z, q, D, &zz, &qq, &gz, &gq);
    const T norm_z = std::sqrt(zz), norm_q = std::sqrt(qq);
    if (norm_z >= least) {
      const T inverse_z = 1 / norm_z, inverse_q = 1 / (norm_q > least ? norm_q : least);
      // |s| = |z + q |z|/|q|| / |z|, summed as it stands: from z·q it would cancel where q points away from z.
      const T norm_s = std::sqrt(square_sum(z, norm_z * inverse_q, q, D)) * inverse_z;
      const T floor_s = norm_s > least ? norm_s : least;
      const T along_s = 2 * (gz * inverse_z + gq * inverse_q) / (floor_s * floor_s);
      of_g = norm_q * inverse_z;
      of_z += of_g * inverse_z * (2 * gq * inverse_q - along_s);
      of_q -= of_g * inverse_q * along_s;
    }
  }
  const V scale_g = V::broadcast(of_g), scale_z = V::broadcast(of_z), scale_q = V::broadcast(of_q);
  const V zero = V::broadcast(0);
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    V sum = V::multiply_add(scale_g, V::load(g + d), zero);
    sum = V::multiply_add(scale_z, V::load(z + d), sum);
    V::multiply_add(scale_q, V::load(q + d), sum).store(grad_z + d);
  }
  for (; d < D; ++d) grad_z[d] = of_g * g[d] + of_z * z[d] + of_q * q[d];
}

template <class T>
Kernel<T> kernel() {
  return {&squared_error<T>, &gradient_row<T>, &widen, &narrow};
}
