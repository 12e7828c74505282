#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#ifdef NCFAST_X86
#include <cpuid.h>
#endif

namespace ncfast::cpu {
namespace {

struct NamedIsa {
  Isa isa;
  const char* name;
};

#ifdef NCFAST_X86
// Of cpuid itself: clang knows the name only from 17 on. Once: a virtual machine stops at that instruction, for 10 µs.
bool has_f16c() {
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  }();
  return found;
}
#endif

std::vector<NamedIsa> available() {
  std::vector<NamedIsa> isas;
#ifdef NCFAST_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f")) isas.push_back({Isa::avx512, "avx512"});
  if (avx2) isas.push_back({Isa::avx2, "avx2"});
#endif
#ifdef NCFAST_NEON
  isas.push_back({Isa::neon, "neon"});
#endif
  isas.push_back({Isa::portable, "portable"});
  return isas;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const NamedIsa& isa : available()) names.emplace_back(isa.name);
  return names;
}

Isa chosen_isa() {
  const std::vector<NamedIsa> isas = available();
  const char* wanted = std::getenv("NCFAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.front().isa;
  std::string names;
  for (const NamedIsa& isa : isas) {
    if (std::string(wanted) == isa.name) return isa.isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("NCFAST_ISA=" + std::string(wanted) + " is not available; this machine has " + names);
}

}  // namespace ncfast::cpu
