#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NCFAST_HOST_DEVICE __host__ __device__
#else
#define NCFAST_HOST_DEVICE
#endif

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), one source for CPU and GPU. The
// addresses and the streams are those of ncfast/ops/philox.py.
namespace ncfast::philox {

enum class Stream : uint32_t { tokens = 0, confidence = 1, labels = 2 };

struct Words {
  uint32_t word[4];
};

NCFAST_HOST_DEVICE inline Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53) * counter.word[0];
    const uint64_t product1 = uint64_t(0xCD9E8D57) * counter.word[2];
    counter = {{uint32_t(product1 >> 32) ^ counter.word[1] ^ key0, uint32_t(product1),
                uint32_t(product0 >> 32) ^ counter.word[3] ^ key1, uint32_t(product0)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// Uniform in (0, 1), never 0 or 1; step and position are below 2^16.
NCFAST_HOST_DEVICE inline double uniform(uint64_t seed, uint64_t sample, uint32_t step, uint32_t position,
                                         Stream stream) {
  const Words counter = {{uint32_t(sample), uint32_t(sample >> 32), step << 16 | position, uint32_t(stream) << 24}};
  return (philox4x32(counter, uint32_t(seed), uint32_t(seed >> 32)).word[0] + 0.5) * 0x1p-32;
}

}  // namespace ncfast::philox
