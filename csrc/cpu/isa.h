#pragma once

#include <string>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#define NCFAST_X86 1
#elif defined(__GNUC__) && defined(__aarch64__)
#define NCFAST_NEON 1  // part of every such processor
#endif

namespace ncfast::cpu {

enum class Isa { portable, neon, avx2, avx512 };

// The names of the instruction sets this machine can run, fastest first.
std::vector<std::string> available_isas();

// The first of them, or the one that the environment variable NCFAST_ISA names. Throws std::invalid_argument when that
// one is not available.
Isa chosen_isa();

}  // namespace ncfast::cpu
