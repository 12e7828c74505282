// Half-precision elements to float and back, `count` of them; narrowing rounds to nearest even.

inline void widen(const void* from, DType dtype, float* to, int64_t count) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  if (dtype == DType::f16) {
    widen_f16(half, to, count);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = uint32_t(half[i]) << 16;
    std::memcpy(to + i, &bits, sizeof(float));
  }
}

inline void narrow(const float* from, DType dtype, void* to, int64_t count) {
  uint16_t* half = static_cast<uint16_t*>(to);
  if (dtype == DType::f16) {
    narrow_f16(from, half, count);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(float));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding could carry a NaN over into another value; bit 6 keeps it one.
    half[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
  }
}
