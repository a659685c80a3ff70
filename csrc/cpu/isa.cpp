// Chooses, once per process, which build of the vectorised kernels runs. The environment variable
// VTP_CPU_ISA asks for a narrower one than the CPU has, which is how one machine tests them all.
// With the macro VTP_ISA defined that one build is all there is.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

#if !defined(__x86_64__) && !defined(VTP_ISA)
#define VTP_ISA generic
#endif

namespace vtp::cpu {

#ifdef VTP_ISA

#define VTP_QUOTE(x) #x
#define VTP_NAME(x) VTP_QUOTE(x)
const char* isa_name() { return VTP_NAME(VTP_ISA); }

#define VTP_DISPATCH(name, Arguments) \
  void name(const Arguments& arguments) { VTP_ISA::name(arguments); }

#else

namespace {

enum class Isa { generic, avx2, avx512 };
constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Isa widest() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return !avx2 ? Isa::generic : avx512 ? Isa::avx512 : Isa::avx2;
}

Isa choose() {
  const Isa best = widest();
  const char* wanted = std::getenv("VTP_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Isa>(i);
  }
  throw std::runtime_error(std::string("VTP_CPU_ISA=") + wanted + ", this CPU has: generic" +
                           (best >= Isa::avx2 ? ", avx2" : "") +
                           (best == Isa::avx512 ? ", avx512" : ""));
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

#define VTP_DISPATCH(name, Arguments)     \
  void name(const Arguments& arguments) { \
    switch (isa()) {                      \
      case Isa::avx512:                   \
        return avx512::name(arguments);   \
      case Isa::avx2:                     \
        return avx2::name(arguments);     \
      case Isa::generic:                  \
        return generic::name(arguments);  \
    }                                     \
  }

#endif

VTP_DISPATCH(attention_scores, AttentionScores)
VTP_DISPATCH(select_topk, SelectTopk)
VTP_DISPATCH(select_diverse, SelectDiverse)
VTP_DISPATCH(token_contribution, TokenContribution)
VTP_DISPATCH(cosine_similarity, CosineSimilarity)
VTP_DISPATCH(passive_attention, PassiveAttention)
VTP_DISPATCH(assign_rows, AssignRows)
VTP_DISPATCH(merge_rows, MergeRows)

}  // namespace vtp::cpu
