// Compiles the file named by NCFAST_KERNEL once for every instruction set, each copy in its own namespace, where Vec is
// the register of that set. The file holds templates and functions only; what it needs is included and declared before.
#include "vec.h"

namespace ncfast::cpu::portable {
#include NCFAST_KERNEL
}

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
