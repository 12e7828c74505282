// Runs `rounds` rounds of independent multiply-adds that stay in registers; returns how many floating-point operations
// that was. `sink` keeps the compiler from dropping them.
inline double multiply_adds(int64_t rounds, float* sink) {
  using V = Vec<float>;
  // Latency times throughput, and few enough for the registers: NEON may start four at a time, which take four cycles.
  constexpr int kChains = V::tile_rows > 6 ? 16 : 12;
  const V x = V::broadcast(0.999f), y = V::broadcast(1e-3f);
  V acc[kChains];
  NCFAST_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = V::broadcast(float(i));
  for (int64_t round = 0; round < rounds; ++round) {
    NCFAST_UNROLL
    for (int i = 0; i < kChains; ++i) acc[i] = V::multiply_add(acc[i], x, y);
  }
  for (int i = 0; i < kChains; ++i) *sink += acc[i].sum();
  return 2.0 * kChains * V::width * double(rounds);
}
