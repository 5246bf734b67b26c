// The choice of instruction set, and cpu_capability(), which tells it. See dispatch.h.
#include "cpu/dispatch.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace coup_fast {
namespace {

bool supported(Isa isa) {
#if defined(COUP_FAST_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa choose() {
  const Isa all[] = {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};
  const char* wanted = std::getenv("COUP_FAST_CPU");
  for (const Isa isa : all) {
    if (wanted == nullptr || *wanted == '\0') {
      if (supported(isa)) return isa;
    } else if (std::strcmp(wanted, name_of(isa)) == 0) {
      STD_TORCH_CHECK(supported(isa), "COUP_FAST_CPU=", wanted,
                      ": this machine lacks that instruction set; unset the variable");
      return isa;
    }
  }
  STD_TORCH_CHECK(false, "COUP_FAST_CPU must be baseline, avx2 or avx512, got ", wanted);
}

std::string cpu_capability() { return name_of(isa()); }

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace coup_fast

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&coup_fast::cpu_capability));
}
