#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fmk {
namespace {

constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

struct CpuFeatures {
  bool avx2 = false;         // with fma and f16c, as the avx2 kernels are compiled
  bool avx512 = false;       // f, bw, dq and vl
  bool avx512_bf16 = false;  // vdpbf16ps
};

#if defined(__x86_64__)

constexpr bool bit(std::uint32_t word, int index) { return (word >> index) & 1u; }

// The register state that the operating system saves on a context switch. An AVX-512 instruction
// faults where this lacks the zmm bits, whatever cpuid says about the processor.
std::uint64_t enabled_state() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

CpuFeatures detect() {
  CpuFeatures features;
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return features;
  const bool osxsave = bit(ecx, 27), avx = bit(ecx, 28), fma = bit(ecx, 12), f16c = bit(ecx, 29);
  if (!osxsave || !avx) return features;
  const std::uint64_t state = enabled_state();
  const bool ymm = (state & 0x06) == 0x06;  // xmm and ymm
  const bool zmm = (state & 0xe6) == 0xe6;  // and opmask, upper halves of zmm0-15, zmm16-31
  if (!ymm || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  const std::uint32_t leaf7_subleaves = eax;
  features.avx2 = bit(ebx, 5) && fma && f16c;
  // f, dq, bw, vl
  features.avx512 =
      features.avx2 && zmm && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);
  if (features.avx512 && leaf7_subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    features.avx512_bf16 = bit(eax, 5);
  }
#if defined(FMK_EMULATE_BF16)  // simd/avx512.h
  features.avx512_bf16 = features.avx512;
#endif
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

Isa choose_isa() {
  const char* requested = std::getenv("FMKERNELS_ISA");
  if (requested != nullptr && *requested != '\0') return runnable_isa(requested);
  Isa best = Isa::kScalar;
  for (Isa isa : compiled_isas()) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "scalar";
  }
}

bool isa_compiled(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return FMK_HAVE_AVX512_BF16;
    case Isa::kAvx512: return FMK_HAVE_AVX512;
    case Isa::kAvx2: return FMK_HAVE_AVX2;
    default: return true;
  }
}

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return cpu_features().avx512_bf16;
    case Isa::kAvx512: return cpu_features().avx512;
    case Isa::kAvx2: return cpu_features().avx2;
    default: return true;
  }
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAllIsas) {
    if (isa_compiled(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa runnable_isa(const std::string& name) {
  for (Isa isa : kAllIsas) {
    if (name != isa_name(isa)) continue;
    if (!isa_compiled(isa)) {
      throw std::runtime_error("ISA '" + name + "' is not compiled into this build, which has: " +
                               names(compiled_isas()));
    }
    if (!isa_supported(isa)) {
      throw std::runtime_error("ISA '" + name +
                               "' cannot run on this processor or operating system");
    }
    return isa;
  }
  throw std::runtime_error("unknown ISA '" + name +
                           "' (FMKERNELS_ISA); this build has: " + names(compiled_isas()));
}

Isa active_isa() {
  // If choose_isa throws, the static stays uninitialised and the next call tries again.
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace fmk
