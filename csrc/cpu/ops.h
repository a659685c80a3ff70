// The CPU kernels' interface.
#pragma once

#include "../arguments.h"

namespace vtp::cpu {

void inflection(const Inflection&);
void compact_rows(const CompactRows&);
void compact_rows_in_place(const CompactRows&);

// Kernels compiled once per instruction set; the plain name calls the widest one this CPU has.
#define VTP_PER_ISA(name, Arguments) \
  namespace generic {                \
  void name(const Arguments&);       \
  }                                  \
  namespace avx2 {                   \
  void name(const Arguments&);       \
  }                                  \
  namespace avx512 {                 \
  void name(const Arguments&);       \
  }                                  \
  void name(const Arguments&);

VTP_PER_ISA(attention_scores, AttentionScores)
VTP_PER_ISA(select_topk, SelectTopk)
VTP_PER_ISA(select_diverse, SelectDiverse)
VTP_PER_ISA(token_contribution, TokenContribution)
VTP_PER_ISA(cosine_similarity, CosineSimilarity)
VTP_PER_ISA(passive_attention, PassiveAttention)
VTP_PER_ISA(assign_rows, AssignRows)
VTP_PER_ISA(merge_rows, MergeRows)

#undef VTP_PER_ISA

const char* isa_name();  // "generic" | "avx2" | "avx512"

}  // namespace vtp::cpu
