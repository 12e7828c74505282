// Compiles the file named by NCFAST_KERNEL once for every instruction set, each copy in its own namespace, where Vec is
// the register of that set. The file holds templates and functions only; what it needs is included and declared before.
#include "vec.h"

namespace ncfast::cpu::portable {
#include NCFAST_KERNEL
}

#ifdef NCFAST_NEON
namespace ncfast::cpu::neon {
#include NCFAST_KERNEL
}
#endif

#ifdef NCFAST_X86

NCFAST_TARGET_AVX2
namespace ncfast::cpu::avx2 {
#include NCFAST_KERNEL
}
NCFAST_TARGET_END

NCFAST_TARGET_AVX512
namespace ncfast::cpu::avx512 {
#include NCFAST_KERNEL
}
NCFAST_TARGET_END

#endif

// What `call`, such as kernel(), gives in the namespace of an instruction set.
#ifdef NCFAST_X86
#define NCFAST_FOR_ISA(isa, call) \
  ((isa) == Isa::avx512 ? avx512::call : (isa) == Isa::avx2 ? avx2::call : portable::call)
#elif defined(NCFAST_NEON)
#define NCFAST_FOR_ISA(isa, call) ((isa) == Isa::neon ? neon::call : portable::call)
#else
#define NCFAST_FOR_ISA(isa, call) ((void)(isa), portable::call)
#endif
