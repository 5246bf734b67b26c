// Chooses the instruction set once: the best this machine has, or what COUP_FAST_CPU says. A kernel
// lives in cpu/per_isa, which the build compiles once per instruction set in a namespace of its
// name:
//
//   COUP_FAST_KERNEL(void frobnicate(const Frob& params, int64_t begin, int64_t end))   declares
//   COUP_FAST_PICK(frobnicate)(params, begin, end)                                     chooses
#pragma once

namespace coup_fast {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Throws if COUP_FAST_CPU asks for what does not exist or what this machine lacks.
Isa isa();
const char* name_of(Isa isa);

template <class Function>
Function* pick(Function* baseline, [[maybe_unused]] Function* avx2,
               [[maybe_unused]] Function* avx512) {
  switch (isa()) {
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace coup_fast

#if defined(COUP_FAST_X86)
#define COUP_FAST_KERNEL(...) \
  namespace baseline {        \
  __VA_ARGS__;                \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__;                \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__;                \
  }
#define COUP_FAST_PICK(function) \
  ::coup_fast::pick(&baseline::function, &avx2::function, &avx512::function)
#else
#define COUP_FAST_KERNEL(...) \
  namespace baseline {        \
  __VA_ARGS__;                \
  }
#define COUP_FAST_PICK(function) (&baseline::function)
#endif
